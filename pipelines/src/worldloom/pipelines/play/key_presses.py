r"""Bytes that a terminal sends -> keys, and for how long each is held.

    b"d", b"\x1b[C", ...  ->  KeyReader.read  ->  ["KeyD", "ArrowRight"]
    keys and times        ->  Held            ->  what is held when a step is due

A terminal says when a key is pressed and, while it stays down, presses it again and again; it never
says that one is let go. A pressed key therefore counts as held for `TAP_S`, about as long as a
terminal takes to begin repeating, and from then on for `REPEAT_S` after each repetition; and for
one step at least, however slow the world is. Of several keys that are down a terminal repeats only
the last, so the others are let go after their time.
"""

import re
from collections.abc import Sequence

TAP_S = 0.5
"""How long one press holds a key. Desktops begin to repeat after 0.25 to 0.66 s, mostly 0.5."""
REPEAT_S = 0.2
"""How long a repetition does. They come at 10 to 40 a second."""
_LONE_ESCAPE_S = 0.05
"""What follows an escape by more is no part of it."""

_NAMED = {
    " ": "Space", "-": "Minus", "=": "Equal", "[": "BracketLeft", "]": "BracketRight",
    ";": "Semicolon", "'": "Quote", ",": "Comma", ".": "Period", "/": "Slash", "\t": "Tab",
    "\r": "Enter", "\n": "Enter", "\x7f": "Backspace", "\b": "Backspace",
}  # fmt: skip
_ARROWS = {"A": "ArrowUp", "B": "ArrowDown", "C": "ArrowRight", "D": "ArrowLeft"}
_SEQUENCE = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*([@-~])|O([@-~])|[^\[O])")
_UNFINISHED = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*|O)?")


class KeyReader:
    """Turns bytes into keys, named as `KeyboardEvent.code` names them on a common keyboard."""

    def __init__(self) -> None:
        self._rest = b""
        self._rest_since = 0.0

    def read(self, content: bytes, /, *, now: float) -> list[str]:
        """Return the keys that were pressed, in order; bytes that are no key are passed over.

        Args:
            content: what the terminal sent, cut anywhere.
            now: seconds, of any clock that only goes forward.
        """
        if self._rest and now - self._rest_since > _LONE_ESCAPE_S:
            self._rest = b""
        content = self._rest + content
        self._rest, self._rest_since = b"", now
        keys, at = [], 0
        while at < len(content):
            sequence = _SEQUENCE.match(content, at)
            if sequence is not None:
                final = (sequence[1] or sequence[2] or b"").decode("ascii")
                keys.append(_ARROWS.get(final, ""))
                at = sequence.end()
                continue
            if content[at] == 0x1B:
                unfinished = _UNFINISHED.match(content, at)
                assert unfinished is not None
                if unfinished.end() == len(content):
                    self._rest = content[at:]
                    break
                at = unfinished.end()
                continue
            keys.append(_key_of(chr(content[at])))
            at += 1
        return [key for key in keys if key]


def _key_of(character: str) -> str:
    """Return the key that types a character, if it is one of ours."""
    if character.isascii() and character.isalpha():
        return f"Key{character.upper()}"
    return f"Digit{character}" if character in "0123456789" else _NAMED.get(character, "")


class Held:
    """Which controls are held, by what was pressed when."""

    def __init__(self) -> None:
        self._until: dict[str, float] = {}
        """Name -> when it is let go; the newest last."""
        self._waiting: dict[str, None] = {}
        """Pressed since the last step."""

    def press(self, name: str, /, *, now: float) -> None:
        """Press a control, or repeat it, which leaves its place in the order."""
        if now < self._until.get(name, now):
            self._until[name] = max(self._until[name], now + REPEAT_S)
        else:
            self._until.pop(name, None)
            self._until[name] = now + TAP_S
        self._waiting[name] = None

    def take(self, *, now: float) -> tuple[str, ...]:
        """Return what a step that is due finds held, the newest last."""
        self._until = {
            name: until
            for name, until in self._until.items()
            if until > now or name in self._waiting
        }
        self._waiting = {}
        return tuple(self._until)

    def take_pressed(self) -> tuple[str, ...]:
        """Return what was pressed since the last step, and let go of it: for steps one by one."""
        pressed = tuple(self._waiting)
        self.let_go()
        return pressed

    def let_go(self) -> None:
        """Let go of everything."""
        self._until, self._waiting = {}, {}


def key_labels(keys: Sequence[str], /) -> str:
    """Return keys as they are written on them, with a stroke between."""
    signs = {code: character for character, code in _NAMED.items() if character.isprintable()}
    arrows = dict(zip(_ARROWS.values(), "↑↓→←", strict=True))
    words = {**signs, **arrows, "Space": "space", "Tab": "tab"}
    return "/".join(words.get(key, key.removeprefix("Key").removeprefix("Digit")) for key in keys)
