"""A model and held-out windows -> numbers: given the true past, and running freely.

    DynamicsModel, windows  ->  {"validation_loss": ..., "free_running_accuracy": ..., ...}

Accuracy given the true past misleads: a model that copies looks good in it. The first frame that a
rollout makes, beside what repeating the last frame would score, does not.
"""

from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .losses import cross_entropy, num_right
from .model import DynamicsModel
from .rollout import generate_codes
from .sampling_config import SamplingConfig
from .windows import WindowBatch, WindowSource

if TYPE_CHECKING:
    from .loading import TrainingData


def validate_all(
    dynamics: DynamicsModel, data: "TrainingData", /, *, seed: int, num_windows: int = 128
) -> dict[str, float]:
    """Return held-out numbers of a model on all data sets that it learns from.

    Of one data set, what `validate` says. Of several, what it says of each, with _set0, _set1, ...
    behind the names, and under the names themselves the means by weight: what is expected of a
    window that is drawn as training draws them.

    Args:
        dynamics: the model.
        data: its data sets, and their weights.
        seed: of the choice of windows.
        num_windows: how many are looked at, over all data sets.
    """
    each = len(data.held_out)
    found = [
        validate(dynamics, windows, seed=seed, num_windows=-(-num_windows // each))
        for windows in data.held_out
    ]
    if each == 1:
        return found[0]
    scores: dict[str, float] = {}
    for name in dict.fromkeys(name for numbers in found for name in numbers):
        told = [(n[name], w) for n, w in zip(found, data.weights, strict=True) if name in n]
        scores[name] = sum(n * w for n, w in told) / sum(w for _, w in told)
    for number, numbers in enumerate(found):
        scores |= {f"{name}_set{number}": value for name, value in numbers.items()}
    return scores


@torch.no_grad()
def validate(
    dynamics: DynamicsModel,
    windows: WindowSource,
    /,
    *,
    seed: int,
    num_windows: int = 128,
    batch_windows: int = 16,
) -> dict[str, float]:
    """Return held-out numbers of a model, which is in eval mode afterwards.

    validation_loss, validation_accuracy: of every frame's codes, given the true past (and, where
    cells have levels, the levels below). free_running_accuracy: share of the codes of the first
    frame, sampled after a prompt of half a window, that are the true ones: of Q levels each counts,
    not the cell as a whole. copy_accuracy: the same for repeating the prompt's last frame. Both are
    missing where no window is long enough. Where cells have levels, validation_loss_0,
    validation_accuracy_0 and so on are those of every level.

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
        for level, (logits, part) in _each_level(logits_BfSV, batch).items():
            nats, count = cross_entropy(logits, part)
            sums["nats" + level] += nats.item()
            sums["right" + level] += num_right(logits, part).item()
            sums["codes" + level] += count
        for name, number in _first_frames(dynamics, batch, range(num_windows)[rows]).items():
            sums[name] += number
    scores = {}
    for level in [name.removeprefix("nats") for name in sums if name.startswith("nats")]:
        scores["validation_loss" + level] = sums["nats" + level] / sums["codes" + level]
        scores["validation_accuracy" + level] = sums["right" + level] / sums["codes" + level]
    if sums["compared"]:
        scores["free_running_accuracy"] = sums["free"] / sums["compared"]
        scores["copy_accuracy"] = sums["copied"] / sums["compared"]
    return scores


def _each_level(logits_BfSV: Tensor, batch: WindowBatch) -> dict[str, tuple[Tensor, WindowBatch]]:
    """Return logits and codes of all levels together and, if there are several, of each."""
    every = {"": (logits_BfSV, batch)}
    if batch.codes_Bthw.dim() == 5:
        for level in range(batch.codes_Bthw.shape[-1]):
            codes_Bthw = batch.codes_Bthw[..., level]
            part = replace(batch, codes_Bthw=codes_Bthw)
            every[f"_{level}"] = (logits_BfSV[..., level, :], part)
    return every


def _first_frames(dynamics: DynamicsModel, batch: WindowBatch, seeds: range) -> dict[str, int]:
    """Return how many codes of a sampled and of a copied frame are right, and of how many."""
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
        "compared": true_Bhw.numel(),
    }


def _num_equal(first: Tensor, second: Tensor) -> int:
    return int((first == second).sum())
