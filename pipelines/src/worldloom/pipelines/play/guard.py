"""Who may ask: Host, Origin and token of every request -> the application, or 403 and one sentence.

A page from anywhere can make a browser send requests to 127.0.0.1. Three walls stand in its way:

    Host    names this machine, so that a stranger's name that was pointed at it (DNS rebinding)
            is refused
    Origin  of a request that may change something is that of our own page; a page on another port
            of this machine is another origin. Absent: not a browser
    token   drawn at random at every start, printed on the terminal, compared in constant time

What a browser would run, frame or guess is switched off by headers.
"""

import ipaddress
import re
import secrets
from collections.abc import Iterable
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN_PATHS = frozenset({"/play.js", "/play.css"})
"""Need no token: they hold no secret, and a page asks for them without one."""
LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:\d{1,5})?")


def new_token() -> str:
    """Return a token that cannot be guessed."""
    return secrets.token_urlsafe(24)


class Guard:
    """Stands before an ASGI application."""

    def __init__(
        self, app: ASGIApp, /, *, token: str, hosts: Iterable[str], any_address: bool = False
    ) -> None:
        """Guard `app`.

        Args:
            app: what is guarded.
            token: that the address must carry.
            hosts: names by which this machine is reached, without a port: behind `ssh -L` the port
                is another.
            any_address: also take any IP address for its name, where it listens on all; a name is
                what rebinding needs.
        """
        self._app = app
        self._token = token.encode()
        self._hosts = frozenset(host.lower() for host in hosts)
        self._any_address = any_address

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or refuse it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        host = Headers(scope=scope).get("host", "")
        if refusal is not None:
            scope.setdefault("extensions", {})
            response = PlainTextResponse(f"{refusal}\n", status_code=403)
            await response(scope, receive, _hardened(send, ""))
            return
        await self._app(scope, receive, _hardened(send, host))

    def _refusal(self, scope: Scope) -> str | None:
        """Return why a request is refused, or None."""
        headers = Headers(scope=scope)
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        if len(hosts) != 1 or not self._is_here(hosts[0]):
            return (
                "this server does not go by that name; open the address that `worldloom play` "
                "printed, or name this machine with --host"
            )
        # Browsers send an origin with every socket and every POST; another page's is another.
        if len(origins) > 1 or (origins and origins[0].lower() != f"http://{hosts[0].lower()}"):
            return "this request comes from another page, which may not play here"
        if scope["path"] in OPEN_PATHS:
            return None
        tokens = parse_qs(scope["query_string"].decode("latin-1")).get("token", [])
        if len(tokens) != 1 or not secrets.compare_digest(tokens[0].encode(), self._token):
            return (
                "the token in the address is missing or another; open the address that "
                "`worldloom play` printed last, with all that follows ?token="
            )
        return None

    def _is_here(self, host: str) -> bool:
        """Whether a Host header names this machine."""
        match = _HOST.fullmatch(host.lower())
        if match is None:
            return False
        name = match[1]
        if name in self._hosts:
            return True
        if not self._any_address:
            return False
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return False
        return True


def _hardened(send: Send, host: str) -> Send:
    """Return a `send` that adds the headers that keep a browser from more than the page needs."""
    sockets = f" ws://{host}" if host else ""  # not every browser counts them as 'self'
    policy = (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
        f"connect-src 'self'{sockets}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )

    async def hardened(message: Message) -> None:
        if message["type"] in ("http.response.start", "websocket.http.response.start"):
            headers = MutableHeaders(scope=message)
            headers["content-security-policy"] = policy
            headers["x-content-type-options"] = "nosniff"
            headers["x-frame-options"] = "DENY"
            headers["referrer-policy"] = "no-referrer"
            headers["cross-origin-opener-policy"] = "same-origin"
            headers["cross-origin-resource-policy"] = "same-origin"
            headers["cache-control"] = "no-store"
        await send(message)

    return hardened
