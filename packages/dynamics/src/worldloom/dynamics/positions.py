"""Where a token stands: axial rotary positions over (t, h, w).

    frames_L, rows_L, columns_L  ->  Rotary (cos, sin) of (L, K/2)

A share of every head's channel pairs turns with the latent frame, the rest with row and column.
Time is the frame's index in the video, the same in training, in cached sampling and after the
window has slid: attention sees differences only. Angles are computed in float64, or frame 5,000
would be blurred by rounding.

Source: RoFormer (arXiv:2104.09864), axial as in arXiv:2403.13298. Departs: base 100, not 10,000,
because windows are tens of frames long and grids tens of cells wide.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_BASE = 100.0


class Rotary(NamedTuple):
    """Cosines and sines of every token's angles, (L, K/2); meta tokens have angle zero."""

    cos: Tensor
    sin: Tensor


def rotary(frames_L: Tensor, rows_L: Tensor, columns_L: Tensor, /, *, head_dim: int) -> Rotary:
    """Return the rotation of tokens at these places.

    Args:
        frames_L: index of the latent frame in the video, any integer.
        rows_L: row in the grid.
        columns_L: column in the grid.
        head_dim: width K of one head, even.
    """
    pairs = head_dim // 2
    spatial = pairs * 3 // 10
    angles = [
        places_L.double()[:, None] * _frequencies(count, places_L.device)
        for places_L, count in (
            (frames_L, pairs - 2 * spatial),
            (rows_L, spatial),
            (columns_L, spatial),
        )
    ]
    turned = torch.cat(angles, dim=-1)
    return Rotary(turned.cos().float(), turned.sin().float())


def no_rotation(num_tokens: int, /, *, head_dim: int, device: torch.device) -> Rotary:
    """Return the rotation of tokens without a place: none."""
    ones = torch.ones(num_tokens, head_dim // 2, device=device)
    return Rotary(ones, torch.zeros_like(ones))


def join(first: Rotary, second: Rotary, /) -> Rotary:
    """Return the rotations of two stretches of tokens, one after the other."""
    return Rotary(torch.cat([first.cos, second.cos]), torch.cat([first.sin, second.sin]))


def rotate(tokens_BNLK: Tensor, turn: Rotary, /) -> Tensor:
    """Turn every pair of channels (i, i + K/2) by its token's angle."""
    first, second = tokens_BNLK.chunk(2, dim=-1)
    cos, sin = turn.cos.to(tokens_BNLK.dtype), turn.sin.to(tokens_BNLK.dtype)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def _frequencies(count: int, device: torch.device) -> Tensor:
    """Return `count` angles per step, from 1 down towards 1 / base, float64."""
    return _BASE ** (-torch.arange(count, device=device, dtype=torch.float64) / max(1, count))
