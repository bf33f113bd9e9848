"""A stretch of play -> FOLDER/NAME.mp4 and FOLDER/NAME.json, written as it is played.

    frames_THWC, slots_rA, step after step  ->  what was seen, enlarged; what was pressed

NAME.json is a list of the words that `worldloom generate --actions NAME.json` takes, so a stretch
that begins at a start gives the same codes there: from the same start, with the session's seed and
settings. Memory does not grow with the length. What a killed process leaves of the mp4 still plays;
its words lack what was pressed last.
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Self

import numpy as np
from worldloom.common import (
    ActionSpec,
    FormatError,
    Frames,
    SlotArray,
    storage_errors,
)
from worldloom.dynamics import NULL

from ..action_sources import NO_ACTION, parse_action
from .film import Film

_LONGEST_RUN = 1 << 16
"""Steps of one word; readers take a word of 1 << 20 at most."""


class Recording:
    """A recording in progress; a context manager. `close` completes both files."""

    def __init__(
        self, folder: Path, name: str, /, *, spec: ActionSpec, fps: float, first_HWC: Frames
    ) -> None:
        """Begin with the frame that is shown now.

        Args:
            folder: is made if it is not there.
            name: of both files, without an ending.
            spec: of the actions.
            fps: frames per second of the video; 0 if the world does not know.
            first_HWC: the frame from which the first action leads on.

        Raises:
            StorageError: if the files cannot be written.
        """
        self.mp4 = folder / f"{name}.mp4"
        self.actions = folder / f"{name}.json"
        self._words = _Words(spec)
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with storage_errors(self.actions):
            self._file = self.actions.open("w", encoding="utf-8")
        try:
            self._film = Film(self.mp4, fps=fps, first_HWC=first_HWC)
        except BaseException:
            self._file.close()
            raise

    @property
    def frames(self) -> int:
        """Frames written so far; the first is the one that was shown when it began."""
        return self._film.frames

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def add(self, frames_THWC: Frames, slots_rA: SlotArray, /) -> None:
        """Write one step: the frames that it shows, and the actions that led to them.

        Raises:
            StorageError: if there is no room; what was written before stays.
            FormatError: if an action's name is one that no word can say.
        """
        text = self._words.add(slots_rA)
        with storage_errors(self.actions):
            self._file.write(text)
            self._file.flush()
        self._film.add(frames_THWC)

    def close(self) -> None:
        """Complete both files; further calls do nothing.

        Raises:
            StorageError: if there is no room.
            FormatError: if an action's name is one that no word can say.
        """
        if self._file.closed:
            return
        try:
            with storage_errors(self.actions), self._file:
                self._file.write(self._words.end())
        finally:
            self._film.close()


class _Words:
    """A JSON list of words, piece by piece: equal actions one after another are one word."""

    def __init__(self, spec: ActionSpec) -> None:
        self._spec = spec
        self._slots: tuple[int, ...] | None = None
        self._steps = 0
        self._begun = False
        self._spell = lru_cache(1024)(self._spell_anew)

    def add(self, slots_rA: SlotArray) -> str:
        """Return what to write now: the runs that ended."""
        text = ""
        for slots in map(tuple, slots_rA.tolist()):
            if slots != self._slots or self._steps == _LONGEST_RUN:
                text += self._run()
                self._slots = slots
            self._steps += 1
        return text

    def end(self) -> str:
        """Return the end of the list."""
        return self._run() + ("\n]\n" if self._begun else "[]\n")

    def _run(self) -> str:
        """Return the run that ends, as one more item of the list."""
        if self._slots is None or self._steps == 0:
            return ""
        word = json.dumps(f"{self._spell(self._slots)}*{self._steps}", ensure_ascii=False)
        before, self._begun, self._steps = ",\n" if self._begun else "[\n", True, 0
        return before + word

    def _spell_anew(self, slots: tuple[int, ...]) -> str:
        """Return the word of an action, by name where that reads back to the same slots."""
        wanted_1A = np.asarray([slots], np.int64)
        for word in self._spellings(slots):
            with suppress(FormatError):
                if np.array_equal(parse_action(word, spec=self._spec), wanted_1A):
                    return word
        raise FormatError(
            f"actions {list(slots)}: {self._spec.kind} actions called "
            f"{', '.join(self._spec.names):.200} cannot be written as words, because their names "
            "contain +, * or each other's numbers; rename them where they are recorded"
        )

    def _spellings(self, slots: tuple[int, ...]) -> Iterator[str]:
        """Yield how an action may be written, the most readable first."""
        spec = self._spec
        if NULL in slots:
            yield NO_ACTION
            return
        if spec.kind == "discrete":
            yield from (spec.names[slots[0]], str(slots[0]))
        elif spec.kind in ("keys", "none"):
            pressed = [key - 1 for key in slots if key]
            yield "+".join(spec.names[key] for key in pressed) or "none"
            yield "+".join(map(str, pressed))
        else:
            raw = spec.decode(np.asarray([slots], np.int64))[0]
            yield ",".join(f"{value:.9g}" for value in raw)
