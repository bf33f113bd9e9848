"""Play a world: PlayConfig -> a page in the browser, or this terminal, until Ctrl-C.

    worldloom play runs/demo

reads a model, its tokenizer and a few start frames, and writes SESSIONS/DATE-TIME: every step that
is taken. The port is taken first, so that a port in use is said before anything is loaded.
"""

import socket
import sys
import webbrowser
from contextlib import closing, suppress
from dataclasses import replace
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from worldloom.common import ConfigError, say

from ..ranks import Share, num_cores
from .config import PlayConfig as PlayConfig
from .worlds import WorldFiles, find_worlds, gallery, world_files

if TYPE_CHECKING:
    from .player import Player
    from .session import PlaySession
    from .session_log import SessionLog

LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")

_GALLERY = 12
"""Starts to choose from."""
_USUAL_FPS = 10.0
"""Of a world whose data had no frame rate."""
_STOP_S = 1.0


def play(config: PlayConfig) -> None:
    """Let a person play until they leave.

    Raises:
        ConfigError: if it is not clear which world is meant, the port is taken, or the server's
            libraries are missing.
        FormatError: if a part of the world is missing or damaged.
        SystemExit: with 130 after Ctrl-C, 143 after SIGTERM.
    """
    files = _files(config)
    if config.terminal:
        from ..devices import computing_with

        with computing_with(config.threads):
            _play_here(files, config)
    else:
        _require_server()
        from .server import listen

        with closing(listen(config.host, config.port)) as listener:
            from ..devices import computing_with

            with computing_with(config.threads or _all_but_one()):
                _play_there(files, config, listener)


def _all_but_one() -> int:
    """Return how many threads leave a core to who draws the page.

    Two threads on two cores wait for each other wherever the browser has one of them: the demo's
    world played 76 frames a second so, and 147 with one thread (docs/performance.md).
    """
    import torch

    return min(torch.get_num_threads(), max(1, num_cores(Share()) - 1))


def _files(config: PlayConfig) -> WorldFiles:
    """Return the world that is meant."""
    if config.world is not None:
        return _from(world_files(config.world), config)
    if config.model is not None:
        assert config.tokenizer is not None, "PlayConfig takes all parts or none"
        return _from(
            WorldFiles(str(config.model), config.model, config.tokenizer, None, None), config
        )
    found = find_worlds(Path())
    if not found:
        raise ConfigError(
            "play: no world was found in this folder or two levels below; name one "
            "(worldloom play FOLDER), or make one in some minutes: worldloom demo"
        )
    if len(found) > 1:
        say("worlds found here, the newest first:")
        for files in found:
            say(f"  {files.name}")
        raise ConfigError(f"play: say which one, as in: worldloom play {found[0].name}")
    say(f"found one world here: {found[0].name}")
    return _from(found[0], config)


def _from(files: WorldFiles, config: PlayConfig) -> WorldFiles:
    """Return a world that starts where a person wants."""
    if config.start is None:
        return files
    recorded = (config.start / "episodes.json").is_file()
    return replace(
        files, starts=config.start, episodes=config.start if recorded else files.episodes
    )


def _require_server() -> None:
    """Say how to get the libraries, before anything is loaded."""
    for module in ("starlette", "uvicorn", "websockets"):
        try:
            import_module(module)
        except ImportError as error:
            raise ConfigError(
                f"play: the page needs {module}, which is not installed ({error}); pip install "
                "'worldloom[play]', or play with --terminal"
            ) from error


def open_session(files: WorldFiles, config: PlayConfig, /) -> "tuple[PlaySession, SessionLog]":
    """Load a world, and begin a session in it and its log.

    Raises:
        FormatError, MismatchError: if a part is missing or damaged, or they do not fit together.
        ConfigError: if there is no moment to start from.
        StorageError: if the session cannot be written.
    """
    if files.starts is None:
        raise ConfigError(
            f"play: {files.name} has neither shards nor episodes, so there is no frame to start "
            "from; name some with --start"
        )
    say(f"{files.name}: loading the model")
    from ..devices import choose_device
    from ..world import World
    from .session import PlaySession
    from .session_log import SessionLog

    world = World.from_pretrained(
        files.model, files.tokenizer, sampling=config.sampling, device=choose_device(config.device)
    )
    starts = gallery(files, world, count=_GALLERY)
    now = datetime.now().astimezone()
    log = SessionLog(_sessions(files, config), files=files, world=world, now=now)
    session = PlaySession(world, starts, sampling=config.sampling, seed=config.seed, log=log)
    return session, log


def open_player(
    session: "PlaySession", files: WorldFiles, /, *, pace: float | None, recordings: Path
) -> "Player":
    """Return a player of a session, not yet started.

    Args:
        session: is the player's from now on.
        files: where its world is: the real game and the truth are found beside it.
        pace: frames a second at first; None for those of the data.
        recordings: folder for what a person records.
    """
    from .companion import open_companions
    from .player import Player

    return Player(
        session,
        name=files.name,
        pace=(session.world.model.spec.fps or _USUAL_FPS) if pace is None else pace,
        companions=open_companions(files, session.world),
        recordings=recordings,
    )


def _sessions(files: WorldFiles, config: PlayConfig) -> Path:
    """Return the folder that keeps what is played."""
    if config.sessions is not None:
        return config.sessions
    return Path("sessions") if config.model is not None else files.model.parents[1] / "sessions"


def _play_here(files: WorldFiles, config: PlayConfig) -> None:
    """Play in this terminal."""
    from .controls import Controls
    from .terminal import play_in_terminal

    session, log = open_session(files, config)
    spec = session.world.model.spec
    try:
        with closing(session):
            play_in_terminal(
                session,
                Controls.of(spec.actions),
                fps=(spec.fps or _USUAL_FPS) if config.pace is None else config.pace,
                stdin=sys.stdin,
                stdout=sys.stdout,
            )
    finally:
        _say_where(log.folder)


def _play_there(files: WorldFiles, config: PlayConfig, listener: socket.socket) -> None:
    """Serve a page on a listening socket, until a signal."""
    from .guard import new_token
    from .server import address_of, build_app, make_server

    session, log = open_session(files, config)
    player = open_player(session, files, pace=config.pace, recordings=log.folder)
    token = new_token()
    app = build_app(player, token=token, host=config.host)
    server = make_server(app)
    address = address_of(listener, config.host, token)
    _invite(address, config, listener)
    player.start()
    if config.open:
        webbrowser.open(address)
    try:
        # After its end the server raises the signal again; this ends below, with its code.
        with suppress(KeyboardInterrupt, SystemExit):
            server.run(sockets=[listener])
    finally:
        if not player.stop(timeout_s=_STOP_S):
            say("the last step did not end in time, so the session may lack it")
        _say_where(log.folder)
    if server.ended_by is not None:
        raise SystemExit(128 + server.ended_by)


def _invite(address: str, config: PlayConfig, listener: socket.socket) -> None:
    """Say how to get in."""
    port = listener.getsockname()[1]
    say(f"open {address}")
    if config.host in LOOPBACK_HOSTS:
        say(
            f"from another machine: ssh -L {port}:{config.host}:{port} {socket.gethostname()}, "
            "then the same address there"
        )
    else:
        say(
            f"this listens on {config.host}: whoever reaches it and has the address plays, and "
            "what goes over the network can be read on its way"
        )
    say("Ctrl-C ends it")


def _say_where(folder: Path) -> None:
    say(f"this session is kept; a video of it: worldloom replay {folder}")
