"""Rollouts that make every frame in turn, so that a machine's moods hit all of them alike.

run, settings       ->  begun       ->  a run's world at a held-out moment
model, shards       ->  started     ->  a rollout whose cache is full
model, shards       ->  runners_of  ->  Runners, one a decoder, all in one state
Runners, actions    ->  race        ->  each with Times and forwards of its frames;  row, cost
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import rooms
import torch
from turns import Times
from worldloom.common import TokenShards
from worldloom.dynamics import DynamicsModel, Rollout, SamplingConfig, Windows, decoders_of
from worldloom.dynamics.decoders import Auto, Jacobi
from worldloom.pipelines.starts import held_out_moments, read_start
from worldloom.pipelines.world import World

LEAST_FRAMES = 8
"""Timed, however long they take."""


@dataclass(slots=True)
class Runner:
    """A rollout and how long its frames took."""

    order: str
    way: str
    rollout: Rollout
    times: list[Times] = field(default_factory=list)
    forwards: list[int] = field(default_factory=list)
    same: list[float] | None = field(default_factory=list)
    """Whether each frame was that of the first runner of its model; None where none was before."""

    def step(self, slots_BrA: torch.Tensor) -> torch.Tensor:
        """Make a frame; return its codes."""
        wall, cpu = time.perf_counter(), time.process_time()
        codes_Bhw = self.rollout.step(slots_BrA)
        self.times.append(Times(time.perf_counter() - wall, time.process_time() - cpu))
        self.forwards.append(self.rollout.forwards)
        return codes_Bhw

    def mean_s(self) -> tuple[float, float]:
        """Return wall and processor seconds of a frame: the mean, since some take far more."""
        wall_s = float(np.mean([t.wall_s for t in self.times]))
        return wall_s, float(np.mean([t.cpu_s for t in self.times]))

    def row(self, base: "Runner") -> dict[str, Any]:
        """Return what is printed of it, beside the first runner."""
        p50, p95 = (float(1e3 * n) for n in np.percentile([t.wall_s for t in self.times], [50, 95]))
        wall_s, cpu_s = self.mean_s()
        base_wall_s, base_cpu_s = base.mean_s()
        return {
            "order": self.order,
            "decoder": self.way,
            "frames/s": 1 / wall_s,
            "p50 ms": p50,
            "p95 ms": p95,
            "CPU-ms": 1e3 * cpu_s,
            "forwards/frame": float(np.mean(self.forwards)),
            f"times {base.way}": base_wall_s / wall_s,
            "in CPU time": base_cpu_s / cpu_s,
            "same codes": float(np.mean(self.same)) if self.same else None,
            "state MB": self.rollout.size_bytes / 1e6,
        }


def middle(values: Iterable[float]) -> float:
    """Return the median."""
    return float(np.median(list(values)))


def race(runners: Sequence[Runner], slots_TA: torch.Tensor, *, frames: int, seconds: float) -> None:
    """Let all make every frame in turn.

    Args:
        runners: each in its state.
        slots_TA: actions, over and over.
        frames: at most so many are timed.
        seconds: as many as this allows, but LEAST_FRAMES.
    """
    _let_auto_choose(runners, slots_TA)
    began = time.perf_counter()
    for step in range(-1, frames):  # the first warms up
        first: dict[int, torch.Tensor] = {}
        slots_BrA = slots_TA[(step + 1) % len(slots_TA)][None, None]
        for runner in runners:
            codes_Bhw = runner.step(slots_BrA)
            model = id(runner.rollout.model)
            if runner.same is not None and model in first:
                runner.same.append(float(torch.equal(first[model], codes_Bhw)))
            first.setdefault(model, codes_Bhw)
        if step + 1 >= LEAST_FRAMES and time.perf_counter() - began > seconds:
            break
    for runner in runners:
        del runner.times[0], runner.forwards[0]
        if runner.same:
            del runner.same[0]


def _let_auto_choose(runners: Sequence[Runner], slots_TA: torch.Tensor) -> None:
    """Let Auto measure its candidates on frames that the others do not make, and take it back."""
    for runner in runners:
        decoder = runner.rollout._decoder
        if isinstance(decoder, Auto):
            start = runner.rollout.snapshot()
            while decoder.chosen is None:
                runner.rollout.step(slots_TA[0][None, None])
            runner.rollout.restore(start)
            runner.rollout._decoder = decoder


def begun(run: Path, sampling: SamplingConfig, /, *, seed: int) -> World:
    """Return the world of a demo's folder, begun with four held-out frames."""
    world = World.from_pretrained(
        run / "dynamics" / "model", run / "tokenizer" / "model", sampling=sampling
    )
    moment, *_ = held_out_moments(run / "shards", world, prompt_frames=4, apart_frames=4)
    start = read_start(run / "shards", world, moment)
    world.reset(start.codes_thw, start.slots_TA, seed=seed)
    return world


def held_out(shards: TokenShards, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes_Bthw and slots_BTA of a held-out window."""
    batch = Windows(shards, "validation", window_frames=frames).batch(0, size=1, seed=0)
    return batch.codes_Bthw, batch.slots_BTA


def started(model: DynamicsModel, shards: TokenShards, sampling: SamplingConfig) -> Rollout:
    """Return a rollout whose cache is full."""
    codes_Bthw, slots_BTA = held_out(shards, rooms.CONTEXT_FRAMES)
    rollout = Rollout(model, codes_Bthw, slots_BTA, seeds=[0], sampling=sampling)
    for step in range(model.config.context_frames - rooms.CONTEXT_FRAMES):
        rollout.step(slots_BTA[:, step % 7 : step % 7 + 1])
    return rollout


def runners_of(
    model: DynamicsModel, shards: TokenShards, sampling: SamplingConfig, *, widest: bool
) -> list[Runner]:
    """Return a runner for every decoder of the model's order, from one state; the plain one first.

    Args:
        model: what predicts.
        shards: where the state comes from.
        sampling: how codes are drawn, but for the decoder.
        widest: whether jacobi runs a second time, and draws all that is left in every forward.
    """
    order = model.config.order
    start = started(model, shards, sampling)
    found = []
    names = sorted(decoders_of(order), key=lambda name: (name in ("jacobi", "auto"), name))
    for name in names:
        rollout = start.fork(1, seeds=[0])
        rollout.sampling = replace(sampling, decoder=name)
        found.append(Runner(order, name, rollout))
        if widest and name == "jacobi":
            wide = start.fork(1, seeds=[0])
            wide.sampling = replace(sampling, decoder=name)
            wide._decoder = Jacobi(reach=inf)
            found.append(Runner(order, "jacobi, all that is left", wide))
    return found


def guidance_cost(off: Runner, on: Runner) -> dict[str, Any]:
    """Return what a guided frame costs beside one that is not."""
    (off_s, off_cpu), (on_s, on_cpu) = off.mean_s(), on.mean_s()
    off_forwards, on_forwards = (float(np.mean(runner.forwards)) for runner in (off, on))
    return {
        "off, ms": 1e3 * off_s,
        "guided, ms": 1e3 * on_s,
        "cost": on_s / off_s,
        "in CPU time": on_cpu / off_cpu,
        "forwards, off": off_forwards,
        "forwards, guided": on_forwards,
        "cost a forward": on_cpu / on_forwards / (off_cpu / off_forwards),
    }
