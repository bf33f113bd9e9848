"""What was done since the start, and states to go back to: rewinding is exact by construction.

    slots_rA, sampling  -> add                       a step, at the position where one is
    a state             -> keep                      at this position, as long as there is room
    position            -> nearest, then steps       a state at or before it, what led on from it

Whoever wants a position back restores the nearest state and takes the steps from there again. They
cost a few bytes each, so that all are held; states are large, so that only some are, within a
budget: close together around the position where one is, farther apart the farther away. The gaps
grow as the square root of the distance, so that a step back takes moments and any other not long.

Nothing here knows what a state is.
"""

from array import array
from bisect import bisect_right, insort
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from worldloom.common import SlotArray
from worldloom.dynamics import SamplingConfig

State = TypeVar("State")

EVERY = 8
"""A state is offered at every position that this divides."""
_MOST_STATES = 512
"""However small they are: choosing which one goes takes time that grows with their number."""


@dataclass(frozen=True, slots=True)
class _Kept(Generic[State]):
    """A state, and the memory that it takes."""

    state: State
    size_bytes: int


class History(Generic[State]):
    """The steps since a start. Position p is after p of them.

    Steps that were rewound stay recorded until one is taken that differs from what was taken
    there: who does the same again goes the same way, through the same settings.
    """

    def __init__(self, *, slots_shape: tuple[int, int], budget_bytes: int) -> None:
        """Begin at position 0.

        Args:
            slots_shape: (r, A), of a step's actions.
            budget_bytes: memory for states. That of position 0 is kept in any case.
        """
        self.position = 0
        self.length = 0
        """The farthest position that one can go to: that of the last step, whatever was rewound."""
        self._shape = slots_shape
        self._budget_bytes = budget_bytes
        self._slots = array("i")
        self._drawn = array("i")
        self._samplings: list[SamplingConfig] = []
        self._numbers: dict[SamplingConfig, int] = {}
        self._kept: dict[int, _Kept[State]] = {}
        self._at: list[int] = []

    @property
    def recorded(self) -> int:
        """Steps that are known: those to `length`, and the rewound ones behind it."""
        return len(self._drawn)

    @property
    def states(self) -> tuple[int, ...]:
        """The positions of which there is a state, rising."""
        return tuple(self._at)

    @property
    def size_bytes(self) -> int:
        """Memory of the states."""
        return sum(kept.size_bytes for kept in self._kept.values())

    def sampling_at(self, position: int, /) -> SamplingConfig | None:
        """Return what was in force there: of the step from it, else of the one to it, if any."""
        step = min(position, self.recorded - 1)
        return self._samplings[self._drawn[step]] if step >= 0 else None

    def add(self, slots_rA: SlotArray, sampling: SamplingConfig, /) -> None:
        """Record a step from this position; what follows it stays only if it is the same step."""
        if self.position == self.recorded or not self._was(slots_rA, sampling):
            self._cut()
            self._slots.extend(slots_rA.ravel().tolist())
            self._drawn.append(self._number(sampling))
        self.position += 1
        self.length = self.position

    def move(self, position: int, /) -> None:
        """Go to a position whose state was restored."""
        self.position = position

    def steps(self, start: int, stop: int, /) -> Iterator[tuple[SlotArray, SamplingConfig]]:
        """Yield (slots_rA, sampling) of the steps that lead from one position to a later one."""
        for step in range(start, stop):
            yield self._slots_at(step), self._samplings[self._drawn[step]]

    def keep(self, state: State, /, *, size_bytes: int) -> None:
        """Hold the state of this position; let others go, as far as room takes."""
        if self.position not in self._kept:
            insort(self._at, self.position)
        self._kept[self.position] = _Kept(state, size_bytes)
        total = self.size_bytes
        while len(self._at) > 1 and (total > self._budget_bytes or len(self._at) > _MOST_STATES):
            position = self._least_missed()
            total -= self._kept.pop(position).size_bytes
            self._at.remove(position)

    def wants_state(self) -> bool:
        """Return whether a state of this position should be kept."""
        return self.position % EVERY == 0 and self.position not in self._kept

    def nearest(self, position: int, /) -> tuple[int, State]:
        """Return the last position at or before this one that has a state, and the state."""
        found = self._at[bisect_right(self._at, position) - 1]
        return found, self._kept[found].state

    def _least_missed(self) -> int:
        """Return the position, not 0, whose state's loss makes the least gap for its distance."""
        end = max(self._at[-1], self.position) + EVERY
        ends = [*self._at[2:], end]
        return min(
            zip(self._at[1:], self._at, ends, strict=False),
            key=lambda at: (at[2] - at[1]) ** 2 / (abs(self.position - at[0]) + EVERY),
        )[0]

    def _was(self, slots_rA: SlotArray, sampling: SamplingConfig) -> bool:
        """Return whether the recorded step from this position is this one."""
        same = self._samplings[self._drawn[self.position]] == sampling
        return same and np.array_equal(self._slots_at(self.position), slots_rA)

    def _slots_at(self, step: int) -> SlotArray:
        """Return slots_rA of one recorded step."""
        width = self._shape[0] * self._shape[1]
        slots = self._slots[step * width : (step + 1) * width]
        return np.array(slots, np.int64).reshape(self._shape)

    def _number(self, sampling: SamplingConfig) -> int:
        """Return the number of settings, a new one if they are new."""
        if sampling not in self._numbers:
            self._numbers[sampling] = len(self._samplings)
            self._samplings.append(sampling)
        return self._numbers[sampling]

    def _cut(self) -> None:
        """Forget what was recorded behind this position."""
        del self._slots[self.position * self._shape[0] * self._shape[1] :]
        del self._drawn[self.position :]
        while self._at and self._at[-1] > self.position:
            del self._kept[self._at.pop()]
