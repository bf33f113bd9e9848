"""What each preset of train-dynamics takes: parameters, memory, operations and speed.

    python benchmarks/presets.py [--json FILE] [--quick]

Counted for 1,024 codes on a grid of 16 x 16 and one of four actions a frame. Memory and operations
are counted on tensors without storage, so no GPU is needed for them. Codes per second on a GPU are
arithmetic, not a measurement: 40% of an H200's 989 TFLOP/s (bf16, dense) over the operations of a
code. On the CPU the smallest presets are measured, in two updates of a window.
"""

from typing import Any

import torch
from report import Report, arguments
from worldloom.common import ActionSpec, CodeSpec, TokenizerSpec
from worldloom.dynamics import Cost, DynamicsSpec, measured_times_s, training_cost
from worldloom.pipelines.settings import parse
from worldloom.pipelines.train_dynamics import TrainDynamicsConfig

NAMES = ("2m", "10m", "30m", "100m", "300m", "1b")
GPU_OPERATIONS_PER_S = 989e12
UTILISATION = 0.4
EXPECTED = ("30m", "100m", "300m", "1b")
"""Presets that fill a GPU; smaller ones wait for its launches, and arithmetic says nothing."""
MEASURED = ("2m", "10m")
"""Presets that are measured on the CPU."""

SPEC = DynamicsSpec(
    tokenizer=TokenizerSpec(
        name="any",
        codes=CodeSpec(vocab_size=1024, grid_height=16, grid_width=16, code_dim=16),
        height=128,
        width=128,
        resize="exact",
        fps=15.0,
        frame_skip=1,
        compute_dtype="float32",
        fingerprint="0" * 64,
    ),
    actions=ActionSpec.discrete(["stay", "left", "right", "fire"]),
    fps=15.0,
    frame_skip=1,
)


def main() -> None:
    """Count, measure what is small, and print."""
    asked = arguments(__doc__ or "").parse_args()
    torch.set_num_threads(1)
    report = Report("presets", quick=asked.quick)
    names = NAMES[:2] if asked.quick else NAMES
    configs = {name: preset(name) for name in names}
    costs = {
        name: training_cost(config.model, SPEC, training=config.training)
        for name, config in configs.items()
    }
    settings = {"codes": 1024, "grid": "16x16", "actions": 4, "seed": 0}
    rows = [memory_row(name, configs[name], costs[name]) for name in names]
    report.table("memory", rows, settings=settings)
    rows = [work_row(name, configs[name], costs[name]) for name in names]
    report.table("work", rows, settings={**settings, "GPU": "H200, expected at 40% of 989 TFLOP/s"})
    if not asked.quick:
        rows = [cpu_row(name, configs[name]) for name in MEASURED]
        report.table("measured on this CPU", rows, settings={**settings, "windows": 1})
    report.write(asked.json)


def preset(name: str) -> TrainDynamicsConfig:
    """Return what `worldloom train-dynamics --preset NAME` reads."""
    words = ["--preset", name, "--shards", "any", "--output", "any"]
    config: TrainDynamicsConfig = parse(TrainDynamicsConfig, words, command="train-dynamics")
    return config


def memory_row(name: str, config: TrainDynamicsConfig, cost: Cost) -> dict[str, Any]:
    """Return what a preset holds while it trains."""
    return {
        "preset": name,
        "parameters": f"{cost.parameters / 1e6:.1f}M",
        "weights": _megabytes(cost.weight_bytes),
        "gradients": _megabytes(cost.gradient_bytes),
        "moments": _megabytes(cost.moment_bytes),
        "a window's activations": _megabytes(cost.window_bytes),
        "recompute": "yes" if config.training.recompute else "no",
    }


def work_row(name: str, config: TrainDynamicsConfig, cost: Cost) -> dict[str, Any]:
    """Return what a preset computes, and how fast that should be."""
    training = config.training
    update = codes_of_a_window(config) * training.batch_windows
    operations = cost.window_operations / codes_of_a_window(config)
    per_s = UTILISATION * GPU_OPERATIONS_PER_S / operations if name in EXPECTED else None
    total = update * training.num_steps
    return {
        "preset": name,
        "codes an update": f"{update:,}",
        "codes in all": f"{total / 1e9:.2f}G",
        "operations a code": f"{operations / 1e9:.3f}G",
        "expected codes/s on a GPU": None if per_s is None else f"{per_s:,.0f}",
        "expected GPU hours": None if per_s is None else f"{total / per_s / 3600:.1f}",
    }


def cpu_row(name: str, config: TrainDynamicsConfig) -> dict[str, Any]:
    """Return how fast a preset is on this CPU, one thread: gradients of a window at a time."""
    gradients_s, update_s = measured_times_s(
        config.model, SPEC, training=config.training, windows=1, cpu=True
    )
    batch = config.training.batch_windows
    codes = codes_of_a_window(config) * batch
    return {"preset": name, "codes/s": f"{codes / (gradients_s * batch + update_s):,.0f}"}


def codes_of_a_window(config: TrainDynamicsConfig) -> int:
    """Return how many codes are predicted of a window."""
    return (config.training.window_frames - 1) * SPEC.tokenizer.codes.cells


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.0f} MB"


if __name__ == "__main__":
    main()
