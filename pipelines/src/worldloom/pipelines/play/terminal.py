"""A session in a terminal: half-block pictures, and the keys of the page.

    keys that are pressed  ->  play_in_terminal  ->  steps of the session, drawn

For machines without a browser, through any number of ssh. One thread: it waits for keys until a
step is due, does it, draws it. How long a pressed key counts as held, key_presses.py says. The
terminal is as it was when play ends, whichever way it ends.
"""

import os
import select
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TextIO

import numpy as np
from worldloom.common import ConfigError, Frames, WorldloomError

from .controls import Controls
from .half_blocks import HalfBlocks, fit_cells
from .key_presses import Held, KeyReader, key_labels
from .session import PlaySession, Shown

_PAUSED_S = 0.25
"""How often a picture that stands still looks whether its window has another size."""
_USUAL_SIZE = os.terminal_size((80, 24))
# A screen of its own, without a cursor; a line that is too long is cut and not wrapped.
_ENTER = "\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[2J"
_LEAVE = "\x1b[0m\x1b[?7h\x1b[?25h\x1b[?1049l"


def play_in_terminal(
    session: PlaySession, controls: Controls, /, *, fps: float, stdin: TextIO, stdout: TextIO
) -> None:
    """Play until q, Ctrl-C (a KeyboardInterrupt) or the end of the input.

    Args:
        session: begins anew; stays open.
        controls: of its world.
        fps: pixel frames a second; 0 for as fast as it can.
        stdin: the terminal's keyboard.
        stdout: the terminal itself.

    Raises:
        ConfigError: if one of them is no terminal, or there is none as we know it.
    """
    for name, file in (("input", stdin), ("output", stdout)):
        if not file.isatty():
            raise ConfigError(
                f"play: --terminal draws where it reads keys, but the {name} is no terminal; run "
                "it in one, without pipes (over ssh with -t)"
            )
    shown = session.reset()
    with _raw(stdin, stdout):
        _TerminalPlay(session, controls, fps=fps, stdin=stdin, stdout=stdout).run(shown)


class _TerminalPlay:
    """Play in a terminal that is ready for it."""

    def __init__(
        self, session: PlaySession, controls: Controls, *, fps: float, stdin: TextIO, stdout: TextIO
    ) -> None:
        self._session, self._controls, self._fps = session, controls, fps
        self._input, self._output = stdin.fileno(), stdout.fileno()
        self._names = {key: control.name for control in controls.controls for key in control.keys}
        self._pause_keys = [key for key in ("KeyP", "Space") if key not in self._names]
        self._reader, self._held, self._picture = KeyReader(), Held(), HalfBlocks()
        self._running, self._due, self._start = True, 0.0, 0
        self._size = _USUAL_SIZE
        self._said = ""
        """What went wrong last."""

    def run(self, shown: Shown) -> None:
        """Play until the end."""
        self._shown = shown
        self._size = self._look()
        self._draw()
        self._due = time.monotonic()
        while True:
            now = time.monotonic()
            wait_s = max(0.0, self._due - now) if self._running else _PAUSED_S
            if select.select([self._input], [], [], wait_s)[0]:
                content = os.read(self._input, 4096)
                keys = self._reader.read(content, now=time.monotonic())
                if not content or "KeyQ" in keys:
                    return
                for key in keys:
                    self._press(key)
            if self._running and time.monotonic() >= self._due:
                self._step(self._held.take(now=time.monotonic()))
            elif self._look() != self._size:
                self._draw()

    def _press(self, key: str) -> None:
        """Do what one key asks for."""
        session = self._session
        if key in self._names:
            self._held.press(self._names[key], now=time.monotonic())
        elif key in self._pause_keys:
            self._running, self._due = not self._running, time.monotonic()
            self._held.let_go()
            self._draw()
        elif key == "Period":
            self._running = False
            self._step(self._held.take_pressed())
        elif key == "Comma":
            self._running = False
            self._go(lambda: session.rewind(max(0, session.position - 1)))
        elif key == "KeyR":
            self._go(lambda: session.reset())
        elif key == "Tab" and session.starts:
            self._start = (self._start + 1) % len(session.starts)
            self._go(lambda: session.reset(start=self._start))

    def _step(self, held: Sequence[str]) -> None:
        """Do one step, and draw its frames at their pace."""
        began = time.monotonic()
        slots_A = self._controls.slots_A(held)
        slots_rA = np.repeat(slots_A[None], self._session.world.steps_per_latent, axis=0)
        period_s = 1 / self._fps if self._fps else 0.0
        if not self._go(lambda: self._session.step(slots_rA), draw=False):
            return
        frames_THWC = self._shown.frames_THWC
        for index, frame_HWC in enumerate(frames_THWC):
            time.sleep(max(0.0, began + index * period_s - time.monotonic()) if index else 0.0)
            self._draw(frame_HWC)
        # A step that took longer than its time is not made up for by a rush.
        self._due = max(self._due + len(frames_THWC) * period_s, time.monotonic())

    def _go(self, move: Callable[[], Shown], *, draw: bool = True) -> bool:
        """Move the session; where it refuses, say why and pause. Return whether it moved."""
        try:
            self._shown = move()
        except WorldloomError as error:
            self._said, self._running = str(error), False
            self._draw()
            return False
        self._said = ""
        if draw:
            self._held.let_go()
            self._draw()
        return True

    def _look(self) -> os.terminal_size:
        """Return how large the window is now; of the usual size, if the terminal does not know."""
        size = os.get_terminal_size(self._output)
        return size if min(size) > 0 else _USUAL_SIZE

    def _draw(self, frame_HWC: Frames | None = None) -> None:
        """Show a frame (the last one, if none is given), what is done, and which keys there are."""
        size = self._look()
        text = ""
        if size != self._size:
            self._size, text = size, "\x1b[2J"
            self._picture.forget()
        lines = [self._status(), self._help()][: max(0, (size.lines - 1) // 2)]
        frame_HWC = self._shown.frames_THWC[-1] if frame_HWC is None else frame_HWC
        rows = size.lines - len(lines)
        picture = fit_cells(frame_HWC, columns=size.columns, rows=rows)
        left = 1 + (size.columns - picture.shape[1]) // 2
        text += self._picture.draw(picture, top=1, left=left)
        for number, line in enumerate(lines):
            # Names come from files: what is no character would be an order to the terminal.
            plain = "".join(sign if sign.isprintable() else "?" for sign in line)
            text += f"\x1b[{rows + 1 + number};1H\x1b[2K{plain[: size.columns]}"
        _write(self._output, text)

    def _status(self) -> str:
        """Return what is being done."""
        shown = self._shown
        if self._said:
            return self._said
        parts = [f"frame {shown.position}", shown.action, f"{shown.model_ms:.0f} ms"]
        return " · ".join(["" if self._running else "paused", *parts]).strip(" ·")

    def _help(self) -> str:
        """Return which keys do what, the world's own first."""
        worlds = [f"{c.label} {key_labels(c.keys)}" for c in self._controls.controls if c.keys]
        ours = [f"pause {key_labels(self._pause_keys)}", "step .", "back ,", "reset R", "quit Q"]
        others = ["next start tab"] if len(self._session.starts) > 1 else []
        return "  ".join([*worlds, *ours, *others])


@contextmanager
def _raw(stdin: TextIO, stdout: TextIO) -> Iterator[None]:
    """Have keys come one by one and unseen, on a screen of its own; afterwards all is as it was.

    Ctrl-C interrupts, as everywhere, and the command line has SIGTERM unwind us. Stopping (Ctrl-Z)
    would leave a shell without its screen, so it does nothing.
    """
    try:
        import termios
    except ImportError as error:
        raise ConfigError(
            f"play: --terminal is not known on this system ({error}); play in a browser, without it"
        ) from error
    fd = stdin.fileno()
    before = termios.tcgetattr(fd)
    raw = termios.tcgetattr(fd)
    raw[0] &= ~(termios.IXON | termios.ICRNL)
    raw[3] &= ~(termios.ICANON | termios.ECHO | termios.IEXTEN)
    off = bytes([os.fpathconf(fd, "PC_VDISABLE")])
    raw[6] = list(raw[6])
    for order in (termios.VSUSP, termios.VQUIT):
        raw[6][order] = off
    raw[6][termios.VMIN], raw[6][termios.VTIME] = 1, 0
    stdout.flush()
    try:
        termios.tcsetattr(fd, termios.TCSANOW, raw)
        _write(stdout.fileno(), _ENTER)
        yield
    finally:
        # Keys that nobody read are not for the shell; TCSAFLUSH would wait for a slow screen.
        with suppress(OSError):
            _write(stdout.fileno(), _LEAVE)
        with suppress(termios.error):
            termios.tcflush(fd, termios.TCIFLUSH)
            termios.tcsetattr(fd, termios.TCSANOW, before)


def _write(fd: int, text: str) -> None:
    """Write all of a text, however slowly it is taken."""
    content = text.encode("utf-8", "replace")
    while content:
        content = content[os.write(fd, content) :]
