"""An ActionSpec <-> what a person holds: named controls with keys, of every kind of game.

    ActionSpec                   ->  Controls.of  ->  .controls: names, labels, keys
    names held, the newest last  ->  slots_A      ->  one step's slots
    slots_A                      ->  held_of      ->  names, to show what somebody else presses

| kind | controls | nothing held |
|---|---|---|
| none | none | no slots |
| discrete | one a value; UP+FIRE and UPRIGHTFIRE are their parts, held together | the no-op |
| keys | one a key; of more than max_keys the newest count | no key |
| multi_discrete | one an on-off axis, one a value of others, two a camera's axis | 0, a middle |
| continuous | lower and raise | the bin of 0, or the middle of an axis without |

Where a game has no action that does nothing, nothing held is NULL: "no action was given". Of two
that exclude each other the newest counts, as on a keyboard. Nothing here imports torch.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from worldloom.common import ActionSpec, FormatError, SlotArray

from .keyboard import RESERVED_KEYS as RESERVED_KEYS
from .keyboard import Group, Wish, assign_keys, wish_of, wish_of_axis, words_of

_NULL = -1
"""worldloom.dynamics.NULL, which is not imported: it would bring torch."""
_NO_OPS = {
    "noop", "no op", "none", "idle", "stay", "nothing", "do nothing", "null", "nop", "wait",
    "no action", "stand still",
}  # fmt: skip
_ATOM = re.compile("UP|DOWN|LEFT|RIGHT|FIRE", re.IGNORECASE)
_COMPOUND = re.compile(f"(?:{_ATOM.pattern})(?:[_ -]?(?:{_ATOM.pattern}))+", re.IGNORECASE)
"""Names written together, as those of the Atari games: UPRIGHTFIRE."""
_ALL_VALUES = 17
"""Of a choice with more values than these, as many are offered, evenly spread."""
_CAMERA_STRENGTH = 0.75
"""How far from the middle bin to the last one a camera's keys go: a mu-law axis of 10 degrees a
frame then turns by 2.5, as a hand does; its last bin would spin."""


@dataclass(frozen=True, slots=True)
class Control:
    """One thing that can be held."""

    name: str
    """As slots_A takes it; no two are the same."""
    label: str
    """For people."""
    keys: tuple[str, ...]
    """KeyboardEvent.code of the keys that hold it, the best first; no key is in two controls.
    Empty where there are more controls than keys: then there is only the button on the screen."""
    group: Group
    """move, look, act, choose (of numbered things) or other."""


@dataclass(frozen=True, slots=True)
class Controls:
    """What there is to hold in one world."""

    spec: ActionSpec
    controls: tuple[Control, ...]
    _settings: Mapping[str, tuple[int, int]]
    """Of axes: name -> (slot, value)."""
    _values: Mapping[frozenset[str], int]
    """Of discrete: names held -> value."""
    _idle: tuple[int, ...]
    """The slots of holding nothing."""

    @classmethod
    def of(cls, spec: ActionSpec, /) -> Self:
        """Return the controls of a spec of any kind."""
        if spec.kind == "discrete":
            return cls._of_choices(spec)
        if spec.kind in ("multi_discrete", "continuous"):
            return cls._of_axes(spec)
        names = spec.names
        wishes = [wish_of(name) for name in names]
        controls = _with_keys([(name,) for name in names], wishes)
        return cls(spec, controls, {}, {}, (0,) * spec.num_slots)

    @classmethod
    def _of_choices(cls, spec: ActionSpec) -> Self:
        """Take the values of one choice apart into what is held together."""
        parts = _parts(spec.names)
        values = {frozenset(names): value for value, names in enumerate(parts)}
        names = list(dict.fromkeys(name for together in parts for name in together))
        controls = _with_keys([(name,) for name in names], [wish_of(name) for name in names])
        return cls(spec, controls, {}, values, (values.get(frozenset(), _NULL),))

    @classmethod
    def _of_axes(cls, spec: ActionSpec) -> Self:
        """Give every axis its directions, or its values."""
        idle = tuple(_idle(spec, slot) for slot in range(spec.num_slots))
        settings: dict[str, tuple[int, int]] = {}
        labels: dict[str, str] = {}
        units: list[tuple[str, ...]] = []
        wishes: list[Wish] = []
        for slot, axis in enumerate(spec.names):
            steers = spec.kind == "continuous" or _is_camera(spec, slot)
            positions = _directions(spec, slot, idle[slot]) if steers else _choices(spec, slot)
            wish = wish_of_axis(axis) if steers else wish_of(axis)
            names = []
            for ending, value in positions.items():
                name = axis + ending
                while name in settings:  # an axis may be called as another one's value
                    name += "'"
                names.append(name)
                settings[name] = slot, value
                labels[name] = f"{_label(axis)} {ending.lstrip('=')}".rstrip()
            if steers:
                units.append(tuple(names))
                ends = [("-", "+").index(ending) for ending in positions]
                options = tuple(tuple(pair[end] for end in ends) for pair in wish.options)
                wishes.append(Wish(wish.group, options))
            else:
                units += [(name,) for name in names]
                wishes += [wish if len(names) == 1 else Wish("choose")] * len(names)
        return cls(spec, _with_keys(units, wishes, labels), settings, {}, idle)

    def slots_A(self, held: Sequence[str], /) -> SlotArray:
        """Return one step's slots_A, int64: those of an action of the spec, or NULL.

        Args:
            held: names of controls, the newest last; a name that stands twice counts once.

        Raises:
            FormatError: if a name is none of the controls'.
        """
        known = {control.name for control in self.controls}
        for name in held:
            if name not in known:
                raise FormatError(
                    f"held: {name!r:.60} is no control of this world; "
                    f"there are {', '.join(sorted(known)[:40]) or 'none'}"
                )
        newest = list(dict.fromkeys(reversed(held)))
        if self.spec.kind == "keys":
            pressed = sorted(self.spec.names.index(name) + 1 for name in newest[: len(self._idle)])
            return np.asarray(pressed + [0] * (len(self._idle) - len(pressed)), np.int64)
        if self.spec.kind == "discrete":
            # The value with the newest name, of those the one with the second newest, and so on.
            fitting = [parts for parts in self._values if parts <= set(newest)]
            best = max(fitting, key=lambda parts: [name in parts for name in newest], default=None)
            return np.asarray(self._idle if best is None else [self._values[best]], np.int64)
        slots = list(self._idle)
        for name in reversed(newest):
            slot, value = self._settings[name]
            slots[slot] = value
        return np.asarray(slots, np.int64).reshape(self.spec.num_slots)

    def held_of(self, slots_A: SlotArray, /) -> tuple[str, ...]:
        """Return the names that are held where these slots are pressed, as near as names come.

        Holding them gives the same slots where `slots_A` can give them: always for discrete and
        keys; a camera's finer bins become the nearest of its names.
        """
        slots = [int(value) for value in slots_A]
        if _NULL in slots:
            return ()
        if self.spec.kind == "keys":
            return tuple(self.spec.names[key - 1] for key in slots if key)
        if self.spec.kind == "discrete":
            parts = next(parts for parts, value in self._values.items() if value == slots[0])
            return tuple(control.name for control in self.controls if control.name in parts)
        names = []
        for slot, value in enumerate(slots):
            offers = {name: at for name, (axis, at) in self._settings.items() if axis == slot}
            nearest = min([self._idle[slot], *offers.values()], key=lambda at: abs(at - value))
            names += [name for name, at in offers.items() if at == nearest]
        return tuple(names)


def _with_keys(
    units: Sequence[tuple[str, ...]],
    wishes: Sequence[Wish],
    labels: Mapping[str, str] | None = None,
) -> tuple[Control, ...]:
    """Return a control for every name; those of one unit lie beside each other."""
    given = assign_keys(wishes, [len(unit) for unit in units])
    return tuple(
        Control(name, (labels or {}).get(name, _label(name)), tuple(keys), wish.group)
        for unit, wish, several in zip(units, wishes, given, strict=True)
        for name, keys in zip(unit, several, strict=True)
    )


def _label(name: str) -> str:
    """Return a name as people write: `MOVE_LEFT` -> Move left."""
    words = " ".join(words_of(name.removeprefix("key.keyboard."))) or name or "(no name)"
    return words[0].upper() + words[1:]


def _parts(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Return what is held for every value: nothing for the no-op, several names for combinations.

    No two values have the same: the second of two no-ops, or of two orders of one combination,
    stays as it is called.
    """
    parts: list[tuple[str, ...]] = []
    seen: set[frozenset[str]] = set()
    for name in names:
        split = _split(name)
        split = (name,) if frozenset(split) in seen else split
        seen.add(frozenset(split))
        parts.append(split)
    return parts


def _split(name: str) -> tuple[str, ...]:
    """Return the names that one is made of."""
    if name == "" or " ".join(words_of(name)) in _NO_OPS:
        return ()
    pieces = [piece.strip() for piece in name.split("+")]
    if len(pieces) == 1 and _COMPOUND.fullmatch(name):
        pieces = _ATOM.findall(name)
    whole = len(pieces) == 1 or "" in pieces or len(set(pieces)) < len(pieces)
    return (name,) if whole else tuple(pieces)


def _is_camera(spec: ActionSpec, slot: int) -> bool:
    """Return whether an axis turns a camera: bins around standing still, whatever the kind."""
    if spec.kind == "continuous":
        return spec.mu_law[slot]
    size = spec.sizes[slot]
    return size >= 3 and size % 2 == 1 and words_of(spec.names[slot])[:1] == ["camera"]


def _idle(spec: ActionSpec, slot: int) -> int:
    """Return the value of an axis that nobody touches."""
    size = spec.sizes[slot]
    if spec.kind != "continuous":
        return size // 2 if _is_camera(spec, slot) else 0
    rest = [
        0.0 if low <= 0 <= high else (low + high) / 2
        for low, high in zip(spec.low, spec.high, strict=True)
    ]
    return int(spec.encode(np.asarray([rest]))[0, slot])


def _directions(spec: ActionSpec, slot: int, idle: int) -> dict[str, int]:
    """Return the values of lowering and raising an axis; one at its end has one direction."""
    share = _CAMERA_STRENGTH if _is_camera(spec, slot) else 1.0
    down, up = idle, spec.sizes[slot] - 1 - idle
    ways = {"-": idle - max(1, round(share * down)), "+": idle + max(1, round(share * up))}
    return {way: value for way, value in ways.items() if 0 <= value < spec.sizes[slot]}


def _choices(spec: ActionSpec, slot: int) -> dict[str, int]:
    """Return the values of a choice but 0, by how they end the axis's name."""
    size = spec.sizes[slot]
    if size == 2:
        return {"": 1}
    values = np.linspace(1, size - 1, min(size - 1, _ALL_VALUES)).round().astype(int)
    return {f"={value}": int(value) for value in values}
