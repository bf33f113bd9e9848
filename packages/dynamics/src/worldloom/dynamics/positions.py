"""Where a token stands: axial rotary positions over (t, h, w).

    frames_L, rows_L, columns_L  ->  Rotary (cos, sin) of (L, K/2)  ->  Rotation  ->  rotate

A share of every head's channel pairs turns with the latent frame, the rest with row and column.
Time is the frame's index in the video, the same in training, in cached sampling and after the
window has slid: attention sees differences only. Angles are computed in float64, or frame 5,000
would be blurred by rounding, and on the CPU, since not every device has float64.

Source: RoFormer (arXiv:2104.09864), axial as in arXiv:2403.13298. Departs: base 100, not 10,000,
because windows are tens of frames long and grids tens of cells wide.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_BASE = 100.0


class Rotary(NamedTuple):
    """Cosines and sines of every token's angles, (L, K/2)."""

    cos: Tensor
    sin: Tensor

    def rotation(self) -> "Rotation":
        """Return it as `rotate` takes it: made once, used in every layer."""
        return Rotation(
            torch.cat([self.cos, self.cos], dim=-1), torch.cat([-self.sin, self.sin], dim=-1)
        )

    def to(self, device: torch.device, /) -> "Rotary":
        """Return it on another device."""
        return Rotary(self.cos.to(device), self.sin.to(device))


class Rotation(NamedTuple):
    """A factor for every channel and for its partner's, (L, K)."""

    own: Tensor
    partner: Tensor

    def to(self, device: torch.device, /) -> "Rotation":
        """Return it on another device."""
        return Rotation(self.own.to(device), self.partner.to(device))

    def of(self, tokens: slice, /) -> "Rotation":
        """Return the rotation of some of the tokens."""
        return Rotation(self.own[tokens], self.partner[tokens])


def rotary(frames_L: Tensor, rows_L: Tensor, columns_L: Tensor, /, *, head_dim: int) -> Rotary:
    """Return the rotation of tokens at these places.

    Args:
        frames_L: index of the latent frame in the video, any integer.
        rows_L: row in the grid.
        columns_L: column in the grid.
        head_dim: width K of one head, even.
    """
    return beside(
        in_time(frames_L, head_dim=head_dim), in_space(rows_L, columns_L, head_dim=head_dim)
    )


def in_time(frames_L: Tensor, /, *, head_dim: int) -> Rotary:
    """Return the part of the rotation that the latent frame decides."""
    return _turns(frames_L, head_dim // 2 - 2 * _pairs_per_axis(head_dim))


def in_space(rows_L: Tensor, columns_L: Tensor, /, *, head_dim: int) -> Rotary:
    """Return the part of the rotation that row and column decide."""
    pairs = _pairs_per_axis(head_dim)
    return beside(_turns(rows_L, pairs), _turns(columns_L, pairs))


def no_place(num_tokens: int, /, *, head_dim: int) -> Rotary:
    """Return the rotation of tokens without a place, which are equally near to every frame.

    Not turning them would put them at frame 0: a query of frame 5,000 would meet them at an angle
    that no training showed. So they keep no part in the channels that turn with time.
    """
    spatial = 2 * _pairs_per_axis(head_dim)
    cos = torch.cat(
        [torch.zeros(num_tokens, head_dim // 2 - spatial), torch.ones(num_tokens, spatial)], dim=-1
    )
    return Rotary(cos, torch.zeros_like(cos))


def join(first: Rotary, second: Rotary, /) -> Rotary:
    """Return the rotations of two stretches of tokens, one after the other."""
    return Rotary(torch.cat([first.cos, second.cos]), torch.cat([first.sin, second.sin]))


def beside(first: Rotary, second: Rotary, /) -> Rotary:
    """Return the rotations of two sets of channel pairs, side by side."""
    return Rotary(
        torch.cat([first.cos, second.cos], dim=-1), torch.cat([first.sin, second.sin], dim=-1)
    )


def rotate(tokens_BLNK: Tensor, rotation: Rotation, /) -> Tensor:
    """Turn every pair of channels (i, i + K/2) by its token's angle."""
    own, partner = (factors[:, None].to(tokens_BLNK.dtype) for factors in rotation)
    partners_BLNK = tokens_BLNK.roll(tokens_BLNK.shape[-1] // 2, dims=-1)
    return torch.addcmul(tokens_BLNK * own, partners_BLNK, partner)


def _pairs_per_axis(head_dim: int) -> int:
    """Return how many channel pairs turn with the row, and as many with the column."""
    return head_dim // 2 * 3 // 10


def _turns(places_L: Tensor, pairs: int) -> Rotary:
    """Return `pairs` rotations, by 1 a place down towards 1 / base a place."""
    speeds = _BASE ** (-torch.arange(pairs, dtype=torch.float64) / max(1, pairs))
    angles = places_L.cpu().double()[:, None] * speeds
    return Rotary(angles.cos().float(), angles.sin().float())
