"""A model and held-out windows -> numbers: given the true past, and running freely.

    DynamicsModel, Windows  ->  {"validation_loss": ..., "free_running_accuracy": ..., ...}

Accuracy given the true past misleads: a model that copies looks good in it. The first frame that a
rollout makes, beside what repeating the last frame would score, does not.
"""

from collections import defaultdict

import torch
from torch import Tensor

from .config import SamplingConfig
from .losses import cross_entropy, num_right
from .model import DynamicsModel
from .rollout import generate_codes
from .windows import WindowBatch, Windows


@torch.no_grad()
def validate(
    dynamics: DynamicsModel,
    windows: Windows,
    /,
    *,
    seed: int,
    num_windows: int = 128,
    batch_windows: int = 16,
) -> dict[str, float]:
    """Return held-out numbers of a model, which is in eval mode afterwards.

    validation_loss, validation_accuracy: of every frame's codes, given the true past.
    free_running_accuracy: share of the cells of the first frame, sampled after a prompt of half a
    window, that are the true ones. copy_accuracy: the same for repeating the prompt's last frame.
    Both are missing where no window is long enough.

    Args:
        dynamics: the model.
        windows: held-out windows.
        seed: of the choice of windows.
        num_windows: how many are looked at.
        batch_windows: how many at a time; changes the memory needed, not the numbers.
    """
    dynamics.eval()
    chosen = windows.batch(0, size=num_windows, seed=seed)
    sums: defaultdict[str, float] = defaultdict(float)
    for start in range(0, num_windows, batch_windows):
        rows = slice(start, start + batch_windows)
        batch = chosen.rows(rows).to(dynamics.device)
        logits_BfSV = dynamics(batch.codes_Bthw, batch.slots_BTA)
        nats, count = cross_entropy(logits_BfSV, batch)
        sums["nats"] += nats.item()
        sums["right"] += num_right(logits_BfSV, batch).item()
        sums["codes"] += count
        for name, number in _first_frames(dynamics, batch, range(num_windows)[rows]).items():
            sums[name] += number
    scores = {
        "validation_loss": sums["nats"] / sums["codes"],
        "validation_accuracy": sums["right"] / sums["codes"],
    }
    if sums["cells"]:
        scores["free_running_accuracy"] = sums["free"] / sums["cells"]
        scores["copy_accuracy"] = sums["copied"] / sums["cells"]
    return scores


def _first_frames(dynamics: DynamicsModel, batch: WindowBatch, seeds: range) -> dict[str, int]:
    """Return in how many cells a sampled and a copied frame are right, and of how many."""
    prompt_frames = max(1, batch.codes_Bthw.shape[1] // 2)
    whole_B = batch.valid_Bt[:, : prompt_frames + 1].all(1)
    if not whole_B.any():
        return {}
    codes_Bthw = batch.codes_Bthw[whole_B]
    generated_Bthw = generate_codes(
        dynamics,
        codes_Bthw[:, :prompt_frames],
        batch.slots_BTA[whole_B, : prompt_frames * dynamics.steps_per_frame],
        seeds=[seed for seed, whole in zip(seeds, whole_B.tolist(), strict=True) if whole],
        sampling=SamplingConfig(),
    )
    true_Bhw = codes_Bthw[:, prompt_frames]
    return {
        "free": _num_equal(generated_Bthw[:, -1], true_Bhw),
        "copied": _num_equal(codes_Bthw[:, prompt_frames - 1], true_Bhw),
        "cells": true_Bhw.numel(),
    }


def _num_equal(first: Tensor, second: Tensor) -> int:
    return int((first == second).sum())
