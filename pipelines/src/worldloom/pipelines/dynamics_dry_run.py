"""Token shards and settings -> what training a dynamics model would take, before it is begun.

    TokenShards, DynamicsConfig, DynamicsTrainingConfig  ->  dry_run  ->  DynamicsDryRun

Memory and arithmetic are counted without allocating the model (worldloom.dynamics, cost.py). Time
is measured in two small updates on this device where that takes seconds, else estimated from the
arithmetic and from how fast this device multiplies two matrices; it is said which.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from worldloom.common import TokenShards, say
from worldloom.dynamics import (
    Cost,
    DynamicsConfig,
    DynamicsSpec,
    DynamicsTrainingConfig,
    measured_times_s,
    training_cost,
)

from .dry_run import size_text

_AFFORDABLE_S = 20.0
"""Longest that two updates may take, as far as arithmetic tells, for them to be done."""
_UTILISATION = 0.4
"""Share of a matrix product's speed that a training is expected to reach; only an expectation."""
_MEMORIES_GB = (24, 48, 80, 141)
"""What graphics cards have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicsDryRun:
    """What a training would take, in one process. As text: one `name value` a line."""

    parameters: int
    windows_per_update: int
    items_per_update: int
    """Codes that an update predicts."""
    updates: int
    items: int
    """Codes that all updates predict."""
    passes: float
    """How often that is every code of the training split."""
    checkpoint_bytes: int
    weight_bytes: int
    gradient_bytes: int
    moment_bytes: int
    """What the optimizer remembers."""
    average_bytes: int
    state_bytes: int
    """Weights, gradients, moments and average."""
    window_bytes: int
    """What the forward of one window keeps for the backward pass."""
    windows_at_once: int
    """1 where training finds out itself how many fit."""
    activation_bytes: int
    """What the forward of so many windows keeps."""
    memory_bytes: int
    """State and activations."""
    operations_per_item: int
    """Floating-point operations for each predicted code, forward and backward."""
    measured: bool
    """Whether the time was measured here; else it is an estimate."""
    items_per_s: float
    update_s: float
    total_s: float
    """Updates alone, without validation and checkpoints."""

    def __str__(self) -> str:
        """Return what a program can read: `parameters 123`, and so on."""
        lines = []
        for field in fields(self):
            value = getattr(self, field.name)
            lines.append(f"{field.name} {f'{value:.6g}' if isinstance(value, float) else value}")
        return "\n".join(lines)


def dry_run(
    shards: Sequence[TokenShards],
    /,
    *,
    model: DynamicsConfig,
    training: DynamicsTrainingConfig,
    cpu: bool,
) -> DynamicsDryRun:
    """Count, measure or estimate, say it, and return it; nothing is written.

    Args:
        shards: the folders, which speak the same codes.
        model: sizes.
        training: how it would be trained.
        cpu: whether it would stay on the CPU.
    """
    spec = DynamicsSpec.of(*shards)
    cost = training_cost(model, spec, training=training)
    codes = spec.tokenizer.codes
    per_frame = codes.cells * codes.num_levels
    per_window = (training.window_frames - 1) * per_frame
    there = per_frame * sum(
        one.episodes[number].latent_frames - 1 for one in shards for number in one.split("train")
    )
    items_per_update = training.batch_windows * per_window
    items = training.num_steps * items_per_update
    at_once = {-1: 1, 0: training.batch_windows}.get(training.micro_windows, training.micro_windows)
    at_once = min(at_once, training.batch_windows)
    update_s, windows, device = _update_s(cost, model, spec, training, at_once=at_once, cpu=cpu)
    dry = DynamicsDryRun(
        parameters=cost.parameters,
        windows_per_update=training.batch_windows,
        items_per_update=items_per_update,
        updates=training.num_steps,
        items=items,
        passes=items / max(1, there),
        checkpoint_bytes=cost.checkpoint_bytes,
        weight_bytes=cost.weight_bytes,
        gradient_bytes=cost.gradient_bytes,
        moment_bytes=cost.moment_bytes,
        average_bytes=cost.average_bytes,
        state_bytes=cost.state_bytes,
        window_bytes=cost.window_bytes,
        windows_at_once=at_once,
        activation_bytes=at_once * cost.window_bytes,
        memory_bytes=cost.state_bytes + at_once * cost.window_bytes,
        operations_per_item=cost.window_operations // per_window,
        measured=windows > 0,
        items_per_s=items_per_update / update_s,
        update_s=update_s,
        total_s=training.num_steps * update_s,
    )
    for sentence in _sentences(dry, training, windows=windows, device=device):
        say(sentence)
    return dry


def _sentences(
    dry: DynamicsDryRun, training: DynamicsTrainingConfig, *, windows: int, device: str
) -> list[str]:
    """Return what a person wants to know."""
    dealt = "; --training.sharded deals them out over the processes" if training.sharded else ""
    average = f", average {size_text(dry.average_bytes)}" if dry.average_bytes else ""
    fitting = [
        f"{max(0, int(gigabytes * 1e9 - dry.state_bytes) // dry.window_bytes)} in {gigabytes} GB"
        for gigabytes in _MEMORIES_GB
    ]
    how = (
        f"measured on {device} in two updates of {windows} window(s)"
        if dry.measured
        else f"estimated: {_UTILISATION:.0%} of how fast {device} multiplies matrices; an update "
        "here would take too long, or too much memory, to be tried"
    )
    return [
        f"{dry.parameters / 1e6:.1f}M parameters; {dry.updates:,} updates of "
        f"{dry.windows_per_update} windows, {dry.items_per_update:,} codes each: "
        f"{dry.items:,} codes in all, {dry.passes:.3g} passes over the training split; "
        f"a checkpoint is {size_text(dry.checkpoint_bytes)}, and two are kept",
        f"memory: {size_text(dry.weight_bytes)} weights, {size_text(dry.gradient_bytes)} "
        f"gradients, {size_text(dry.moment_bytes)} moments of the optimizer{average}: "
        f"{size_text(dry.state_bytes)} in all{dealt}",
        f"a window keeps {size_text(dry.window_bytes)} for the backward pass (counted as a CPU "
        f"keeps it; a GPU keeps less in bf16), {dry.windows_at_once} at once: about "
        f"{size_text(dry.memory_bytes)} while training. Windows that fit beside the rest: "
        f"{', '.join(fitting)}. What the libraries compute with comes on top",
        f"time: {dry.update_s:.3g} s an update, {dry.items_per_s:,.0f} codes/s, "
        f"{_duration_text(dry.total_s)} in all without validation and checkpoints ({how})",
        "nothing was trained and nothing was written: this was a dry run",
    ]


def _update_s(  # noqa: PLR0913 - what would be trained, and where
    cost: Cost,
    model: DynamicsConfig,
    spec: DynamicsSpec,
    training: DynamicsTrainingConfig,
    /,
    *,
    at_once: int,
    cpu: bool,
) -> tuple[float, int, str]:
    """Return seconds of an update, of how many windows it was measured (0: not), and the device."""
    device = "cpu" if cpu or not torch.cuda.is_available() else "cuda"
    name = "the CPU" if device == "cpu" else torch.cuda.get_device_name()
    speed = _UTILISATION * _operations_per_s(device, bf16=training.bf16)
    window_s = cost.window_operations / speed
    free = 0.8 * _free_bytes(device) - cost.state_bytes
    windows = at_once
    while windows and (
        2 * windows * window_s > _AFFORDABLE_S or windows * cost.window_bytes > free
    ):
        windows //= 2
    if not windows:
        return training.batch_windows * window_s, 0, name
    gradients_s, apply_s = measured_times_s(
        model, spec, training=training, windows=windows, cpu=device == "cpu"
    )
    return training.batch_windows * gradients_s / windows + apply_s, windows, name


def _operations_per_s(device: str, *, bf16: bool) -> float:
    """Return how fast a device multiplies two matrices, in floating-point operations a second."""
    size = 1024 if device == "cpu" else 8192
    dtype = torch.bfloat16 if bf16 else torch.float32
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    best_s = float("inf")
    for _ in range(5):
        began = time.monotonic()
        (matrix @ matrix)[0, 0].item()  # waits for the device
        best_s = min(best_s, time.monotonic() - began)
    return 2 * size**3 / best_s


def _free_bytes(device: str) -> float:
    """Return the memory that a device has left; of a CPU half of what there is, for others too."""
    if device == "cuda":
        return float(torch.cuda.mem_get_info()[0])
    return 0.5 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _duration_text(seconds: float) -> str:
    """Return a duration as people say it."""
    for unit, length_s in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * length_s:
            return f"{seconds / length_s:.1f} {unit}"
    return f"{seconds:.0f} seconds"
