"""How fast a training is, and how long it waits for data.

with throughput: one update    ->  items per second, share of the time that was waited

The blocks are updates alone: validations and checkpoints in between do not count.
"""

import time
from typing import Self


class Throughput:
    """Time of the blocks it goes around."""

    def __init__(self) -> None:
        self._started = self._sum_s = 0.0
        self._told_s = self._told_part_s = 0.0
        self._count = 0

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        return self

    def __exit__(self, *exception: object) -> None:
        self._sum_s += time.monotonic() - self._started
        self._count += 1

    @property
    def mean_s(self) -> float:
        """Seconds per block so far."""
        return self._sum_s / self._count

    def share_of(self, part_s: float, /) -> float:
        """Return of the time since the last call how large a share part_s has grown by."""
        share = (part_s - self._told_part_s) / (self._sum_s - self._told_s)
        self._told_s, self._told_part_s = self._sum_s, part_s
        return share
