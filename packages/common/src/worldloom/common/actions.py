"""Actions of any kind <-> a fixed number of integer slots per step.

    raw actions (what the environment takes) -> encode -> slots_TA int64, [:, a] in [0, sizes[a])
    slots_TA                                 -> decode -> raw actions

| kind | raw, per step | slots |
|---|---|---|
| none | nothing, shape (0,) | none: A = 0, a video without actions |
| discrete | one integer in [0, n) | that integer |
| keys | n values 0 or 1, at most max_keys of them 1 | pressed keys + 1, rising, then zeros |
| multi_discrete | one integer in [0, sizes[a]) for each a | those integers |
| continuous | one float in [low, high] per axis | the bin of each axis, linear or mu-law |

encode and decode are exact inverses, but for `continuous`: there encode(decode(slots)) == slots,
and decode(encode(raw)) is the centre of raw's bin, a float32. No-op, null and padding are three
different things: a no-op is an action of the game and has its own slots here; *null* ("no action
was given", for guidance and for video without labels) and *padding* (no step at all) are not
actions and have none.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self, get_args

import numpy as np
import numpy.typing as npt

from .errors import FormatError

ActionKind = Literal["none", "discrete", "keys", "multi_discrete", "continuous"]
ActionArray = npt.NDArray[Any]
SlotArray = npt.NDArray[np.int64]

_MU = 255.0
"""Companding constant of the mu-law bins (ITU-T G.711)."""
_MAX_SLOTS = 256
_MAX_SLOT_SIZE = 1 << 16
_MAX_VALUE = 1e30
"""Largest bound of a continuous axis: float32, which environments take, ends at 3e38."""
_MAX_STEPS = 1 << 20
"""Longest hold of one written action; a typing error must not fill the memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionSpec:
    """What one step's action is. Travels in episodes, manifests and models.

    Build one with `none`, `discrete`, `keys`, `multi_discrete` or `continuous`.
    """

    kind: ActionKind
    names: tuple[str, ...] = ()
    """discrete, keys: one a value or key; multi_discrete, continuous: one an axis."""
    sizes: tuple[int, ...] = ()
    """Number of values of each slot; its length is A."""
    low: tuple[float, ...] = ()
    """continuous: smallest value of each axis."""
    high: tuple[float, ...] = ()
    """continuous: largest value of each axis."""
    mu_law: tuple[bool, ...] = ()
    """continuous: bins of an axis are finer near the middle (camera-like axes)."""

    def __post_init__(self) -> None:
        """Refuse a spec that describes no action space."""
        where = f"ActionSpec({self.kind})"
        if self.kind not in get_args(ActionKind):
            raise FormatError(f"{where}: unknown kind; known: {', '.join(get_args(ActionKind))}")
        if len(self.sizes) > _MAX_SLOTS:
            raise FormatError(f"{where}: {len(self.sizes)} slots, at most {_MAX_SLOTS}")
        for size in self.sizes:
            if not 1 <= size <= _MAX_SLOT_SIZE:
                raise FormatError(
                    f"{where}: a slot of {size} values, must be 1 to {_MAX_SLOT_SIZE}"
                )
        axes = len(self.sizes) if self.kind == "continuous" else 0
        if not len(self.low) == len(self.high) == len(self.mu_law) == axes:
            raise FormatError(f"{where}: low, high and mu_law must have {axes} values each")
        if any(
            not -_MAX_VALUE <= lo < hi <= _MAX_VALUE
            for lo, hi in zip(self.low, self.high, strict=True)
        ):
            raise FormatError(
                f"{where}: every low must be below its high, both within {_MAX_VALUE:g}: "
                "an axis without bounds has no bins"
            )
        wanted = {
            "none": 0,
            "discrete": self.sizes[0] if self.sizes else -1,
            "keys": self.sizes[0] - 1 if self.sizes else -1,
            "multi_discrete": len(self.sizes),
            "continuous": len(self.sizes),
        }[self.kind]
        if wanted < 0:
            raise FormatError(f"{where}: at least one slot, got none")
        if len(self.names) != wanted:
            raise FormatError(f"{where}: {len(self.names)} names, must be {wanted}")
        if len(set(self.names)) != len(self.names):
            raise FormatError(f"{where}: a name stands twice in {', '.join(self.names)}")
        if self.kind in ("none", "discrete") and len(self.sizes) != (self.kind == "discrete"):
            raise FormatError(f"{where}: {len(self.sizes)} slots do not fit this kind")
        if self.kind == "keys" and (len(set(self.sizes)) != 1 or len(self.sizes) > len(self.names)):
            raise FormatError(f"{where}: 1 to {len(self.names)} equal slots, got {self.sizes}")
        if self.kind == "continuous":
            self._check_bins(where)

    def _check_bins(self, where: str) -> None:
        """Refuse bins so fine that float32 does not tell their centres apart."""
        axes = zip(self.names, self.sizes, self.low, self.high, self.mu_law, strict=True)
        for name, size, low, high, bent in axes:
            bins = np.arange(size)[:, None]
            centres = _unbin(bins, size, low, high, bent).astype(np.float64)
            outside = (centres < low) | (centres > high)
            if (outside | (_bin(centres, size, low, high, bent) != bins)).any():
                raise FormatError(
                    f"{where}: {size} bins in [{low:g}, {high:g}] of {name} are finer than float32"
                )

    @classmethod
    def none(cls) -> Self:
        """Video without actions."""
        return cls(kind="none")

    @classmethod
    def discrete(cls, names: Sequence[str], /) -> Self:
        """One of len(names) choices per step."""
        return cls(kind="discrete", names=tuple(names), sizes=(len(names),))

    @classmethod
    def keys(cls, names: Sequence[str], /, *, max_keys: int | None = None) -> Self:
        """Any keys at once, at most `max_keys` of them (all, if it is not given)."""
        slots = len(names) if max_keys is None else max_keys
        return cls(kind="keys", names=tuple(names), sizes=(len(names) + 1,) * slots)

    @classmethod
    def multi_discrete(cls, sizes: Sequence[int], /, *, names: Sequence[str]) -> Self:
        """Several independent choices per step."""
        return cls(kind="multi_discrete", names=tuple(names), sizes=tuple(int(n) for n in sizes))

    @classmethod
    def continuous(
        cls,
        low: Sequence[float],
        high: Sequence[float],
        /,
        *,
        names: Sequence[str],
        bins: int = 11,
        mu_law: Sequence[bool] | None = None,
    ) -> Self:
        """Real axes, each cut into `bins` bins; an odd number keeps the middle exact."""
        return cls(
            kind="continuous",
            names=tuple(names),
            sizes=(bins,) * len(low),
            low=tuple(float(value) for value in low),
            high=tuple(float(value) for value in high),
            mu_law=tuple(mu_law) if mu_law is not None else (False,) * len(low),
        )

    @property
    def num_slots(self) -> int:
        """Integer slots per step, A."""
        return len(self.sizes)

    @property
    def raw_width(self) -> int:
        """Values per step of a raw action array; `discrete` has one, as a vector of shape (T,)."""
        return {"none": 0, "discrete": 1, "keys": len(self.names)}.get(self.kind, len(self.sizes))

    @property
    def slot_dtype(self) -> str:
        """The smallest unsigned integer type that holds every slot, as numpy spells it."""
        return "uint8" if max(self.sizes, default=1) <= 1 << 8 else "uint16"

    def encode(self, raw: ActionArray, /, *, where: str = "actions") -> SlotArray:
        """Return slots_TA, int64, of raw actions of T steps.

        Raises:
            FormatError: if the shape, an action or the number of keys is not of this spec.
        """
        raw = np.asarray(raw)
        if raw.ndim == 0:
            raise FormatError(f"{where}: one number, expected the actions of T steps")
        shape = (len(raw),) if self.kind == "discrete" else (len(raw), self.raw_width)
        if raw.shape != shape:
            raise FormatError(f"{where}: shape {raw.shape}, but {self.kind} actions need {shape}")
        if self.kind == "continuous":
            return self._bin(raw.astype(np.float64), where)
        # numpy calls an empty list float64; that says nothing about its values.
        if raw.size and not np.issubdtype(raw.dtype, np.integer) and raw.dtype != bool:
            raise FormatError(f"{where}: dtype {raw.dtype}, but {self.kind} actions are integers")
        raw = raw.astype(np.int64)
        if self.kind == "keys":
            return self._press(raw, where)
        slots = raw[:, None] if self.kind == "discrete" else raw
        return self.check_slots(slots, where=where)

    def decode(self, slots_TA: SlotArray, /) -> ActionArray:
        """Return the raw actions of slots_TA: what the environment takes, step by step."""
        slots_TA = self.check_slots(slots_TA)
        if self.kind == "discrete":
            return slots_TA[:, 0]
        if self.kind == "keys":
            raw = np.zeros((len(slots_TA), len(self.names) + 1), np.int64)
            np.put_along_axis(raw, slots_TA, 1, axis=1)
            return raw[:, 1:]
        if self.kind == "continuous":
            return _unbin(slots_TA, self.sizes, self.low, self.high, self.mu_law)
        return slots_TA

    def check_slots(self, slots_TA: ActionArray, /, *, where: str = "actions") -> SlotArray:
        """Return slots_TA as int64 after checking every value against this spec.

        Raises:
            FormatError: naming the first step and slot that are out of range.
        """
        slots = np.asarray(slots_TA)
        if slots.ndim != 2 or slots.shape[1] != self.num_slots:
            raise FormatError(f"{where}: shape {slots.shape}, expected (T, A={self.num_slots})")
        if not np.issubdtype(slots.dtype, np.integer):
            raise FormatError(f"{where}: dtype {slots.dtype}, expected integers")
        slots = slots.astype(np.int64)
        bad = (slots < 0) | (slots >= np.asarray(self.sizes, np.int64))
        if bad.any():
            step, slot = np.argwhere(bad)[0]
            raise FormatError(
                f"{where}: step {step} has {slots[step, slot]} in slot {slot}, "
                f"must be in [0, {self.sizes[slot]})"
            )
        if self.kind == "keys":
            before, after = slots[:, :-1], slots[:, 1:]
            ordered = ((after == 0) | ((before > 0) & (after > before))).all(1)
            if not ordered.all():
                step = int(np.flatnonzero(~ordered)[0])
                raise FormatError(
                    f"{where}: step {step} has key slots {slots[step].tolist()}, "
                    "must be rising keys, then zeros"
                )
        return slots

    def describe(self, slots_TA: SlotArray, /) -> list[str]:
        """Return a short text a step, for pictures and logs: `MOVE_LEFT+ATTACK`, `turn=0.50`."""
        texts = []
        for raw in self.decode(slots_TA):
            if self.kind == "discrete":
                texts.append(self.names[int(raw)])
            elif self.kind == "keys":
                pressed = [name for name, down in zip(self.names, raw, strict=True) if down]
                texts.append("+".join(pressed) or "none")
            else:
                form = "{}={:.2f}" if self.kind == "continuous" else "{}={}"
                texts.append(
                    " ".join(
                        form.format(name, value)
                        for name, value in zip(self.names, raw, strict=True)
                    )
                )
        return texts

    def parse(self, text: str, /) -> SlotArray:
        """Return slots_TA of one written action held for a while: `MOVE_RIGHT*12`, `left+fire*3`.

        A `discrete` action is a name or a number, `keys` are names joined by `+` (or `none`),
        the other kinds are numbers joined by `,`, one per axis.

        Raises:
            FormatError: naming the word that is not an action, and the actions there are.
        """
        word, star, times = text.strip().partition("*")
        word, times = word.strip(), times.strip()
        where = f"action {word!r:.60}"
        steps = _number(times) if star else 1
        if steps is None or not 1 <= steps <= _MAX_STEPS:
            raise FormatError(
                f"{where}: after '*' stands the number of steps, 1 to {_MAX_STEPS}, "
                f"as in {word:.60}*12; got {times!r:.20}"
            )
        if self.kind in ("multi_discrete", "continuous"):
            continuous = self.kind == "continuous"
            read = float if continuous else int
            try:
                values = [read(part) for part in word.split(",")]
                raw = np.asarray([values], np.float64 if continuous else np.int64)
            except (ValueError, OverflowError) as error:
                raise FormatError(
                    f"{where}: expected {read.__name__} numbers for {', '.join(self.names)}"
                ) from error
        elif self.kind == "discrete":
            raw = np.asarray([self._value(word, where)])
        else:
            raw = np.zeros((1, self.raw_width), np.int64)
            for part in word.split("+") if word != "none" else []:
                raw[0, self._value(part, where)] = 1
        return np.repeat(self.encode(raw, where=where), steps, axis=0)

    def _value(self, word: str, where: str) -> int:
        """Return the number of a named value or key."""
        word = word.strip()
        if word in self.names:
            return self.names.index(word)
        number = _number(word)
        if number is not None and number < len(self.names):
            return number
        raise FormatError(f"{where}: no such action; there are {', '.join(self.names) or 'none'}")

    def _press(self, raw: ActionArray, where: str) -> SlotArray:
        """Return the slots of 0/1 keys: pressed keys + 1 in rising order, then zeros."""
        bad = (raw != 0) & (raw != 1)
        if bad.any():
            step = int(np.argwhere(bad)[0][0])
            raise FormatError(f"{where}: step {step} has keys {raw[step].tolist()}, must be 0 or 1")
        count = raw.sum(1)
        if (count > self.num_slots).any():
            step = int(np.flatnonzero(count > self.num_slots)[0])
            raise FormatError(
                f"{where}: step {step} presses {count[step]} keys, at most {self.num_slots}"
            )
        numbered = raw * np.arange(1, raw.shape[1] + 1)
        pressed_first = np.sort(np.where(numbered == 0, raw.shape[1] + 1, numbered), axis=1)
        slots = pressed_first[:, : self.num_slots]
        return np.where(slots > raw.shape[1], 0, slots).astype(np.int64)

    def _bin(self, raw: npt.NDArray[np.float64], where: str) -> SlotArray:
        """Return the bin of every axis; values outside [low, high] are refused."""
        low, high = np.asarray(self.low), np.asarray(self.high)
        slack = 1e-6 * (high - low)  # float32 environments overshoot their own bounds by rounding
        bad = ~((raw >= low - slack) & (raw <= high + slack))
        if bad.any():
            step, axis = np.argwhere(bad)[0]
            raise FormatError(
                f"{where}: step {step} has {raw[step, axis]} on axis {self.names[axis]}, "
                f"must be in [{low[axis]}, {high[axis]}]"
            )
        return _bin(raw, self.sizes, low, high, self.mu_law)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], /, *, where: str) -> Self:
        """Rebuild from JSON values; `where` names the file in errors.

        Raises:
            FormatError: if a field is missing, unknown or of the wrong type.
        """
        kinds: dict[str, tuple[type, ...]] = {
            "names": (str,),
            "sizes": (int,),
            "low": (int, float),
            "high": (int, float),
            "mu_law": (bool,),
        }
        if not isinstance(data, Mapping) or set(data) != {"kind", *kinds}:
            raise FormatError(f"{where}: an action spec has the fields kind, {', '.join(kinds)}")
        for name, types in kinds.items():
            values = data[name]
            if not isinstance(values, list) or any(
                not isinstance(value, types) or (bool not in types and isinstance(value, bool))
                for value in values
            ):
                raise FormatError(f"{where}: action spec field {name!r} has the wrong type")
        if data["kind"] not in get_args(ActionKind):
            raise FormatError(f"{where}: unknown kind of actions {data['kind']!r:.60}")
        try:
            return cls(
                kind=data["kind"],
                names=tuple(data["names"]),
                sizes=tuple(data["sizes"]),
                low=tuple(float(value) for value in data["low"]),
                high=tuple(float(value) for value in data["high"]),
                mu_law=tuple(data["mu_law"]),
            )
        except (FormatError, OverflowError) as error:
            raise FormatError(f"{where}: {error}") from error


def _bin(
    raw: npt.NDArray[np.float64],
    sizes: npt.ArrayLike,
    low: npt.ArrayLike,
    high: npt.ArrayLike,
    mu_law: npt.ArrayLike,
) -> SlotArray:
    """Return the bin of every value, each axis cut into as many as `sizes` says."""
    low, high, sizes = np.asarray(low), np.asarray(high), np.asarray(sizes)
    unit = np.clip((raw - low) / (high - low), 0, 1) * 2 - 1
    bent = np.sign(unit) * np.log1p(_MU * np.abs(unit)) / np.log1p(_MU)
    unit = np.where(mu_law, bent, unit)
    bins: SlotArray = np.clip(np.floor((unit + 1) / 2 * sizes), 0, sizes - 1).astype(np.int64)
    return bins


def _unbin(
    slots_TA: SlotArray,
    sizes: npt.ArrayLike,
    low: npt.ArrayLike,
    high: npt.ArrayLike,
    mu_law: npt.ArrayLike,
) -> npt.NDArray[np.float32]:
    """Return the centre of every bin."""
    unit = (slots_TA + 0.5) / np.asarray(sizes) * 2 - 1
    straight = np.sign(unit) * np.expm1(np.abs(unit) * np.log1p(_MU)) / _MU
    unit = np.where(mu_law, straight, unit)
    low, high = np.asarray(low), np.asarray(high)
    centres: npt.NDArray[np.float32] = (low + (unit + 1) / 2 * (high - low)).astype(np.float32)
    return centres


def _number(text: str) -> int | None:
    """Return the number that a few ASCII digits write, or None."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 9 else None
