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

_IGNORED = -100


def cross_entropy(logits_BfSV: Tensor, batch: WindowBatch, /) -> tuple[Tensor, int]:
    """Return (cross-entropy in nats, summed; number of codes) of the real frames after the first.

    Args:
        logits_BfSV: of frames 1 .. t-1, any float dtype; the sum is taken in float32.
        batch: the true codes, and which frames are real.
    """
    # Padding is skipped by its label: picking the other rows would copy the logits.
    nats = library_cross_entropy(
        logits_BfSV.flatten(0, -2).float(),
        _targets_BfN(batch).flatten(),
        ignore_index=_IGNORED,
        reduction="sum",
    )
    return nats, num_targets(batch)


def num_right(logits_BfSV: Tensor, batch: WindowBatch, /) -> Tensor:
    """Return how many of the codes that count are the likeliest one, float32."""
    return (logits_BfSV.detach().argmax(-1).flatten(2) == _targets_BfN(batch)).sum().float()


def num_targets(batch: WindowBatch, /) -> int:
    """Return how many codes count: those of the real frames after the first."""
    return int(batch.valid_Bt[:, 1:].sum()) * math.prod(batch.codes_Bthw.shape[2:])


def _targets_BfN(batch: WindowBatch) -> Tensor:
    """Return the N = S * Q codes a frame to predict, with padding as what is ignored."""
    codes_BfN = batch.codes_Bthw[:, 1:].flatten(2)
    return torch.where(batch.valid_Bt[:, 1:, None], codes_BfN, _IGNORED)
