"""ActionSpec <-> Gymnasium: the space of a world's actions, and the slots of an action. No torch.

    ActionSpec          -> action_space   -> Discrete, MultiBinary, MultiDiscrete or Box
    action of a space   -> slots_of       -> slots_A
    slots_A             -> action_of      -> action of the space
    ActionSpec          -> keys_to_action -> what gymnasium.utils.play presses

| kind | space | |
|---|---|---|
| none | Discrete(1) | there is nothing to choose; 0 lets the world go on |
| discrete | Discrete(n) | |
| keys | MultiBinary(n) | of more keys than the spec's max_keys the first by number count |
| multi_discrete | MultiDiscrete(sizes) | also of games with a Dict or a Tuple of choices |
| continuous | Box(low, high), float32 | every axis goes to its nearest bin |
"""

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np
from gymnasium import Space, spaces
from worldloom.common import ActionSpec, FormatError, SlotArray

from .play.controls import Controls

_MOST_HELD = 3
"""Keys held together that gymnasium.utils.play is told of: it asks for every combination."""
_MOST_COMBINATIONS = 2000
_CODES: Mapping[str, int] = {
    "Space": 32, "Minus": ord("-"), "Equal": ord("="), "BracketLeft": ord("["),
    "BracketRight": ord("]"), "Semicolon": ord(";"), "Quote": ord("'"),
    # SDL's own numbers, as pygame has them: bit 30 and the scancode.
    "ArrowRight": 1 << 30 | 79, "ArrowLeft": 1 << 30 | 80,
    "ArrowDown": 1 << 30 | 81, "ArrowUp": 1 << 30 | 82,
}  # fmt: skip


def action_space(spec: ActionSpec, /) -> Space[Any]:
    """Return the space of one step's action."""
    if spec.kind == "none":
        return spaces.Discrete(1)
    if spec.kind == "discrete":
        return spaces.Discrete(len(spec.names))
    if spec.kind == "keys":
        return spaces.MultiBinary(len(spec.names))
    if spec.kind == "multi_discrete":
        return spaces.MultiDiscrete(list(spec.sizes))
    low, high = np.asarray(spec.low, np.float32), np.asarray(spec.high, np.float32)
    return spaces.Box(low, high, dtype=np.float32)


def slots_of(action: Any, spec: ActionSpec, /) -> SlotArray:
    """Return slots_A of an action of the space.

    Raises:
        FormatError: if it is none of the space's.
    """
    if spec.kind == "none":
        return np.zeros(0, np.int64)
    raw = np.asarray(action)
    if spec.kind == "keys" and raw.shape == (len(spec.names),):
        raw = np.where(np.cumsum(raw != 0) > spec.num_slots, 0, raw)
    try:
        slots_A: SlotArray = spec.encode(raw[None], where="action")[0]
    except FormatError as error:
        raise FormatError(f"{error}; the action space is {action_space(spec)}") from None
    return slots_A


def action_of(slots_A: SlotArray, spec: ActionSpec, /) -> Any:
    """Return the action of the space that has these slots."""
    if spec.kind == "none":
        return 0
    raw = spec.decode(slots_A[None])[0]
    if spec.kind == "discrete":
        return int(raw)
    return raw.astype(action_space(spec).dtype)


def idle_action(spec: ActionSpec, /) -> Any:
    """Return the action of who presses nothing; the first there is, where no action does nothing.

    For `noop` of gymnasium.utils.play.
    """
    slots_A = Controls.of(spec).slots_A([])
    return action_of(np.maximum(slots_A, 0), spec)


def keys_to_action(spec: ActionSpec, /) -> dict[tuple[int, ...], Any]:
    """Return the action of every few keys held together, by their numbers in pygame."""
    controls = Controls.of(spec)
    keys = {key: name.name for name in controls.controls for key in name.keys}
    found: dict[tuple[int, ...], Any] = {}
    for count in range(1, _MOST_HELD + 1):
        for held in combinations(keys, count):
            if len(found) >= _MOST_COMBINATIONS:
                return found
            slots_A = controls.slots_A([keys[key] for key in held])
            if (slots_A >= 0).all():
                found[tuple(sorted(map(_pygame_key, held)))] = action_of(slots_A, spec)
    return found


def _pygame_key(code: str) -> int:
    """Return pygame's number of a key, of its KeyboardEvent.code."""
    return _CODES[code] if code in _CODES else ord(code[-1].lower())
