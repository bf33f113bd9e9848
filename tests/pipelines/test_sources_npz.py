import io
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from video_worlds import FPS, SIDE, SPECS, assert_aligned, played, read_here
from worldloom.common import ConfigError, Episodes, FormatError
from worldloom.pipelines.ingest import IngestConfig
from worldloom.pipelines.ingest_config import ActionFileConfig, NpzConfig
from worldloom.pipelines.ingest_worker import IngestReport
from worldloom.pipelines.sources import open_source
from worldloom.pipelines.sources.arrays import open_frames

KINDS = list(SPECS)


def settings(path: Path, /, **changes: Any) -> IngestConfig:
    plain = {
        "kind": "npz", "output": path.parent / "episodes", "height": SIDE, "width": SIDE,
        "fps": float(FPS),
    }  # fmt: skip
    return IngestConfig(path=path, **{**plain, **changes})


def flags(kind: str, **more: Any) -> ActionFileConfig:
    given: dict[str, Any] = {}
    if kind not in ("none", "keys"):
        given["kind"] = kind
    if kind == "discrete":
        given["names"] = SPECS[kind].names
    if kind == "multi_discrete":
        given["sizes"] = (3, 5)
    if kind == "continuous":
        given |= {"low": (-1.0, -2.0), "high": (1.0, 2.0)}
    return ActionFileConfig(**given, **more)


def save(path: Path, /, *, deflated: bool = False, **arrays: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (np.savez_compressed if deflated else np.savez)(path, **arrays)
    return path


@pytest.mark.parametrize("frame_skip", [1, 3])
@pytest.mark.parametrize("alignment", ["next", "previous"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_action_stands_between_the_frames_that_it_joins(
    tmp_path, kind, alignment, frame_skip
):
    world = played(kind, 150)
    raw = world.raw.astype(bool) if kind == "keys" else world.raw
    if frame_skip == 1 and len(raw):  # once with a row a frame, once without the odd one
        raw = np.concatenate([raw, raw[:1]] if alignment == "next" else [raw[:1], raw])
    arrays = {} if kind == "none" else {"actions": raw}
    save(tmp_path / "v/a.npz", frames=world.frames_THWC, deflated=frame_skip == 3, **arrays)
    config = settings(
        tmp_path / "v", frame_skip=frame_skip, actions=flags(kind, alignment=alignment)
    )
    _, (report,) = read_here(config)
    assert isinstance(report, IngestReport), report
    with Episodes(config.output).open("a") as episode:
        assert_aligned(episode, world, frame_skip=frame_skip)


def test_rewards_are_kept_and_add_up_under_a_frame_skip(tmp_path):
    world = played("discrete", 10)
    rewards = np.arange(10, dtype=np.float64)
    save(tmp_path / "v/a.npz", frames=world.frames_THWC, actions=world.raw, rewards=rewards)
    config = settings(tmp_path / "v", frame_skip=4, actions=flags("discrete"))
    read_here(config)
    with Episodes(config.output).open("a") as episode:
        assert episode.num_frames == 3
        assert episode.rewards.tolist() == [0 + 1 + 2 + 3, 4 + 5 + 6 + 7]


def test_arrays_of_other_names_are_read_and_npy_files_are_frames_without_actions(tmp_path):
    world = played("none", 5)
    save(tmp_path / "v/a.npz", obs=world.frames_THWC, note=np.arange(3))
    np.save(tmp_path / "v/b.npy", world.frames_THWC)
    config = settings(tmp_path / "v", npz=NpzConfig(frames="obs"))
    source, answers = read_here(config)
    assert source.actions.kind == "none"
    assert all(isinstance(answer, IngestReport) for answer in answers)
    for key in ("a", "b"):
        with Episodes(config.output).open(key) as episode:
            assert_aligned(episode, world)


def test_episodes_written_into_the_source_are_none_of_its_arrays(tmp_path):
    save(tmp_path / "v/a.npz", frames=played("none", 3).frames_THWC)
    config = settings(tmp_path / "v", output=tmp_path / "v/episodes")
    for _ in range(2):
        source, answers = read_here(config)
        assert [recording.origin for recording in source.recordings] == ["a.npz"]
        assert isinstance(answers[0], IngestReport)


def test_arrays_without_frames_per_second_are_refused(tmp_path):
    save(tmp_path / "v/a.npz", frames=played("none", 2).frames_THWC)
    with pytest.raises(ConfigError, match="give --fps"):
        open_source("npz", tmp_path / "v", settings(tmp_path / "v", fps=None))


class Canary:
    def __reduce__(self) -> Any:
        return (print, ("the canary sang",))


def header(descr: str, shape: str) -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"
    padded = text.ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded.encode()


def zipped(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return buffer.getvalue()


def npy(array: Any, **more: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **more)
    return buffer.getvalue()


FRAMES = npy(played("none", 4).frames_THWC)
BAD = {
    "rubbish": (b"rubbish", "not an npz"),
    "empty": (b"", "not an npz"),
    "no such array": (zipped(actions=npy(np.arange(3))), "frames: stands there 0 times"),
    "a bomb": (zipped(frames=header("|u1", "(10000000000, 64, 64, 3)")), "the header asks for"),
    "floats": (zipped(frames=npy(np.zeros((4, 64, 64, 3), np.float32))), "float32 .* must be"),
    "grey frames": (zipped(frames=npy(np.zeros((4, 64, 64), np.uint8))), "must be uint8"),
    "channels first": (zipped(frames=npy(np.zeros((4, 3, 64, 64), np.uint8))), "must be uint8"),
    "no frames": (zipped(frames=npy(np.zeros((0, 64, 64, 3), np.uint8))), "must be uint8"),
    "objects": (
        zipped(frames=npy(np.array([Canary()], object), allow_pickle=True)),
        "only plain numbers",
    ),
    "objects as actions": (
        zipped(frames=FRAMES, actions=npy(np.array([Canary()] * 3, object), allow_pickle=True)),
        "only plain numbers",
    ),
    "a wide header": (zipped(frames=header("|u1", "(4,)" + " " * 60_000)), "not an npy array"),
    "five actions": (zipped(frames=FRAMES, actions=npy(np.zeros(5, int))), "5 rows for 4 frames"),
    "an action of 9": (zipped(frames=FRAMES, actions=npy(np.full(3, 9))), "has 9 in slot 0"),
    "real actions": (zipped(frames=FRAMES, actions=npy(np.full(3, 0.5))), "row 0 has 0.5"),
    "endless": (zipped(frames=FRAMES, actions=npy(np.full(3, np.inf))), "is not finite"),
    "a cube": (zipped(frames=FRAMES, actions=npy(np.zeros((3, 2, 2)))), r"must be \[N\]"),
    "two rewards": (
        zipped(frames=FRAMES, actions=npy(np.zeros(3, int)), rewards=npy(np.zeros(2))),
        "rewards: 2 rows for 4 frames",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_is_not_what_it_claims_is_refused_and_memory_stays_small(
    tmp_path, name, capsys
):
    content, said = BAD[name]
    world = played("discrete", 4)
    save(tmp_path / "v/0.npz", frames=world.frames_THWC, actions=world.raw)
    (tmp_path / "v/1.npz").write_bytes(content)
    config = settings(tmp_path / "v", actions=flags("discrete"))
    tracemalloc.start()
    _, (good, bad) = read_here(config)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(good, IngestReport)
    assert "1.npz" in bad.reason
    with pytest.raises(FormatError, match=said):
        raise FormatError(bad.reason)
    assert peak < 64e6
    assert "canary" not in capsys.readouterr().out
    assert not (config.output / "1.npz").exists()


@pytest.mark.parametrize("deflated", [False, True])
def test_a_flipped_or_missing_byte_is_refused_and_names_the_frames(tmp_path, deflated):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (20, 64, 64, 3), np.uint8)
    whole = save(tmp_path / "v/a.npz", frames=frames, deflated=deflated).read_bytes()
    torn = bytearray(whole)
    torn[len(whole) // 2] ^= 4
    config = settings(tmp_path / "v")
    for content in (bytes(torn), whole[: len(whole) // 2]):
        (tmp_path / "v/a.npz").write_bytes(content)
        try:
            _, (answer,) = read_here(config)
        except FormatError as error:
            assert "a.npz: not an npz, or cut short" in str(error)  # noqa: PT017 # both may be
        else:
            assert "a.npz: frames: is damaged" in answer.reason
    np.save(tmp_path / "v/a.npy", frames)
    (tmp_path / "v/a.npz").unlink()
    torn_npy = (tmp_path / "v/a.npy").read_bytes()[:-1]
    (tmp_path / "v/a.npy").write_bytes(torn_npy)
    _, (answer,) = read_here(config)
    assert "the header asks for" in answer.reason


@pytest.mark.parametrize("deflated", [False, True])
def test_memory_does_not_depend_on_the_number_of_frames(tmp_path, deflated):
    def peak(num_frames: int) -> float:
        path = tmp_path / f"{num_frames}.npz"
        save(path, frames=np.zeros((num_frames, 64, 64, 3), np.uint8), deflated=deflated)
        tracemalloc.start()
        with open_frames(path, "frames") as array:
            assert sum(1 for _ in array.frames()) == num_frames
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return float(top)

    # 2,000 frames are 25 MB, 6 pieces; 10,000 are 123 MB.
    assert peak(10_000) < 1.2 * peak(2_000)


@pytest.mark.slow
@given(content=st.binary(max_size=300), at=st.integers(0, 400), whole=st.booleans())
@hypothesis_settings(max_examples=2000, deadline=None, derandomize=True)
def test_whatever_bytes_stand_there_only_our_error_is_raised(tmp_path_factory, content, at, whole):
    path = tmp_path_factory.getbasetemp() / "fuzzed.npz"
    good = zipped(frames=npy(np.zeros((2, 2, 2, 3), np.uint8)), actions=npy(np.arange(1)))
    path.write_bytes(content if whole else good[:at] + content[:8] + good[at + len(content[:8]) :])
    try:
        source = open_source("npz", path, settings(path))
        with source.open(source.recordings[0]) as opened:
            count = sum(1 for _ in opened.frames())
            opened.actions(count)
            opened.rewards(count)
    except (FormatError, ConfigError):
        pass
