"""Does frame 5,000 cost what frame 50 cost?

    python benchmarks/unbounded.py --run runs/demo --plot unbounded.png --json unbounded.json

Plays a demo's world, pixels and all, for 5,000 frames without a break, with actions that are held
for a while. After 50 frames, and then every so often, it stops to compare: a second world of the
same run, always between frames 40 and 60, and the long one make frames in turn, pair by pair, so
that what else the machine does hits both alike. Stated are, at each such place,

    ms, CPU-ms      of a frame of the long world: the median of the pairs
    ratio           to the other world's frame: the median over the pairs of wall seconds, and that
                    of processor seconds; 1 if nothing grows
    RSS             memory of the process, and how much that is of what it was at frame 50
    state MB        what a snapshot of the long world takes
    finite          whether all keys and values in its cache are numbers
    codes           how many different codes the frames since the place before had: a world that got
                    stuck shows few

The plot has every frame: medians of 50 of them, and the memory. It needs /proc (Linux) for the
memory. Tables go to stdout, progress to stderr.
"""

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from drift import write_walks
from races import begun, middle
from report import Report, arguments
from turns import Times, timed
from worldloom.common import TokenShards, say
from worldloom.dynamics import (
    DynamicsConfig,
    DynamicsTrainingConfig,
    SamplingConfig,
    train_dynamics_model,
)
from worldloom.pipelines.world import World

FIRST, YOUNG = 50, (40, 60)
"""Frame that all is compared with; between which frames the other world stays."""
BLOCK = 50
"""Frames a point of the plot."""


@dataclass(frozen=True, slots=True)
class Keys:
    """Actions that are held for eight steps, without end and without a memory of them."""

    sizes: Sequence[int]
    steps: int
    seed: int

    def slots_rA(self, frame: int) -> np.ndarray:
        """Return the actions that lead to a latent frame."""
        rng = np.random.default_rng([self.seed, frame // 8])
        return np.tile(rng.integers(0, self.sizes), (self.steps, 1))


class Player:
    """A world that is played, and what its frames took."""

    def __init__(self, world: World, keys: Keys) -> None:
        self.world = world
        self.frame = 0
        self.codes: set[int] = set()
        self._keys = keys

    def step(self) -> Times:
        """Make a latent frame, with its pixels."""
        slots_rA = self._keys.slots_rA(self.frame)
        found: list[torch.Tensor] = []
        times = timed(lambda: found.append(self.world.step(slots_rA)[1]), 1)
        self.codes.update(found[0].flatten().tolist())
        self.frame += 1
        return times


class Young(Player):
    """A world that is never old."""

    def __init__(self, world: World, keys: Keys) -> None:
        super().__init__(world, keys)
        while self.frame < YOUNG[0]:
            self.step()
        self._start = world.snapshot()

    def step(self) -> Times:
        """Make a latent frame; go back in time first, where it would get old."""
        if self.frame == YOUNG[1]:
            self.world.restore(self._start)
            self.frame = YOUNG[0]
            super().step()  # the first after a restore finds other memory
        return super().step()


def resident_bytes() -> int:
    """Return the memory of this process that is in RAM."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def compare(long: Player, young: Player, pairs: int) -> dict[str, Any]:
    """Return a row: both make frames in turn."""
    place, different = long.frame, len(long.codes)
    resident, snapshot = resident_bytes(), long.world.snapshot()
    cache = snapshot.rollout.cache
    finite = all(bool(part.isfinite().all()) for part in (cache.keys, cache.values))
    state_bytes = snapshot.size_bytes
    del snapshot, cache
    long.step(), young.step()  # to warm up
    found = [(long.step(), young.step()) for _ in range(pairs)]
    long.codes.clear()
    return {
        "frame": place,
        "ms": 1e3 * middle(old.wall_s for old, _ in found),
        "CPU-ms": 1e3 * middle(old.cpu_s for old, _ in found),
        "ratio": middle(old.wall_s / new.wall_s for old, new in found),
        "in CPU time": middle(old.cpu_s / new.cpu_s for old, new in found),
        "RSS, MB": resident / 1e6,
        "state MB": state_bytes / 1e6,
        "finite": finite,
        "codes": different,
    }


def play(
    long: Player, young: Player, *, frames: int, every: int, pairs: int
) -> tuple[list[dict[str, Any]], list[tuple[int, Times, int]]]:
    """Return a row a place, and of every frame in between its number, times and memory after it."""
    rows: list[dict[str, Any]] = []
    every_frame: list[tuple[int, Times, int]] = []
    for place in [FIRST, *range(every, frames + 1, every)]:
        while long.frame < place:
            found = long.step()
            every_frame.append((long.frame, found, resident_bytes()))
        say(f"unbounded: frame {place} of {frames}")
        rows.append(compare(long, young, pairs))
    for row in rows:
        row["RSS, times"] = row["RSS, MB"] / rows[0]["RSS, MB"]
    return rows, every_frame


def draw(
    path: Path, rows: Sequence[dict[str, Any]], every_frame: Sequence[tuple[int, Times, int]]
) -> None:
    """Draw milliseconds and memory over frames, and the ratios at the places."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    blocks = [every_frame[start : start + BLOCK] for start in range(0, len(every_frame), BLOCK)]
    frames = [middle(frame for frame, _, _ in block) for block in blocks]
    figure, (above, between, below) = plt.subplots(
        3, 1, sharex=True, figsize=(8, 7), layout="constrained"
    )
    for name, field in (("of the clock", "wall_s"), ("of the processor", "cpu_s")):
        values = [1e3 * middle(getattr(times, field) for _, times, _ in block) for block in blocks]
        above.plot(frames, values, label=name)
    above.set(ylabel="ms a frame", title=f"medians of {BLOCK} frames")
    above.set_ylim(bottom=0)
    above.legend()
    places = [row["frame"] for row in rows]
    between.axhspan(0.95, 1.05, color="0.9")
    between.plot(places, [row["ratio"] for row in rows], "o-", label="of the clock")
    between.plot(places, [row["in CPU time"] for row in rows], "o-", label="of the processor")
    between.set(ylabel="times a frame\nbetween 40 and 60", ylim=(0.8, 1.2))
    between.legend()
    memory = [block[-1][2] / 1e6 for block in blocks]
    below.plot(frames, memory)
    below.set(ylabel="memory, MB", ylim=(0, 1.2 * max(memory)), xlabel="latent frame")
    figure.savefig(path)
    plt.close(figure)


def write_tiny_run(run: Path) -> None:
    """Write a world that can be played and knows nothing."""
    write_walks(run, episodes=10, frames=24)
    training = DynamicsTrainingConfig(
        num_steps=2, batch_windows=2, window_frames=6, warmup_steps=1, validate_every=2,
        checkpoint_every=2, log_every=1,
    )  # fmt: skip
    model = DynamicsConfig(num_layers=1, dim=24, num_heads=2, context_frames=4)
    train_dynamics_model(
        TokenShards(run / "shards"), run / "dynamics", model=model, training=training, cpu=True
    )


def main() -> None:
    """Play, print, draw."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="a demo's folder")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw every frame: png or svg")
    parser.add_argument("--frames", type=int, default=5000)
    parser.add_argument("--every", type=int, default=1000, help="frames from one place to the next")
    parser.add_argument("--pairs", type=int, default=200, help="frames of either world at a place")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0, help="of actions and noise")
    asked = parser.parse_args()
    if asked.run is None and not asked.quick:
        parser.error("--run: name a demo's folder, such as runs/demo (`make demo`)")
    if asked.quick:
        asked.frames, asked.every, asked.pairs = 200, 100, 10
    if asked.pairs >= asked.every - FIRST:
        parser.error("--pairs: must be fewer than lie between two places")
    torch.set_num_threads(asked.threads)
    report = Report("unbounded", quick=asked.quick, packages=("x-transformers",))
    with tempfile.TemporaryDirectory(prefix="worldloom-") as folder:
        run = asked.run
        if run is None:
            run = Path(folder) / "run"
            write_tiny_run(run)
        world, other = (begun(run, SamplingConfig(), seed=asked.seed) for _ in range(2))
    keys = Keys(world.model.spec.actions.sizes, world.steps_per_latent, asked.seed)
    began = time.perf_counter()
    about = {name: getattr(asked, name) for name in ("frames", "every", "pairs")}
    rows, every_frame = play(Player(world, keys), Young(other, keys), **about)
    settings = {
        **about,
        "seed": asked.seed,
        "threads": asked.threads,
        "context frames": world.model.config.context_frames,
        "seconds": time.perf_counter() - began,
    }
    report.table("unbounded", rows, settings=settings)
    if asked.plot is not None:
        draw(asked.plot, rows, every_frame)
    report.write(asked.json)


if __name__ == "__main__":
    main()
