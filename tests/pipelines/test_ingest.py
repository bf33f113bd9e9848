import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from video_worlds import (
    assert_aligned,
    played,
    read_frame,
    read_here,
    write_actions,
    write_video,
)
from worldloom.common import ActionSpec, ConfigError, Episodes, FormatError, TokenShards
from worldloom.dynamics import Windows
from worldloom.pipelines.info import action_words
from worldloom.pipelines.ingest import IngestConfig, ingest
from worldloom.pipelines.ingest_config import ActionFileConfig
from worldloom.pipelines.ingest_worker import IngestReport
from worldloom.pipelines.tokenize import TokenizeConfig, tokenize
from worldloom.tokenizer import (
    ConvTokenizer,
    QuantizerConfig,
    TokenizerConfig,
    Trained,
    load_tokenizer,
    resize_frames,
)

SIDE = 16
NAMES = ("noop", "left", "right", "fire", "jump")
SIZE = ("--height", "16", "--width", "16")


def settings(path: Path, output: Path, /, **changes: Any) -> IngestConfig:
    plain = {
        "kind": "videos", "height": SIDE, "width": SIDE,
        "actions": ActionFileConfig(names=NAMES),
    }  # fmt: skip
    return IngestConfig(path=path, output=output, **{**plain, **changes})


def make(folder: Path, count: int, num_frames: int = 12) -> Path:
    """Write recordings of a world, each with its actions beside it."""
    for number in range(count):
        world = played("discrete", num_frames, seed=number, side=SIDE)
        write_video(folder / f"clip{number:02d}.mkv", world.frames_THWC)
        write_actions(folder / f"clip{number:02d}.csv", world)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def start(folder: Path, output: Path, *more: str, **environment: str) -> subprocess.Popen:
    """Start the command line, in a process group of its own."""
    command = [
        sys.executable, "-m", "worldloom.pipelines", "ingest", "videos", str(folder),
        "--output", str(output), *SIZE, "--actions.names", *NAMES, *more,
    ]  # fmt: skip
    return subprocess.Popen(
        command,
        # Tests run in the background run with Ctrl-C ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("videos"), 6)


@pytest.fixture(scope="module")
def whole(videos, tmp_path_factory) -> dict[str, bytes]:
    """What an undisturbed run of one process writes."""
    return content(ingest(settings(videos, tmp_path_factory.mktemp("whole") / "e")))


@pytest.fixture(scope="module")
def whole_cut(videos, tmp_path_factory) -> dict[str, bytes]:
    """The same, cut into episodes of 5 frames."""
    return content(ingest(settings(videos, tmp_path_factory.mktemp("cut") / "e", max_frames=5)))


def test_an_ingest_says_what_it_read_how_it_aligned_and_what_comes_next(tmp_path, videos, capsys):
    output = ingest(settings(videos, tmp_path / "e"))
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("alignment: row i of the file of actions leads from frame i") == 1
    assert "6 recordings, 20 frames per second" in said.err
    assert "wrote 6 episodes, 72 frames" in said.err
    assert f"next: worldloom train-tokenizer --episodes {output} --output" in said.err
    episodes = Episodes(output)
    assert episodes.keys == [f"clip{number:02d}" for number in range(6)]
    for number, key in enumerate(episodes.keys):
        with episodes.open(key) as episode:
            assert_aligned(episode, played("discrete", 12, seed=number, side=SIDE))


def test_any_number_of_processes_writes_the_same_bytes(tmp_path, videos, whole):
    assert content(ingest(settings(videos, tmp_path / "e", workers=3))) == whole


def test_finished_episodes_are_never_redone_and_new_recordings_are_added(
    tmp_path, videos, whole, capsys
):
    config = settings(videos, tmp_path / "e", num_recordings=4)
    ingest(config)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "e").glob("*.npz")}
    assert len(before) == 4
    capsys.readouterr()
    ingest(settings(videos, tmp_path / "e"))
    assert "wrote 2 episodes" in (said := capsys.readouterr().err)
    assert "4 were there before" in said
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert content(tmp_path / "e") == whole


@pytest.mark.parametrize("max_frames", [0, 5])
@pytest.mark.parametrize(
    "failpoint",
    ["write:1", "rename:1", "episode-write:1", "episode-write:4", "episode-rename:1",
     "episode-rename:5"],
)  # fmt: skip
@pytest.mark.slow
def test_a_kill_leaves_whole_episodes_and_the_next_run_writes_the_same_bytes(
    tmp_path, videos, whole, whole_cut, failpoint, max_frames
):
    more = ["--max-frames", str(max_frames)]
    killed = start(videos, tmp_path / "e", *more, WORLDLOOM_FAILPOINT=failpoint)
    _, said = killed.communicate(timeout=120)
    assert killed.returncode != 0, said
    wanted = whole_cut if max_frames else whole
    there = {path.name: path for path in (tmp_path / "e").glob("*.npz") if path.name in wanted}
    for name, path in there.items():
        assert path.read_bytes() == wanted[name]
    if max_frames:  # where the first part stands, all of them do
        for name in there:
            if name.endswith("-000000.npz"):
                assert {f"{name[:6]}-{part:06d}.npz" for part in range(3)} <= set(there)
    config = settings(videos, tmp_path / "e", max_frames=max_frames)
    assert content(ingest(config)) == wanted


@pytest.mark.slow
def test_a_recording_in_one_part_killed_at_its_rename_is_whole_or_absent(tmp_path, videos, whole):
    killed = start(
        videos, tmp_path / "e", "--max-frames", "20", WORLDLOOM_FAILPOINT="recording-rename:3"
    )
    killed.communicate(timeout=120)
    assert killed.returncode != 0
    there = sorted(path.name for path in (tmp_path / "e").glob("*.npz"))
    assert there == [f"clip{number:02d}-000000.npz" for number in range(3)]
    ingest(settings(videos, tmp_path / "e", max_frames=20))
    with Episodes(tmp_path / "e").open("clip05-000000") as episode:
        assert episode.metadata["parts"] == 1
        assert_aligned(episode, played("discrete", 12, seed=5, side=SIDE))
    assert not list((tmp_path / "e").glob("tmp-*"))


@pytest.mark.slow
def test_ctrl_c_ends_with_130_and_the_same_command_continues(tmp_path, whole):
    folder = make(tmp_path / "v", 40, num_frames=100)
    undisturbed = content(ingest(settings(folder, tmp_path / "undisturbed")))
    stopped = start(folder, tmp_path / "e", "--workers", "2")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and len(list((tmp_path / "e").glob("clip*.npz"))) < 2:
        time.sleep(0.01)
    os.killpg(stopped.pid, signal.SIGINT)
    _, said = stopped.communicate(timeout=60)
    assert stopped.returncode == 130, said
    assert "run the same command again, and it continues" in said
    assert not list((tmp_path / "e").glob("tmp-*"))
    assert 2 <= len(list((tmp_path / "e").glob("clip*.npz"))) < 40
    again = start(folder, tmp_path / "e", "--workers", "2")
    assert again.communicate(timeout=120)[0].strip() == str(tmp_path / "e")
    assert content(tmp_path / "e") == undisturbed


@pytest.mark.slow
def test_a_corrupt_video_among_fifty_is_named_and_counted_and_the_others_are_as_ever(
    tmp_path, capsys
):
    folder = make(tmp_path / "v", 50, num_frames=6)
    undisturbed = content(ingest(settings(folder, tmp_path / "undisturbed", workers=2)))
    bad = folder / "clip24.mkv"
    bad.write_bytes(bad.read_bytes()[:-400])
    capsys.readouterr()
    with pytest.raises(FormatError, match=r"clip24\.mkv: .*--skip-bad 1 or more"):
        ingest(settings(folder, tmp_path / "e"))
    kept = sorted(path.name for path in (tmp_path / "e").glob("clip*.npz"))
    assert 0 < len(kept) < 50
    ingest(settings(folder, tmp_path / "e", skip_bad=1, workers=2))
    said = capsys.readouterr().err
    assert "skipped 'clip24.mkv'" in said
    assert "1 skipped, see skipped.json" in said
    there = content(tmp_path / "e")
    (row,) = json.loads(there.pop("skipped.json"))["skipped"]
    assert (row["key"], row["origin"]) == ("clip24", "clip24.mkv")
    assert row["reason"].startswith("clip24.mkv: ")
    del undisturbed["clip24.npz"]
    assert there == undisturbed
    assert len(there) == 50  # 49 and episodes.json

    write_video(bad, played("discrete", 6, seed=24, side=SIDE).frames_THWC)
    ingest(settings(folder, tmp_path / "e"))
    assert not (tmp_path / "e/skipped.json").exists()
    assert len(Episodes(tmp_path / "e").keys) == 50


def test_more_bad_recordings_than_allowed_stop_it_and_are_kept_in_mind(tmp_path):
    folder = make(tmp_path / "v", 4)
    for number in (1, 2):
        (folder / f"clip{number:02d}.mkv").write_bytes(b"rubbish")
    with pytest.raises(FormatError, match=r"clip02\.mkv: .*\(1 were skipped before\)"):
        ingest(settings(folder, tmp_path / "e", skip_bad=1))
    assert [path.name for path in (tmp_path / "e").glob("*.npz")] == ["clip00.npz"]
    skipped = json.loads((tmp_path / "e/skipped.json").read_text())["skipped"]
    assert [row["key"] for row in skipped] == ["clip01", "clip02"]


def test_a_source_of_which_nothing_can_be_read_is_no_success(tmp_path):
    folder = make(tmp_path / "v", 2)
    for path in folder.glob("*.csv"):
        path.write_text("action\n9\n")
    with pytest.raises(FormatError, match="every recording was skipped"):
        ingest(settings(folder, tmp_path / "e", skip_bad=5))


@pytest.mark.parametrize("kind", ["videos", "vpt", "npz"])
def test_an_empty_folder_is_refused_with_3_at_once(tmp_path, kind):
    (tmp_path / "v").mkdir()
    command = [
        sys.executable, "-m", "worldloom.pipelines", "ingest", kind, str(tmp_path / "v"),
        "--output", str(tmp_path / "e"),
    ]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 3, ended.stderr
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.count("\n") == 1
    assert ended.stdout == ""
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"frame_skip": 2}, r"frame_skip \(1 there, 2 here\)"),
        ({"resize": "crop"}, r"source\.resize \('exact' there, 'crop' here\)"),
        ({"max_frames": 5}, r"source\.max_frames \(0 there, 5 here\)"),
        ({"fps": 30.0}, r"fps \(20\.0 there, 30\.0 here\), source\.fps_given"),
        (
            {"actions": ActionFileConfig(names=NAMES, alignment="previous")},
            r"source\.alignment \(.row i of the file of actions leads",
        ),
        (
            {"actions": ActionFileConfig(names=("a", "b", "c", "d", "e"))},
            r"actions\.names \(\['noop'",
        ),
    ],
)
def test_a_folder_begun_with_other_settings_is_refused_and_left_as_it_is(
    tmp_path_factory, tmp_path, videos, whole, changes, said
):
    for name, data in whole.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=said):
        ingest(settings(videos, tmp_path, **changes))
    assert content(tmp_path) == whole


def test_episodes_of_other_recordings_are_not_mixed_in(tmp_path, videos):
    output = ingest(settings(videos, tmp_path / "e", num_recordings=1))
    other = make(tmp_path / "other", 1)
    (other / "clip00.mkv").rename(other / "another.mkv")
    (other / "clip00.csv").rename(other / "another.csv")
    with pytest.raises(ConfigError, match=r"has episodes of 1 recordings that .* has not: clip00"):
        ingest(settings(other, output))


def test_a_cut_recording_loses_only_the_actions_between_its_parts(tmp_path):
    world = played("discrete", 200, side=SIDE)
    write_video(tmp_path / "v/a.mkv", world.frames_THWC)
    write_actions(tmp_path / "v/a.csv", world)
    # Keys that would be those of parts, if parts had them only where there are several.
    write_video(tmp_path / "v/a-000001.mkv", world.frames_THWC)
    write_actions(tmp_path / "v/a-000001.csv", world)
    for frame_skip, max_frames, lengths in ((1, 70, [70, 70, 60]), (3, 33, [33, 33, 1])):
        output = tmp_path / f"e{frame_skip}"
        config = settings(tmp_path / "v", output, frame_skip=frame_skip, max_frames=max_frames)
        _, answers = read_here(config)
        assert all(isinstance(answer, IngestReport) for answer in answers), answers
        episodes = Episodes(output)
        assert episodes.keys == [
            f"{key}-{part:06d}" for key in ("a-000001", "a") for part in range(3)
        ] or episodes.keys == sorted(
            f"{key}-{part:06d}" for key in ("a-000001", "a") for part in range(3)
        )
        for part, length in enumerate(lengths):
            with episodes.open(f"a-{part:06d}") as episode:
                assert episode.num_frames == length
                assert (episode.metadata["part"], episode.metadata["parts"]) == (part, 3)
                first = part * max_frames * frame_skip
                assert_aligned(episode, world, frame_skip=frame_skip, first=first)
        assert not list(output.glob("tmp-*"))


@pytest.mark.parametrize("rule", ["stretch", "crop", "pad"])
def test_frames_are_resized_by_the_rule_of_the_tokenizer(tmp_path, rule):
    frames = np.random.default_rng(0).integers(0, 256, (70, 24, 40, 3), np.uint8)
    write_video(tmp_path / "v/a.mkv", frames)
    with pytest.raises(ConfigError, match=r"24x40 .*not 16x16; give --height 24 --width 40"):
        ingest(settings(tmp_path / "v", tmp_path / "e"))
    config = settings(tmp_path / "v", tmp_path / "e", resize=rule)
    read_here(config)
    with Episodes(tmp_path / "e").open("a") as episode:
        wanted = resize_frames(frames, height=SIDE, width=SIDE, rule=rule)
        assert (episode.frames() == wanted).all()


def test_memory_does_not_depend_on_the_length_of_a_recording(tmp_path):
    def peak(num_frames: int) -> float:
        path = tmp_path / f"{num_frames}/a.npz"
        path.parent.mkdir()
        np.savez(path, frames=np.zeros((num_frames, 64, 64, 3), np.uint8))
        config = settings(
            path.parent, tmp_path / f"e{num_frames}", kind="npz", fps=10.0, max_frames=700,
            height=64, width=64,
        )  # fmt: skip
        tracemalloc.start()
        _, (answer,) = read_here(config)
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert isinstance(answer, IngestReport)
        return float(top)

    assert peak(8_000) < 1.25 * peak(2_000)  # 98 MB of frames against 25


@pytest.mark.parametrize(
    ("flags", "said", "code"),
    [
        (["--heigth", "3"], "did you mean --height?", 2),
        (["--frame-skip", "0"], "--frame-skip must be at least 1, got 0", 2),
        (["--max-frames", "-1"], "--max-frames must be at least 0, got -1", 2),
        (["--fps", "0"], "--fps must be a positive number", 2),
        (["--workers", "0"], "--workers must be at least 1", 2),
        (["--actions.kind", "joystick"], "joystick", 2),
        (["--config", "nothing.toml"], "nothing.toml: not found", 2),
    ],
)
def test_a_wrong_flag_is_refused_before_anything_is_read(tmp_path, videos, flags, said, code):
    ended = start(videos, tmp_path / "e", *flags)
    _, err = ended.communicate(timeout=60)
    assert ended.returncode == code
    assert said in err
    assert not (tmp_path / "e").exists()


def shards_of(tmp_path: Path, tokenizer: str, *, side: int, frame_skip: int) -> Any:
    """Ingest and tokenize one recording of a world; return the world and the shards."""
    world = played("discrete", 61, side=side)
    write_video(tmp_path / "v/a.mkv", world.frames_THWC)
    write_actions(tmp_path / "v/a.csv", world)
    config = settings(
        tmp_path / "v", tmp_path / "e", height=side, width=side, frame_skip=frame_skip
    )
    read_here(config)
    tokenize(
        TokenizeConfig(
            episodes=config.output, tokenizer=tokenizer, output=tmp_path / "s", device="cpu",
            workers=1,
        )
    )  # fmt: skip
    return world, TokenShards(tmp_path / "s")


def slots_between(world: Any, first: int, steps: int, frame_skip: int) -> Any:
    """Return the slots of some steps of an episode that begins with the world's first frame."""
    last_of_each = [(first + i + 1) * frame_skip - 1 for i in range(steps)]
    return world.spec.encode(world.raw[last_of_each])


@pytest.mark.parametrize("frame_skip", [1, 3])
def test_slots_of_a_window_are_what_its_decoded_frames_show(tmp_path, frame_skip):
    world, shards = shards_of(tmp_path, "patch", side=64, frame_skip=frame_skip)
    tokenizer = load_tokenizer("patch")
    windows = Windows(shards, "train", window_frames=5)
    for index in range(6):
        batch = windows.batch(index, size=2, seed=0)
        for codes_thw, slots_TA in zip(batch.codes_Bthw, batch.slots_BTA, strict=True):
            frames = tokenizer.decode(codes_thw[None], num_frames=5)[0].numpy()
            shown = [read_frame(frame, 1) for frame in frames]
            steps = [step for step, _ in shown]
            assert steps == list(range(steps[0], steps[0] + 5 * frame_skip, frame_skip))
            wanted = slots_between(world, steps[0] // frame_skip, 4, frame_skip)
            assert np.array_equal(slots_TA.numpy(), wanted)
            # Of the raw actions under a frame skip the last led to the kept frame, which shows it.
            assert [slots for _, slots in shown[1:]] == wanted.tolist()


@pytest.mark.parametrize("frame_skip", [1, 3])
def test_slots_between_latent_frames_of_several_frames_are_those_of_all_their_steps(
    tmp_path, frame_skip
):
    config = TokenizerConfig(
        height=SIDE, width=SIDE, architecture="video", temporal_stride=2, widths=(8,),
        num_blocks=(1,), quantizer=QuantizerConfig(kind="fsq", code_dim=4, fsq_levels=(8, 5, 5, 5)),
    )  # fmt: skip
    model = tmp_path / "model"
    trained = Trained(fps=20 / frame_skip, frame_skip=frame_skip)
    ConvTokenizer(config, trained=trained, seed=0).eval().save(model, card="tiny")
    world, shards = shards_of(tmp_path, str(model), side=SIDE, frame_skip=frame_skip)
    codes_thw = shards.codes_thw(0)
    windows = Windows(shards, "train", window_frames=4)
    starts = range(len(codes_thw) - 3)
    for index in range(6):
        batch = windows.batch(index, size=2, seed=0)
        for window_thw, slots_TA in zip(batch.codes_Bthw.numpy(), batch.slots_BTA, strict=True):
            (start,) = [s for s in starts if np.array_equal(codes_thw[s : s + 4], window_thw)]
            # Latent frame j ends with frame 2 j, so from the first to the fourth there are 6 steps.
            assert np.array_equal(slots_TA.numpy(), slots_between(world, 2 * start, 6, frame_skip))


def test_of_many_choices_at_once_a_preview_names_those_that_are_not_as_mostly():
    spec = ActionSpec.multi_discrete([2, 2, 11], names=["jump", "run", "turn"])
    raw = np.array([[0, 1, 5], [0, 1, 5], [1, 1, 5], [0, 0, 9], [0, 1, 5]])
    assert action_words(spec, raw) == ["-", "-", "jump=1", "run=0 turn=9", "-"]
    assert action_words(ActionSpec.discrete(["a", "b"]), np.array([1, 0])) == ["b", "a"]
    assert action_words(spec, raw[:0]) == []
