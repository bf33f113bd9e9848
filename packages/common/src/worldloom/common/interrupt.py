"""Stopping well: SIGTERM and Ctrl-C become a wish that a training loop grants between two steps.

    with Interrupt() as interrupt:
        for step in ...:
            if interrupt.wanted: save, then interrupt.leave()

Nothing is interrupted half way: what is saved is the state after a whole step.
"""

import signal
import threading
from types import FrameType
from typing import NoReturn, Self


class Interrupt:
    """Notes SIGTERM and SIGINT while the block runs; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self._signal: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # others cannot set handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @property
    def wanted(self) -> bool:
        """Whether somebody asked to stop."""
        return self._signal is not None

    def leave(self) -> NoReturn:
        """Exit with 143 after SIGTERM, 130 after Ctrl-C; call it once the state is saved."""
        raise SystemExit(128 + (self._signal or signal.SIGTERM))

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self._signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        self._signal = number
