"""Promises of replay and info: a session again, to the same codes or the first that differs."""

import json
import re
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from pipelines.play.playing import (
    GUIDED,
    KINDS,
    WARM,
    load_world,
    some_keys,
    some_start,
    write_world,
)
from worldloom.common import ConfigError, FormatError, MismatchError
from worldloom.pipelines.cli import main
from worldloom.pipelines.info import describe
from worldloom.pipelines.play.session import PlaySession
from worldloom.pipelines.play.session_log import RecordedSession, SessionLog, Step
from worldloom.pipelines.play.worlds import world_files
from worldloom.pipelines.replay import ReplayConfig, replay
from worldloom.pipelines.video_files import VideoFile

NOON = datetime(2026, 1, 31, 12, 0, 0)


def play(folder):
    """Play a world in all ways; return the session's folder and every frame that was seen."""
    world = load_world(folder)
    log = SessionLog(folder / "sessions", files=world_files(folder), world=world, now=NOON)
    starts = [some_start(world), some_start(world, seed=1)]
    session = PlaySession(world, starts, sampling=WARM, seed=5, log=log)
    keys = some_keys(world, 30)
    seen = [session.reset().frames_THWC]
    for number, slots_rA in enumerate(keys):
        if number in (10, 20):
            session.sampling = GUIDED if number == 10 else WARM
        seen.append(session.step(slots_rA).frames_THWC)
    seen.append(session.rewind(7).frames_THWC[-1:])
    seen += [session.step(slots_rA).frames_THWC for slots_rA in keys[7:12]]  # the same way
    seen += [session.rewind(position).frames_THWC[-1:] for position in (2, 9)]
    session.sampling = GUIDED
    seen += [session.step(slots_rA).frames_THWC for slots_rA in keys[:4]]  # another
    seen.append(session.reset(start=1, seed=9).frames_THWC)
    seen += [session.step(session.act()).frames_THWC for _ in range(3)]
    session.close()
    return log.folder, np.concatenate(seen)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """A world of every kind, played: its folder, the session's, and what was seen."""
    parent = tmp_path_factory.mktemp("worlds")
    folders = {kind: write_world(parent / kind, kind) for kind in KINDS}
    return {kind: (folder, *play(folder)) for kind, folder in folders.items()}


@pytest.fixture
def copied(worlds, tmp_path):
    """A played world to harm; its session's folder."""
    folder, session, _ = worlds["plain"]
    no_films = shutil.ignore_patterns("*.mp4")
    there = Path(shutil.copytree(folder, tmp_path / "world", ignore=no_films))
    return there / "sessions" / session.name


def frames_of(path):
    """The frames of a film, at the size of the world."""
    with VideoFile(path) as video:
        large_THWC = np.stack(list(video.frames()))
    return large_THWC[:, 16::32, 16::32]


@pytest.mark.parametrize("kind", KINDS)
def test_a_session_replays_to_the_same_codes_and_a_film_of_what_was_seen(worlds, kind, capsys):
    _, session, seen_THWC = worlds[kind]
    path = replay(ReplayConfig(session=session))
    assert path == session / "replay.mp4"
    assert "the same codes again" in capsys.readouterr().err
    film_THWC = frames_of(path)
    assert film_THWC.shape == seen_THWC.shape
    # The codec keeps 4:2:0 colours, at near to no loss.
    assert np.abs(film_THWC.astype(int) - seen_THWC).mean() < 6
    assert not list(session.glob("tmp-*"))


@pytest.mark.parametrize("line", [2, 11, 20, 43, 49])
def test_the_first_frame_that_differs_is_named_and_the_exit_code_is_3(copied, line, capsys):
    path = copied / "events.jsonl"
    lines = path.read_text().splitlines()
    assert json.loads(lines[line - 1])["event"] == "step"
    for number in (line, len(lines)):  # a later one, too
        event = json.loads(lines[number - 1])
        event["codes"][5] = (event["codes"][5] + 1) % 16
        lines[number - 1] = json.dumps(event)
    path.write_text("\n".join(lines) + "\n")
    assert main(["replay", str(copied), "--device", "cpu"]) == 3
    said = capsys.readouterr()
    assert said.out == ""
    error = next(row for row in said.err.splitlines() if row.startswith("error: "))
    assert f"events.jsonl: line {line}: step " in error
    assert re.search(r"1 of 16, the first in cell \(1, 1\), \d+ then and \d+ now", error)
    earlier = lines[: line - 1]
    steps = [json.loads(row) for row in earlier if json.loads(row)["event"] == "step"]
    assert f"step {len(steps) + 1} of the session" in error
    starts = sum(json.loads(row)["event"] == "reset" for row in earlier)
    assert f"of start {starts}, is the first whose codes differ" in error
    assert not (copied / "replay.mp4").exists()
    assert not list(copied.glob("tmp-*"))


def test_pressing_another_key_in_the_log_leads_to_other_codes(copied):
    path = copied / "events.jsonl"
    lines = path.read_text().splitlines()
    event = json.loads(lines[3])
    event["slots"] = [[(max(0, event["slots"][0][0]) + 1) % 3]]
    path.write_text("\n".join([*lines[:3], json.dumps(event), *lines[4:]]) + "\n")
    with pytest.raises(MismatchError, match="line 4: step 3 of the session, position 3 of start 1"):
        replay(ReplayConfig(session=copied))


def test_other_versions_are_named_where_codes_differ(copied):
    header = json.loads((copied / "session.json").read_text())
    header["versions"]["torch"] = "1.0"
    (copied / "session.json").write_text(json.dumps(header))
    replay(ReplayConfig(session=copied))  # where they agree it does not matter
    path = copied / "events.jsonl"
    lines = path.read_text().splitlines()
    event = json.loads(lines[1])
    event["codes"][0] = (event["codes"][0] + 1) % 16
    path.write_text("\n".join([lines[0], json.dumps(event), *lines[2:]]) + "\n")
    with pytest.raises(MismatchError, match=r"other versions: torch '1.0' then, '"):
        replay(ReplayConfig(session=copied))


def test_a_torn_session_replays_up_to_the_tear(copied, capsys):
    path = copied / "events.jsonl"
    path.write_bytes(path.read_bytes()[:-10])
    replay(ReplayConfig(session=copied, output=copied.parent / "films" / "out.mp4"))
    said = capsys.readouterr().err
    assert "cut short" in said
    assert (copied.parent / "films" / "out.mp4").stat().st_size > 0


def test_another_model_is_refused_and_a_missing_one_can_be_named(copied, tmp_path):
    world = copied.parents[1]
    other = write_world(tmp_path / "other", "plain", seed=2)
    with pytest.raises(MismatchError, match="another model than the one that was played"):
        replay(ReplayConfig(session=copied, model=other / "dynamics" / "model"))
    shutil.move(world / "dynamics" / "model", tmp_path / "model")
    shutil.move(world / "tokenizer" / "model", tmp_path / "tokenizer")
    with pytest.raises(FormatError, match="is not there; say where it is with --model"):
        replay(ReplayConfig(session=copied))
    with pytest.raises(FormatError, match="tokenizer"):
        replay(ReplayConfig(session=copied, model=tmp_path / "model"))
    replay(
        ReplayConfig(
            session=copied, model=tmp_path / "model", tokenizer=str(tmp_path / "tokenizer")
        )
    )


def test_a_name_in_a_session_file_imports_nothing(copied):
    header = json.loads((copied / "session.json").read_text())
    for name in ("os:system", "antigravity:fly", "image"):
        (copied / "session.json").write_text(json.dumps({**header, "tokenizer": name}))
        with pytest.raises((FormatError, MismatchError)):
            replay(ReplayConfig(session=copied))
    assert "antigravity" not in sys.modules
    (copied / "session.json").write_text(json.dumps({**header, "tokenizer": ""}))
    with pytest.raises(FormatError, match="name it with --tokenizer"):
        replay(ReplayConfig(session=copied))


def test_code_that_came_with_a_session_is_not_run(copied, monkeypatch):
    """A path that ends like `module:Class`, as seen from where a person stands."""
    header = json.loads((copied / "session.json").read_text())
    (copied / "stranger.py").write_text("raise SystemExit('the stranger is in')\n")
    monkeypatch.chdir(copied)
    for name in ("../stranger:Tokenizer", f"../{copied.name}/stranger:Tokenizer", "stranger:T"):
        (copied / "session.json").write_text(json.dumps({**header, "tokenizer": name}))
        for session in (copied, Path(".")):
            with pytest.raises((FormatError, MismatchError)):
                replay(ReplayConfig(session=session))
    assert "stranger" not in sys.modules


def test_a_session_is_found_through_a_link(copied, tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    link = tmp_path / "deep" / "er" / "link"
    link.symlink_to(copied)
    assert describe(link, verify=True)["verified"] is True
    assert replay(ReplayConfig(session=link, output=tmp_path / "film.mp4")) is not None


def test_a_header_that_is_not_of_its_model_is_refused(copied):
    header = json.loads((copied / "session.json").read_text())
    header["actions"]["names"] = ["STAY", "RIGHT", "LEFT"]
    (copied / "session.json").write_text(json.dumps(header))
    with pytest.raises(MismatchError, match="the file was altered"):
        replay(ReplayConfig(session=copied))


def test_settings_that_the_model_has_not_are_refused_by_their_line(copied):
    path = copied / "events.jsonl"
    lines = path.read_text().splitlines()
    event = json.loads(lines[0])
    event["sampling"]["decoder"] = "maskgit"
    path.write_text("\n".join([json.dumps(event), *lines[1:]]) + "\n")
    with pytest.raises(FormatError, match=r"line 1: .*maskgit"):
        replay(ReplayConfig(session=copied))


def test_a_session_in_which_nothing_was_done_is_refused(copied):
    (copied / "events.jsonl").write_bytes(b"")
    with pytest.raises(FormatError, match="nothing was played"):
        replay(ReplayConfig(session=copied))


def test_a_device_that_is_not_here_is_said(copied):
    with pytest.raises(ConfigError, match="not to be had here"):
        replay(ReplayConfig(session=copied, device="cuda:99"))


# worldloom info SESSION


@pytest.mark.parametrize("kind", KINDS)
def test_info_tells_of_a_session_what_was_done(worlds, kind):
    folder, session, seen_THWC = worlds[kind]
    about = describe(session)
    r = KINDS[kind].frames_per_latent
    assert about["kind"] == "session"
    assert (about["num_starts"], about["start"], about["seeds"]) == (
        2,
        ["start 0", "start 1"],
        [5, 9],
    )
    assert (about["num_steps"], about["num_rewinds"]) == (42, 3)
    assert about["num_frames"] == 42 * r
    assert len(seen_THWC) == 42 * r + 2 + 3
    assert about["seconds"] == pytest.approx(42 * r / 8.75)
    assert about["last_line_cut_short"] is False
    assert about["model"] == str(folder / "dynamics" / "model")
    steps = [event for _, event in RecordedSession(session).events() if isinstance(event, Step)]
    pressed = [tuple(slots_A) for event in steps for slots_A in event.slots_rA.tolist()]
    assert about["actions"]["steps"] == len(pressed)
    assert sum(about["actions"]["histogram"].values()) <= len(pressed)
    most = max(pressed.count(slots) for slots in set(pressed))
    assert next(iter(about["actions"]["histogram"].values())) == most


def test_info_verifies_that_the_model_is_still_the_one(copied, tmp_path):
    assert describe(copied, verify=True)["verified"] is True
    path = copied.parents[1] / "dynamics" / "model" / "config.json"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(FormatError, match="another model than the one that was played"):
        describe(copied, verify=True)
    describe(copied)


def test_info_of_a_session_prints_it_and_needs_no_torch(copied):
    (copied / "events.jsonl").write_bytes((copied / "events.jsonl").read_bytes()[:-3])
    code = (
        "import sys; from worldloom.pipelines.cli import main; "
        f"ended = [main(['info', {str(copied)!r}]), main(['info', {str(copied)!r}, '--json'])]; "
        "sys.exit(any(ended) or 'torch' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert f"{copied}: a play session" in ended.stdout
    assert re.search(r"last line cut short +yes", ended.stdout)
    assert '"kind": "session"' in ended.stdout


def test_info_refuses_a_forged_session_by_its_line(copied):
    with (copied / "events.jsonl").open("ab") as file:
        file.write(b'{"event": "rewind", "position": 100}\n')
    with pytest.raises(FormatError, match=r"line \d+: position: 100"):
        describe(copied)


def test_as_many_threads_compute_as_did(copied, monkeypatch):
    path = copied / "session.json"
    header = json.loads(path.read_text())
    assert header["threads"] == torch.get_num_threads()
    path.write_text(json.dumps({**header, "threads": 3}))
    seen, step = set(), PlaySession.step

    def counted(self, slots_rA):
        seen.add(torch.get_num_threads())
        return step(self, slots_rA)

    monkeypatch.setattr(PlaySession, "step", counted)
    replay(ReplayConfig(session=copied))
    assert (seen, torch.get_num_threads()) == ({3}, header["threads"])
