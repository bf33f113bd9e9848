"""A play server in a thread, and clients that a browser is not: any header, any bytes, no manners.

a world's folder  -> running   -> Running: its port, player and log
Running           -> connect   -> Client: messages and frames, as they come
                  -> handshake -> the status that any headers get
"""

import http.client
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection
from websockets.sync.client import connect as open_socket
from worldloom.dynamics import SamplingConfig
from worldloom.pipelines.play.connection import Seat
from worldloom.pipelines.play.player import Player
from worldloom.pipelines.play.protocol import SUBPROTOCOL, unpack_frame
from worldloom.pipelines.play.server import build_app, listen, make_server
from worldloom.pipelines.play.session import PlaySession
from worldloom.pipelines.play.session_log import RecordedSession, SessionLog, Step
from worldloom.pipelines.play.worlds import gallery, world_files
from worldloom.pipelines.world import World

TOKEN = "a-token-of-the-tests"
SAMPLING = SamplingConfig(temperature=1.0, min_p=0.0)
FRAME = "frame"


def wait_until(so: Callable[[], bool], /, *, timeout_s: float = 20.0) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + timeout_s
    while not so():
        assert time.monotonic() < deadline, f"not so after {timeout_s:g} s"
        time.sleep(0.02)


@dataclass
class Running:
    """A server that runs."""

    port: int
    player: Player
    log: Path

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def codes(self) -> list[Any]:
        """The codes of every step so far, as the log has them."""
        events = [event for _, event in RecordedSession(self.log).events()]
        return [event.codes_hw.tolist() for event in events if isinstance(event, Step)]

    def done(self) -> list[str]:
        """What was done at each of them, in words."""
        session = RecordedSession(self.log)
        steps = [event for _, event in session.events() if isinstance(event, Step)]
        return [session.actions.describe(step.slots_rA)[0] for step in steps]


def open_log(world: Path, sessions: Path) -> tuple[PlaySession, SessionLog]:
    """A session in a world, with its log."""
    files = world_files(world)
    loaded = World.from_pretrained(files.model, files.tokenizer, sampling=SAMPLING)
    log = SessionLog(sessions, files=files, world=loaded, now=datetime.now().astimezone())
    starts = gallery(files, loaded, count=4)
    return PlaySession(loaded, starts, sampling=SAMPLING, seed=3, log=log), log


@contextmanager
def running(
    world: Path,
    sessions: Path,
    /,
    *,
    guarded: bool = True,
    hold_s: float = 10.0,
    pace: float = 50.0,
    companions: Mapping[str, Callable[[], Any]] | None = None,
) -> Iterator[Running]:
    """Serve a world in a thread."""
    session, log = open_log(world, sessions)
    player = Player(
        session, name="toy", pace=pace, companions=companions or {}, recordings=log.folder
    )
    with closing(listen("127.0.0.1", 0)) as listener:
        app = build_app(
            player, token=TOKEN, host="127.0.0.1", seat=Seat(hold_s=hold_s), guarded=guarded
        )
        server = make_server(app)
        player.start()
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield Running(listener.getsockname()[1], player, log.folder)
        finally:
            server.should_exit = True
            thread.join(10)
            assert not thread.is_alive()
            assert player.stop(timeout_s=10)


@dataclass
class Client:
    """One socket."""

    socket: ClientConnection
    _passed: list[dict[str, Any]] = field(default_factory=list)

    def say(self, kind: str, **fields: Any) -> None:
        self.socket.send(json.dumps({"type": kind, **fields}))

    def next(self, timeout_s: float = 10.0) -> dict[str, Any]:
        """The next message; a frame's has type "frame", its header's fields and its images."""
        message = self.socket.recv(timeout=timeout_s)
        if isinstance(message, str):
            return json.loads(message)
        header, images = unpack_frame(message)
        return {"type": FRAME, **header, "images": images}

    def until(self, kind: str, timeout_s: float = 20.0, **wanted: Any) -> dict[str, Any]:
        """The next message of a kind whose fields are as wanted.

        Those of the kind before it are let go; those of others are kept, because between texts and
        frames there is no order.
        """
        deadline = time.monotonic() + timeout_s
        passed, self._passed = self._passed, []
        while True:
            message = passed.pop(0) if passed else self.next(deadline - time.monotonic())
            if message["type"] != kind:
                self._passed.append(message)
            elif wanted.items() <= message.items():
                self._passed += passed
                return message

    def reach(self, position: int) -> dict[str, Any]:
        """The first frame there or beyond: on a busy machine some are dropped."""
        while (frame := self.until(FRAME))["position"] < position:
            pass
        return frame

    def greeting(self) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """The first three messages."""
        first = self.next(), self.next(), self.next()
        assert [message["type"] for message in first] == ["welcome", "state", FRAME]
        return first

    def close_code(self, timeout_s: float = 10.0) -> int | None:
        """The code with which the server closes; what it says before is let go."""
        deadline = time.monotonic() + timeout_s
        try:
            while True:
                self.next(deadline - time.monotonic())
        except ConnectionClosed as closed:
            return closed.rcvd.code if closed.rcvd else None


def slow_reader(port: int) -> socket.socket:
    """A connection whose kernel takes little that nobody reads: to be passed to connect as `sock`.

    With `max_queue=1` the client's library reads hardly ahead, either.
    """
    stalled = socket.socket()
    stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    stalled.connect(("127.0.0.1", port))
    return stalled


def fast_writer(port: int) -> socket.socket:
    """A connection whose kernel holds little that was not sent, so that a flood has no long tail.

    To be passed to connect as `sock`.
    """
    narrow = socket.socket()
    narrow.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 << 10)
    narrow.connect(("127.0.0.1", port))
    return narrow


def drain(page: Client, received: dict[str, Any]) -> threading.Thread:
    """Read everything, in a thread, until the socket ends: the last message of each type."""

    def read() -> None:
        with suppress(ConnectionClosed):
            while True:
                message = page.next(timeout_s=600)
                received[message["type"]] = message

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread


@contextmanager
def connect(there: Running | str, /, *, client: str = "one", **options: Any) -> Iterator[Client]:
    """Connect as the page does; to a server, or to an address that a command printed."""
    origin, token = (there.origin, TOKEN) if isinstance(there, Running) else parts(there)
    with open_socket(
        f"{origin.replace('http', 'ws', 1)}/play?token={token}&client={client}",
        origin=origin,
        subprotocols=[SUBPROTOCOL],
        **{"max_size": None, "compression": None, **options},
    ) as socket:
        yield Client(socket)


def parts(address: str) -> tuple[str, str]:
    """(origin, token) of a printed address."""
    origin, _, token = address.partition("/?token=")
    return origin, token


def ask(
    port: int, method: str, path: str, headers: list[tuple[str, str]], body: bytes = b""
) -> Any:
    """Send exactly these headers; return (status, headers, body)."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in headers:
            connection.putheader(name, value)
        if body:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body or None)
        answer = connection.getresponse()
        # After 101 the socket's own bytes follow, without an end.
        return (
            answer.status,
            dict(answer.getheaders()),
            b"" if answer.status == 101 else answer.read(),
        )
    finally:
        connection.close()


def handshake(port: int, path: str, headers: list[tuple[str, str]]) -> int:
    """Ask for a WebSocket with these headers; return the status: 101 if it opens."""
    key = [
        ("Upgrade", "websocket"),
        ("Connection", "Upgrade"),
        ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
        ("Sec-WebSocket-Version", "13"),
        ("Sec-WebSocket-Protocol", SUBPROTOCOL),
    ]
    return ask(port, "GET", path, [*headers, *key])[0]


def resident_bytes(pid: int | None = None) -> int:
    """Memory of a process."""
    pages = Path(f"/proc/{pid or os.getpid()}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
