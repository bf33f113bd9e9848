"""One page's socket: JSON in, what the player says and shows out. Who may have the player at all.

    socket -> parse_message -> player.offer;     player -> Outbox -> socket

Everything that waits is bounded. Frames: the newest few, older ones are dropped and counted. Texts:
all are sent, so a page that reads none of them is not read from either, until it does. What it
sends meanwhile fills its own buffers, not ours.
"""

import asyncio
import re
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from starlette.responses import PlainTextResponse
from starlette.websockets import WebSocket, WebSocketDisconnect
from worldloom.common import WorldloomError

from .packing import PackedFrame
from .player import Player
from .protocol import (
    CLOSE_BUSY,
    CLOSE_TAKEN_OVER,
    SUBPROTOCOL,
    WINDOW_STEPS,
    Seen,
    pack_frame,
    pack_text,
    parse_message,
)

FRAME_QUEUE = 2
"""Frames that wait to be sent; of worlds that give several a step, those of as many steps."""

_MAX_TEXTS = 64
SEND_TIMEOUT_S = 20.0
"""A page that takes nothing for so long is gone, whatever its machine says."""
_HOLD_S = 10.0
"""How long a world waits for a page whose connection broke."""
_BREATH = 16
"""Messages read before everybody else in the event loop has a turn."""
_CLIENT = re.compile(r"[A-Za-z0-9_-]{1,64}")
_CLEAN_CLOSES = (1000, 1001)


class Outbox:
    """What waits to be sent to one page; filled by the player's thread, emptied by its socket."""

    def __init__(self, loop: asyncio.AbstractEventLoop, /, *, frames_per_step: int) -> None:
        self._loop = loop
        self._capacity = FRAME_QUEUE * frames_per_step
        self._lock = threading.Lock()  # guards all but the two events
        self._texts: deque[Mapping[str, Any]] = deque()
        self._frames: deque[PackedFrame] = deque()
        self._dropped = 0
        self._sent = 0
        self._seen: int | None = None
        self._window = WINDOW_STEPS * frames_per_step
        self._signalled = False
        self._changed = asyncio.Event()
        self._emptied = asyncio.Event()

    def tell(self, message: Mapping[str, Any], /) -> None:
        """Queue a message that must arrive; of how things stand, the newest is enough."""
        with self._lock:
            if message["type"] == "state":
                self._texts = deque(text for text in self._texts if text["type"] != "state")
            self._texts.append(message)
        self._signal()

    def seen(self, frames: int, /) -> None:
        """Take note of how many frames the page has got; one that never says so gets them all."""
        with self._lock:
            self._seen = min(frames, self._sent)
        self._signal()

    def show(self, frames: Sequence[PackedFrame], /, *, afresh: bool) -> None:
        """Queue frames, and drop the oldest where there are too many."""
        with self._lock:
            if afresh:
                self._dropped += len(self._frames)
                self._frames.clear()
            self._frames.extend(frames)
            while len(self._frames) > self._capacity:
                self._frames.popleft()
                self._dropped += 1
        self._signal()

    async def next(self) -> str | bytes:
        """Wait for the next thing to send: texts first, then frames when they are due."""
        while True:
            wait_s = None
            with self._lock:
                self._signalled = False
                self._changed.clear()
                if self._texts:
                    message = self._texts.popleft()
                    self._emptied.set()
                    return pack_text(message)
                behind = self._seen is not None and self._sent - self._seen >= self._window
                if self._frames and not behind:
                    wait_s = self._frames[0].due - time.monotonic()
                    if wait_s <= 0:
                        frame, dropped = self._frames.popleft(), self._dropped
                        self._sent += 1
                        return pack_frame({**frame.header, "dropped": dropped}, frame.images)
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._changed.wait()

    async def room(self) -> None:
        """Wait until so few texts wait that a page may cause more."""
        while len(self._texts) > _MAX_TEXTS:
            self._emptied.clear()
            await self._emptied.wait()

    def _signal(self) -> None:
        """Wake the event loop, once for all that came since it looked."""
        with self._lock:
            if self._signalled:
                return
            self._signalled = True
        # The loop may have ended while the player finished its last step: then nobody listens.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._changed.set)


class Seat:
    """Who plays: one page at a time, and the one whose connection broke may come back."""

    def __init__(self, *, hold_s: float = _HOLD_S) -> None:
        self._hold_s = hold_s
        self._client: str | None = None
        self._connection: Connection | None = None
        self._free_at = 0.0

    def take(self, connection: "Connection", /) -> bool:
        """Return whether this page may play; where it has another socket, that one is closed."""
        if connection.client != self._client:
            if self._connection is not None or time.monotonic() < self._free_at:
                return False
        else:
            connection.resumed = True
            if self._connection is not None:
                self._connection.taken_over.set()
        self._client, self._connection = connection.client, connection
        return True

    def leave(self, connection: "Connection", /, *, clean: bool) -> None:
        """Be free for others: at once after a clean close, else when the page had its chance."""
        if self._connection is connection:
            self._connection = None
            self._free_at = 0.0 if clean else time.monotonic() + self._hold_s


class Connection:
    """One page's socket, from its handshake to its close."""

    def __init__(self, socket: WebSocket, player: Player, seat: Seat, /, *, client: str) -> None:
        self._socket, self._player, self._seat = socket, player, seat
        self.client = client
        self.resumed = False
        self.taken_over = asyncio.Event()
        self._outbox = Outbox(asyncio.get_running_loop(), frames_per_step=player.frames_per_step)

    async def serve(self) -> None:
        """Speak the protocol until one side leaves."""
        await self._socket.accept(subprotocol=SUBPROTOCOL)
        if not self._seat.take(self):
            await self._refuse()
            return
        clean = False
        try:
            try:
                self._player.attach(self._outbox, resumed=self.resumed)
            except WorldloomError as error:
                self._outbox.tell({"type": "error", "message": str(error)})
            clean = await self._converse()
        finally:
            self._player.detach(self._outbox)
            self._seat.leave(self, clean=clean)

    async def _refuse(self) -> None:
        """Say that somebody else plays."""
        sentence = (
            "somebody else plays in this world now; try again when they have left, or start "
            "another `worldloom play` with another --port"
        )
        with suppress(WebSocketDisconnect, RuntimeError):  # as in _send
            await self._socket.send_text(pack_text({"type": "busy", "message": sentence}))
            await self._socket.close(CLOSE_BUSY, "busy")

    async def _converse(self) -> bool:
        """Read and send until one of both ends; return whether the page said goodbye."""
        reading = asyncio.create_task(self._read())
        tasks = [
            reading,
            asyncio.create_task(self._send()),
            asyncio.create_task(self.taken_over.wait()),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception) and not isinstance(result, WebSocketDisconnect):
                raise result
        if self.taken_over.is_set():
            with suppress(WebSocketDisconnect, RuntimeError):
                await self._socket.close(CLOSE_TAKEN_OVER, "taken over")
        return not reading.cancelled() and reading.result() in _CLEAN_CLOSES

    async def _read(self) -> int:
        """Hand on what the page says; return the code with which it left."""
        count = 0
        while True:
            received = await self._socket.receive()
            if received["type"] == "websocket.disconnect":
                return int(received.get("code") or 1005)
            await self._take(received.get("text"))
            await self._outbox.room()
            count += 1
            if count % _BREATH == 0:
                await asyncio.sleep(0)

    async def _take(self, text: str | None) -> None:
        """Hand one message on, or say what is wrong with it."""
        if text is None:
            self._outbox.tell(
                {"type": "error", "message": "message: bytes, but only JSON text is understood"}
            )
            return
        try:
            message = parse_message(text)
            if isinstance(message, Seen):
                self._outbox.seen(message.frames)
                return
            while not self._player.offer(message):
                await asyncio.sleep(0.002)
        except WorldloomError as error:
            self._outbox.tell({"type": "error", "message": str(error)})

    async def _send(self) -> None:
        """Send what waits; end with a page that takes nothing, or is no more."""
        # uvicorn raises RuntimeError where it has closed the socket by itself, as after a message
        # that was too large.
        with suppress(TimeoutError, WebSocketDisconnect, RuntimeError):
            while True:
                waiting = await self._outbox.next()
                async with asyncio.timeout(SEND_TIMEOUT_S):
                    if isinstance(waiting, str):
                        await self._socket.send_text(waiting)
                    else:
                        await self._socket.send_bytes(waiting)
                await asyncio.sleep(0)  # or a lost connection is noticed only after many


async def play_socket(socket: WebSocket, player: Player, seat: Seat, /) -> None:
    """Serve a WebSocket: the handshake's own demands, then the conversation."""
    client = socket.query_params.get("client", "")
    if not _CLIENT.fullmatch(client):
        sentence = "client must be 1 to 64 of A-Z a-z 0-9 _ -, drawn at random by the page"
        await socket.send_denial_response(PlainTextResponse(f"{sentence}\n", status_code=400))
        return
    if SUBPROTOCOL not in socket.scope["subprotocols"]:
        sentence = f"this server speaks {SUBPROTOCOL}; reload the page"
        await socket.send_denial_response(PlainTextResponse(f"{sentence}\n", status_code=400))
        return
    await Connection(socket, player, seat, client=client).serve()
