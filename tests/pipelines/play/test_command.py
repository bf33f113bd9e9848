"""`worldloom play` as a person types it: which world, where it listens, how it ends."""

import re
import shutil
import signal
import socket
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from pipelines.play.raw import (
    FRAME,
    connect,
    drain,
    fast_writer,
    parts,
    resident_bytes,
    slow_reader,
)
from worldloom.common import ConfigError, FormatError
from worldloom.dynamics import SamplingConfig
from worldloom.pipelines.cli import main
from worldloom.pipelines.play import command as play_command
from worldloom.pipelines.play.command import play
from worldloom.pipelines.play.config import PlayConfig
from worldloom.pipelines.play.session_log import RecordedSession, Step

LOOPBACK_HEX = "0100007F"


@contextmanager
def started(commands, *words):
    """A `worldloom play` that runs, and the address that it printed."""
    command = commands.start("play", *words, "--device", "cpu")
    try:
        yield command, said(command, r"open (http://\S+)")
    except BaseException:
        with suppress(OSError):  # a test that got so far has waited for its end
            command.send(signal.SIGKILL)
            command.wait()
        raise


def said(command, pattern, timeout_s=60.0):
    """Wait until the command says something on stderr; return its group."""
    deadline = time.monotonic() + timeout_s
    while True:
        text = Path(f"{command._stem}.err").read_text()
        if found := re.search(pattern + r"\s", text):
            return found[1]
        assert command.is_running(), text
        assert time.monotonic() < deadline, text
        time.sleep(0.02)


def codes_of(sessions):
    """The codes of every step of the only session in a folder."""
    (folder,) = sessions.iterdir()
    events = [event for _, event in RecordedSession(folder).events()]
    return [event.codes_hw for event in events if isinstance(event, Step)]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("reads", [True, False], ids=["a page that reads", "a page that does not"])
def test_a_signal_ends_it_at_once_with_every_step_kept(
    commands, steer_world, tmp_path, number, code, reads
):
    words = (steer_world, "--port", 0, "--pace", 0, "--sessions", tmp_path / "sessions")
    with started(commands, *words) as (command, address):
        port = int(parts(address)[0].rpartition(":")[2])
        options = {} if reads else {"sock": slow_reader(port), "max_queue": 1, "close_timeout": 0.1}
        with connect(address, **options) as page:
            page.greeting()
            page.say("format", image="png")
            page.say("record", on=True)
            page.say("run", on=True)
            position = page.reach(30)["position"]
            if not reads:
                time.sleep(3.0)
            command.send(number)
            began = time.monotonic()
            if reads:
                assert page.close_code() == 1012
            ended = command.wait()
            # Under a second on an idle machine; waiting for who takes nothing would be over 20.
            assert time.monotonic() - began < 10
        assert ended.code == code
        *_, last = ended.err.splitlines()
        (folder,) = (tmp_path / "sessions").iterdir()
        assert last == f"this session is kept; a video of it: worldloom replay {folder}"
        assert "Traceback" not in ended.err
        assert len(codes_of(tmp_path / "sessions")) >= position
        (video,) = folder.glob("recording-*.mp4")
        assert video.stat().st_size > 1000
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", port), 1)


def test_by_default_it_listens_on_this_machine_alone_and_says_the_token_nowhere_else(
    commands, steer_world, tmp_path
):
    with started(commands, steer_world, "--port", 0, "--sessions", tmp_path) as (command, address):
        origin, token = parts(address)
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", origin)
        port = int(origin.rpartition(":")[2])
        rows = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
        listening = re.findall(rf"\d: (\w+):{port:04X} \w+:0000 0A", rows)
        assert listening == [LOOPBACK_HEX]
        with connect(address) as page:
            page.greeting()
            page.socket.send("{")
            page.until("error")
        command.send(signal.SIGINT)
        ended = command.wait()
    assert ended.err.count(token) == 1
    assert f"ssh -L {port}:127.0.0.1:{port} " in ended.err
    assert ended.out == ""


def flood_for_10_s(page, pid):
    """Send 10,000 messages a second, or as many as are taken; return (most bytes, messages)."""
    before, most, sent = resident_bytes(pid), 0, 0
    texts = ['{"type":"input","held":["LEFT"],"n":1}', "?", '{"type":"format","image":"jpeg"}']
    began = time.monotonic()
    while (elapsed := time.monotonic() - began) < 10.0:
        for _ in range(min(100, int(elapsed * 1e4) - sent)):
            page.socket.send(texts[sent % 3])
            sent += 1
        most = max(most, resident_bytes(pid) - before)
    return most, sent


@pytest.mark.slow
def test_ten_seconds_of_flood_leave_the_memory_of_a_server_of_its_own_within_20_mb(
    commands, steer_world, tmp_path
):
    words = (steer_world, "--port", 0, "--pace", 20, "--sessions", tmp_path)
    with started(commands, *words) as (command, address):
        sock, received = fast_writer(int(parts(address)[0].rpartition(":")[2])), {}
        with connect(address, sock=sock) as page:
            page.greeting()
            page.say("run", on=True)
            page.reach(60)
            drain(page, received)
            most, sent = flood_for_10_s(page, command.pid)
            page.say("input", held=["FIRE"], n=99)
            deadline = time.monotonic() + 60
            while received[FRAME]["n"] != 99:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert received[FRAME]["held"] == ["FIRE"]
        command.send(signal.SIGINT)
        assert command.wait().code == 130
    assert most < 20 << 20, f"{most >> 20} MiB after {sent} messages"


def test_a_port_in_use_is_named_before_anything_is_loaded(steer_world, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(steer_world, broken)
    (broken / "dynamics" / "model" / "model.safetensors").write_bytes(b"")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["play", str(broken), "--port", str(port)]) == 2
        error = capsys.readouterr().err
        assert f"--port {port}" in error
        assert "--port 0" in error
        assert "loading" not in error
    assert main(["play", str(broken), "--port", "0"]) == 3
    assert "model.safetensors" in capsys.readouterr().err


def test_without_a_world_those_found_here_are_listed(steer_world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["play"]) == 2
    assert "worldloom demo" in capsys.readouterr().err
    for name in ("runs/one", "runs/two"):
        shutil.copytree(steer_world, tmp_path / name)
    assert main(["play"]) == 2
    error = capsys.readouterr().err
    assert "  runs/one\n" in error
    assert "  runs/two\n" in error
    assert re.search(r"as in: worldloom play runs/(one|two)\n", error)


def test_without_a_world_the_only_one_is_played(
    commands, steer_world, tmp_path, monkeypatch, capsys
):
    shutil.copytree(steer_world, tmp_path / "runs" / "one")
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match="port"):
        play(PlayConfig(port=taken.getsockname()[1]))
    assert "found one world here: runs/one" in capsys.readouterr().err


def test_a_folder_without_a_world_is_named(tmp_path):
    with pytest.raises(FormatError, match=re.escape(str(tmp_path))):
        play(PlayConfig(world=tmp_path))


def test_a_world_in_parts_needs_all_of_them_and_no_name():
    with pytest.raises(ConfigError, match="needs all three"):
        PlayConfig(model=Path("m"), tokenizer="t")
    with pytest.raises(ConfigError, match="leave it out"):
        PlayConfig(world=Path("w"), model=Path("m"), tokenizer="t", start=Path("s"))


@pytest.mark.parametrize(("field", "value"), [("port", 70_000), ("port", -1), ("pace", -1.0)])
def test_a_port_or_pace_that_is_none_is_refused(field, value):
    with pytest.raises(ConfigError, match=f"--{field}"):
        PlayConfig(**{field: value})


@pytest.mark.parametrize("seed", [-1, 1 << 63])
def test_a_seed_that_is_none_is_refused(seed):
    with pytest.raises(ConfigError, match=r"--seed .*: must be at least 0 and below 2\*\*63"):
        PlayConfig(seed=seed)


def test_a_world_in_parts_is_played_and_kept_in_the_present_folder(
    commands, steer_world, tmp_path, monkeypatch
):
    with started(
        commands, "--model", steer_world / "dynamics" / "model",
        "--tokenizer", steer_world / "tokenizer" / "model", "--start", steer_world / "episodes",
        "--port", 0, "--sessions", tmp_path / "kept",
    ) as (command, address):  # fmt: skip
        with connect(address) as page:
            assert len(page.greeting()[0]["starts"]) == 3
            page.say("step")
            page.until(FRAME, position=1)
        command.send(signal.SIGINT)
        assert command.wait().code == 130
    assert len(codes_of(tmp_path / "kept")) == 1


@pytest.mark.parametrize("start", ["a.png", "b.png", "."])
def test_starts_that_play_cannot_have_are_named_for_what_they_are(steer_world, tmp_path, start):
    (tmp_path / "a.png").touch()
    says = {"a.png": "is no folder", "b.png": "no such file", ".": "has neither manifest.json"}
    with pytest.raises(FormatError, match=says[start]) as refused:
        play(PlayConfig(world=steer_world, start=tmp_path / start, port=0))
    assert "picture" not in str(refused.value)


def test_settings_that_the_model_cannot_be_played_with_are_refused_at_once(steer_world):
    with pytest.raises(ConfigError, match="decoder is maskgit"):
        play(PlayConfig(world=steer_world, sampling=SamplingConfig(decoder="maskgit"), port=0))


def test_a_world_without_a_frame_to_start_from_is_refused(steer_world, tmp_path):
    bare = tmp_path / "bare"
    for part in ("dynamics", "tokenizer"):
        shutil.copytree(steer_world / part, bare / part)
    with pytest.raises(ConfigError, match="--start"):
        play(PlayConfig(world=bare, port=0))


@pytest.mark.parametrize("library", ["starlette", "uvicorn", "websockets"])
def test_a_missing_library_is_named_with_the_extra_that_brings_it(
    steer_world, monkeypatch, library
):
    monkeypatch.setitem(sys.modules, library, None)  # as if it were not installed
    with pytest.raises(ConfigError, match=rf"{library}.*pip install 'worldloom\[play\]'"):
        play(PlayConfig(world=steer_world, port=0))


def test_the_help_names_the_two_ways_to_play_and_what_replays_it(capsys):
    with pytest.raises(SystemExit):
        main(["play", "--help"])
    shown = capsys.readouterr().out
    for words in ("worldloom play runs/demo", "--terminal", "ssh -L", "worldloom replay SESSION"):
        assert words in shown
    assert "{None}" not in shown


@pytest.mark.parametrize(
    ("words", "taken"), [((), 3), (("--threads", 1), 1), (("--terminal", "--threads", 2), 2)]
)
def test_a_core_is_left_to_the_browser(steer_world, tmp_path, monkeypatch, words, taken):
    seen = []

    def note(files, config, *_):
        seen.append(torch.get_num_threads())

    for name in ("_play_here", "_play_there"):
        monkeypatch.setattr(play_command, name, note)
    monkeypatch.setattr(play_command, "num_cores", lambda _share: 4)
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    try:
        main(["play", str(steer_world), "--port", "0", *map(str, words)])
        assert torch.get_num_threads() == 8
    finally:
        torch.set_num_threads(before)
    assert seen == [taken]


def test_threads_out_of_range_are_refused(capsys):
    assert main(["play", "--threads", "-1"]) == 2
    assert "--threads -1: must be in [0, 1024]" in capsys.readouterr().err
