"""Promises of sources/minari.py: what minari itself wrote comes out with its actions in place."""

import json
import sys
import tracemalloc
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from video_worlds import assert_aligned, played, read_here
from worldloom.common import ActionSpec, ConfigError, Episodes, FormatError
from worldloom.pipelines.ingest import ingest
from worldloom.pipelines.ingest_config import IngestConfig, MinariConfig
from worldloom.pipelines.sources.hdf5 import Numbers, child, open_hdf5
from worldloom.pipelines.sources.minari import open_source
from worldloom.pipelines.sources.space_json import find_images, parse_object, read_space

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import minari
    from minari.data_collector import EpisodeBuffer
    from minari.serialization import serialize_space

PICTURE = spaces.Box(0, 255, (64, 64, 3), np.uint8)
BLANK = np.zeros((64, 64, 3), np.uint8)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Have minari write a data set of (observations, actions); return its folder."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))

    def write(
        episodes: Sequence[tuple[Any, Any]], observation: Any, action: Any, **more: Any
    ) -> Path:
        buffers = [
            EpisodeBuffer(
                observations=observations,
                actions=actions,
                rewards=[0.5 * i for i in range(steps(actions))],
                terminations=[i == steps(actions) - 1 for i in range(steps(actions))],
                truncations=[False] * steps(actions),
            )
            for observations, actions in episodes
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its advice on authors
            minari.create_dataset_from_buffers(
                "worlds/test-v0", buffers, action_space=action, observation_space=observation,
                **{"data_format": "hdf5", **more},
            )  # fmt: skip
        return tmp_path / "minari" / "worlds" / "test-v0"

    return write


def steps(actions: Any) -> int:
    return steps(next(iter(actions.values()))) if isinstance(actions, dict) else len(actions)


def config(path: Path, output: Path, /, **changes: Any) -> IngestConfig:
    plain = {"kind": "minari", "fps": 15.0}
    return IngestConfig(path=path, output=output, **{**plain, **changes})


def main_file(folder: Path) -> Path:
    return folder / "data" / "main_data.hdf5"


def choices(count: int) -> list[np.int64]:
    return list(np.random.default_rng(count).integers(0, 5, count))


WORLDS = [played("discrete", 8, seed=1), played("discrete", 20, seed=2)]


@pytest.fixture
def two_episodes(write):
    """A data set of the two recordings whose frames show their actions."""
    return write([(list(w.frames_THWC), list(w.raw)) for w in WORLDS], PICTURE, spaces.Discrete(5))


def episode(settings: IngestConfig) -> tuple[Any, Any]:
    """Ingest, and return frames and actions of the first episode."""
    _, answers = read_here(settings)
    with Episodes(settings.output).open(answers[0].key) as opened:
        return opened.frames(0, opened.num_frames), opened.actions


@pytest.mark.parametrize("jpeg", [True, False])
@pytest.mark.parametrize("frame_skip", [1, 3])
def test_every_action_leads_to_the_frame_that_shows_it(write, tmp_path, jpeg, frame_skip):
    recorded = [(list(world.frames_THWC), list(world.raw)) for world in WORLDS]
    folder = write(recorded, PICTURE, spaces.Discrete(5), jpeg_encoding=jpeg)
    read_here(config(folder, tmp_path / "out", frame_skip=frame_skip))
    episodes = Episodes(tmp_path / "out")
    assert episodes.spec.fps == 15 / frame_skip
    for key, world in zip(episodes.keys, WORLDS, strict=True):
        with episodes.open(key) as opened:
            assert_aligned(opened, world, frame_skip=frame_skip)
            kept = len(world.raw) // frame_skip
            rewards = (0.5 * np.arange(kept * frame_skip)).reshape(kept, -1).sum(1)
            assert opened.rewards.tolist() == rewards.tolist()
            assert (opened.metadata["terminated"], opened.metadata["truncated"]) == (True, False)


def test_frames_that_minari_did_not_pack_come_out_exactly(write, tmp_path):
    rng = np.random.default_rng(0)
    small = [rng.integers(0, 256, (16, 24, 3), np.uint8) for _ in range(70)]
    folder = write(
        [({"view": small, "goal": [np.zeros(2, np.float32)] * 70}, choices(69))],
        spaces.Dict(
            view=spaces.Box(0, 255, (16, 24, 3), np.uint8),
            goal=spaces.Box(-np.inf, np.inf, (2,), np.float32),
        ),
        spaces.Discrete(5),
    )
    frames_THWC, _ = episode(config(folder, tmp_path / "out", height=16, width=24))
    assert np.array_equal(frames_THWC, np.stack(small))


def test_grey_frames_become_three_equal_colours(write, tmp_path):
    grey = [np.full((16, 24), 40 + i, np.uint8) for i in range(4)]
    folder = write([(grey, choices(3))], spaces.Box(0, 255, (16, 24), np.uint8), spaces.Discrete(5))
    frames_THWC, _ = episode(config(folder, tmp_path / "out", height=16, width=24))
    assert np.array_equal(frames_THWC, np.stack([grey] * 3, axis=-1))


def test_the_image_key_chooses_among_pictures_and_is_asked_for_where_there_are_several(
    write, tmp_path
):
    def view(colour):
        return [np.full((64, 64, 3), colour, np.uint8)] * 4

    folder = write(
        [({"eye": {"left": view(10), "right": view(200)}}, choices(3))],
        spaces.Dict(eye=spaces.Dict(left=PICTURE, right=PICTURE)),
        spaces.Discrete(5),
    )
    with pytest.raises(ConfigError, match=r"eye/left.*eye/right.*--minari\.image-key"):
        open_source(folder, config(folder, tmp_path))
    with pytest.raises(ConfigError, match="eye/rigth: no such picture; did you mean 'eye/right'"):
        open_source(folder, config(folder, tmp_path, minari=MinariConfig(image_key="eye/rigth")))
    chosen = config(folder, tmp_path / "out", minari=MinariConfig(image_key="eye/right"))
    frames_THWC, _ = episode(chosen)
    assert abs(int(frames_THWC.mean()) - 200) < 3


@pytest.mark.parametrize(
    ("space", "actions", "spec", "raw"),
    [
        (spaces.Discrete(3, start=5), [np.int64(5), np.int64(7)],
         ActionSpec.discrete(["ACTION_0", "ACTION_1", "ACTION_2"]), [0, 2]),
        (spaces.MultiBinary(3), [np.array([0, 1, 1], np.int8), np.array([1, 0, 0], np.int8)],
         ActionSpec.keys(["KEY_0", "KEY_1", "KEY_2"]), [[0, 1, 1], [1, 0, 0]]),
        (spaces.MultiDiscrete([3, 2], start=[1, 0]), [np.array([1, 0]), np.array([3, 1])],
         ActionSpec.multi_discrete([3, 2], names=["AXIS_0", "AXIS_1"]), [[0, 0], [2, 1]]),
        (spaces.Box(-2, 2, (2,), np.float32), [np.float32([0.5, -2]), np.float32([2, 0])],
         ActionSpec.continuous([-2, -2], [2, 2], names=["AXIS_0", "AXIS_1"]), [[0.5, -2], [2, 0]]),
        (spaces.Dict(fire=spaces.Discrete(2), move=spaces.MultiBinary(2)),
         {"fire": [np.int64(1), np.int64(0)], "move": [np.int8([0, 1]), np.int8([1, 1])]},
         ActionSpec.multi_discrete([2, 2, 2], names=["fire", "move.KEY_0", "move.KEY_1"]),
         [[1, 0, 1], [0, 1, 1]]),
    ],
)  # fmt: skip
def test_every_action_space_maps_as_in_a_recorded_game(write, tmp_path, space, actions, spec, raw):
    folder = write([([BLANK] * 3, actions)], PICTURE, space)
    _, recorded = episode(config(folder, tmp_path / "out"))
    assert recorded.tolist() == raw
    assert Episodes(tmp_path / "out").spec.actions == spec


def test_an_axis_without_bounds_needs_them_from_the_settings(write, tmp_path):
    folder = write(
        [([BLANK] * 2, [np.float32([0.5])])],
        PICTURE,
        spaces.Box(-np.inf, np.inf, (1,), np.float32),
    )
    with pytest.raises(ConfigError, match=r"without bounds.*--minari\.low"):
        open_source(folder, config(folder, tmp_path))
    given = MinariConfig(low=(-1,), high=(1,), bins=5)
    source = open_source(folder, config(folder, tmp_path, minari=given))
    assert (source.actions.sizes, source.actions.low) == ((5,), (-1.0,))


def test_a_small_map_beside_one_picture_is_no_frame(write, tmp_path):
    small = [np.zeros((7, 7, 3), np.uint8)] * 2
    folder = write(
        [({"map": small, "view": [BLANK] * 2}, choices(1))],
        spaces.Dict(map=spaces.Box(0, 255, (7, 7, 3), np.uint8), view=PICTURE),
        spaces.Discrete(5),
    )
    assert open_source(folder, config(folder, tmp_path)).image_key == "view"


def test_the_frame_rate_is_asked_for(two_episodes, tmp_path):
    with pytest.raises(ConfigError, match=r"does not say how many frames a second.*--fps"):
        open_source(two_episodes, config(two_episodes, tmp_path, fps=None))


def test_episodes_come_in_the_order_of_their_numbers(write, tmp_path):
    folder = write([([BLANK] * 2, choices(1))] * 12, PICTURE, spaces.Discrete(5))
    keys = [r.key for r in open_source(folder, config(folder, tmp_path)).recordings]
    assert keys == [f"episode-{i:06d}" for i in range(12)]
    assert keys == [
        r.key for r in open_source(main_file(folder), config(folder, tmp_path)).recordings
    ]


def damage(folder: Path, episode: int, what: str) -> None:
    """Spoil one episode in a way that a stranger, or a bad disk, may."""
    with h5py.File(main_file(folder), "r+") as file:
        group = file[f"episode_{episode}"]
        if what == "missing":
            del group["actions"]
        elif what == "short":
            rows = group["actions"][:-1]
            del group["actions"]
            group["actions"] = rows
        elif what == "range":
            group["actions"][0] = 9
        elif what == "floats":
            rows = group["actions"][:] + 0.5
            del group["actions"]
            group["actions"] = rows
        elif what == "jpeg":
            group["observations"][2] = np.zeros(9, np.uint8)
        elif what == "nan":
            group["rewards"][1] = np.nan
        elif what == "soft":
            del group["actions"]
            group["actions"] = h5py.SoftLink("/episode_1/actions")
        elif what == "external":
            del group["actions"]
            group["actions"] = h5py.ExternalLink("secret.hdf5", "/secret")
        elif what == "references":
            del group["actions"]
            group["actions"] = np.array([group.ref] * 7, h5py.ref_dtype)
        elif what == "empty":
            shape = (0, *group["observations"].shape[1:])
            del group["observations"]
            group.create_dataset("observations", shape, np.uint8)


def read(source: Any, recording: Any) -> None:
    """Read all that a recording has."""
    with source.open(recording) as opened:
        count = sum(1 for _ in opened.frames())
        opened.actions(count)
        opened.rewards(count)


BROKEN = {
    "missing": r"episode_0: has no 'actions'",
    "short": r"episode_0: actions: shape \(6,\), but 8 frames need \(7,\)",
    "range": r"episode_0: actions: step 0 has 9 in slot 0, must be in \[0, 5\)",
    "floats": r"episode_0: actions: float64, expected integers",
    "jpeg": r"episode_0: observations: frame 2: not a JPEG",
    "nan": r"episode_0: rewards: step 1 is nan",
    "soft": r"episode_0: 'actions' is a SoftLink; links are not followed",
    "external": r"episode_0: 'actions' is a ExternalLink; links are not followed",
    "references": r"episode_0: actions: dtype object, only plain numbers are read",
    "empty": r"episode_0: observations: no observation, so no frame",
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_episode_is_refused_with_its_place(two_episodes, tmp_path, what):
    folder = two_episodes
    damage(folder, 0, what)
    source = open_source(folder, config(folder, tmp_path))
    with pytest.raises(FormatError, match=BROKEN[what]) as refused:
        read(source, source.recordings[0])
    assert str(main_file(folder)) in str(refused.value)


def test_skip_bad_leaves_out_the_broken_episode_alone(two_episodes, tmp_path, capsys):
    folder = two_episodes
    damage(folder, 0, "range")
    with pytest.raises(FormatError, match="step 0 has 9"):
        ingest(config(folder, tmp_path / "none"))
    out = ingest(config(folder, tmp_path / "out", skip_bad=1))
    assert Episodes(out).keys == ["episode-000001"]
    assert "episode_0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"data_format": "arrow"}, "data_format 'arrow', read is hdf5"),
        ({"total_episodes": 3}, "2 episodes, but metadata.json says 3"),
        ({"observation_space": "{"}, "observation_space: cannot be read as JSON"),
        ({"observation_space": 7}, "observation_space: expected a string of JSON"),
        ({"action_space": json.dumps({"type": "Text"})}, "a space of type 'Text'"),
        ({"action_space": json.dumps({"type": "Discrete", "n": 10**9, "start": 0})},
         "Discrete of 1000000000 values"),
        ({"action_space": json.dumps({"type": "MultiBinary", "n": [10**6, 10**6]})},
         "1000000000000 axes"),
    ],
)  # fmt: skip
def test_metadata_that_is_not_minaris_is_refused(two_episodes, tmp_path, change, reason):
    folder = two_episodes
    path = folder / "data" / "metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(FormatError, match=reason):
        open_source(folder, config(folder, tmp_path))


def test_a_data_set_without_pictures_or_episodes_is_refused(write, two_episodes, tmp_path):
    folder = two_episodes
    with h5py.File(main_file(folder), "r+") as file:
        del file["episode_0"], file["episode_1"]
    with pytest.raises(FormatError, match="has no episodes"):
        open_source(folder, config(folder, tmp_path))
    path = folder / "data" / "metadata.json"
    about = {
        **json.loads(path.read_text()),
        "observation_space": serialize_space(spaces.Discrete(2)),
    }
    path.write_text(json.dumps(about))
    with pytest.raises(FormatError, match="no observation of it is a picture"):
        open_source(folder, config(folder, tmp_path))
    with pytest.raises(FormatError, match="no such folder"):
        open_source(tmp_path / "nowhere", config(folder, tmp_path))


def test_a_cut_file_is_refused(two_episodes, tmp_path):
    folder = two_episodes
    content = main_file(folder).read_bytes()
    main_file(folder).write_bytes(content[: len(content) // 2])
    with pytest.raises(FormatError, match=r"main_data\.hdf5: cannot be read as HDF5"):
        open_source(folder, config(folder, tmp_path))


def claim(path: Path, what: str) -> None:
    """Write a small file whose numbers are not in it."""
    with h5py.File(path, "w") as file:
        if what == "terabytes":
            file.create_dataset("x", (10**9, 1000), np.uint8, chunks=(1, 1000))
        elif what == "packed":
            data = file.create_dataset("x", (10**9, 64), np.uint8, chunks=(16, 64), compression=9)
            data[:16] = 0
        elif what == "chunk":
            file.create_dataset("x", (1 << 30,), np.uint8, chunks=(1 << 29,), compression=1)
        elif what == "elsewhere":
            file.create_dataset("x", (10,), np.uint8, external=[("secret.bin", 0, 10)])
        elif what == "virtual":
            layout = h5py.VirtualLayout((10,), np.uint8)
            layout[:] = h5py.VirtualSource("secret.hdf5", "y", (10,))
            file.create_virtual_dataset("x", layout)
        elif what == "twice packed":
            settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            settings.set_chunk((1000,))
            settings.set_deflate(9)
            settings.set_deflate(9)
            h5py.h5d.create(
                file.id, b"x", h5py.h5t.NATIVE_UINT8, h5py.h5s.create_simple((1000,)), settings
            )
        elif what == "records":
            file["x"] = np.zeros(3, [("a", "u1")])
        elif what == "scalar":
            file["x"] = 3


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("terabytes", "claims 1000000000000 bytes"),
        ("packed", "claims 64000000000 bytes"),
        ("chunk", "chunks of 536870912 bytes"),
        ("elsewhere", "lie in other files"),
        ("virtual", "lie in other files"),
        ("twice packed", r"packed by the filters \[1, 1\]"),
        ("records", "only plain numbers"),
        ("scalar", "one number or none"),
    ],
)
def test_a_claim_that_the_file_cannot_fill_costs_no_memory(tmp_path, what, reason):
    path = tmp_path / "claims.hdf5"
    claim(path, what)
    tracemalloc.start()
    with open_hdf5(path) as root, pytest.raises(FormatError, match=reason):
        child(root, "x", where=str(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 24


@pytest.mark.parametrize("packed", [{}, {"compression": "gzip"}, {"compression": "lzf"}])
def test_pieces_join_to_the_whole_whatever_the_chunks(tmp_path, packed):
    rows = np.random.default_rng(0).integers(0, 256, (333, 5, 7), np.uint8)
    path = tmp_path / "x.hdf5"
    with h5py.File(path, "w") as file:
        file.create_dataset("a/x", data=rows, chunks=(100, 2, 7), **packed)
        file["y"] = rows
    with open_hdf5(path) as root:
        for name in ("a/x", "y"):
            numbers = child(root, name, where=str(path))
            assert isinstance(numbers, Numbers)
            assert np.array_equal(np.concatenate(list(numbers.pieces())), rows)
            assert np.array_equal(numbers.whole(), rows)


def test_memory_does_not_grow_with_the_length_of_an_episode(write, tmp_path):
    folder = write(
        [([BLANK] * 3001, [np.int64(0)] * 3000)],
        PICTURE,
        spaces.Discrete(5),
        jpeg_encoding=False,
    )
    source = open_source(folder, config(folder, tmp_path))
    tracemalloc.start()
    read(source, source.recordings[0])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 12e6 < 3001 * BLANK.nbytes / 3  # two pieces, each of a chunk's rows


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
NUMBERS = st.lists(st.integers(-3, 300), max_size=3) | JSON
SPACES = st.recursive(
    st.fixed_dictionaries(
        {"type": st.sampled_from(["Discrete", "MultiBinary", "MultiDiscrete", "Box", "Dict", "?"])},
        optional={
            "n": st.integers() | NUMBERS,
            "start": st.integers() | NUMBERS,
            "nvec": NUMBERS,
            "low": NUMBERS,
            "high": NUMBERS,
            "shape": st.lists(st.integers(0, 1 << 40), max_size=4) | JSON,
            "dtype": st.sampled_from(["float32", "int64", "uint8", "object"]) | JSON,
        },
    )
    | JSON,
    lambda inner: st.fixed_dictionaries(
        {
            "type": st.sampled_from(["Dict", "Tuple"]),
            "subspaces": st.lists(inner, max_size=3)
            | st.dictionaries(st.text(max_size=4), inner, max_size=3),
        }
    ),
    max_leaves=6,
)


@pytest.mark.slow
@settings(max_examples=300)
@given(space=SPACES)
def test_any_description_of_a_space_is_read_or_refused(space):
    for reader in (read_space, find_images):
        with suppress(FormatError):
            reader(space, where="test")


@settings(max_examples=500)
@given(text=st.text() | st.integers() | JSON.map(json.dumps) | st.just("[" * 100_000))
def test_any_text_is_an_object_or_refused(text):
    with suppress(FormatError):
        assert isinstance(parse_object(text, where="test"), dict)


@given(n=st.integers(1, 50), start=st.integers(-5, 5), width=st.integers(1, 6), data=st.data())
@settings(max_examples=100)
def test_what_minari_serializes_is_read_back(n, start, width, data):
    nvec = data.draw(st.lists(st.integers(1, 9), min_size=width, max_size=width))
    for space in (
        spaces.Discrete(n, start=start),
        spaces.MultiBinary(width),
        spaces.MultiBinary([width, 2]),
        spaces.MultiDiscrete(nvec),
        spaces.Box(-1.5, n, (width,), np.float32),
        spaces.Tuple([spaces.Discrete(n), spaces.Dict(a=spaces.MultiDiscrete(nvec))]),
    ):
        read = read_space(json.loads(serialize_space(space)), where="test")
        assert str(read) == str(space)


def test_without_h5py_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ConfigError, match=r"pip install 'worldloom\[ingest\]'"):
        open_source(tmp_path, config(tmp_path, tmp_path))
