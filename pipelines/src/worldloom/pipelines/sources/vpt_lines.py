"""The action files of OpenAI's Minecraft recordings (VPT) -> keys, camera and menus of each frame.

    NAME.jsonl, one object a frame  ->  read_lines  ->  Lines

What is done about the recorder's quirks is what OpenAI's own loader does: an attack button that is
down in the first line and stays so is not pressed until it is pressed anew, and a change of the
hotbar presses that slot's key, for the recorder does not see the wheel. It departs from that
loader in three ways: degrees are not truncated to integers, the slot that is selected in the first
line presses nothing, and steps in which nothing is pressed stay: a world goes on without us.

Source: `data_loader.py` and `run_inverse_dynamics_model.py` of OpenAI's Video-Pre-Training.
"""

from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from worldloom.common import FormatError, parse_json

from .text_lines import bounded_lines

KEYBOARD = {
    "key.keyboard.escape": "ESC",
    "key.keyboard.s": "back",
    "key.keyboard.q": "drop",
    "key.keyboard.w": "forward",
    **{f"key.keyboard.{n}": f"hotbar.{n}" for n in range(1, 10)},
    "key.keyboard.e": "inventory",
    "key.keyboard.space": "jump",
    "key.keyboard.a": "left",
    "key.keyboard.d": "right",
    "key.keyboard.left.shift": "sneak",
    "key.keyboard.left.control": "sprint",
    "key.keyboard.f": "swapHands",
}
MOUSE_BUTTONS = {0: "attack", 1: "use", 2: "pickItem"}
KEYS = (*KEYBOARD.values(), *MOUSE_BUTTONS.values())
DEGREES_PER_DOT = 360 / 2400
"""Of the mouse, at the sensitivity of the recordings."""

_INDEX = {name: i for i, name in enumerate(KEYS)}
_MAX_LINE_BYTES = 1 << 20
_MAX_DOTS = 1e9
_HOTBAR_SLOTS = 9


@dataclass(frozen=True, slots=True)
class Lines:
    """A whole action file, 40 bytes a frame."""

    keys: npt.NDArray[np.uint8]
    """[N, len(KEYS)], 1 where a key is down."""
    camera: npt.NDArray[np.float64]
    """[N, 2], degrees of pitch (down is positive) and of yaw (right is positive)."""
    menu: npt.NDArray[np.bool_]
    """[N], whether a menu covers the game; the mouse then moves its pointer, not the camera."""
    attack_was_stuck: bool
    """Whether the attack button was reported as down from the first frame on."""

    def __len__(self) -> int:
        return len(self.menu)


def read_lines(path: Path, /) -> Lines:
    """Read an action file.

    Raises:
        FormatError: naming the file and the line that is not what the recorder writes.
    """
    keys, camera, menu = bytearray(), array("d"), bytearray()
    stuck = was_stuck = False
    hotbar: int | None = None
    for where, line in _objects(path):
        mouse = _object(line, "mouse", where)
        pressed = _pressed(line, mouse, where)
        fresh = _list(mouse, "newButtons", where, int)
        if not menu:
            was_stuck = stuck = fresh == [0]
        elif 0 in fresh:
            stuck = False
        if stuck:
            pressed.discard("attack")
        selected = _hotbar(line, where)
        if selected is not None:
            if hotbar is not None and selected != hotbar:
                pressed.add(f"hotbar.{selected + 1}")
            hotbar = selected
        row = bytearray(len(KEYS))
        for name in pressed:
            row[_INDEX[name]] = 1
        keys += row
        camera.extend(_number(mouse, name, where) * DEGREES_PER_DOT for name in ("dy", "dx"))
        menu.append(_flag(line, "isGuiOpen", where))
    if not menu:
        raise FormatError(f"{path}: has no lines; expected one a frame")
    return Lines(
        keys=np.frombuffer(bytes(keys), np.uint8).reshape(-1, len(KEYS)),
        camera=np.frombuffer(camera.tobytes(), np.float64).reshape(-1, 2),
        menu=np.frombuffer(bytes(menu), np.bool_),
        attack_was_stuck=was_stuck,
    )


def _objects(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield where it stands and the object of every line."""
    expected = "a line of actions for each frame"
    for where, content in bounded_lines(path, expected=expected, max_line_bytes=_MAX_LINE_BYTES):
        line = parse_json(content, where=where)
        if not isinstance(line, dict):
            raise FormatError(f"{where}: expected an object, got {line!r:.60}")
        yield where, line


def _pressed(line: Mapping[str, Any], mouse: Mapping[str, Any], where: str) -> set[str]:
    """Return the names of all that is down; keys that no action has are passed by."""
    keyboard = _object(line, "keyboard", where)
    keys = _list(keyboard, "keys", where, str)
    buttons = _list(mouse, "buttons", where, int)
    pressed = {KEYBOARD[key] for key in keys if key in KEYBOARD}
    return pressed | {MOUSE_BUTTONS[button] for button in buttons if button in MOUSE_BUTTONS}


def _hotbar(line: Mapping[str, Any], where: str) -> int | None:
    """Return the selected slot, or None from recorders that do not tell."""
    slot = line.get("hotbar")
    if slot is not None and (type(slot) is not int or not 0 <= slot < _HOTBAR_SLOTS):
        raise FormatError(f"{where}: hotbar is {slot!r:.60}, must be 0 to {_HOTBAR_SLOTS - 1}")
    return slot


def _object(line: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    value = line.get(name)
    if not isinstance(value, dict):
        raise FormatError(f"{where}: {name} is {value!r:.60}, must be an object")
    return value


def _list(table: Mapping[str, Any], name: str, where: str, kind: type) -> list[Any]:
    values = table.get(name)
    if not isinstance(values, list) or any(type(value) is not kind for value in values):
        raise FormatError(f"{where}: {name} is {values!r:.60}, must be a list of {kind.__name__}")
    return values


def _number(table: Mapping[str, Any], name: str, where: str) -> float:
    value = table.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _MAX_DOTS:
        raise FormatError(f"{where}: mouse {name} is {value!r:.60}, must be a number")
    return float(value)


def _flag(table: Mapping[str, Any], name: str, where: str) -> bool:
    value = table.get(name, False)
    if type(value) is not bool:
        raise FormatError(f"{where}: {name} is {value!r:.60}, must be true or false")
    return value
