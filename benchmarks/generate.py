"""How fast are codes generated, by which decoder, and against what others have?

    python benchmarks/generate.py                                    all that needs no --run
    python benchmarks/generate.py --only decoders --grid 8 --models /tmp/models
    python benchmarks/generate.py --only decoders --run runs/raster  a run's own model and codes
    python benchmarks/generate.py --only world --run runs/demo
    python benchmarks/generate.py --only genie2 genie2-long --peer /tmp/genie2

decoders: a table for every grid and context. Models are of the demo's size (192 wide, 4 layers,
1024 codes). That of order raster has learned a game (rooms.py; `--models FOLDER` keeps it for the
next run), for how sure a model is decides how many forwards jacobi takes; those of the other orders
have fresh weights, for their forwards are counted beforehand. All make every frame in turn. The
decoders of one model go on from one state with the same noise, so they draw the same codes ("same
codes": the share of frames in which they did; where two codes tie, one may differ, and from there
on the worlds do). The context is how many frames the cache holds; it is full.

guidance: a frame guided by scale 2 beside one that is not, in turn.

cache: all cells of a frame, one forward each, before a full context, through our layers with the
preallocated cache and through x-transformers' own Decoder of the same sizes with its cache, which
grows by concatenation. "tokens alone" is layers and cache in both; "whole" adds what ours does
besides: codes in, logits, noise and sampling.

layout: a frame by weights as they lie and by the copy that a rollout lays out for the processor
(linear.py), of the demo's size and of LARGE, float32 and bf16: 64 tokens a forward, or one.

world: the world of --run at batch 1, codes and pixels, without and with guidance.

genie2: the job of the README of PyPI's genie2-pytorch: 16 frames of 2x2 codes from one, batch 2,
by 51.6M parameters; in a process of its own, see train_step.py. Ours has the default order (frame),
as many parameters less at most 2%, sees all frames too, and gets an action for every frame, which
theirs cannot. Once more with weights in bf16, half as many bytes to read, and by order raster, cell
by cell, as theirs. genie2-long: 64 frames, which takes theirs minutes. genie2-guided: the forward
for a cell in frame 17, guided and not.

Milliseconds are of whole frames, with noise and sampling, without pixels unless it says so. Frames
per second and ratios of decoders are of the mean, for jacobi takes a frame in which all moves much
longer. CPU-ms are of all threads: on a busy machine they say more.

Tables go to stdout, progress to stderr.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import rooms
import torch
from peers import generation, genie2
from peers.growing_cache import GrowingCache
from races import Runner, begun, guidance_cost, held_out, middle, race, runners_of, started
from report import Report, arguments, spread
from turns import Times, ratios, take_turns, timed
from worldloom.common import TokenShards, say
from worldloom.dynamics import DynamicsModel, Rollout, SamplingConfig
from worldloom.dynamics.linear import packed_weights

LARGE = {"num_layers": 12, "dim": 512, "num_heads": 8, "num_meta_tokens": 16}
GUIDED = 2.0


class Bench:
    """What the tables are made from; shards and models are made once."""

    def __init__(self, asked: Any, folder: Path) -> None:
        self.asked = asked
        self.sampling = SamplingConfig(temperature=asked.temperature, min_p=asked.min_p)
        self.sizes = rooms.TINY if asked.quick else rooms.DEMO
        self._folder = asked.models or folder
        self._raster: dict[int, DynamicsModel] = {}

    def shards(self, grid: int) -> TokenShards:
        """Return the game on a grid."""
        episodes = 12 if self.asked.quick else 200
        folder = self._folder / f"rooms-{grid}-{episodes}-{self.asked.seed}"
        return rooms.write_rooms(folder, grid, episodes=episodes, seed=self.asked.seed)

    def raster(self, grid: int) -> DynamicsModel:
        """Return the model that learned it."""
        if grid not in self._raster:
            name = f"raster-{grid}-{self.asked.updates}-{self.asked.seed}"
            say(f"generate: training a model for {grid}x{grid} codes")
            self._raster[grid] = rooms.learned(
                self.shards(grid), self._folder / name,
                sizes=self.sizes, updates=self.asked.updates, seed=self.asked.seed,
            )  # fmt: skip
        return self._raster[grid]

    def fresh(self, grid: int, order: str) -> DynamicsModel:
        """Return a model of another order."""
        return rooms.fresh(self.shards(grid), order, sizes=self.sizes, seed=self.asked.seed)

    def slots_TA(self, runner: Runner) -> torch.Tensor:
        """Return a walk of the model's actions: people hold their keys."""
        sizes = runner.rollout.model.spec.actions.sizes
        rng = np.random.default_rng(self.asked.seed)
        return torch.from_numpy(rng.integers(0, sizes, (8, len(sizes))).repeat(4, axis=0))

    def about(self, **more: Any) -> dict[str, Any]:
        """Return what a table was made with."""
        names = ("seed", "threads", "temperature", "min_p")
        return {name: getattr(self.asked, name) for name in names} | {"batch": 1} | more


def compare_decoders(report: Report, bench: Bench) -> None:
    """Print the tables `decoders`."""
    asked = bench.asked
    if asked.run is not None:
        shards = TokenShards(asked.run / "shards")
        model = DynamicsModel.from_pretrained(asked.run / "dynamics" / "model")
        codes, frames = shards.codes, model.config.context_frames
        runners = runners_of(model, shards, bench.sampling, widest=True)
        title = f"decoders, {codes.grid_height}x{codes.grid_width}, --run"
        decoder_table(report, bench, runners, title, {"context frames": frames})
        return
    for grid in asked.grid:
        shards = bench.shards(grid)
        for context in asked.context:
            model = rooms.with_context(bench.raster(grid), shards, context)
            # To draw all that is left costs the more, the larger the grid.
            runners = runners_of(model, shards, bench.sampling, widest=grid <= 8)
            for order, name in (("row", "row"), ("frame", "frame"), ("masked", "maskgit")):
                model = rooms.with_context(bench.fresh(grid, order), shards, context)
                rollout = started(model, shards, replace(bench.sampling, decoder=name))
                runners.append(Runner(order, name, rollout, same=None))
            title = f"decoders, {grid}x{grid}, context {context}"
            about = {"context frames": context, "updates": asked.updates}
            decoder_table(report, bench, runners, title, about)


def decoder_table(
    report: Report, bench: Bench, runners: Sequence[Runner], /, title: str, about: dict[str, Any]
) -> None:
    """Let all run, print how fast they were."""
    asked = bench.asked
    say(f"generate: {title}")
    race(runners, bench.slots_TA(runners[0]), frames=asked.frames, seconds=asked.seconds)
    rows = [runner.row(runners[0]) for runner in runners]
    report.table(title, rows, settings=bench.about(frames=len(runners[0].times), **about))


def compare_guidance(report: Report, bench: Bench) -> None:
    """Print the table `guidance`."""
    rows = []
    for grid in asked_grids(bench, most=8):
        shards = bench.shards(grid)
        for order, names in (("frame", ["frame"]), ("raster", ["raster", "jacobi"])):
            model = bench.raster(grid) if order == "raster" else bench.fresh(grid, order)
            runners = []
            for name in names:
                for scale in (1.0, GUIDED):
                    sampling = replace(bench.sampling, decoder=name, guidance_scale=scale)
                    rollout = started(model, shards, sampling)
                    runners.append(Runner(order, name, rollout, same=None))
            say(f"generate: guidance, {grid}x{grid}, order {order}")
            slots_TA = bench.slots_TA(runners[0])
            race(runners, slots_TA, frames=bench.asked.frames, seconds=bench.asked.seconds / 2)
            for off, on in zip(runners[::2], runners[1::2], strict=True):
                what = {"grid": f"{grid}x{grid}", "order": order, "decoder": off.way}
                rows.append(what | guidance_cost(off, on))
    report.table("guidance", rows, settings=bench.about(scale=GUIDED))


def asked_grids(bench: Bench, *, most: int) -> list[int]:
    """Return the grids that are asked for, but for those that would say nothing more."""
    return [grid for grid in bench.asked.grid if grid <= most] or bench.asked.grid[:1]


def compare_caches(report: Report, bench: Bench) -> None:
    """Print the table `cache`."""
    asked, rows = bench.asked, []
    for grid in asked.grid:
        for context in asked.context:
            shards = bench.shards(grid)
            model = rooms.with_context(bench.fresh(grid, "raster"), shards, context)
            rollout = started(model, shards, replace(bench.sampling, decoder="raster"))
            _, slots_BTA = held_out(shards, rooms.CONTEXT_FRAMES)
            contenders = {
                "theirs": GrowingCache(model.config, cells=model.grid.cells),
                "alone": partial(timed, tokens_alone(rollout, slots_BTA[:, :1])),
                "whole": partial(timed, partial(rollout.step, slots_BTA[:, :1])),
            }
            say(f"generate: cache, {grid}x{grid}, context {context}")
            rounds = asked.rounds if grid <= 8 else min(3, asked.rounds)
            found = take_turns(contenders, rounds=rounds, steps=1, warm=1)
            theirs = found["theirs"]
            row: dict[str, Any] = {"grid": f"{grid}x{grid}", "context frames": context}
            row["x-transformers', ms"] = spread([1e3 * t.wall_s for t in theirs])
            for name, what in (("alone", "tokens alone"), ("whole", "whole")):
                ours = found[name]
                row[f"ours, {what}, ms"] = spread([1e3 * t.wall_s for t in ours])
                row[f"{what}: times as fast"] = _faster(theirs, ours)
                row[f"{what}: in CPU time"] = _faster(theirs, ours, cpu=True)
            rows.append(row)
    report.table("cache", rows, settings=bench.about(rounds=asked.rounds))


def tokens_alone(rollout: Rollout, slots_BrA: torch.Tensor) -> Callable[[], None]:
    """Return what runs every cell's token of the rollout's next frame through the layers."""
    model = rollout.model
    snapshot = rollout.snapshot()
    codes_BSQ = snapshot.past[-1]

    @torch.inference_mode()
    @packed_weights()
    def run() -> None:
        there = model.open_frame(snapshot.frame, codes_BSQ, slots_BrA, snapshot.cache)
        for cell in range(model.grid.cells):
            model.cached_tokens(there, slice(cell, cell + 1), codes_BSQ)

    return run


def _faster(theirs: Sequence[Times], ours: Sequence[Times], *, cpu: bool = False) -> dict[str, Any]:
    name = "cpu_s" if cpu else "wall_s"
    return ratios([getattr(t, name) for t in theirs], [getattr(t, name) for t in ours])


def compare_layouts(report: Report, bench: Bench) -> None:
    """Print the table `layout`."""
    asked, rows = bench.asked, []
    grid = min(8, *asked.grid)
    shards = bench.shards(grid)
    for size, sizes in (("demo's", bench.sizes), ("large", bench.sizes if asked.quick else LARGE)):
        for order in ("frame", "raster"):
            for dtype in (torch.float32, torch.bfloat16):
                model = rooms.fresh(shards, order, sizes=sizes, seed=asked.seed).to(dtype)
                contenders = {
                    name: partial(timed, frame_of(shards, weights, bench.sampling))
                    for name, weights in (("as they lie", model), ("laid out", deepcopy(model)))
                }
                model.train().eval()  # lets go of the copy
                say(f"generate: layout, {size} size, order {order}, {dtype}")
                found = take_turns(contenders, rounds=asked.rounds, steps=1, warm=1)
                before, after = found.values()
                rows.append(
                    {
                        "size": f"{size}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M",
                        "tokens a forward": 1 if order == "raster" else model.grid.cells,
                        "weights": str(dtype).removeprefix("torch."),
                        "as they lie, ms": spread([1e3 * t.wall_s for t in before]),
                        "laid out, ms": spread([1e3 * t.wall_s for t in after]),
                        "times as fast": _faster(before, after),
                        "in CPU time": _faster(before, after, cpu=True),
                    }
                )
    report.table("layout", rows, settings=bench.about(grid=grid, rounds=asked.rounds))


def frame_of(
    shards: TokenShards, model: DynamicsModel, sampling: SamplingConfig
) -> Callable[[], object]:
    """Return what makes a rollout's next frame, group by group."""
    decoder = "raster" if model.config.order == "raster" else "frame"
    rollout = started(model, shards, replace(sampling, decoder=decoder))
    _, slots_BTA = held_out(shards, rooms.CONTEXT_FRAMES)
    return partial(rollout.step, slots_BTA[:, :1])


def measure_world(report: Report, bench: Bench) -> None:
    """Print the table `world`."""
    asked = bench.asked
    worlds = {
        name: begun(asked.run, SamplingConfig(guidance_scale=scale), seed=asked.seed)
        for name, scale in (("plain", 1.0), ("guided", GUIDED))
    }
    times: dict[str, list[Times]] = {name: [] for name in worlds}
    spec, r = worlds["plain"].model.spec, worlds["plain"].steps_per_latent
    rng = np.random.default_rng(asked.seed)
    held_TA = rng.integers(0, spec.actions.sizes, (8, spec.actions.num_slots)).repeat(4, axis=0)
    for step in range(-20, 3 * asked.frames):  # the first warm up
        slots_rA = np.tile(held_TA[step % len(held_TA)], (r, 1))
        for name, world in worlds.items():
            found = timed(partial(world.step, slots_rA), 1)
            if step >= 0:
                times[name].append(found)
    plain_ms = 1e3 * middle(t.wall_s for t in times["plain"]) / r
    rows = []
    for name, own in times.items():
        p50, p95 = (float(1e3 * n / r) for n in np.percentile([t.wall_s for t in own], [50, 95]))
        rows.append(
            {
                "world": name,
                "frames/s": 1e3 / p50,
                "p50 ms": p50,
                "p95 ms": p95,
                "CPU-ms": 1e3 * middle(t.cpu_s for t in own) / r,
                "times plain": p50 / plain_ms,
                "state MB": worlds[name].snapshot().size_bytes / 1e6,
            }
        )
    codes = spec.tokenizer.codes
    about = {
        "seed": asked.seed,
        "threads": asked.threads,
        "frames": 3 * asked.frames * r,
        "codes": f"{codes.grid_height}x{codes.grid_width}",
        "pixels": f"{spec.tokenizer.height}x{spec.tokenizer.width}",
        "order": worlds["plain"].model.config.order,
        "scale": GUIDED,
    }
    report.table("world", rows, settings=about)


def compare_with_genie2(report: Report, bench: Bench, *, frames: int, rounds: int | None) -> None:
    """Print a table `genie2`; theirs is slow, so rounds may be fewer than asked for."""
    asked = bench.asked
    frames, rounds = (2, 1) if asked.quick else (frames, rounds or asked.rounds)
    with genie2_process(asked) as peer:
        rows = generation.compare(peer, frames=frames, rounds=rounds, seed=asked.seed)
    about = {**about_genie2(asked), "frames": frames, "rounds": rounds}
    report.table(f"genie2, {frames} frames", rows, settings=about)


def compare_guided_genie2(report: Report, bench: Bench) -> None:
    """Print the table `genie2, guided`."""
    asked = bench.asked
    job = {"frames": 2 if asked.quick else 16, "rounds": asked.rounds}
    with genie2_process(asked) as peer:
        rows = generation.compare_guided(peer, **job, seed=asked.seed)
    about = {**about_genie2(asked), "scale": generation.SCALE, **job}
    report.table("genie2, guided", rows, settings=about)


def about_genie2(asked: Any) -> dict[str, Any]:
    """Return what its tables are made with."""
    return {"seed": asked.seed, "threads": asked.threads,
            "batch": genie2.BATCH, "cells": genie2.SIDE**2}  # fmt: skip


@contextmanager
def genie2_process(asked: Any) -> Iterator[genie2.Genie2Process]:
    """Lend genie2-pytorch, installed first if it is not there."""
    with tempfile.TemporaryDirectory() as folder:
        where = asked.peer or Path(folder)
        genie2.install(where)
        with genie2.Genie2Process(where, threads=asked.threads, seed=asked.seed) as peer:
            yield peer


TABLES: dict[str, Callable[[Report, Bench], None]] = {
    "decoders": compare_decoders,
    "guidance": compare_guidance,
    "cache": compare_caches,
    "layout": compare_layouts,
    "world": measure_world,
    "genie2": partial(compare_with_genie2, frames=16, rounds=3),
    "genie2-guided": compare_guided_genie2,
    "genie2-long": partial(compare_with_genie2, frames=64, rounds=3),
}


def main() -> None:
    """Measure, print."""
    parser = arguments(__doc__ or "")
    parser.add_argument(
        "--only", nargs="+", choices=list(TABLES),
        help="all; without --run all but world; of a --quick run all that need no network",
    )  # fmt: skip
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="a demo's folder")
    parser.add_argument("--models", type=Path, metavar="FOLDER", help="keep trained models there")
    parser.add_argument("--peer", type=Path, metavar="FOLDER", help="keep genie2-pytorch there")
    parser.add_argument("--grid", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--context", type=int, nargs="+", default=[8, 16], help="frames, 8 or more")
    parser.add_argument("--updates", type=int, default=300, help="of training, a model")
    parser.add_argument("--frames", type=int, default=60, help="timed, a decoder, at most")
    parser.add_argument("--seconds", type=float, default=60, help="a table, about")
    parser.add_argument("--rounds", type=int, default=7, help="of cache, layout, genie2-guided")
    parser.add_argument("--temperature", type=float, default=SamplingConfig().temperature)
    parser.add_argument("--min-p", type=float, default=SamplingConfig().min_p)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0, help="of game, training and noise")
    asked = parser.parse_args()
    if min(asked.context) < rooms.CONTEXT_FRAMES:
        parser.error(f"--context: must be {rooms.CONTEXT_FRAMES} or more, as models were trained")
    names = asked.only or [
        name
        for name in TABLES
        if (name != "world" or asked.run)
        and (not name.startswith("genie2") or asked.peer or not asked.quick)
    ]
    if "world" in names and asked.run is None:
        parser.error("--run: name a demo's folder, such as runs/demo (`make demo`)")
    if asked.quick:
        asked.grid, asked.context, asked.updates, asked.rounds = [4], [8], 4, 1
        asked.frames, asked.seconds = 8, 1.0
    torch.set_num_threads(asked.threads)
    report = Report("generate", quick=asked.quick, packages=("x-transformers",))
    with tempfile.TemporaryDirectory(prefix="worldloom-") as folder:
        bench = Bench(asked, Path(folder))
        for name in names:
            TABLES[name](report, bench)
            report.write(asked.json)


if __name__ == "__main__":
    main()
