"""Codes -> what every token is fed, where it stands and what it sees.

    codes_Bthw, or codes_BthwQ      <->  codes_BtSQ, Q = 1 where a cell has one code
    codes_BtSQ                       ->  codes of the same cell one frame before; codes beside
    an order                         ->  own_TT: what the tokens of a frame see of each other
    the same, frames, a context      ->  (L, M + L): what all tokens see; or its factors

There is one token per cell and latent frame, and it predicts that cell's code: all Q levels of it
(level_head.py). Its input never holds that code; it holds

    the same cell's code one latent frame before         (every order; a choice for raster and row)
    the code before it (raster) or above it (row)        the first cells, of the last cells of the
                                                         frame before; nothing for other orders
    the actions that lead to the frame                   r of them, A slots each; or these are r
                                                         tokens of their own in front of the cells

which is next-token prediction with the shift written out: a cell's own place is at the token that
predicts it, so a frame whose cells are decided together needs no placeholder tokens. Frame 0 is
given; with orders `frame` and `masked` it needs no tokens of its own: those of frame 1 carry it.

Order `masked` is order `frame`, and then refines: its cells are decided again by tokens that hold
their own code, too, or a mask in its place, and predict what is masked. Other frames never see
these: what they see of it are its tokens with all cells masked, the same however it was refined, so
a rollout remembers what training did. In a window the refining tokens lie behind all others, frame
by frame (`twice`).

Source: masks as in MaskGIT, arXiv:2202.04200; windows with tokens of two kinds as in block
diffusion, arXiv:2503.09573, where it is the unmasked ones that later frames see.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad
from worldloom.common import CodeSpec, bind_shape

from .config import Order


@dataclass(frozen=True, slots=True)
class Grid:
    """The tokens of a latent frame: its actions, if they have tokens, and its cells, in order."""

    height: int
    width: int
    order: Order
    lead: int = 0
    """Action tokens in front of the cells: r, or 0 where actions are added to the cells."""

    @property
    def cells(self) -> int:
        """Cells per latent frame, S."""
        return self.height * self.width

    @property
    def tokens(self) -> int:
        """Tokens per latent frame, T."""
        return self.lead + self.cells

    @property
    def first_frame(self) -> int:
        """The first latent frame that has tokens of its own."""
        return 0 if self.beside else 1

    @property
    def group(self) -> int:
        """Cells that are decided together."""
        return {"raster": 1, "row": self.width}.get(self.order, self.cells)

    @property
    def beside(self) -> int:
        """How many cells back the code lies that a token is fed beside; 0 for none."""
        return {"raster": 1, "row": self.width}.get(self.order, 0)

    @property
    def refines(self) -> bool:
        """Whether cells may be decided again, given some of the others."""
        return self.order == "masked"

    def groups(self) -> list[tuple[int, int]]:
        """Return the [start, stop) of the cells of every forward, in order."""
        return [(start, start + self.group) for start in range(0, self.cells, self.group)]

    def tokens_of(self, cells: slice, /) -> slice:
        """Return the tokens that a forward of these cells runs: the first brings the actions."""
        return slice(self.lead + cells.start if cells.start else 0, self.lead + cells.stop)

    def places(self) -> tuple[Tensor, Tensor]:
        """Return rows_S and columns_S of the cells."""
        cells_S = torch.arange(self.cells)
        return cells_S // self.width, cells_S % self.width

    def own_sight(self) -> Tensor:
        """Return own_TT, True where a token may see another of its own frame.

        Actions see actions; a cell sees them and the groups up to its own.
        """
        lead_A = torch.full((self.lead,), -1)
        group_T = torch.cat([lead_A, torch.arange(self.cells) // self.group])
        return group_T[None, :] <= group_T[:, None]


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


def earlier_frames(*, frames: int, context_frames: int, twice: bool) -> Tensor:
    """Return (f, f): whether the tokens of a row's frame see those of a column's, an earlier one.

    They see `context_frames` frames, their own included. If a window has tokens `twice`, (2 f,
    2 f): those behind see the same frames as those in front, and nobody sees them.
    """
    count_f = torch.arange(frames)
    behind_ff = count_f[:, None] - count_f[None, :]
    earlier_ff = (behind_ff > 0) & (behind_ff < context_frames)
    return pad(earlier_ff.repeat(2, 1), (0, frames)) if twice else earlier_ff


def sight_mask(grid: Grid, earlier_ff: Tensor, /, *, num_meta: int) -> Tensor:
    """Return (L, M + L): what tokens see, True where that of a row sees a column's, meta first.

    All see the meta tokens, the frames before their own that `earlier_frames` tells, and of their
    own frame what `Grid.own_sight` says.
    """
    tokens = grid.tokens
    among = earlier_ff.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)
    for start in range(0, len(among), tokens):
        among[start : start + tokens, start : start + tokens] = grid.own_sight()
    return torch.cat([torch.ones(len(among), num_meta, dtype=torch.bool), among], dim=1)


def space_mask(grid: Grid, /, *, frames: int, num_meta: int) -> Tensor:
    """Return (f, 1, T, M + T): what tokens see within frames, meta tokens first.

    Where cells are decided one after the other, (f, 1, T, M + 2 T): the frame before is seen too.
    """
    seen = grid.own_sight().expand(frames, 1, -1, -1)
    if grid.beside:
        before = torch.ones_like(seen)
        before[0] = False
        seen = torch.cat([before, seen], dim=-1)
    sinks = torch.ones(frames, 1, grid.tokens, num_meta, dtype=torch.bool)
    return torch.cat([sinks, seen], dim=-1)


def time_mask(earlier_ff: Tensor, /, *, num_meta: int) -> Tensor:
    """Return (f, M + f): what a token sees of itself in its own and other frames, meta first."""
    seen = earlier_ff | torch.eye(len(earlier_ff), dtype=torch.bool)
    return torch.cat([torch.ones(len(seen), num_meta, dtype=torch.bool), seen], dim=-1)
