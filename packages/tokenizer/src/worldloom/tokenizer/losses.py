"""What the tokenizer is trained to keep. Each a pure function.

true and reconstructed video_BCTHW, weight_B1THW  ->  a scalar
"""

import torch
from torch import Tensor

MOVING = 0.2
"""In [-1, 1]: a tenth of the range. A pixel this far from its clip's median counts as moving."""


def motion_weight(video_BCTHW: Tensor, /, *, extra: float) -> Tensor:
    """Return weight_B1THW with mean 1: pixels that differ from their clip's median weigh more.

    In an unweighted mean a ball of two pixels is worth less than the noise of the background, and a
    tokenizer that erases it scores better (measured in docs/log.md); 1 + extra on the pixels of
    moving things keeps them.
    """
    median = video_BCTHW.median(dim=2, keepdim=True).values
    moving = ((video_BCTHW - median).abs() > MOVING).any(dim=1, keepdim=True)
    weight = 1 + extra * moving.to(video_BCTHW.dtype)
    return weight / weight.mean()


def reconstruction_loss(true_BCTHW: Tensor, recon_BCTHW: Tensor, weight_B1THW: Tensor, /) -> Tensor:
    """Return the weighted mean of 0.5 |error| + error^2."""
    error = recon_BCTHW.float() - true_BCTHW
    return (weight_B1THW * (0.5 * error.abs() + error.square())).mean()


def usage(codes: Tensor, vocab_size: int, /) -> tuple[float, float]:
    """Return (fraction of the codes that occur, perplexity of their distribution)."""
    counts = torch.bincount(codes.flatten(), minlength=vocab_size).float()
    probs = counts / counts.sum()
    perplexity = torch.exp(-(probs * probs.clamp_min(1e-12).log()).sum())
    return float((counts > 0).float().mean()), float(perplexity)
