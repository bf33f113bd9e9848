"""The thread that plays: what a page says and the clock -> tasks for a game, one after another.

    Message -> offer -> [ this thread: Game.do ] -> Outlet

One thread has the game, so that generating never waits for a socket and no socket for it. What is
held is a single value that the newest input replaces; everything else waits in a short line.
Without an outlet nothing is generated.
"""

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING

from worldloom.common import FormatError, WorldloomError, say

from .game import Game, Greet, Outlet, Task, Tick
from .protocol import Input, Message, Rewind

if TYPE_CHECKING:
    from .companion import Companion
    from .session import PlaySession

_MAX_WAITING = 32
"""Messages in line, beyond which whoever sends them waits."""
_KEPT_PICTURES = 4


class Player:
    """Plays one session for whoever is attached."""

    def __init__(
        self,
        session: "PlaySession",
        /,
        *,
        name: str,
        pace: float,
        companions: Mapping[str, Callable[[], "Companion"]],
        recordings: Path,
    ) -> None:
        """Take over a session; `start` begins.

        Args:
            session: used by no one else from now on, and closed at the end.
            name: of the world, for people.
            pace: pixel frames a second; 0 as many as can be.
            companions: what can be shown beside it, by name.
            recordings: folder for what a person records.
        """
        self._game = Game(
            session, name=name, pace=pace, companions=companions, recordings=recordings
        )
        self._names = frozenset(control.name for control in self._game.controls.controls)
        self.starts = session.starts
        """Where it may begin: the gallery."""
        self.frames_per_step = session.world.steps_per_latent
        """Actions that a step takes and frames that it gives, r."""
        self._wake = threading.Condition()  # guards what follows
        self._waiting: deque[tuple[Task, Input]] = deque()
        self._input = Input((), 0)
        self._outlet: Outlet | None = None
        self._stopping = False
        self._died: str | None = None
        self._anew = False
        """Whether who came last is still to find everything as at the start."""
        self._thread = threading.Thread(target=self._run, name="player", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self, *, timeout_s: float) -> bool:
        """End after the step that runs; return whether it did in time and the session is closed."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def attach(self, outlet: Outlet, /, *, resumed: bool) -> None:
        """Play for this outlet; it gets welcome, state and the present frame, then what it asks.

        Raises:
            WorldloomError: if the player cannot go on at all.
        """
        with self._wake:
            self._require_alive()
            self._outlet = outlet
            self._waiting.clear()
            self._input = Input((), 0)
            self._anew = self._anew or not resumed
            self._waiting.append((Greet(resumed=not self._anew), self._input))
            self._wake.notify()

    def detach(self, outlet: Outlet, /) -> None:
        """Stand still until somebody attaches, unless another outlet took over."""
        with self._wake:
            if self._outlet is outlet:
                self._outlet = None
                self._waiting.clear()

    def offer(self, message: Message, /) -> bool:
        """Take a message; return False where too many wait already: offer it again soon.

        Raises:
            FormatError: if a control is held that this world does not have.
            WorldloomError: if the player cannot go on at all.
        """
        if isinstance(message, Input):
            for name in message.held:
                if name not in self._names:
                    raise FormatError(
                        f"input: this world has no control {name!r:.60}; it has "
                        f"{', '.join(sorted(self._names)) or 'none'!s:.200}"
                    )
        with self._wake:
            self._require_alive()
            if isinstance(message, Input):
                self._input = message
                return True
            if len(self._waiting) >= _MAX_WAITING:
                return False
            last = self._waiting[-1][0] if self._waiting else None
            if isinstance(message, Rewind) and isinstance(last, Rewind):
                # A slider says every position that it passes; only where it is now matters.
                self._waiting.pop()
            self._waiting.append((message, self._input))
            self._wake.notify()
        return True

    def keep_picture(self, picture: bytes, /) -> str:
        """Keep a picture to start from; return the name by which `reset` asks for it."""
        name, pictures = token_hex(8), self._game.pictures
        with self._wake:
            pictures[name] = picture
            while len(pictures) > _KEPT_PICTURES:
                del pictures[next(iter(pictures))]
        return name

    def recording(self, name: str, /) -> Path | None:
        """Return the file of a finished recording."""
        return self._game.recorded.get(name)

    def _require_alive(self) -> None:
        if self._died is not None:
            raise WorldloomError(self._died)

    def _run(self) -> None:
        """Do what is asked and what is due, until stopped."""
        try:
            while (next_task := self._next()) is not None:
                self._attempt(*next_task)
        except BaseException as error:
            say(traceback.format_exc().rstrip())
            self._die(f"the player ended with {_name(error)}; start `worldloom play` again")
        finally:
            self._game.end()

    def _next(self) -> tuple[Task, Input] | None:
        """Wait for something to do; None at the end."""
        game = self._game
        with self._wake:
            while not self._stopping:
                game.outlet = self._outlet
                if self._waiting:
                    task, held = self._waiting.popleft()
                    if isinstance(task, Greet):
                        self._anew = False
                    return task, held
                going = game.running and self._outlet is not None
                wait_s = game.due - time.monotonic() if going else None
                if wait_s is not None and wait_s <= 0:
                    return Tick(), self._input
                self._wake.wait(None if wait_s is None else min(wait_s, threading.TIMEOUT_MAX))
        return None

    def _attempt(self, task: Task, held: Input) -> None:
        """Do one thing; what goes wrong is told, and the session lives."""
        try:
            self._game.do(task, held)
        except WorldloomError as error:
            self._game.complain(task, str(error))
        except Exception as error:
            say(traceback.format_exc().rstrip())
            self._game.complain(
                task,
                f"this did not work: {_name(error)}; the terminal that runs `worldloom play` shows "
                "where. Reset, or rewind, to go on",
            )

    def _die(self, sentence: str) -> None:
        """Tell whoever looks on, and whoever comes, that this player is no more."""
        with self._wake:
            self._died = sentence
            outlet = self._outlet
        if outlet is not None:
            outlet.tell({"type": "error", "message": sentence})


def _name(error: BaseException) -> str:
    """Return "RuntimeError: out of memory", short enough for a line."""
    line = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {line}"[:300]
