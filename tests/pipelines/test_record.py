import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from worldloom.common import ConfigError, Episodes, WorldloomError, derive_seed
from worldloom.pipelines.record import RecordConfig, record
from worlds import ACTION_COLOURS, NO_ACTION, shown_action, shown_step

TESTS = Path(__file__).parents[1]


def settings(output: Path, /, **changes: Any) -> RecordConfig:
    plain = {
        "env": "worlds:LastAction-v0", "height": 16, "width": 16, "num_episodes": 4, "seed": 3,
        "stickiness": 0.5,
    }  # fmt: skip
    return RecordConfig(output=output, **{**plain, **changes})


SLOW = "pause_s=0.05"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """What an uninterrupted recording writes."""
    return content(record(settings(tmp_path_factory.mktemp("whole") / "e")))


@pytest.fixture(scope="module")
def whole_slow(tmp_path_factory) -> dict[str, bytes]:
    """The same of the world that takes its time."""
    output = tmp_path_factory.mktemp("slow") / "e"
    return content(record(settings(output, env_kwargs=SLOW, num_episodes=8, workers=2)))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def start(output: Path, /, *more: str, **environment: str) -> subprocess.Popen:
    """Start the command line on the slow world, in a process group of its own."""
    command = [
        sys.executable, "-m", "worldloom.pipelines", "record", "--env", "worlds:LastAction-v0",
        "--output", str(output), "--height", "16", "--width", "16", "--seed", "3",
        "--stickiness", "0.5", *more,
    ]  # fmt: skip
    return subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": str(TESTS), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def descendants(pid: int) -> list[int]:
    """Return the processes that a process started, and those that they started."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [p for child in map(int, text.split()) for p in (child, *descendants(child))]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # it may end while it is read
        return False


def wait_until(happens: Callable[[], bool], *, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not happens():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


@pytest.mark.parametrize("frame_skip", [1, 3])
def test_action_i_leads_from_frame_i_to_frame_i_plus_1(tmp_path, frame_skip):
    length = 11
    config = settings(tmp_path / "e", frame_skip=frame_skip, env_kwargs=f"length={length}, start=2")
    episodes = Episodes(record(config))
    assert len(episodes.keys) == 4
    for key in episodes.keys:
        episode = episodes.open(key)
        frames, actions = episode.frames(), episode.actions
        steps = [min(i * frame_skip, length) for i in range(len(frames))]
        assert steps[-1] == length
        assert [shown_step(frame) for frame in frames] == steps
        assert [shown_action(frame) for frame in frames] == [None, *actions.tolist()]
        # The world pays the number of the action for every game frame it is held.
        assert episode.rewards.tolist() == (actions * np.diff(steps)).tolist()
        assert episode.metadata["total_reward"] == episode.rewards.sum()
        assert episode.metadata["terminated"]
        assert not episode.metadata["truncated"]
    assert episodes.spec.frame_skip == frame_skip
    assert episodes.spec.fps == 20 / frame_skip


def test_any_number_of_workers_writes_the_same_bytes(tmp_path):
    one = content(record(settings(tmp_path / "one", num_episodes=7)))
    three = content(record(settings(tmp_path / "three", num_episodes=7, workers=3)))
    assert len(one) == 8
    assert one == three


def test_episodes_differ_from_each_other_and_between_seeds(tmp_path):
    first = Episodes(record(settings(tmp_path / "a", num_episodes=3)))
    other = Episodes(record(settings(tmp_path / "b", num_episodes=3, seed=4)))
    colours = {
        tuple(episodes.open(key).frames()[0, 12, 0].tolist())
        for episodes in (first, other)
        for key in episodes.keys
    }
    actions = {
        tuple(episodes.open(key).actions.tolist())
        for episodes in (first, other)
        for key in episodes.keys
    }
    assert len(colours) == len(actions) == 6
    assert first.open("episode-000002").metadata["seed"] == derive_seed(3, "env", 2) % 2**31


def test_more_episodes_later_are_those_that_would_have_been_recorded_at_once(tmp_path):
    at_once = content(record(settings(tmp_path / "a", num_episodes=5)))
    record(settings(tmp_path / "b", num_episodes=2))
    two = content(tmp_path / "b")
    assert content(record(settings(tmp_path / "b", num_episodes=5))) == at_once
    assert two.items() <= at_once.items()


def test_a_cut_episode_says_that_it_was_truncated(tmp_path):
    episodes = Episodes(record(settings(tmp_path / "e", max_frames=5)))
    episode = episodes.open(episodes.keys[0])
    assert episode.num_frames == 5
    assert len(episode.actions) == 4
    assert episode.metadata["truncated"]
    assert not episode.metadata["terminated"]


def test_an_episode_of_one_frame_has_no_actions(tmp_path):
    episodes = Episodes(record(settings(tmp_path / "e", max_frames=1)))
    episode = episodes.open(episodes.keys[0])
    assert episode.num_frames == 1
    assert episode.actions.shape == (0,)


def test_the_blank_placeholder_at_the_end_is_no_frame(tmp_path):
    config = settings(
        tmp_path / "e", env_kwargs="blank_end=true, length=6", policy="worlds:in_turn"
    )
    episodes = Episodes(record(config))
    episode = episodes.open(episodes.keys[0])
    assert [shown_step(frame) for frame in episode.frames()] == [0, 1, 2, 3, 4, 5]
    assert episode.actions.tolist() == [0, 1, 2, 3, 0]
    # The last action, 1, led to the placeholder: its reward counts, its frame does not.
    assert episode.rewards.sum() == 6
    assert episode.metadata["total_reward"] == 7
    assert episode.metadata["terminated"]


def test_frames_are_resized_by_the_rule_and_colours_stay_colours(tmp_path):
    config = settings(tmp_path / "e", height=32, width=64, resize="pad", num_episodes=1)
    episode = Episodes(record(config)).open("episode-000000")
    frame = episode.frames()[3]
    assert frame.shape == (32, 64, 3)
    assert (frame[:, :16] == 0).all()
    assert tuple(frame[6, 16 + 6].tolist()) == ACTION_COLOURS[episode.actions[2]]
    assert tuple(episode.frames()[0, 6, 16 + 6].tolist()) == NO_ACTION


def test_a_persons_policy_sees_the_observation_and_is_obeyed(tmp_path):
    episodes = Episodes(record(settings(tmp_path / "e", policy="worlds:in_turn", num_episodes=1)))
    assert episodes.open("episode-000000").actions.tolist() == [0, 1, 2, 3] * 2 + [0, 1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"policy": "worlds:out_of_range"}, r"policy worlds:out_of_range: returned 99.*Discrete"),
        ({"policy": "worlds:broken"}, r"policy worlds:broken: failed \(KeyError: 'left'\)"),
        ({"env_kwargs": "fail_at=3"}, "worlds:LastAction-v0: step with action .* floor gave way"),
    ],
)
def test_a_failure_while_playing_is_named_and_leaves_no_torn_episode(tmp_path, changes, said):
    with pytest.raises(WorldloomError, match=said):
        record(settings(tmp_path / "e", **changes))
    assert list(content(tmp_path / "e")) == ["episodes.json"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"env": "worlds:LastAktion-v0"}, "did you mean LastAction-v0"),
        ({"env": "worlds:Spaces-v0"}, "could not be opened"),
        ({"height": 20}, "draws 16x16 .*--height 16 --width 16, or --resize stretch, crop or pad"),
        ({"policy": "no_such_module:play"}, "--policy no_such_module:play"),
        ({"policy": "stikcy"}, "did you mean 'sticky'"),
        ({"action_weights": "ACTION_9=2"}, "no action 'ACTION_9'"),
        ({"action_weights": "ACTION_1"}, "--action-weights"),
        ({"env_kwargs": "{length"}, "neither a JSON object nor TOML"),
        ({"env_kwargs": "[1]"}, "must be a table"),
        ({"env_kwargs": "length=nan"}, "kept as JSON"),
        ({"env_kwargs": "length=1979-05-27"}, "kept as JSON"),
        ({"num_episodes": 0}, "--num-episodes must be at least 1"),
        ({"workers": 0}, "--workers must be at least 1"),
        ({"fps": -1.0}, "--fps must be a positive number"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_and_leaves_nothing(tmp_path, changes, said):
    with pytest.raises(ConfigError, match=said):
        record(settings(tmp_path / "deep" / "e", **changes))
    assert list(tmp_path.iterdir()) == []


def test_env_kwargs_may_be_json_or_toml(tmp_path):
    json_kwargs = settings(tmp_path / "a", env_kwargs='{"length": 3, "blank_end": true}')
    toml_kwargs = settings(tmp_path / "b", env_kwargs="length=3, blank_end=true")
    assert content(record(json_kwargs)) == content(record(toml_kwargs))


def test_other_settings_in_the_same_folder_are_refused_by_name(tmp_path):
    record(settings(tmp_path / "e"))
    before = content(tmp_path / "e")
    with pytest.raises(ConfigError, match=r"source\.seed \(3 there, 5 here\)"):
        record(settings(tmp_path / "e", seed=5, num_episodes=9))
    with pytest.raises(ConfigError, match=r"source\.env_kwargs\.length \(None there, 4 here\)"):
        record(settings(tmp_path / "e", env_kwargs="length=4"))
    assert content(tmp_path / "e") == before


def test_another_version_of_the_game_is_refused_only_while_episodes_are_missing(tmp_path):
    record(settings(tmp_path / "e"))
    path = tmp_path / "e" / "episodes.json"
    spec = json.loads(path.read_text())
    spec["source"]["packages"]["gymnasium"] = "0.1"
    path.write_text(json.dumps(spec))
    record(settings(tmp_path / "e"))
    with pytest.raises(ConfigError, match=r"source\.packages\.gymnasium \('0\.1' there"):
        record(settings(tmp_path / "e", num_episodes=5))


def test_a_folder_of_something_else_is_refused_untouched(tmp_path):
    (tmp_path / "thesis.txt").write_text("ten years of work")
    (tmp_path / "tmp-notes").write_text("more")
    with pytest.raises(ConfigError, match=r"has thesis\.txt, tmp-notes but no episodes\.json"):
        record(settings(tmp_path))
    assert sorted(content(tmp_path)) == ["thesis.txt", "tmp-notes"]
    with pytest.raises(ConfigError, match="is a file"):
        record(settings(tmp_path / "thesis.txt"))


def test_stdout_has_the_folder_and_stderr_what_was_written(tmp_path):
    process = start(tmp_path / "e", "--num-episodes", "2")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out == f"{tmp_path / 'e'}\n"
    assert "wrote 2 episodes, 22 frames" in err
    assert "actions: ACTION_" in err
    assert "next: worldloom train-tokenizer" in err


def test_ctrl_c_leaves_whole_episodes_and_no_process(tmp_path, whole_slow):
    output = tmp_path / "e"
    more = ("--num-episodes", "8", "--env-kwargs", SLOW, "--workers", "2")
    process = start(output, *more)
    wait_until(lambda: len(list(output.glob("tmp-*"))) > 0 and any(output.glob("episode-*")))
    children = descendants(process.pid)
    assert children
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does: the whole foreground group
    process.communicate(timeout=30)
    assert process.returncode == 130
    # multiprocessing's resource tracker ends a moment after the process that it tracks for.
    wait_until(lambda: not any(alive(pid) for pid in children), timeout_s=60)
    assert 0 < len(list(output.glob("episode-*"))) < 8
    assert content(output).items() <= whole_slow.items()
    again = start(output, *more)
    again.communicate(timeout=60)
    assert content(output) == whole_slow


def test_a_recording_killed_outright_takes_its_processes_with_it_and_continues(
    tmp_path, whole_slow
):
    output = tmp_path / "e"
    more = ("--num-episodes", "8", "--env-kwargs", SLOW, "--workers", "2")
    process = start(output, *more)
    wait_until(lambda: len(list(output.glob("tmp-*"))) > 0 and any(output.glob("episode-*")))
    children = descendants(process.pid)
    process.kill()
    process.wait()
    wait_until(lambda: not any(alive(pid) for pid in children), timeout_s=60)
    torn = list(output.glob("tmp-*"))
    assert torn, "killed between episodes: nothing was proved"
    again = start(output, *more)
    again.communicate(timeout=60)
    assert content(output) == whole_slow


def test_a_killed_worker_is_reported_and_the_others_are_reaped(tmp_path):
    output = tmp_path / "e"
    more = ("--num-episodes", "9", "--env-kwargs", SLOW, "--workers", "2")
    process = start(output, *more)
    wait_until(lambda: any(output.glob("tmp-*")))
    workers = [pid for pid in descendants(process.pid) if "spawn_main" in _command(pid)]
    assert len(workers) == 2
    began = time.monotonic()
    os.kill(workers[0], signal.SIGKILL)
    _, err = process.communicate(timeout=30)
    assert time.monotonic() - began < 30
    assert process.returncode == 1
    assert f"process {workers[0]} was killed by SIGKILL on task" in err
    assert "run the same command again to continue" in err
    assert not any(alive(pid) for pid in workers)
    assert not any(output.glob("tmp-*"))


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except (FileNotFoundError, ProcessLookupError):
        return ""


@pytest.mark.parametrize("point", ["episode-write", "episode-rename", "write", "fsync", "rename"])
def test_a_kill_at_any_step_of_writing_is_survived(tmp_path, whole, point):
    output = tmp_path / "e"
    process = start(output, "--num-episodes", "4", WORLDLOOM_FAILPOINT=f"{point}:1")
    process.communicate(timeout=60)
    assert process.returncode != 0
    written = content(output)
    assert {k: v for k, v in written.items() if not k.startswith("tmp-")}.items() <= whole.items()
    again = start(output, "--num-episodes", "4")
    _, err = again.communicate(timeout=60)
    assert again.returncode == 0, err
    assert content(output) == whole


def test_a_full_disk_is_one_sentence_and_leaves_only_whole_episodes(tmp_path):
    output = tmp_path / "e"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    try:
        process = start(
            output, "--num-episodes", "4", "--workers", "2", "--env-kwargs", "length=3000",
            "--max-frames", "4000",
        )  # fmt: skip
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert out == ""
    assert "Traceback" not in err
    assert "episode-00000" in err
    assert "File too large" in err
    assert "nothing was left half written" in err
    assert list(content(output)) == ["episodes.json"]


def test_two_recordings_never_write_to_one_folder_at_once(tmp_path):
    output = tmp_path / "e"
    more = ("--num-episodes", "4", "--env-kwargs", "pause_s=0.1")
    first = start(output, *more)
    wait_until(lambda: any(output.glob("tmp-*")))
    with pytest.raises(ConfigError, match="another recording is writing there"):
        record(settings(output, env_kwargs="pause_s=0.1"))
    _, err = first.communicate(timeout=60)
    assert first.returncode == 0, err
    assert len(list(output.glob("episode-*"))) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("env", "package", "frame_skip", "size"),
    [
        ("VizdoomBasic-v1", "vizdoom", 4, (120, 160)),
        ("ALE/Pong-v5", "ale_py", 4, (210, 160)),
        ("MiniGrid-Empty-8x8-v0", "minigrid", 1, (256, 256)),
        ("CartPole-v1", "gymnasium", 2, (400, 600)),
    ],
)
def test_an_episode_does_not_depend_on_the_ones_played_before_it(
    tmp_path, env, package, frame_skip, size
):
    pytest.importorskip(package)
    # Two processes play an episode after others than one process does. Doom's engine would carry
    # the bobbing of the weapon over: one of 24 episodes shows it.
    num_episodes = 24 if package == "vizdoom" else 4
    one, two = (
        content(
            record(
                RecordConfig(
                    env=env, output=tmp_path / str(workers), num_episodes=num_episodes,
                    frame_skip=frame_skip, height=size[0], width=size[1], max_frames=80,
                    workers=workers,
                )
            )
        )
        for workers in (1, 2)
    )  # fmt: skip
    assert len(one) == num_episodes + 1
    assert [name for name in one if one[name] != two[name]] == []


@pytest.mark.slow
def test_doom_is_recorded_without_its_blank_end_and_leaves_no_litter(tmp_path, monkeypatch):
    pytest.importorskip("vizdoom")
    monkeypatch.chdir(tmp_path)
    config = RecordConfig(
        env="VizdoomBasic-v1", output=Path("doom"), num_episodes=3, frame_skip=4, resize="stretch"
    )
    episodes = Episodes(record(config))
    assert [path.name for path in tmp_path.iterdir()] == ["doom"]
    assert episodes.spec.actions.names == ("NOOP", "ATTACK", "MOVE_RIGHT", "MOVE_LEFT")
    assert episodes.spec.frame_skip == 4
    assert episodes.spec.fps == 8.75
    for key in episodes.keys:
        frames_THWC = episodes.open(key).frames()
        assert frames_THWC.reshape(len(frames_THWC), -1).max(1).min() > 50
        # The walls and the floor are brown: more red than blue. A swap of channels would show.
        red, _, blue = frames_THWC[:, 40:60, :20].reshape(-1, 3).mean(0)
        assert red > 1.2 * blue
        # The status bar of the game would be a grey strip with red digits below all else.
        assert frames_THWC[0, 60:, :20].astype(float).std() < 25
