"""Logits and true codes -> cross-entropy. Pure.

    logits_BfSV, WindowBatch  ->  nats, summed over the codes that count, and how many count

Where cells have levels, logits are logits_BfSQV and a cell counts as Q codes, each by itself; their
mean is the mean over the levels. Frames behind the end of a short episode are padding: never a
label. Sums, not means, so that batches cut in two and processes side by side add up to the whole.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy as library_cross_entropy

from .windows import WindowBatch

IGNORED = -100
"""What is no label, in the place of a code."""


def cross_entropy(logits_BfSV: Tensor, batch: WindowBatch, /) -> tuple[Tensor, int]:
    """Return (cross-entropy in nats, summed; number of codes) of the real frames after the first.

    Args:
        logits_BfSV: of frames 1 .. t-1, any float dtype; the sum is taken in float32.
        batch: the true codes, and which frames are real.
    """
    return _summed_nats(logits_BfSV, batch), num_targets(batch)


def code_losses(
    logits_BfSV: Tensor, batch: WindowBatch, /, *, squares: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (cross-entropy in nats, squared log-denominators, codes right), each summed, float32.

    Args:
        logits_BfSV: of frames 1 .. t-1, any float dtype; sums are taken in float32.
        batch: the true codes, and which frames are real.
        squares: whether the squares are wanted; else they are 0.
    """
    # One copy for all: the likeliest are found in float32 four times as fast as in bf16 on a CPU.
    logits_BfSV = logits_BfSV.float()
    right = num_right(logits_BfSV, batch)
    if not squares:
        nats = _summed_nats(logits_BfSV, batch)  # and no count, for which a GPU would have to wait
        return nats, torch.zeros_like(nats), right
    targets_L = _targets_BfN(batch).flatten()
    logits_LV = logits_BfSV.flatten(0, -2).float()
    nats_L = library_cross_entropy(logits_LV, targets_L, ignore_index=IGNORED, reduction="none")
    # log-denominator = nats + true logit: one softmax serves both.
    true_L = logits_LV.gather(1, targets_L.clamp_min(0)[:, None])[:, 0]
    log_denominators_L = torch.where(targets_L == IGNORED, 0, nats_L + true_L)
    return nats_L.sum(), log_denominators_L.square().sum(), right


def num_right(logits_BfSV: Tensor, batch: WindowBatch, /) -> Tensor:
    """Return how many of the codes that count are the likeliest one, float32."""
    return (logits_BfSV.detach().argmax(-1).flatten(2) == _targets_BfN(batch)).sum().float()


def num_targets(batch: WindowBatch, /) -> int:
    """Return how many codes count: those of the real frames after the first."""
    return int(batch.valid_Bt[:, 1:].sum()) * math.prod(batch.codes_Bthw.shape[2:])


def _summed_nats(logits_BfSV: Tensor, batch: WindowBatch) -> Tensor:
    """Return the cross-entropy of the codes that count, summed."""
    # Padding is skipped by its label: picking the other rows would copy the logits.
    return library_cross_entropy(
        logits_BfSV.flatten(0, -2).float(),
        _targets_BfN(batch).flatten(),
        ignore_index=IGNORED,
        reduction="sum",
    )


def _targets_BfN(batch: WindowBatch) -> Tensor:
    """Return the N = S * Q codes a frame to predict, with padding as what is ignored."""
    codes_BfN = batch.codes_Bthw[:, 1:].flatten(2)
    return torch.where(batch.valid_Bt[:, 1:, None], codes_BfN, IGNORED)
