"""Contenders that take turns, so that a machine's moods hit all of them alike.

{name: run(steps) -> Times}  ->  take_turns  ->  {name: Times of every round}
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from report import spread
from worldloom.common import say


@dataclass(frozen=True, slots=True)
class Times:
    """How long a step of one round took."""

    wall_s: float
    cpu_s: float
    """Of all threads: on a busy machine it says more."""


def timed(step: Callable[[], None], steps: int) -> Times:
    """Run a round."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        step()
    return Times((time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps)


def take_turns(
    contenders: Mapping[str, Callable[[int], Times]], *, rounds: int, steps: int, warm: int
) -> dict[str, list[Times]]:
    """Return every contender's rounds; each runs `warm` steps first that do not count."""
    for name, run in contenders.items():
        say(f"warming up: {name}")
        run(warm)
    found: dict[str, list[Times]] = {name: [] for name in contenders}
    for number in range(rounds):
        say(f"round {number + 1} of {rounds}")
        for name, run in contenders.items():
            found[name].append(run(steps))
    return found


def ratios(first: Sequence[float], second: Sequence[float]) -> dict[str, float]:
    """Return first / second of every round: median, least and greatest."""
    return spread([a / b for a, b in zip(first, second, strict=True)])
