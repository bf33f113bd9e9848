"""What games call their actions -> keys that a hand expects there.

    "MOVE_LEFT", "key.keyboard.w", "hotbar.3"  ->  wish_of       ->  Wish: a group, keys
    "camera_pitch", "steer", "brake"           ->  wish_of_axis  ->  Wish: keys for both directions
    wishes of all actions                      ->  assign_keys   ->  who gets which keys

Keys are physical ones, named as `KeyboardEvent.code` names them, so that a hand finds W, A, S, D in
one place on every layout. Walking is WASD and turning the arrows where a game has both; where it
has one of them, both work. What nothing is known of gets digits, then letters, in order.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Group = Literal["move", "look", "act", "choose", "other"]
"""What belongs together on a screen."""

RESERVED_KEYS = frozenset(
    ("KeyP", "KeyR", "KeyQ", "Comma", "Period", "Slash", "Escape", "Tab", "Enter", "Backspace")
)
"""Keys of play itself: pause, reset, quit (in a terminal), back, step, help, leave, focus, confirm.

Modifiers and function keys are never used either: a browser or a desktop acts on them.
"""

_DIGITS = tuple(f"Digit{digit}" for digit in "1234567890")
_LETTERS = tuple(f"Key{letter}" for letter in "ASDFGHJKLWETYUIOZXCVBNM")
_SIGNS = ("Minus", "Equal", "BracketLeft", "BracketRight", "Semicolon", "Quote")
_ARROWS = ("ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown")
KEYS = (*_DIGITS, *_LETTERS, *_SIGNS, *_ARROWS, "Space")
"""Every key that may be given away, in the order in which unknown actions take them."""

_PAIRS = (
    ("ArrowLeft", "ArrowRight"), ("ArrowDown", "ArrowUp"), ("KeyA", "KeyD"), ("KeyS", "KeyW"),
    ("KeyJ", "KeyL"), ("KeyK", "KeyI"), ("KeyZ", "KeyX"), ("KeyC", "KeyV"), ("KeyB", "KeyN"),
    ("KeyF", "KeyG"), ("KeyT", "KeyY"), ("KeyU", "KeyO"), ("Digit1", "Digit2"),
    ("Digit3", "Digit4"), ("Digit5", "Digit6"), ("Digit7", "Digit8"), ("Digit9", "Digit0"),
    ("Minus", "Equal"), ("BracketLeft", "BracketRight"),
)  # fmt: skip
"""Where the two directions of an axis lie beside each other, the lower one first."""


@dataclass(frozen=True, slots=True)
class Wish:
    """Which keys one action, or the directions of one axis, would like."""

    group: Group
    options: tuple[tuple[str, ...], ...] = ()
    """The best first; each has one key an action. Empty where nothing is known."""


def assign_keys(wishes: Sequence[Wish], sizes: Sequence[int], /) -> list[list[list[str]]]:
    """Return keys for each of the sizes[i] actions of every wish; no key twice.

    First everybody's best wish is heard, then the second, and looking around before the rest, so
    that walking leaves it the arrows. Then those that nothing is known of take what is left, and at
    last the others get a second key. An action may go without if there are too many.
    """
    free = set(KEYS)
    given: list[list[list[str]]] = [[[] for _ in range(size)] for size in sizes]

    def take(index: int, option: Sequence[str]) -> bool:
        fits = len(option) == sizes[index] and set(option) <= free
        if fits:
            free.difference_update(option)
            for keys, key in zip(given[index], option, strict=True):
                keys.append(key)
        return fits

    waiting = [index for index, size in enumerate(sizes) if size]
    waiting.sort(key=lambda index: wishes[index].group != "look")
    for rank in range(max((len(wish.options) for wish in wishes), default=0)):
        waiting = [
            index
            for index in waiting
            if rank >= len(wishes[index].options) or not take(index, wishes[index].options[rank])
        ]
    known = [index for index, keys in enumerate(given) if keys and keys[0]]
    for index in sorted(waiting):
        if sizes[index] != 2 or not any(take(index, pair) for pair in _PAIRS):
            for keys in given[index]:
                key = next((key for key in KEYS if key in free), None)
                if key is not None:
                    free.discard(key)
                    keys.append(key)
    for index in known:
        any(take(index, option) for option in wishes[index].options)
    return given


def words_of(name: str, /) -> list[str]:
    """Return the words of a name in small letters: `swapHands` -> swap, hands."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]


def wish_of(name: str, /) -> Wish:
    """Return what an action's name lets expect."""
    words = words_of(name)
    while len(words) > 1 and words[0] in _EMPTY_WORDS:
        words = words[1:]
    phrase = " ".join(words)
    if (direction := _direction(words)) is not None:
        return direction
    if phrase in _MEANINGS:
        group, keys = _MEANINGS[phrase]
        return Wish(group, tuple((key,) for key in keys))
    if len(phrase) == 1 and f"Key{phrase.upper()}" in _LETTERS:
        return Wish("other", ((f"Key{phrase.upper()}",),))
    if words and words[-1].isdecimal() and len(words[-1]) == 1:
        return Wish("choose", ((f"Digit{words[-1]}",),))
    return Wish("other")


def wish_of_axis(name: str, /) -> Wish:
    """Return what an axis's name lets expect: the key that lowers it, then the one that raises."""
    words = set(words_of(name))
    horizontal = (("ArrowLeft", "ArrowRight"), ("KeyA", "KeyD"))
    downward = (("ArrowUp", "ArrowDown"), ("KeyW", "KeyS"))
    upward = (("ArrowDown", "ArrowUp"), ("KeyS", "KeyW"))
    if words & {"brake", "pitch"}:
        return Wish("look" if "pitch" in words else "move", downward)
    if words & {"gas", "throttle", "accelerate", "acceleration", "forward"}:
        return Wish("move", upward)
    if words & {"yaw", "turn", "look"}:
        return Wish("look", horizontal)
    if words & {"x", "steer", "steering", "torque", "force", "left", "right", "horizontal"}:
        return Wish("move", horizontal)
    return Wish("move", upward) if words & {"y", "up", "vertical"} else Wish("move")


def _direction(words: Sequence[str]) -> Wish | None:
    """Return the wish of going or looking somewhere, if that is what the words say."""
    if not words:
        return None
    verb = " ".join(words[:-1])
    key = _DIRECTIONS.get(words[-1])
    if words[-1] == "engine" and verb in ("left", "right", "main"):  # of a lander
        verb, key = "", {"left": "Left", "right": "Right", "main": "Up"}[verb]
    if words[-1] in ("minus", "plus") and len(words) > 1:
        verb, key = "", {"minus": "Left", "plus": "Right"}[words[-1]]
    if key is None:
        return None
    arrow = f"Arrow{key}"
    letter = {"Left": "KeyA", "Right": "KeyD", "Up": "KeyW", "Down": "KeyS"}[key]
    if verb in ("turn", "look", "rotate", "camera", "aim", "pan", "face"):
        return Wish("look", ((arrow,), (letter,)))
    if verb in ("move", "go", "walk", "step", "strafe", "run", "slide"):
        return Wish("move", ((letter,), (arrow,)))
    if verb:
        return None
    return Wish("move", ((arrow,), (letter,)))


_EMPTY_WORDS = {"key", "keyboard", "button", "buttons", "action", "actions", "binary", "mouse"}
_DIRECTIONS = {
    "left": "Left", "right": "Right", "up": "Up", "down": "Down", "north": "Up", "south": "Down",
    "west": "Left", "east": "Right", "forward": "Up", "forwards": "Up", "back": "Down",
    "backward": "Down", "backwards": "Down",
}  # fmt: skip

_FIRE = ("Space", "KeyF", "KeyX")
_JUMP = ("Space", "KeyJ", "KeyX")
_USE = ("KeyE", "KeyF", "Space")
_CROUCH = ("KeyC",)
_RUN = ("KeyV", "KeyX")
_MEANINGS: dict[str, tuple[Group, tuple[str, ...]]] = {
    **dict.fromkeys(("fire", "attack", "shoot", "hit", "punch", "swing"), ("act", _FIRE)),
    **dict.fromkeys(("space", "jump", "hop", "thrust", "boost"), ("act", _JUMP)),
    **dict.fromkeys(("use", "toggle", "open", "interact", "activate", "do"), ("act", _USE)),
    **dict.fromkeys(("crouch", "sneak", "duck"), ("move", _CROUCH)),
    **dict.fromkeys(("speed", "sprint", "run"), ("move", _RUN)),
    **dict.fromkeys(("altattack", "alt attack", "secondary"), ("act", ("KeyG", "KeyX"))),
    **dict.fromkeys(("pickup", "pick up", "take", "grab"), ("act", ("KeyG", "Space"))),
    **dict.fromkeys(("drop", "dropoff", "drop off", "put down"), ("act", ("KeyX", "KeyZ"))),
    "reload": ("act", ("KeyT",)),
    "zoom": ("look", ("KeyZ",)),
    "turn 180": ("look", ("KeyB",)),
    "inventory": ("act", ("KeyI",)),
    "swap hands": ("act", ("KeyH",)),
    "pick item": ("act", ("KeyG",)),
    "select next weapon": ("choose", ("BracketRight",)),
    "select prev weapon": ("choose", ("BracketLeft",)),
    "done": ("act", ("KeyM",)),
}
"""What actions are called that are no direction -> where they lie."""
