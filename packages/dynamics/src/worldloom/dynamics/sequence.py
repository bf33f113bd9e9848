"""Codes -> what every token is fed, where it stands and what it sees.

    codes_Bthw, or codes_BthwQ      <->  codes_BtSQ, Q = 1 where a cell has one code
    codes_BtSQ                       ->  codes of the same cell one frame before; codes beside
    frames, cells                    ->  frames_L, rows_L, columns_L: where the tokens stand
    the same, an order, a context    ->  mask_LL: what they see

There is one token per cell and latent frame, and it predicts that cell's code: all Q levels of it
(level_head.py). Its input never holds that code; it holds

    the same cell's code one latent frame before        (every order)
    the code before it (raster) or above it (row)        nothing for `frame`; the first cells, of
                                                         the last cells of the frame before
    the actions that lead to the frame                   r of them, A slots each

which is next-token prediction with the shift written out: a cell's own place is at the token that
predicts it, so a frame whose cells are decided together needs no placeholder tokens. Frame 0 is
given; with order `frame` it needs no tokens of its own, as the tokens of frame 1 carry it.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from worldloom.common import CodeSpec, bind_shape

from .config import Order


@dataclass(frozen=True, slots=True)
class Grid:
    """The cells of a latent frame, and in which order they are decided."""

    height: int
    width: int
    order: Order

    @property
    def cells(self) -> int:
        """Cells per latent frame, S."""
        return self.height * self.width

    @property
    def first_frame(self) -> int:
        """The first latent frame that has tokens of its own."""
        return 1 if self.order == "frame" else 0

    @property
    def group(self) -> int:
        """Cells that are decided together."""
        return {"raster": 1, "row": self.width, "frame": self.cells}[self.order]

    @property
    def beside(self) -> int:
        """How many cells back the code lies that a token is fed beside; 0 for none."""
        return {"raster": 1, "row": self.width, "frame": 0}[self.order]

    def groups(self) -> list[tuple[int, int]]:
        """Return the [start, stop) of the cells of every forward, in order."""
        return [(start, start + self.group) for start in range(0, self.cells, self.group)]

    def places(
        self, first: int, last: int, start: int = 0, stop: int | None = None, /
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (frames_L, rows_L, columns_L) of cells [start, stop) of frames [first, last)."""
        cells = torch.arange(start, self.cells if stop is None else stop)
        frames_L = torch.arange(first, last).repeat_interleave(len(cells))
        cells_L = cells.repeat(last - first)
        return frames_L, cells_L // self.width, cells_L % self.width


def flatten_codes(name: str, codes_Bthw: Tensor, spec: CodeSpec, /) -> Tensor:
    """Return codes_BtSQ; `name` names the codes in errors.

    Args:
        name: what they are to the caller.
        codes_Bthw: (B, t, h, w), or (B, t, h, w, Q) where the spec has levels.
        spec: their grid and levels.

    Raises:
        ShapeError: if grid or levels are not the spec's.
    """
    levels = spec.num_levels > 1
    bind_shape(
        name, codes_Bthw, "B t h w Q" if levels else "B t h w",
        h=spec.grid_height, w=spec.grid_width, Q=spec.num_levels,
    )  # fmt: skip
    return rearrange(codes_Bthw, "B t h w Q -> B t (h w) Q" if levels else "B t h w -> B t (h w) 1")


def unflatten_codes(codes_BSQ: Tensor, spec: CodeSpec, /) -> Tensor:
    """Return codes_Bhw of latent frames, or codes_BhwQ where the spec has levels."""
    pattern = "B (h w) Q -> B h w Q" if spec.num_levels > 1 else "B (h w) 1 -> B h w"
    return rearrange(codes_BSQ, pattern, h=spec.grid_height)


def shift_beside(codes_BtSQ: Tensor, before_BtSQ: Tensor, grid: Grid, /) -> Tensor:
    """Return, for every cell, the codes that it is fed from its place in the order.

    Cell c gets the codes of cell c - grid.beside. The first cells get those of the last cells of
    the frame before: no other token that they see is fed these.

    Args:
        codes_BtSQ: codes of the frames, with any axes in front of the cells.
        before_BtSQ: codes of the frame before each, from `shift_before`.
        grid: with an order in which cells are fed codes of their own frame.
    """
    last, first = before_BtSQ[..., -grid.beside :, :], codes_BtSQ[..., : -grid.beside, :]
    return torch.cat([last, first], dim=-2)


def shift_before(codes_BtSQ: Tensor, /, *, pad: int) -> Tensor:
    """Return the codes of the same cell one latent frame before; `pad` for the first frame."""
    return torch.cat([torch.full_like(codes_BtSQ[:, :1], pad), codes_BtSQ[:, :-1]], dim=1)


def sight_mask(
    frames_L: Tensor, cells_L: Tensor, /, *, grid: Grid, context_frames: int, num_meta: int
) -> Tensor:
    """Return mask_LL, True where the token of a row may see that of a column, meta tokens first.

    Meta tokens see each other; every token sees them, the frames before its own up to
    `context_frames` in all, and of its own frame the groups up to its own.
    """
    group_L = cells_L // grid.group
    behind = frames_L[:, None] - frames_L[None, :]
    earlier = (behind > 0) & (behind < context_frames)
    beside = (behind == 0) & (group_L[None, :] <= group_L[:, None])
    length = num_meta + len(frames_L)
    mask = torch.zeros(length, length, dtype=torch.bool)
    mask[:, :num_meta] = True
    mask[num_meta:, num_meta:] = earlier | beside
    return mask
