"""The server as clients meet it: one that plays, and those that flood, stall, intrude or go."""

import io
import json
import socket
import time
from contextlib import ExitStack, closing, contextmanager, suppress

import av
import numpy as np
import pytest
from PIL import Image
from pipelines.play.raw import (
    FRAME,
    TOKEN,
    ask,
    connect,
    drain,
    fast_writer,
    handshake,
    open_log,
    resident_bytes,
    running,
    slow_reader,
    wait_until,
)
from websockets.exceptions import ConnectionClosed
from worldloom.common import ConfigError, StorageError
from worldloom.pipelines.play import connection
from worldloom.pipelines.play import server as server_module
from worldloom.pipelines.play.protocol import MAX_MESSAGE_BYTES
from worldloom.pipelines.play.recording import Recording
from worldloom.pipelines.play.server import address_of, listen


@pytest.fixture
def served(steer_world, tmp_path):
    with running(steer_world, tmp_path, hold_s=0.0) as server:
        yield server


def get(server, path, method="GET", body=b""):
    """(status, headers, body) of a request of our own page."""
    headers = [("Host", f"127.0.0.1:{server.port}"), ("Origin", server.origin)]
    return ask(server.port, method, f"{path}?token={TOKEN}", headers, body)


def come_to_rest(server):
    """Wait until no step is on its way any more; return how many there were."""
    counts = [-1]

    def rests():
        counts.append(len(server.codes()))
        if counts[-1] != counts[-2]:
            time.sleep(0.3)
        return counts[-1] == counts[-2]

    wait_until(rests)
    return counts[-1]


def until_left(server):
    """Wait until the server has noticed that its page is gone."""
    wait_until(lambda: server.player._outlet is None)


def pixels(image):
    return np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))


# Playing.


def test_a_page_is_told_what_the_world_is_and_where_it_stands(served):
    with connect(served) as page:
        welcome, state, frame = page.greeting()
    assert (welcome["version"], welcome["width"], welcome["height"]) == (1, 16, 16)
    assert (welcome["fps"], welcome["pace"], welcome["resumed"]) == (20.0, 50.0, False)
    assert [control["name"] for control in welcome["controls"]] == ["LEFT", "RIGHT", "FIRE"]
    assert [start["url"] for start in welcome["starts"]] == [f"/start/{k}.png" for k in range(3)]
    assert welcome["decoders"][0] == welcome["settings"]["decoder"] == state["settings"]["decoder"]
    assert not state["running"]
    assert (state["position"], state["seed"], state["start"]) == (0, 3, 0)
    assert (frame["position"], frame["n"], frame["last"], frame["dropped"]) == (0, 0, True, 0)


def test_the_steps_of_a_page_are_those_of_a_session_of_its_own_code_for_code(
    served, steer_world, tmp_path
):
    held = [["LEFT"], [], ["RIGHT", "FIRE"], ["RIGHT"], ["LEFT"]] * 4
    with connect(served) as page:
        page.greeting()
        page.say("format", image="png")
        shown = []
        for n, names in enumerate(held, start=1):
            page.say("input", held=names, n=n)
            page.say("step")
            shown.append(page.until(FRAME, n=n))
    alone, _ = open_log(steer_world, tmp_path / "alone")
    alone.reset(start=0, seed=3)
    # The newest of two that exclude each other counts.
    values = {"LEFT": 1, "RIGHT": 2, "FIRE": 3}
    wanted = [alone.step(np.array([[values[names[-1]] if names else 0]])) for names in held]
    assert served.codes() == [step.codes_hw.tolist() for step in wanted]
    for frame, step in zip(shown, wanted, strict=True):
        assert np.array_equal(pixels(frame["images"][0]), step.frames_THWC[-1])
        assert frame["position"] == step.position
    assert [frame["held"] for frame in shown] == held
    alone.close()


def test_frames_are_small_jpegs_that_look_alike_and_png_on_request(served):
    with connect(served) as page:
        _, _, first = page.greeting()
        page.say("format", image="png")
        page.say("rewind", position=0)
        exact = page.until(FRAME)
    jpeg, png = (Image.open(io.BytesIO(frame["images"][0])) for frame in (first, exact))
    assert (jpeg.format, png.format) == ("JPEG", "PNG")
    difference = np.abs(np.asarray(jpeg, int) - np.asarray(png.convert("RGB"), int))
    assert difference.mean() < 8
    assert exact["sizes"] == [len(exact["images"][0])]


def test_the_newest_input_wins(served):
    with connect(served) as page:
        page.greeting()
        for n in range(1, 501):
            page.say("input", held=["LEFT"] if n % 2 else ["RIGHT"], n=n)
        page.say("step")
        frame = page.until(FRAME, position=1)
    assert (frame["n"], frame["held"], frame["action"]) == (500, ["RIGHT"], "RIGHT")


def test_a_step_takes_what_was_held_when_it_was_asked_for(served):
    with connect(served) as page:
        page.greeting()
        for n, name in enumerate(["LEFT", "FIRE", "RIGHT"], start=1):
            page.say("input", held=[name], n=n)
            page.say("step")
        assert page.reach(3)["action"] == "RIGHT"  # the frames before it may be dropped
    assert served.done() == ["LEFT", "FIRE", "RIGHT"]


def test_it_runs_at_its_pace_until_it_is_paused(served):
    with connect(served) as page:
        page.greeting()
        page.say("pace", frames_per_s=5)
        page.say("run", on=True)
        page.until("state", running=True)  # which lets the states before it go
        page.reach(2)
        began = time.monotonic()
        page.reach(12)
        assert 1.4 < time.monotonic() - began < 10  # ten frames at five a second
        page.say("run", on=False)
        state = page.until("state", running=False)
        time.sleep(0.5)  # two more would be due
        page.say("run", on=False)
        assert page.until("state")["position"] == state["position"]


def test_rewinding_and_pressing_the_same_keys_again_gives_the_same_codes(served):
    with connect(served) as page:
        page.greeting()

        def press(*names):
            for name in names:
                page.say("input", held=[name], n=1)
                page.say("step")

        press("LEFT", "RIGHT", "FIRE", "LEFT", "LEFT")
        page.until(FRAME, position=5)
        page.say("rewind", position=2)
        there = page.until("state", position=2)
        assert (there["length"], there["running"]) == (5, False)
        press("FIRE", "LEFT", "LEFT")
        page.until(FRAME, position=5)
        page.say("rewind", position=9)
        assert "9" in page.until("error")["message"]
    codes = served.codes()
    assert codes[5:8] == codes[2:5]


def test_a_reset_chooses_start_and_seed(served):
    with connect(served) as page:
        welcome, _, _ = page.greeting()
        page.say("format", image="png")
        page.say("reset", start=2, seed=77)
        frame = page.until(FRAME)
        state = page.until("state", start=2)
        assert (state["seed"], state["position"]) == (77, 0)
        page.say("reset")
        assert page.until("state", seed=77)["start"] == 2
        page.say("reset", start=99)
        assert "99" in page.until("error")["message"]
    code, headers, picture = get(served, welcome["starts"][2]["url"])
    assert (code, headers["content-type"]) == (200, "image/png")
    assert np.array_equal(pixels(picture), pixels(frame["images"][0]))
    assert get(served, "/start/3.png")[0] == 404


def test_settings_change_between_frames_and_those_that_are_none_change_nothing(served):
    with connect(served) as page:
        page.greeting()
        page.say("settings", temperature=0, top_k=2, guidance_scale=1.5)
        settings = page.until("state")["settings"]
        assert (settings["temperature"], settings["top_k"]) == (0, 2)
        for wrong in ({"min_p": 2}, {"temperature": -1}, {"decoder": "guess"}, {"top_p": 0}):
            page.say("settings", **wrong)
            assert next(iter(wrong)) in page.until("error")["message"]
            assert page.until("state")["settings"] == settings
        page.say("step")
        page.until(FRAME, position=1)


def test_the_model_plays_by_itself_when_asked(served):
    with connect(served) as page:
        page.greeting()
        page.say("autoplay", on=True)
        assert page.until("state", autoplay=True)
        for position in range(1, 9):
            page.say("step")
            frame = page.until(FRAME, position=position)
            assert frame["held"] == ([] if frame["action"] == "STAY" else [frame["action"]])


def test_a_picture_that_was_sent_is_a_start(served):
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (250, 10, 10)).save(file, "PNG")
    code, _, answer = get(served, "/picture", "POST", file.getvalue())
    assert code == 200
    name = json.loads(answer)["picture"]
    with connect(served) as page:
        page.greeting()
        page.say("reset", picture=name)
        assert page.until("state", start=name)["position"] == 0
        page.say("reset", picture="no-such")
        assert "send it again" in page.until("error")["message"]
        page.say(
            "reset", picture=json.loads(get(served, "/picture", "POST", b"x" * 99)[2])["picture"]
        )
        assert "not readable" in page.until("error")["message"]
        assert page.until("state")["start"] == name
        page.say("step")
        page.until(FRAME, position=1)


def test_who_leaves_while_a_picture_is_sent_leaves_no_traceback(served, caplog):
    head = (
        f"POST /picture?token={TOKEN} HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\n"
        f"Origin: {served.origin}\r\nContent-Length: 100000\r\n\r\n"
    )
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", served.port), timeout=10) as leaving:
            leaving.sendall(head.encode() + bytes(500))
            time.sleep(0.05)
    assert get(served, "/")[0] == 200
    time.sleep(0.2)
    assert not [record for record in caplog.records if record.exc_info]
    assert not served.player._game.pictures


@pytest.mark.parametrize("number", ["99", "-1", "x", "00", "9" * 5000])
def test_a_start_that_is_none_is_not_found(served, number):
    code, _, sentence = get(served, f"/start/{number}.png")
    assert (code, b"starts, from 0" in sentence) == (404, True)


def test_only_the_last_four_pictures_are_kept_and_none_larger_than_8_mib(served):
    assert get(served, "/picture", "POST", bytes(8 << 20))[0] == 200
    code, _, sentence = get(served, "/picture", "POST", bytes((8 << 20) + 1))
    assert code == 413
    assert b"8 MiB" in sentence
    for _ in range(20):
        get(served, "/picture", "POST", bytes(100))
    assert len(served.player._game.pictures) == 4


def test_a_recording_is_handed_over_as_a_video_and_the_words_of_its_actions(served):
    with connect(served) as page:
        page.greeting()
        page.say("record", on=True)
        assert page.until("state")["recording"]
        page.say("input", held=["LEFT"], n=1)
        for _ in range(4):
            page.say("step")
        page.say("record", on=False)
        recorded = page.until("recorded")
        assert not page.until("state")["recording"]
        page.say("record", on=True)
        page.say("step")
        page.say("rewind", position=0)  # the actions would not lead there
        assert page.until("recorded")["frames"] == 2
    code, headers, video = get(served, recorded["mp4"])
    assert (code, headers["content-type"]) == (200, "video/mp4")
    with av.open(io.BytesIO(video)) as container:
        assert sum(1 for _ in container.decode(video=0)) == recorded["frames"] == 5
    assert json.loads(get(served, recorded["json"])[2]) == ["LEFT*4"]
    assert get(served, "/recording/..%2Fsession.json")[0] == 404


def test_a_recording_that_cannot_be_written_ends_and_play_goes_on(served, monkeypatch):
    def full(*_):
        raise StorageError("no space left")

    with connect(served) as page:
        page.greeting()
        page.say("record", on=True)
        assert page.until("state")["recording"]
        monkeypatch.setattr(Recording, "add", full)
        page.say("step")
        page.reach(1)
        assert "the recording ends here: no space left" in page.until("error")["message"]
        recorded = page.until("recorded")
        assert recorded["frames"] == 1
        assert not page.until("state")["recording"]
        page.say("step")
        page.reach(2)
    assert get(served, recorded["mp4"])[0] == 200


class Beside:
    """Something that runs beside the world, as long as it does."""

    def __init__(self, *, fails_at=1000, error=None):
        self.fails_at, self.closed, self._steps = fails_at, False, 0
        self.error = error or RuntimeError("the lights went out")

    def reset(self, start):
        self._steps = 0
        return np.full((1, 16, 16, 3), 0, np.uint8)

    def step(self, slots_rA):
        self._steps += 1
        if self._steps == self.fails_at:
            raise self.error
        return np.full((1, 16, 16, 3), self._steps, np.uint8)

    def close(self):
        self.closed = True


def test_what_runs_beside_comes_as_a_second_image(steer_world, tmp_path):
    beside = Beside()
    with (
        running(steer_world, tmp_path, companions={"game": lambda: beside}) as server,
        connect(server) as page,
    ):
        welcome, _, first = page.greeting()
        assert (welcome["companions"], len(first["images"])) == (["game"], 1)
        page.say("format", image="png")
        page.say("step")
        page.until(FRAME, position=1)
        page.say("compare", **{"with": "game"})
        brought = page.until(FRAME)
        page.until("state", compare="game")
        page.say("step")
        stepped = page.until(FRAME, position=2)
        assert [int(pixels(f["images"][1]).max()) for f in (brought, stepped)] == [1, 2]
        page.say("compare", **{"with": "truth"})
        assert "none, game" in page.until("error")["message"]
        for kind, wrong in (("reset", {"start": 99}), ("rewind", {"position": 99})):
            page.say(kind, **wrong)
            page.until("error")
            assert page.until("state")["compare"] == "game"
        page.say("compare", **{"with": "none"})
        assert len(page.until(FRAME)["images"]) == 1
        assert beside.closed


# What goes wrong.


@pytest.mark.parametrize(
    "said",
    [
        "", "{", "[]", '{"type":"jump"}', '{"type":"step","x":1}',
        '{"type":"input","held":["NOPE"],"n":1}', '{"type":"input","held":[-1],"n":1}',
        '{"type":"input","held":[99],"n":1}', '{"type":"rewind","position":1}',
        '{"type":"reset","seed":-1}', '{"type":"reset","seed":9007199254740992,"start":9}',
        '{"type":"compare","with":"game"}', b"\x00\xff", "x" * MAX_MESSAGE_BYTES,
    ],
)  # fmt: skip
def test_what_is_not_understood_or_not_possible_is_answered_and_the_session_lives(served, said):
    with connect(served) as page:
        page.greeting()
        page.say("step")
        page.until(FRAME, position=1)
        if said == '{"type":"rewind","position":1}':
            said = '{"type":"rewind","position":2}'
        page.socket.send(said)
        error = page.until("error")
        assert 10 < len(error["message"]) < 500
        page.say("step")
        page.until(FRAME, position=2)


@pytest.mark.parametrize("size", [MAX_MESSAGE_BYTES + 1, 100_000, 20_000_000])
def test_a_message_that_is_too_large_closes_the_socket_with_1009_and_the_session_lives(
    served, size
):
    with connect(served, client="zero") as page:  # what is allocated once is there
        page.greeting()
        page.say("step")
        page.until(FRAME, position=1)
    until_left(served)
    before = resident_bytes()
    with connect(served) as page:
        page.greeting()
        page.say("step")
        page.until(FRAME, position=1)
        with suppress(ConnectionClosed):
            page.socket.send("x" * size)
        # Who still writes when the socket closes may never come to read why.
        assert page.close_code() in ((1009,) if size < 1_000_000 else (1009, None))
    with connect(served) as page:
        welcome, state, _ = page.greeting()
        assert (welcome["resumed"], state["position"]) == (True, 1)
    assert resident_bytes() - before < (20 << 20) + 3 * size


def test_an_exception_while_stepping_is_told_pauses_and_hangs_nothing(steer_world, tmp_path, capfd):
    beside = Beside(fails_at=3)
    with (
        running(steer_world, tmp_path, companions={"game": lambda: beside}) as server,
        connect(server) as page,
    ):
        page.greeting()
        page.say("compare", **{"with": "game"})
        page.say("run", on=True)
        message = page.until("error")["message"]
        assert "RuntimeError: the lights went out" in message
        assert "\n" not in message
        page.until("state", running=False, compare="none")
        page.say("run", on=True)
        page.reach(10)
    assert "Traceback" in capfd.readouterr().err


def test_a_player_that_ends_says_so_to_who_is_there_and_to_who_comes(steer_world, tmp_path, capfd):
    beside = Beside(fails_at=1, error=SystemExit(1))
    with running(steer_world, tmp_path, companions={"game": lambda: beside}) as server:
        with connect(server) as page:
            page.greeting()
            page.say("compare", **{"with": "game"})
            page.say("step")
            assert "start `worldloom play` again" in page.until("error")["message"]
            page.say("step")
            assert "start `worldloom play` again" in page.until("error")["message"]
        until_left(server)
        with connect(server, client="two") as page:
            assert "start `worldloom play` again" in page.next()["message"]
    assert "SystemExit" in capfd.readouterr().err


# Who plays.


def test_a_second_player_is_told_that_the_world_is_taken(served):
    with connect(served) as page:
        page.greeting()
        with connect(served, client="two") as other:
            busy = other.next()
            assert busy["type"] == "busy"
            assert "somebody else plays" in busy["message"]
            assert other.close_code() == 4009
        page.say("step")
        page.until(FRAME, position=1)
    until_left(served)
    with connect(served, client="two") as other:  # who left, left it as it was at the start
        welcome, state, _ = other.greeting()
        assert (welcome["resumed"], state["position"]) == (False, 0)


def test_the_same_page_takes_its_session_over_and_the_older_socket_is_closed(served):
    with connect(served) as page:
        page.greeting()
        page.say("pace", frames_per_s=0)
        page.say("run", on=True)
        page.reach(5)
        with connect(served) as again:
            welcome, state, frame = again.greeting()
            assert (welcome["resumed"], welcome["pace"], state["running"]) == (True, 0, True)
            assert frame["position"] >= state["position"] >= 5  # it runs meanwhile
            assert page.close_code() == 4001
            again.reach(state["position"] + 5)


def test_without_a_page_nothing_is_generated_and_nothing_is_held(served):
    with connect(served) as page:
        page.greeting()
        page.say("input", held=["LEFT"], n=5)
        page.say("run", on=True)
        page.reach(3)
    until_left(served)
    count = come_to_rest(served)
    time.sleep(0.3)
    assert len(served.codes()) == count
    with connect(served) as page:
        _, state, frame = page.greeting()
        assert frame["position"] >= state["position"] == count  # it runs again
        assert page.reach(count + 2)["held"] == []


def test_after_a_broken_connection_the_world_waits_for_its_page_and_then_for_anybody(
    steer_world, tmp_path
):
    with running(steer_world, tmp_path, hold_s=3.0) as server:
        with connect(server) as page:
            page.greeting()
            page.say("step")
            page.until(FRAME, position=1)
            page.socket.socket.shutdown(socket.SHUT_RDWR)
        with connect(server, client="two") as other:
            assert other.next()["type"] == "busy"
        with connect(server) as page:
            welcome, state, _ = page.greeting()
            assert (welcome["resumed"], state["position"]) == (True, 1)
            page.socket.socket.shutdown(socket.SHUT_RDWR)

        def begins_anew():
            with connect(server, client="two") as other:
                said = other.next()
                return said["type"] == "welcome" and not said["resumed"]

        wait_until(begins_anew, timeout_s=30)


@pytest.mark.parametrize("client", ["", "a b", "x" * 65, "%00", "<script>"])
def test_a_page_must_name_itself_plainly(served, client):
    host = [("Host", f"127.0.0.1:{served.port}")]
    query = client.replace(" ", "%20")
    assert handshake(served.port, f"/play?token={TOKEN}&client={query}", host) == 400
    assert handshake(served.port, f"/play?token={TOKEN}", host) == 400


def test_a_page_of_another_protocol_is_refused_with_ours(served):
    status, _, body = ask(
        served.port,
        "GET",
        f"/play?token={TOKEN}&client=one",
        [
            ("Host", f"127.0.0.1:{served.port}"),
            ("Upgrade", "websocket"),
            ("Connection", "Upgrade"),
            ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
            ("Sec-WebSocket-Version", "13"),
            ("Sec-WebSocket-Protocol", "worldloom.play.2"),
        ],
    )
    assert (status, b"worldloom.play.1" in body) == (400, True)


# Floods, and readers that do not read. The memory is that of client and server together.


def flood(page, *, seconds, rate, messages):
    """Send messages at a rate; return how many were sent and how much memory that took at most."""
    began, sent, most, before = time.monotonic(), 0, 0, resident_bytes()
    while (elapsed := time.monotonic() - began) < seconds:
        while sent < elapsed * rate:
            page.socket.send(messages[sent % len(messages)])
            sent += 1
        most = max(most, resident_bytes() - before)
        time.sleep(0.005)
    return sent, most


def warm_up(page):
    """Play a little, so that what is allocated once is there."""
    page.greeting()
    page.say("run", on=True)
    page.reach(40)


INPUTS = [json.dumps({"type": "input", "held": ["LEFT"] * (k % 2), "n": k}) for k in range(1000)]
OTHERS = [
    *['{"type":"format","image":"png"}', '{"type":"settings","temperature":1}', "{", ""] * 50,
    '{"type":"input","held":["NOPE"],"n":1}', '{"type":"step"}', '{"type":"rewind","position":0}',
]  # fmt: skip


def check_flood(served, *, seconds, messages):
    # Its own pings would give up on a machine that is slow to answer them.
    with connect(served, sock=fast_writer(served.port), ping_interval=None) as page:
        warm_up(page)
        received = {}
        thread = drain(page, received)
        sent, most = flood(page, seconds=seconds, rate=1e4, messages=messages)
        assert most < 20 << 20
        page.say("input", held=["FIRE"], n=123_456_789)
        page.say("run", on=True)
        deadline = time.monotonic() + 90
        while received.get(FRAME, {}).get("n") != 123_456_789:
            assert time.monotonic() < deadline, "the newest input never won"
            time.sleep(0.01)
        assert received[FRAME]["action"] == "FIRE"
        page.socket.close()
        thread.join(10)
    return sent


@pytest.mark.parametrize("messages", [INPUTS, OTHERS], ids=["inputs", "others"])
def test_a_flood_takes_little_memory_and_the_newest_input_wins(served, messages):
    assert check_flood(served, seconds=1.0, messages=messages) > 100


@pytest.mark.slow
@pytest.mark.parametrize("messages", [INPUTS, OTHERS], ids=["inputs", "others"])
def test_ten_seconds_of_flood_take_little_memory_and_the_newest_input_wins(served, messages):
    check_flood(served, seconds=10.0, messages=messages)


@contextmanager
def stalled(served):
    """A page that plays and stops reading."""
    sock = slow_reader(served.port)
    # Its own pings would notice that nothing is read, and close.
    with connect(served, sock=sock, max_queue=1, ping_interval=None) as page:
        warm_up(page)
        page.say("format", image="png")
        page.say("pace", frames_per_s=0)
        yield page


@pytest.mark.slow
def test_a_page_that_stops_reading_loses_old_frames_and_takes_no_memory(served):
    with stalled(served) as page:
        before, count = resident_bytes(), len(served.codes())
        deadline = time.monotonic() + 60
        while len(served.codes()) < count + 350:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert resident_bytes() - before < 20 << 20
        page.say("run", on=False)
        count = come_to_rest(served)
        frames = [page.until(FRAME)]
        while frames[-1]["position"] < count:
            frames.append(page.until(FRAME))
        assert frames[-1]["dropped"] > 50
        positions = [frame["position"] for frame in frames]
        assert positions == sorted(set(positions))
        # What is not here was dropped: nothing is lost in silence.
        dropped = frames[-1]["dropped"] - frames[0]["dropped"]
        assert positions[-1] - positions[0] == len(frames) - 1 + dropped


def test_a_page_that_asks_and_never_reads_the_answers_is_not_read_from_either(served):
    with stalled(served) as page:
        page.say("run", on=False)
        before = resident_bytes()
        page.socket.socket.settimeout(1.0)
        sent, wrong = 0, "?" * 15_000
        with suppress(ConnectionClosed):  # as the library calls it when nobody takes what it sends
            while sent < 5_000:
                page.socket.send(wrong)
                sent += 1
        assert sent < 5_000
        assert resident_bytes() - before < 20 << 20


def test_of_frames_that_a_page_has_not_seen_few_are_on_their_way(served):
    with connect(served) as page:
        welcome, _, _ = page.greeting()
        assert welcome["window"] == 8
        page.say("seen", frames=1)
        page.say("pace", frames_per_s=0)
        page.say("run", on=True)
        shown = [page.until(FRAME) for _ in range(8)]
        # A busy machine drops some before they are sent, and counts them.
        last = shown[-1]["position"]
        assert last == 8 + shown[-1]["dropped"]
        with pytest.raises(TimeoutError):  # the ninth, before anything was seen of the eight
            page.until(FRAME, timeout_s=0.5)
        wait_until(lambda: len(served.codes()) > last + 5)
        page.say("seen", frames=9)
        after = [page.until(FRAME) for _ in range(8)]
        # The queue held the two newest of those that were made meanwhile; the others were dropped.
        assert after[0]["dropped"] == after[0]["position"] - 9 > 0


@pytest.mark.slow
def test_a_page_that_takes_nothing_at_all_frees_the_world_in_time(served, monkeypatch):
    monkeypatch.setattr(connection, "SEND_TIMEOUT_S", 0.5)
    with stalled(served):
        deadline = time.monotonic() + 30
        while True:
            assert time.monotonic() < deadline
            time.sleep(0.2)
            with connect(served, client="two") as other:
                if other.next()["type"] == "welcome":
                    break


def test_a_flood_of_the_smallest_frames_takes_little_memory(served):
    empty_text = b"\x81\x80\0\0\0\0" * 2000
    with connect(served, close_timeout=0.1) as page:
        warm_up(page)
        drain(page, {})
        before, most, began = resident_bytes(), 0, time.monotonic()
        while time.monotonic() - began < 2.0:
            page.socket.socket.sendall(empty_text)
            most = max(most, resident_bytes() - before)
    assert most < 20 << 20


def test_a_message_that_is_too_large_while_frames_are_sent_leaves_no_traceback(served, caplog):
    with connect(served) as page:
        page.greeting()
        page.say("pace", frames_per_s=0)
        page.say("run", on=True)
        page.reach(5)
        for _ in range(500):  # their answers are on their way when the socket closes
            page.socket.send("{")
        page.socket.send("x" * 100_000)
        assert page.close_code() == 1009
    time.sleep(0.2)
    assert "Traceback" not in caplog.text


# Where it listens.


def test_who_connects_and_says_nothing_does_not_keep_others_out(served, monkeypatch):
    with ExitStack() as stack:
        for _ in range(70):
            stack.enter_context(closing(socket.create_connection(("127.0.0.1", served.port))))
        assert get(served, "/")[0] == 503  # the control: there are as many as may be
        monkeypatch.setattr(server_module, "_PATIENCE_TICKS", 3)
        deadline = time.monotonic() + 20
        while get(served, "/")[0] != 200:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        with connect(served) as page:  # who plays is not cut off
            page.greeting()
            time.sleep(1.0)
            page.say("step")
            page.reach(1)


def test_a_port_in_use_is_named():
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port {port}: .*--port 0"):
            listen("127.0.0.1", port)


def test_a_port_is_taken_from_the_moment_it_is_bound_so_that_no_second_server_loads_a_model():
    """SO_REUSEADDR alone lets two sockets have one port until the first of them listens."""
    with listen("127.0.0.1", 0) as first, socket.create_connection(first.getsockname(), 1):
        pass


def test_a_host_that_is_not_here_is_named():
    with pytest.raises(ConfigError, match=r"192\.0\.2\.7"):
        listen("192.0.2.7", 0)
    with pytest.raises(ConfigError, match="no-such-host"):
        listen("no-such-host.invalid", 0)


@pytest.mark.parametrize(
    ("host", "start"), [("127.0.0.1", "http://127.0.0.1:"), ("0.0.0.0", "http://127.0.0.1:")]
)
def test_the_address_is_one_that_a_browser_here_opens(host, start):
    with listen(host, 0) as listener:
        address = address_of(listener, host, "abc")
        assert address == f"{start}{listener.getsockname()[1]}/?token=abc"
