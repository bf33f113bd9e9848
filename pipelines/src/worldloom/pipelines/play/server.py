"""A player -> a web server for it: the page, its pictures, the socket; bound, guarded, ended.

listen(host, port)  -> a socket, before anything slow begins
build_app(player)   -> an ASGI application, behind the guard
make_server(app)    -> what serves it on that socket until Ctrl-C or SIGTERM
"""

import asyncio
import socket
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp
from starlette.websockets import WebSocket
from worldloom.common import ConfigError

from .connection import Seat, play_socket
from .guard import LOOPBACK, Guard
from .packing import pack_image
from .player import Player
from .protocol import MAX_MESSAGE_BYTES, MAX_PICTURE_BYTES

PAGE = Path(__file__).parent / "page"

_PAGE_FILES = {
    "/": ("index.html", "text/html"),
    "/play.js": ("play.js", "text/javascript"),
    "/play.css": ("play.css", "text/css"),
}
_SEND_BYTES = 64 << 10
"""The kernel's buffer for what a page has not read yet, which is old by then. The other way it
keeps its own size: full and small, Linux drops acknowledgements, and the connection stalls."""
_GRACE_S = 0.2
"""How long clients have to say goodbye when the server ends."""
_MAX_CONNECTIONS = 64
_PATIENCE_TICKS = 50
"""Of .1 s: who has asked for nothing after one or two of these is cut off."""


def listen(host: str, port: int, /) -> socket.socket:
    """Return a listening socket; who connects before the server runs waits.

    Raises:
        ConfigError: if the address is not of this machine, or the port is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ConfigError(f"--host {host}: no such address ({error})") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BYTES)
        listener.bind(address)
        listener.listen()
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"--port {port}: cannot be listened on at {host} ({error.strerror}); another program "
            "may use it, perhaps another `worldloom play`. Pass --port with another, or --port 0 "
            "for one that is free"
        ) from error
    return listener


def hosts_of(host: str, /) -> tuple[frozenset[str], bool]:
    """Return the names that a Host header may have, and whether any IP address may be one.

    Behind `ssh -L` a browser says localhost, wherever the server listens.
    """
    name = f"[{host}]" if ":" in host else host
    return LOOPBACK | {name, socket.gethostname().lower()}, host in ("0.0.0.0", "::")


def build_app(
    player: Player,
    /,
    *,
    token: str,
    host: str,
    seat: Seat | None = None,
    guarded: bool = True,
) -> ASGIApp:
    """Return the application that serves one player.

    Args:
        player: whose world it is; need not have started.
        token: that every address must carry.
        host: where it listens.
        seat: who plays.
        guarded: False only in tests, to show what the guard keeps out.
    """
    seat = seat or Seat()
    pictures = {
        str(number): pack_image(point.frame_HWC, "png")
        for number, point in enumerate(player.starts)
    }

    async def page(request: Request) -> Response:
        name, kind = _PAGE_FILES[request.url.path]
        return Response((PAGE / name).read_bytes(), media_type=kind)

    async def start(request: Request) -> Response:
        if (found := pictures.get(request.path_params["number"])) is None:
            raise HTTPException(404, f"there are {len(pictures)} starts, from 0")
        return Response(found, media_type="image/png")

    async def picture(request: Request) -> Response:
        content = bytearray()
        try:
            async for part in request.stream():
                content += part
                if len(content) > MAX_PICTURE_BYTES:
                    size = f"{MAX_PICTURE_BYTES >> 20} MiB"
                    raise HTTPException(413, f"the picture is larger than {size}; make it smaller")
        except ClientDisconnect:
            return Response()  # which nobody is there to read
        return JSONResponse({"picture": player.keep_picture(bytes(content))})

    async def recording(request: Request) -> Response:
        path = player.recording(request.path_params["name"])
        if path is None or not path.is_file():
            raise HTTPException(404, "there is no such recording")
        return FileResponse(path, filename=path.name)

    async def play(websocket: WebSocket) -> None:
        await play_socket(websocket, player, seat)

    app = Starlette(
        routes=[
            *(Route(path, page) for path in _PAGE_FILES),
            Route("/start/{number}.png", start),
            Route("/picture", picture, methods=["POST"]),
            Route("/recording/{name}", recording),
            WebSocketRoute("/play", play),
        ],
        exception_handlers={HTTPException: _in_words},
    )
    if not guarded:
        return app
    names, any_address = hosts_of(host)
    return Guard(app, token=token, hosts=names, any_address=any_address)


async def _in_words(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return PlainTextResponse(f"{error.detail}\n", status_code=error.status_code)


class Server(uvicorn.Server):
    """A server that ends soon, whatever its clients do, and knows why."""

    ended_by: int | None = None
    """The signal that ended it."""
    _silent: frozenset[object] = frozenset()

    async def on_tick(self, counter: int) -> bool:
        """Cut off who connected and asked for nothing: they would fill the places of others."""
        if counter % _PATIENCE_TICKS == 0:
            connections = self.server_state.connections
            # None before the first request; connections of other protocols have had theirs.
            silent = frozenset(c for c in connections if getattr(c, "scope", True) is None)
            for connection in connections & self._silent & silent:
                connection.transport.abort()
            self._silent = silent
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take note of a signal; a shell's background jobs get no exception for Ctrl-C."""
        self.ended_by = sig
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Say goodbye; who does not take it in time is cut off."""
        asyncio.get_running_loop().call_later(_GRACE_S, self._cut_off)
        await super().shutdown(sockets)

    def _cut_off(self) -> None:
        for connection in list(self.server_state.connections):
            # Closing would wait until a client that reads nothing has read everything.
            connection.transport.abort()


def make_server(app: ASGIApp, /) -> Server:
    """Return a server for the application; `run(sockets=[...])` serves until a signal."""
    return Server(
        uvicorn.Config(
            app,
            http="h11",
            ws="websockets-sansio",
            lifespan="off",
            log_config=None,
            # Its lines of every request would show the token.
            access_log=False,
            log_level="warning",
            server_header=False,
            proxy_headers=False,
            ws_max_size=MAX_MESSAGE_BYTES,
            # Pictures are packed already; for the rest there is nothing to gain.
            ws_per_message_deflate=False,
            limit_concurrency=_MAX_CONNECTIONS,
            timeout_graceful_shutdown=1,
        )
    )


def address_of(listener: socket.socket, host: str, token: str, /) -> str:
    """Return what to open in a browser."""
    port = listener.getsockname()[1]
    named = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    name = f"[{named}]" if ":" in named else named
    return f"http://{name}:{port}/?token={token}"
