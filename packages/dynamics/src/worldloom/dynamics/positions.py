"""Where a token stands: axial rotary positions over (t, h, w).

    frames_f, space_T  ->  Rotary (cos, sin) of (f * T, K/2)  ->  Rotation  ->  rotate

A share of every head's channel pairs turns with the latent frame, the rest with row and column, or
not at all (`Axes`). Time is the frame's index in the video, the same in training,
in cached sampling and after the window has slid: attention sees differences only. Angles are
computed in float64, or frame 5,000 would be blurred by rounding, and on the CPU, since not every
device has float64.

What has no place on an axis (a meta token in time, an action in space) keeps no part in that axis'
channels. Not turning it would put it at place 0 instead: a query of frame 5,000 would meet it at an
angle that no training showed.

Source: RoFormer (arXiv:2104.09864), axial as in arXiv:2403.13298. Departs: base 100, not 10,000,
because windows are tens of frames long and grids tens of cells wide.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .config import Positions

_BASE = 100.0


@dataclass(frozen=True, slots=True)
class Axes:
    """How the channel pairs of a head are dealt out."""

    time: int
    """Pairs that turn with the latent frame."""
    space: int
    """Pairs that turn with the row, and as many with the column."""
    grid: bool
    """Whether they do; else they are the same everywhere, and stay free for content."""

    @classmethod
    def of(cls, head_dim: int, positions: Positions, /) -> "Axes":
        """Return those of a head of width K = head_dim, which is even."""
        space = head_dim // 2 * 3 // 10
        return cls(time=head_dim // 2 - 2 * space, space=space, grid=positions == "axial")


class Rotary(NamedTuple):
    """Cosines and sines of every token's angles, (L, K/2) or some of these pairs."""

    cos: Tensor
    sin: Tensor

    def rotation(self) -> "Rotation":
        """Return it as `rotate` takes it: made once, used in every layer."""
        own = torch.cat([self.cos, self.cos], dim=-1)
        partner = torch.cat([-self.sin, self.sin], dim=-1)
        return Rotation(own[:, None], partner[:, None])

    def to(self, device: torch.device, /) -> "Rotary":
        """Return it on another device."""
        return Rotary(self.cos.to(device), self.sin.to(device))


class Rotation(NamedTuple):
    """A factor for every channel and for its partner's, (L, 1, K): the same for every head."""

    own: Tensor
    partner: Tensor

    def to(self, device: torch.device, /) -> "Rotation":
        """Return it on another device."""
        return Rotation(self.own.to(device), self.partner.to(device))

    def of(self, tokens: slice, /) -> "Rotation":
        """Return the rotation of some of the tokens."""
        return Rotation(self.own[tokens], self.partner[tokens])

    def packed(self, batch: int, /, *, num_meta: int) -> "Rotation":
        """Return that of the first tokens once, then of the others window after window."""
        own, partner = (
            torch.cat([part[:num_meta], part[num_meta:].repeat(batch, 1, 1)]) for part in self
        )
        return Rotation(own, partner)


def in_time(frames_L: Tensor, axes: Axes, /) -> Rotary:
    """Return the part of the rotation that the latent frame decides; any integers."""
    return _turns(frames_L, axes.time)


def in_space(rows_L: Tensor, columns_L: Tensor, axes: Axes, /) -> Rotary:
    """Return the part of the rotation that row and column decide."""
    turned = 1 if axes.grid else 0
    return beside(_turns(turned * rows_L, axes.space), _turns(turned * columns_L, axes.space))


def nowhere_in_space(num_tokens: int, axes: Axes, /) -> Rotary:
    """Return that part for tokens that belong to a frame and to no cell of it."""
    zeros = torch.zeros(num_tokens, 2 * axes.space)
    return Rotary(zeros if axes.grid else torch.ones_like(zeros), zeros)


def no_place(num_tokens: int, axes: Axes, /) -> Rotary:
    """Return the rotation of tokens without a place, which are equally near to every frame."""
    cos = torch.cat(
        [torch.zeros(num_tokens, axes.time), torch.ones(num_tokens, 2 * axes.space)], dim=-1
    )
    return Rotary(cos, torch.zeros_like(cos))


def every(now_f: Rotary, space_T: Rotary, /) -> Rotary:
    """Return the rotations of the T tokens of each of f frames, frame after frame.

    Args:
        now_f: the frames' part, from `in_time`.
        space_T: the tokens' part, the same in every frame.
    """
    frames, tokens = len(now_f.cos), len(space_T.cos)
    return beside(
        Rotary(*(part.repeat_interleave(tokens, dim=0) for part in now_f)),
        Rotary(*(part.repeat(frames, 1) for part in space_T)),
    )


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
    own, partner = (factors.to(tokens_BLNK.dtype) for factors in rotation)
    partners_BLNK = tokens_BLNK.roll(tokens_BLNK.shape[-1] // 2, dims=-1)
    return torch.addcmul(tokens_BLNK * own, partners_BLNK, partner)


def _turns(places_L: Tensor, pairs: int) -> Rotary:
    """Return `pairs` rotations, by 1 a place down towards 1 / base a place."""
    speeds = _BASE ** (-torch.arange(pairs, dtype=torch.float64) / max(1, pairs))
    angles = places_L.cpu().double()[:, None] * speeds
    return Rotary(angles.cos().float(), angles.sin().float())
