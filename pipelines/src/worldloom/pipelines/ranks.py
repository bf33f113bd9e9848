"""What a launcher says of this process -> its share of the work, where processes do not talk.

    --rank and --world, or the variables of torchrun, or of Slurm  ->  find_share  ->  Share
    all tasks  ->  Share.of  ->  those of this rank

Nothing here opens a connection or waits for another rank: shares are disjoint by arithmetic.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from worldloom.common import ConfigError

Task = TypeVar("Task")


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """One of `world` processes that divide the work among them."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    """Its number among those on this machine, as far as the launcher says."""
    local_world: int = 1
    """How many there are on this machine."""
    launcher: str = ""
    """Who said so: "torchrun", "Slurm" or "--rank"; empty for a process on its own."""

    def of(self, tasks: Sequence[Task], /) -> Sequence[Task]:
        """Return every world-th of the tasks."""
        return tasks[self.rank :: self.world]


def find_share(
    rank: int | None, world: int | None, /, *, environ: Mapping[str, str] = os.environ
) -> Share:
    """Return the share that flags give, else torchrun, else Slurm, else all of the work.

    Raises:
        ConfigError: if one of the two is given without the other, or they contradict each other.
    """
    if (rank is None) != (world is None):
        raise ConfigError("--rank and --world go together: which of how many processes this is")
    if rank is not None and world is not None:
        return _checked(Share(rank=rank, world=world, launcher="--rank"), "--rank, --world")
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return _checked(
            Share(
                rank=_number(environ, "RANK"),
                world=_number(environ, "WORLD_SIZE"),
                local_rank=_number(environ, "LOCAL_RANK", "0"),
                local_world=_number(environ, "LOCAL_WORLD_SIZE", "1"),
                launcher="torchrun",
            ),
            "RANK, WORLD_SIZE",
        )
    return _of_slurm(environ)


def num_cores(share: Share, /, *, environ: Mapping[str, str] = os.environ) -> int:
    """Return how many cores this process may keep busy, at least 1."""
    affinity = getattr(os, "sched_getaffinity", None)  # of Linux
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    if "SLURM_CPUS_PER_TASK" in environ:
        cores = min(cores, _number(environ, "SLURM_CPUS_PER_TASK"))
    return max(1, cores // share.local_world)


def _of_slurm(environ: Mapping[str, str]) -> Share:
    """Return the share of a task of an array, of a task of `srun`, or of a task in both."""
    rank, world, local_rank, local_world, found = 0, 1, 0, 1, False
    if "SLURM_ARRAY_TASK_ID" in environ and "SLURM_ARRAY_TASK_COUNT" in environ:
        # An array may begin at 1, or count in steps.
        first = _number(environ, "SLURM_ARRAY_TASK_MIN", "0")
        step = max(1, _number(environ, "SLURM_ARRAY_TASK_STEP", "1"))
        rank = (_number(environ, "SLURM_ARRAY_TASK_ID") - first) // step
        world, found = _number(environ, "SLURM_ARRAY_TASK_COUNT"), True
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    if "SLURM_PROCID" in environ and tasks in environ:
        count = _number(environ, tasks)
        rank, world = rank * count + _number(environ, "SLURM_PROCID"), world * count
        local_rank, found = _number(environ, "SLURM_LOCALID", "0"), True
        # "2(x3),1": what stands first is right for all nodes but perhaps the last.
        per_node = re.match(r"[1-9]\d*", environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
        local_world = int(per_node[0]) if per_node else 1
    if not found:
        return Share()
    return _checked(
        Share(
            rank=rank,
            world=world,
            local_rank=local_rank,
            local_world=local_world,
            launcher="Slurm",
        ),
        "Slurm's numbers",
    )


def _number(environ: Mapping[str, str], name: str, default: str = "") -> int:
    """Return a variable of a launcher."""
    value = environ.get(name, default)
    if not value.isdecimal():
        raise ConfigError(f"{name} is {value!r:.60}, must be a number; or give --rank and --world")
    return int(value)


def _checked(share: Share, where: str) -> Share:
    """Return the share if there is such a rank."""
    if not 0 <= share.rank < share.world:
        raise ConfigError(
            f"{where}: rank {share.rank} of {share.world}, but ranks count from 0 to one less "
            "than there are; give --rank and --world that do"
        )
    return share
