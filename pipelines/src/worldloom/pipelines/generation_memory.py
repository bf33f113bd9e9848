"""One world, measured -> what so many take -> whether they fit, or how many would.

    World, Job              -> measure_world -> WorldCost: bytes a world, bytes of its pictures
    WorldCost, how many     -> require_room  -> nothing, or a refusal that names how many fit

One world is rolled for a frame before the batch is, and what its tensors take at most is counted.
Weights are there already, also as they are laid out for generating, and count for nothing.
"""

import os
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from worldloom.common import ConfigError

from .generation import Job
from .world import World
from .world_batch import WorldBatch

_SLACK = 2.0
"""Of what was counted: kernels keep scratch of their own, and allocators what was freed. Measured
1.8 for 256 worlds of the demo on a CPU (glibc)."""
_SHARE = 0.9
"""Of the free memory that is planned with; others may want some meanwhile."""
_MOVIE_COPIES = 5
"""Of a drawn movie that live at once, while the GIF's palette is found. Measured 4.3."""


@dataclass(frozen=True, slots=True)
class WorldCost:
    """Memory of one world of a batch."""

    rolling_bytes: float
    """On the device, while it generates."""
    frames_bytes: float
    """In main memory: the frames of one future."""
    movie_bytes: float
    """In main memory: one column of a movie that is drawn; movies are drawn one after another."""


def measure_world(world: World, job: Job, /, *, steps: int, scale: int) -> WorldCost:
    """Roll one world for a latent frame and count what it takes.

    Args:
        world: what rolls; it keeps its own state.
        job: any start and the first of its actions.
        steps: pixel frames that every future will have.
        scale: side of a pixel in the pictures.
    """

    def once() -> None:
        batch = WorldBatch(
            world.model, world.tokenizer, [job.start], seeds=[0], sampling=world.sampling
        )
        r = world.steps_per_latent
        batch.step(job.slots_TA[[0] * r][None])

    spec = world.tokenizer.spec
    given = spec.codes.pixel_frames(len(job.start.codes_thw))
    frames = 3.0 * spec.height * spec.width * (given + steps)
    return WorldCost(
        rolling_bytes=_SLACK * peak_bytes(once, world.model.device),
        frames_bytes=frames,
        movie_bytes=_MOVIE_COPIES * scale**2 * frames,
    )


def peak_bytes(work: Callable[[], object], device: torch.device, /) -> int:
    """Return the most that tensors which the work made took at once."""
    if device.type == "cuda":
        work()  # what is allocated once, as the workspaces of matrix products, is no world's
        torch.cuda.synchronize(device)
        before = int(torch.cuda.memory_allocated(device))
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return int(torch.cuda.max_memory_allocated(device)) - before
    live = _LiveBytes()
    with live:
        work()
    return live.most


def require_room(
    cost: WorldCost,
    /,
    *,
    starts: int,
    samples: int,
    device: torch.device,
    copies: float = 1.0,
) -> None:
    """Refuse more worlds than memory, before any of them runs.

    Args:
        cost: of one world.
        starts: how many there are.
        samples: futures of each.
        device: where they roll.
        copies: how many frames are held for each frame of a future: true ones, or another turn's.

    Raises:
        ConfigError: naming what they would take, what is free, and how many would fit.
    """
    frames, movie = copies * cost.frames_bytes, cost.movie_bytes
    each = cost.rolling_bytes + frames
    if device.type == "cuda":
        free_bytes = float(torch.cuda.mem_get_info(device)[0])
        memory = _Memory("CUDA", free_bytes, cost.rolling_bytes, 0.0)
        _require(memory, starts=starts, samples=samples)
        each = frames
    main = _Memory("main", free_main_bytes(), each, movie)
    _require(main, starts=starts, samples=samples)


def free_main_bytes(root: Path = Path("/")) -> float:
    """Return the main memory that this process may still take: the machine's, or its container's.

    Args:
        root: where /proc and /sys are.
    """
    found = []
    with suppress(OSError, ValueError):
        about = dict(
            line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines()
        )
        found.append(1024.0 * int(about["MemAvailable"].split()[0]))
    groups = root / "sys/fs/cgroup"
    for limit, used, stat, total in (
        ("memory.max", "memory.current", "memory.stat", ""),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
            "total_",
        ),
    ):
        # "max" is no number: no limit.
        with suppress(OSError, ValueError):
            free = int((groups / limit).read_text()) - int((groups / used).read_text())
            # Files that were read are counted as used, and go when somebody wants the room.
            with suppress(OSError, ValueError, KeyError):
                about = dict(line.split() for line in (groups / stat).read_text().splitlines())
                free += int(about[f"{total}inactive_file"]) + int(about[f"{total}active_file"])
            found.append(max(0.0, float(free)))
    # Elsewhere nothing says what is free: half of what there is.
    return min(found) if found else 0.5 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class _Memory:
    """A memory, and what a world and a column of a movie take of it."""

    name: str
    free_bytes: float
    world_bytes: float
    movie_bytes: float


def _require(memory: _Memory, /, *, starts: int, samples: int) -> None:
    """Refuse more worlds than one memory holds."""
    columns = samples + 1  # what truly happened is a column of the movie, too
    room, movie = _SHARE * memory.free_bytes, memory.movie_bytes
    needed = starts * samples * memory.world_bytes + columns * movie
    if needed <= room:
        return
    most_starts = int((room - columns * movie) / (samples * memory.world_bytes))
    most_samples = int((room - movie) / (starts * memory.world_bytes + movie))
    fits = [
        f"{most:,} {what}"
        for most, what, asked in (
            (most_starts, "starts", starts),
            (most_samples, "samples of each", samples),
        )
        if 1 <= most < asked
    ]
    worlds = int((room - 2 * movie) / memory.world_bytes)
    if fits:
        cure = f"at most {' or '.join(fits)} would fit"
    elif worlds >= 1:
        cure = f"about {worlds:,} would fit: take fewer starts and fewer samples of each"
    elif movie:
        cure = "not even one of each fits: lower --scale or the number of frames"
    else:
        cure = "not even one of each fits: take a smaller model, or --device cpu"
    raise ConfigError(
        f"{starts * samples:,} worlds ({starts:,} starts, {samples:,} samples of each) would take "
        f"about {_size(needed)} of {memory.name} memory, and {_size(memory.free_bytes)} are free; "
        f"{cure}"
    )


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own has no types
    """Counts the bytes of tensors that are made under it, as long as they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = 0
        """The most there were at once."""
        self._now = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation; count what it made."""
        given = {_storage(part) for part in tree_leaves((args, kwargs)) if _is_tensor(part)}
        made = func(*args, **(kwargs or {}))
        for part in tree_leaves(made):
            if _is_tensor(part) and _storage(part) not in given:
                self._count(part.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until it goes."""
        key, size = storage._cdata, storage.nbytes()
        known = self._known.get(key)
        if known is not None and known() is storage:
            return

        def gone(_: object) -> None:
            self._now -= size

        self._known[key] = weakref.ref(storage, gone)
        self._now += size
        self.most = max(self.most, self._now)


def _is_tensor(part: object) -> bool:
    """Tell whether this is a tensor with memory to count; weights laid out anew show none."""
    return isinstance(part, torch.Tensor) and part.layout == torch.strided


def _storage(part: torch.Tensor) -> int:
    """Return what two tensors share if they share memory."""
    return int(part.untyped_storage()._cdata)


def _size(size_bytes: float) -> str:
    """Return a size as people say it."""
    gib = size_bytes / 2**30
    return f"{gib:,.1f} GiB" if gib >= 0.5 else f"{1024 * gib:,.0f} MiB"
