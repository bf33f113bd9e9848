"""A model and held-out windows -> numbers: given the true past, and running freely.

    DynamicsModel, windows  ->  {"validation_loss": ..., "free_running_accuracy": ..., ...}

Accuracy given the true past misleads: a model that copies looks good in it. The first frame that a
rollout makes, beside what repeating the last frame would score, does not. Nor does that frame say
whether the model holds out: a few rollouts go on, and their 4th and 8th frames are judged too.

Windows whose actions nobody knows count like all others, with NULL in every slot, as in training.
What such a model can know of the next frame is less, so where some windows have actions and others
have none, the free-running numbers are also told of those that have.
"""

from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor

from .actions import NULL
from .losses import cross_entropy, num_right
from .model import DynamicsModel
from .rollout import generate_codes
from .sampling_config import SamplingConfig
from .sequence import flatten_codes
from .windows import WindowBatch, WindowSource

if TYPE_CHECKING:
    from .loading import TrainingData

_LATER_FRAMES = (4, 8)
"""Generated frames that are judged besides the first."""
_LATER_SHARE = 4
"""One window in so many is rolled out that far: a frame costs as much as the first one did."""
_WITH_ACTIONS = "_with_actions"
"""Behind the names of numbers of windows whose actions are known."""


def validate_all(
    dynamics: DynamicsModel,
    data: "TrainingData",
    /,
    *,
    seed: int,
    num_windows: int = 128,
    batch_windows: int = 16,
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
        batch_windows: how many at a time; changes the memory needed, and sums by their rounding.
    """
    each = len(data.held_out)
    measured = [
        _measure(dynamics, windows, seed, -(-num_windows // each), batch_windows)
        for windows in data.held_out
    ]
    found = [_told(*one) for one in measured]
    if each == 1:
        return found[0]
    means: dict[str, float] = {}
    everything = [scores for scores, _ in measured]
    for name in dict.fromkeys(name for scores in everything for name in scores):
        told = [(s[name], w) for s, w in zip(everything, data.weights, strict=True) if name in s]
        means[name] = sum(n * w for n, w in told) / sum(w for _, w in told)
    scores = _told(means, any(some_unknown for _, some_unknown in measured))
    for number, numbers in enumerate(found):
        scores |= {f"{name}_set{number}": value for name, value in numbers.items()}
    return scores


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
    not the cell as a whole. copy_accuracy: the same for repeating the prompt's last frame. With
    _at_4 and _at_8 behind the names, both of the 4th and the 8th frame, of the first quarter of the
    windows; with _with_actions, of windows whose actions are known, where some are not. All these
    are missing where no window is long enough. Where cells have levels, validation_loss_0,
    validation_accuracy_0 and so on are those of every level. Where the model has an action head,
    validation_action_loss (nats an action) and validation_action_accuracy are those of the actions
    that are known.

    Args:
        dynamics: the model.
        windows: held-out windows.
        seed: of the choice of windows.
        num_windows: how many are looked at.
        batch_windows: how many at a time; changes the memory needed, and sums by their rounding.
    """
    return _told(*_measure(dynamics, windows, seed, num_windows, batch_windows))


def _told(scores: dict[str, float], some_unknown: bool) -> dict[str, float]:
    """Return the numbers that are told: where all actions are known, those of such windows are all.

    Args:
        scores: all that were measured.
        some_unknown: whether of some windows nobody knows the actions.
    """
    if some_unknown:
        return scores
    return {n: value for n, value in scores.items() if not n.endswith(_WITH_ACTIONS)}


@torch.no_grad()
def _measure(
    dynamics: DynamicsModel, windows: WindowSource, seed: int, num_windows: int, batch_windows: int
) -> tuple[dict[str, float], bool]:
    """Return all numbers, and whether of some windows nobody knows the actions."""
    dynamics.eval()
    chosen = windows.batch(0, size=num_windows, seed=seed)
    sums: defaultdict[str, float] = defaultdict(float)
    for start in range(0, num_windows, batch_windows):
        rows = slice(start, start + batch_windows)
        batch = chosen.rows(rows).to(dynamics.device)
        tokens_BfSD = dynamics.tokens(batch.codes_Bthw, batch.slots_BTA)
        logits_BfSV = dynamics.logits(tokens_BfSD, batch.codes_Bthw)
        for level, (logits, part) in _each_level(logits_BfSV, batch).items():
            nats, count = cross_entropy(logits, part)
            sums["nats" + level] += nats.item()
            sums["right" + level] += num_right(logits, part).item()
            sums["codes" + level] += count
        numbers = range(num_windows)[rows]
        num_later = -(-num_windows // _LATER_SHARE)
        for found in (
            _actions(dynamics, tokens_BfSD, batch),
            _free_running(dynamics, batch, numbers, num_later=num_later),
        ):
            for name, number in found.items():
                sums[name] += number
    scores = {}
    for level in [name.removeprefix("nats") for name in sums if name.startswith("nats")]:
        scores["validation_loss" + level] = sums["nats" + level] / sums["codes" + level]
        scores["validation_accuracy" + level] = sums["right" + level] / sums["codes" + level]
    if sums["actions"]:
        scores["validation_action_loss"] = sums["action_nats"] / sums["actions"]
        scores["validation_action_accuracy"] = sums["actions_right"] / sums["actions"]
    for which in ("", _WITH_ACTIONS, *(f"_at_{number}" for number in _LATER_FRAMES)):
        if compared := sums["compared" + which]:
            scores["free_running_accuracy" + which] = sums["free" + which] / compared
            scores["copy_accuracy" + which] = sums["copied" + which] / compared
    return scores, sums["compared"] > sums["compared" + _WITH_ACTIONS]


def _each_level(logits_BfSV: Tensor, batch: WindowBatch) -> dict[str, tuple[Tensor, WindowBatch]]:
    """Return logits and codes of all levels together and, if there are several, of each."""
    every = {"": (logits_BfSV, batch)}
    if batch.codes_Bthw.dim() == 5:
        for level in range(batch.codes_Bthw.shape[-1]):
            codes_Bthw = batch.codes_Bthw[..., level]
            part = replace(batch, codes_Bthw=codes_Bthw)
            every[f"_{level}"] = (logits_BfSV[..., level, :], part)
    return every


def _actions(dynamics: DynamicsModel, tokens_BfSD: Tensor, batch: WindowBatch) -> dict[str, float]:
    """Return nats, number and right ones of the actions that are known, as the head has them."""
    if dynamics.action_head is None:
        return {}
    codes_BtSQ = flatten_codes("codes", batch.codes_Bthw, dynamics.spec.tokenizer.codes)
    slots_BfrA = rearrange(batch.slots_BTA, "B (f r) A -> B f r A", r=dynamics.steps_per_frame)
    logits_BfLX = dynamics.action_head(tokens_BfSD, codes_BtSQ, slots_BfrA)
    nats, count, right = dynamics.action_head.nats(logits_BfLX, slots_BfrA, batch.valid_Bt[:, 1:])
    return {"action_nats": nats.item(), "actions": count.item(), "actions_right": right.item()}


def _free_running(
    dynamics: DynamicsModel, batch: WindowBatch, numbers: range, *, num_later: int
) -> dict[str, int]:
    """Return how many codes of sampled and of copied frames are right, and of how many.

    Args:
        dynamics: the model.
        batch: some of the windows.
        numbers: of these windows among all, which are their seeds.
        num_later: the windows before this one are rolled out to the last of _LATER_FRAMES.
    """
    window_frames = batch.codes_Bthw.shape[1]
    prompt_frames = max(1, window_frames // 2)
    whole_B = batch.valid_Bt[:, : prompt_frames + 1].all(1)
    later_B = torch.tensor([number < num_later for number in numbers], device=whole_B.device)
    last = max(n for n in (1, *_LATER_FRAMES) if n <= window_frames - prompt_frames)
    counts: defaultdict[str, int] = defaultdict(int)
    # Of a window that ends earlier the frames behind its end are made and not judged.
    for rows_B, depth in ((whole_B & later_B, last), (whole_B & ~later_B, 1)):
        if not rows_B.any():
            continue
        codes_Bthw, slots_BTA = batch.codes_Bthw[rows_B], batch.slots_BTA[rows_B]
        generated_Bthw = generate_codes(
            dynamics,
            codes_Bthw[:, :prompt_frames],
            slots_BTA[:, : (prompt_frames + depth - 1) * dynamics.steps_per_frame],
            seeds=[number for number, there in zip(numbers, rows_B.tolist(), strict=True) if there],
            sampling=SamplingConfig(),
        )
        copied_Bhw = codes_Bthw[:, prompt_frames - 1]
        known_B = (slots_BTA[:, 0] != NULL).all(-1)
        for number in (1, *_LATER_FRAMES):
            if number > depth:
                break
            frame = prompt_frames + number - 1
            there_B = batch.valid_Bt[rows_B, frame]
            judged = {f"_at_{number}": there_B}
            if number == 1:
                judged = {"": there_B, _WITH_ACTIONS: there_B & known_B}
            for name, judged_B in judged.items():
                true_Bhw = codes_Bthw[judged_B, frame]
                counts["free" + name] += _num_equal(generated_Bthw[judged_B, frame], true_Bhw)
                counts["copied" + name] += _num_equal(copied_Bhw[judged_B], true_Bhw)
                counts["compared" + name] += true_Bhw.numel()
    return counts


def _num_equal(first: Tensor, second: Tensor) -> int:
    return int((first == second).sum())
