import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from video_worlds import (
    KEYS,
    SIDE,
    SPECS,
    World,
    assert_aligned,
    played,
    read_here,
    write_actions,
    write_video,
)
from worldloom.common import ConfigError, Episodes, FormatError, check_key
from worldloom.pipelines.ingest import IngestConfig
from worldloom.pipelines.ingest_config import ActionFileConfig
from worldloom.pipelines.ingest_worker import IngestReport
from worldloom.pipelines.sources import open_source
from worldloom.pipelines.sources.keys import unique_keys

KINDS = [kind for kind in SPECS if kind != "none"]


def settings(path: Path, /, **changes: Any) -> IngestConfig:
    plain = {"kind": "videos", "output": path.parent / "episodes", "height": SIDE, "width": SIDE}
    return IngestConfig(path=path, **{**plain, **changes})


def flags(kind: str, suffix: str, **more: Any) -> ActionFileConfig:
    """What a person has to say for the world's files of actions to be read."""
    given: dict[str, Any] = {}
    if suffix == ".csv" and kind != "discrete":
        given["columns"] = SPECS[kind].names
    if suffix == ".csv" and kind in ("keys", "multi_discrete"):
        given["kind"] = kind
    if kind == "multi_discrete" and suffix != ".csv":
        given["kind"] = kind
    if kind == "multi_discrete":
        given["sizes"] = (3, 5)
    if kind == "discrete":
        given["names"] = SPECS[kind].names
    if kind == "keys" and suffix != ".csv":
        given["names"] = KEYS
    if kind == "continuous":
        given |= {"low": (-1.0, -2.0), "high": (1.0, 2.0)}
    return ActionFileConfig(**given, **more)


def one(folder: Path) -> Any:
    episodes = Episodes(folder)
    return episodes.open(episodes.keys[0])


@pytest.mark.parametrize("frame_skip", [1, 3])
@pytest.mark.parametrize("alignment", ["next", "previous"])
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".npz"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_action_stands_between_the_frames_that_it_joins(
    tmp_path, kind, suffix, alignment, frame_skip
):
    world = played(kind, 20)
    write_video(tmp_path / "v/a.mp4", world.frames_THWC)
    write_actions(tmp_path / f"v/a{suffix}", world, alignment=alignment, full=frame_skip == 1)
    config = settings(
        tmp_path / "v",
        frame_skip=frame_skip,
        actions=flags(kind, suffix, alignment=alignment),
    )
    _, (report,) = read_here(config)
    assert isinstance(report, IngestReport), report
    with one(config.output) as episode:
        assert_aligned(episode, world, frame_skip=frame_skip)
        assert episode.spec.actions == SPECS[kind] or kind in (
            "keys",
            "multi_discrete",
            "continuous",
        )


def test_the_wrong_alignment_is_found_out_by_the_assertion_above(tmp_path):
    world = played("discrete", 20)
    write_video(tmp_path / "v/a.mp4", world.frames_THWC)
    write_actions(tmp_path / "v/a.csv", world, alignment="previous")
    config = settings(tmp_path / "v", actions=flags("discrete", ".csv", alignment="next"))
    read_here(config)
    with one(config.output) as episode, pytest.raises(AssertionError):
        assert_aligned(episode, world)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm", ".gif", ".avi", ".mov"])
def test_every_container_gives_all_frames_in_order_and_none_twice(tmp_path, suffix):
    world = played("none", 41)
    write_video(tmp_path / f"v/a{suffix}", world.frames_THWC)
    config = settings(tmp_path / "v")
    read_here(config)
    with one(config.output) as episode:
        assert_aligned(episode, world)
        assert episode.spec.fps == 20
        assert episode.spec.actions.kind == "none"


@pytest.mark.parametrize("alignment", ["next", "previous"])
@pytest.mark.parametrize("rows", [1, 17, 18, 21, 40])
def test_other_numbers_of_rows_than_the_frames_or_one_less_are_refused_with_both(
    tmp_path, rows, alignment
):
    world = played("discrete", 20)
    write_video(tmp_path / "v/a.mp4", world.frames_THWC)
    more = World(world.spec, np.resize(world.raw, rows), world.frames_THWC)
    write_actions(tmp_path / "v/a.csv", more, full=False)
    config = settings(tmp_path / "v", actions=flags("discrete", ".csv", alignment=alignment))
    _, (answer,) = read_here(config)
    assert f"a.csv: {rows} rows for 20 frames, must be 19 or 20" in answer.reason


def test_a_video_without_actions_among_others_with_them_is_a_bad_recording(tmp_path):
    world = played("discrete", 6)
    for name in ("a", "b", "c"):
        write_video(tmp_path / f"v/{name}.mp4", world.frames_THWC)
    write_actions(tmp_path / "v/a.csv", world)
    write_actions(tmp_path / "v/c.jsonl", world)
    config = settings(
        tmp_path / "v", actions=ActionFileConfig(columns=("action",), names=world.spec.names)
    )
    _, answers = read_here(config)
    assert [isinstance(answer, IngestReport) for answer in answers] == [True, False, True]
    assert "b.mp4: has no file of actions beside it" in answers[1].reason
    write_actions(tmp_path / "v/a.npz", world)
    _, answers = read_here(config)
    assert "a.csv and a.npz both lie beside it" in answers[0].reason
    none = settings(tmp_path / "v", actions=ActionFileConfig(format="none"))
    assert open_source("videos", tmp_path / "v", none).actions.kind == "none"


JSONL = '{"action": 0}\n{"action": 1}\n{"action": 2}\n'


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.jsonl", JSONL + '{"action": \n', "line 4: cannot be read as JSON"),
        ("a.jsonl", JSONL + "\n" + JSONL, "line 4: is empty"),
        ("a.jsonl", JSONL + '{"act": 1}\n', "line 4: column 'action' stands there 0 times"),
        ("a.jsonl", JSONL + '{"action": NaN}\n', "line 4: nan is no number"),
        ("a.jsonl", JSONL + '{"action": {"a": 1}}\n', "line 4: {'a': 1} is no number"),
        ("a.jsonl", JSONL + '{"action": ' + "[" * 100_000, "line 4: more than 65536 bytes"),
        ("a.jsonl", JSONL + '{"action": -1}\n', "has -1 in slot 0"),
        ("a.jsonl", JSONL + '{"action": 9}\n', "has 9 in slot 0"),
        ("a.jsonl", JSONL + '{"action": "fly"}\n', "row 3 has 'fly', which is none of"),
        ("a.jsonl", JSONL + '{"action": 1.5}\n', "row 3 has 1.5"),
        ("a.csv", "action\n0\n1,1\n", "line 3: 2 values under 1 columns"),
        ("a.csv", "action,action\n0,1\n", "column 'action' stands there 2 times"),
        ("a.csv", "", "is empty"),
        ("a.csv", "action\n" + "9" * 70_000 + "\n", "a line of more than"),
        ("a.csv", "action\n\xff\n", "cannot be read as actions"),
        ("a.npz", "rubbish", "not an npz"),
    ],
)
def test_a_damaged_file_of_actions_is_refused_and_names_the_line(tmp_path, name, text, said):
    world = played("discrete", 4)
    for stem in ("0", "a"):
        write_video(tmp_path / f"v/{stem}.mp4", world.frames_THWC)
    write_actions(tmp_path / "v/0.csv", world)
    (tmp_path / "v" / name).write_bytes(text.encode("latin-1"))
    given = ActionFileConfig(columns=("action",), kind="discrete", names=world.spec.names)
    _, (good, bad) = read_here(settings(tmp_path / "v", actions=given))
    assert isinstance(good, IngestReport)
    assert f"{name}" in bad.reason
    assert said in bad.reason


@pytest.mark.parametrize(
    ("text", "given", "said"),
    [
        ("frame,x,y\n0,1,2\n", {}, "which of its columns are the actions\\? .* frame, x, y"),
        ("action\n", {}, "no file of actions has a row"),
        ("frame,x,y\n0,1,2\n", {"columns": ("x", "y")}, "--actions.kind keys, or"),
        ("frame,x\n0,0.5\n1,-2\n", {}, "--actions.low .* found are x -2 to 0.5"),
        ("action\n70000\n", {}, "more than 4096 different ones"),
        ("action\n1\n", {"kind": "discrete", "names": ("a", "a")}, "a name stands twice"),
        ("x,y\n1,2\n", {"columns": ("z",)}, "column 'z' stands there 0 times, .* x, y"),
    ],
)
def test_what_can_be_read_in_two_ways_is_asked_for_with_what_there_is(tmp_path, text, given, said):
    write_video(tmp_path / "v/a.mp4", played("none", 3).frames_THWC)
    (tmp_path / "v/a.csv").write_text(text)
    config = settings(tmp_path / "v", actions=ActionFileConfig(**given))
    with pytest.raises((ConfigError, FormatError), match=said):
        open_source("videos", tmp_path / "v", config)


@pytest.mark.parametrize(
    ("suffix", "text", "kind", "names"),
    [
        (".csv", "frame,move\n0,2\n1,0\n", "discrete", ("0", "1", "2")),
        (".csv", "action\nleft\nfire\n", "discrete", ("fire", "left")),
        (".jsonl", "1\n0\n", "discrete", ("0", "1")),
        (".jsonl", '["w", "a"]\n[]\n', "keys", ("a", "w")),
        (".jsonl", '{"keys": []}\n{"keys": ["s"]}\n', "keys", ("s",)),
        (".jsonl", '{"action": [true, false]}\n', "keys", ("action0", "action1")),
    ],
)
def test_columns_and_kind_are_found_where_there_is_one_way(tmp_path, suffix, text, kind, names):
    write_video(tmp_path / "v/a.mp4", played("none", 3).frames_THWC)
    (tmp_path / f"v/a{suffix}").write_text(text)
    spec = open_source("videos", tmp_path / "v", settings(tmp_path / "v")).actions
    assert (spec.kind, spec.names) == (kind, names)


def test_a_file_at_another_rate_is_refused_with_both_files_unless_the_rate_is_given(tmp_path):
    world = played("none", 8)
    write_video(tmp_path / "v/a.mp4", world.frames_THWC)
    write_video(tmp_path / "v/b.mp4", world.frames_THWC, fps=30)
    _, (good, bad) = read_here(settings(tmp_path / "v"))
    assert isinstance(good, IngestReport)
    assert "b.mp4: 30 frames per second, but" in bad.reason
    assert "a.mp4 has 20" in bad.reason
    config = settings(tmp_path / "v", fps=25.0, output=tmp_path / "given")
    _, answers = read_here(config)
    assert all(isinstance(answer, IngestReport) for answer in answers)
    assert Episodes(config.output).spec.fps == 25


def test_a_file_of_another_size_is_refused_with_both_files_unless_a_rule_is_given(tmp_path):
    world, small = played("none", 8), played("none", 8, side=32)
    write_video(tmp_path / "v/a.mp4", world.frames_THWC)
    write_video(tmp_path / "v/b.mp4", small.frames_THWC)
    _, (good, bad) = read_here(settings(tmp_path / "v"))
    assert isinstance(good, IngestReport)
    assert "b.mp4: frames are 32x32 (height x width), wanted are 64x64, as of a.mp4" in bad.reason
    config = settings(tmp_path / "v", resize="stretch", output=tmp_path / "stretched")
    read_here(config)
    for key in ("a", "b"):
        with Episodes(config.output).open(key) as episode:
            assert_aligned(episode, world)


def test_names_of_every_kind_become_keys_that_are_safe_and_differ(tmp_path):
    world = played("none", 3)
    names = [
        "a b",
        "a_b",
        "a\nb",
        "é",
        "è",
        "x" * 240,
        "x" * 239 + "y",
        "tmp-1-a",
        "c.d",
        "-",
        "..b",
    ]
    for name in names:
        write_video(tmp_path / "v/plain.mp4", world.frames_THWC).rename(tmp_path / f"v/{name}.mp4")
    write_video(tmp_path / "v/sub/a_b.mp4", world.frames_THWC)
    write_video(tmp_path / "v/a_b.mkv", world.frames_THWC)
    os.rename(tmp_path / "v/c.d.mp4", os.fsencode(tmp_path / "v") + b"/\xff\xfe.mp4")
    config = settings(tmp_path / "v")
    source, answers = read_here(config)
    assert all(isinstance(answer, IngestReport) for answer in answers), answers
    keys = Episodes(config.output).keys
    # "..b" begins with a dot, and what is hidden is left alone.
    assert len(keys) == len(set(map(str.casefold, keys))) == len(names) - 1 + 2
    (tmp_path / "v/new.mp4").symlink_to(tmp_path / "v/a b.mp4")
    later = open_source("videos", tmp_path / "v", config)
    assert {r.key for r in later.recordings} == {r.key for r in source.recordings} | {"new"}


@given(names=st.sets(st.text(min_size=1, max_size=100), max_size=8))
@hypothesis_settings(max_examples=300, deadline=None, derandomize=True)
def test_any_names_become_keys_that_a_part_number_still_fits_behind(names):
    several = sorted(names)
    several += [key for key in unique_keys(several) if key not in names]  # a stranger's trap
    keys = unique_keys(several)
    assert len(set(keys)) == len(several)
    for name, key in zip(several, keys, strict=True):
        check_key(f"{key}-000000", where=name)


def test_links_are_followed_and_never_in_a_circle(tmp_path):
    world = played("none", 3)
    write_video(tmp_path / "elsewhere/a.mp4", world.frames_THWC)
    (tmp_path / "v/inner").mkdir(parents=True)
    (tmp_path / "v/folder").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "v/inner/circle").symlink_to(tmp_path / "v")
    (tmp_path / "v/gone.mp4").symlink_to(tmp_path / "nothing.mp4")
    config = settings(tmp_path / "v", skip_bad=1)
    source, answers = read_here(config)
    assert [recording.origin for recording in source.recordings] == ["folder/a.mp4", "gone.mp4"]
    assert isinstance(answers[0], IngestReport)
    assert "gone.mp4: not found" in answers[1].reason


def test_pipes_and_devices_are_refused_and_nobody_waits_for_them(tmp_path):
    world = played("discrete", 4)
    write_video(tmp_path / "v/0.mp4", world.frames_THWC)
    write_video(tmp_path / "v/2.mp4", world.frames_THWC)
    write_actions(tmp_path / "v/0.csv", world)
    os.mkfifo(tmp_path / "v/1.mp4")
    write_actions(tmp_path / "v/1.csv", world)
    os.mkfifo(tmp_path / "v/2.csv")
    (tmp_path / "v/3.mp4").symlink_to("/dev/zero")
    write_actions(tmp_path / "v/3.csv", world)
    _, answers = read_here(settings(tmp_path / "v"))
    assert isinstance(answers[0], IngestReport)
    for answer, name in zip(answers[1:], ("1.mp4", "2.csv", "3.mp4"), strict=True):
        assert f"{name}: not an ordinary file" in answer.reason


def test_the_episodes_say_where_they_come_from_and_hold_no_path_of_the_machine(tmp_path):
    world = played("discrete", 6)
    write_video(tmp_path / "v/day 1/a.mp4", world.frames_THWC)
    write_actions(tmp_path / "v/day 1/a.csv", world)
    config = settings(tmp_path / "v", frame_skip=2)
    read_here(config)
    text = (config.output / "episodes.json").read_text()
    source = json.loads(text)["source"]
    assert str(tmp_path) not in text
    assert source["alignment"].startswith("row i of the file of actions leads from frame i")
    assert source["combining"] == "the last action of the steps"
    assert source["columns"] == ["action"]
    with one(config.output) as episode:
        assert episode.metadata["origin"] == "day 1/a.mp4"
        assert episode.spec.fps == 10
