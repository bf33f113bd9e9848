"""Where the actions of a rollout come from: words, a file, a policy.

    "MOVE_RIGHT*12,NOOP*4"            -> written_actions -> slots_TA
    actions.json | .npy | .txt        -> written_actions -> slots_TA
    "a.json,b.txt", two starts        -> actions_of_each -> slots_TA of each
    a spec and a generator            -> random_actions, sticky_actions -> slots_TA
    a spec                            -> single_actions  -> each action there is, by name

Every source ends in checked slots, so that nothing behind it asks where they came from.
"""

import json
from pathlib import Path

import numpy as np
from worldloom.common import (
    ActionSpec,
    ConfigError,
    FormatError,
    SlotArray,
    npy_array,
    storage_errors,
)

STICKY = 0.85
"""Chance that a sticky policy keeps its action: held keys, as people hold them."""

NO_ACTION = "null"
"""The word for NULL, "no action was given": what holding nothing is in a game without a no-op."""

_FILES = (".json", ".npy", ".txt")


def written_actions(text: str, /, *, spec: ActionSpec) -> SlotArray:
    """Return slots_TA of actions that a person wrote, as words or as the name of a file.

    Words are separated by commas, `MOVE_RIGHT*12,ATTACK*2`; where an action itself contains commas
    (one number an axis) by semicolons, `0.5,0*12;0,0*4`. A file is a .json list of such words, or
    of lists of slots; a .npy of slots_TA; or a .txt with one word a line (# begins a remark).

    Raises:
        ConfigError: naming the typed word that is not an action, and the actions there are.
        FormatError: the same of a file.
    """
    path = Path(text)
    in_file = path.suffix in _FILES
    try:
        slots_TA = _from_file(path, spec) if in_file else _from_words(_split(text, spec), spec)
    except FormatError as error:
        # What a person types is a setting; the same words in a file are data.
        raise (error if in_file else ConfigError(str(error))) from None
    if len(slots_TA) == 0:
        kind = FormatError if in_file else ConfigError
        known = ", ".join(spec.names) or "none"
        raise kind(f"actions {text!r}: holds no action; there are {known}")
    return slots_TA


def actions_of_each(text: str, /, *, spec: ActionSpec, starts: int) -> list[SlotArray]:
    """Return slots_TA of every start: the same written actions for all, or those of a file each.

    Files, one a start in their order, are separated by commas; all else is `written_actions`.

    Raises:
        ConfigError: if there are several files, but not one for each start.
        ConfigError, FormatError: as `written_actions` does.
    """
    parts = [part.strip() for part in text.split(",")]
    if len(parts) == 1 or not all(Path(part).suffix in _FILES for part in parts):
        return [written_actions(text, spec=spec)] * starts
    if len(parts) != starts:
        raise ConfigError(
            f"--actions: {len(parts)} files for {starts} {'start' if starts == 1 else 'starts'}; "
            "give one for each start, in their order, or one for all"
        )
    return [written_actions(part, spec=spec) for part in parts]


def _split(text: str, spec: ActionSpec, /) -> list[str]:
    """Return the words between commas, or between semicolons where actions contain commas."""
    comma = spec.kind in ("multi_discrete", "continuous")
    return [word for word in text.split(";" if comma else ",") if word.strip()]


def random_actions(spec: ActionSpec, steps: int, /, *, rng: np.random.Generator) -> SlotArray:
    """Return slots_TA of `steps` actions, each drawn anew, all equally likely.

    Of `keys`, first the number of pressed ones is drawn, then which.
    """
    if spec.kind != "keys":
        return rng.integers(0, np.asarray(spec.sizes, np.int64), (steps, spec.num_slots))
    raw = np.zeros((steps, len(spec.names)), np.int64)
    for row in raw:
        pressed = rng.integers(0, spec.num_slots + 1)
        row[rng.permutation(len(spec.names))[:pressed]] = 1
    return spec.encode(raw)


def sticky_actions(spec: ActionSpec, steps: int, /, *, rng: np.random.Generator) -> SlotArray:
    """Return slots_TA of `steps` actions, each kept from the step before with chance STICKY."""
    fresh_TA = random_actions(spec, steps, rng=rng)
    keep = rng.random(steps) < STICKY
    for step in range(1, steps):
        if keep[step]:
            fresh_TA[step] = fresh_TA[step - 1]
    return fresh_TA


def single_actions(spec: ActionSpec, /, *, limit: int = 12) -> list[tuple[str, SlotArray]]:
    """Return (name, slots_1A) of each action held by itself: what a person would try first.

    A value of `discrete`; no key and each key of `keys`; the lowest and the highest value of each
    axis of the other kinds, the rest at their middle. At most `limit` of them.
    """
    if spec.kind == "none":
        return []
    if spec.kind == "discrete":
        slots = np.arange(len(spec.names))[:, None]
    elif spec.kind == "keys":
        slots = spec.encode(np.eye(len(spec.names) + 1, len(spec.names), k=-1, dtype=np.int64))
    else:
        sizes = np.asarray(spec.sizes)
        # A choice of several usually has "nothing" first; a real axis has it in the middle.
        middle = (sizes - 1) // 2 if spec.kind == "continuous" else np.zeros_like(sizes)
        slots = np.repeat(middle[None], 2 * len(sizes), axis=0)
        for axis, size in enumerate(sizes):
            slots[2 * axis, axis], slots[2 * axis + 1, axis] = 0, size - 1
        _, first = np.unique(slots, axis=0, return_index=True)
        slots = slots[np.sort(first)]
    slots = slots[:limit].astype(np.int64)
    return list(zip(spec.describe(slots), slots[:, None], strict=True))


def parse_action(text: str, /, *, spec: ActionSpec) -> SlotArray:
    """Return slots_TA of one written action: as ActionSpec.parse, and `null*12` is NULL.

    An action that a game itself calls null goes before.

    Raises:
        FormatError: naming the word that is not an action, and the actions there are.
    """
    word, star, times = text.partition("*")
    if word.strip() != NO_ACTION or NO_ACTION in spec.names or spec.kind == "none":
        return spec.parse(text)
    from worldloom.dynamics import NULL  # here and not above: it brings torch

    steps = ActionSpec.none().parse(f"none{star}{times}")  # for its length alone
    return np.full((len(steps), spec.num_slots), NULL, np.int64)


def action_words(spec: ActionSpec, slots_TA: SlotArray, /) -> list[str]:
    """Return a short text a step, as ActionSpec.describe; `null` where no action was given."""
    known_T = np.all(slots_TA >= 0, axis=1)
    words = spec.describe(np.where(known_T[:, None], slots_TA, 0))
    return [word if known else NO_ACTION for word, known in zip(words, known_T, strict=True)]


def _from_words(words: list[str], spec: ActionSpec) -> SlotArray:
    """Return the slots of words such as `MOVE_RIGHT*12`, one after another."""
    parts = [parse_action(word, spec=spec) for word in words]
    return np.concatenate(parts) if parts else np.zeros((0, spec.num_slots), np.int64)


def _from_file(path: Path, spec: ActionSpec) -> SlotArray:
    """Return the slots in a file of actions."""
    if not path.is_file():
        raise FormatError(
            f"{path}: no such file of actions; write words such as "
            f"{(spec.names or ('none',))[0]}*12 instead, or one of {', '.join(_FILES)}"
        )
    with storage_errors(path):
        content = path.read_bytes()
    if path.suffix == ".npy":
        return spec.check_slots(npy_array(content, where=str(path)), where=str(path))
    try:
        text = content.decode()
        listed = json.loads(text) if path.suffix == ".json" else None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not readable as a list of actions ({error})") from error
    if path.suffix == ".txt":
        lines = (line.partition("#")[0].strip() for line in text.splitlines())
        return _from_words([line for line in lines if line], spec)
    if not isinstance(listed, list):
        raise FormatError(f"{path}: expected a JSON list of actions, got {type(listed).__name__}")
    if all(isinstance(item, str) for item in listed):
        return _from_words(listed, spec)
    try:
        return spec.check_slots(np.asarray(listed), where=str(path))
    except (ValueError, OverflowError) as error:
        raise FormatError(
            f"{path}: must hold words such as {(spec.names or ('none',))[0]}*12, "
            f"or lists of {spec.num_slots} slots"
        ) from error
