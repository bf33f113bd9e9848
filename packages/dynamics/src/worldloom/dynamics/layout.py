"""Sizes of a grid and a context -> where the tokens of a forward stand and what they see.

    latent frames, a batch          ->  window    ->  Rotation, Sight; those of the last are kept
    the same, twice                 ->  window    ->  the same of tokens that refine frames, besides
    a latent frame before a cache   ->  frame     ->  Rotation, mask_TM
    some of its tokens              ->  in_frame  ->  Sight

What positions.py, sequence.py and sight.py offer, chosen by the config; tensors only, no weights.
"""

import torch
from torch import Tensor, nn

from .config import DynamicsConfig
from .kv_cache import KVCache
from .positions import (
    Axes,
    Rotary,
    Rotation,
    every,
    in_space,
    in_time,
    join,
    no_place,
    nowhere_in_space,
)
from .sequence import Grid, earlier_frames, sight_mask, space_mask, time_mask
from .sight import FactorisedFrameCache, FactorisedWindow, FrameCache, Sight, Window, blocks_of


class Layout(nn.Module):
    """A module for the sake of its constants, which move with the model from device to device."""

    def __init__(self, config: DynamicsConfig, grid: Grid, /) -> None:
        super().__init__()
        self.grid = grid
        self.num_meta = config.num_meta_tokens
        self.context_frames = config.context_frames
        self.factorised = config.attention == "factorised"
        self.axes = Axes.of(config.dim // config.num_heads, config.positions)
        # What of a frame's rotation and mask is the same in every frame.
        space_T, own_TT = self._space_rotary(), grid.own_sight()
        self.register_buffer("space_cos", space_T.cos, persistent=False)
        self.register_buffer("space_sin", space_T.sin, persistent=False)
        self.register_buffer("own_TT", own_TT, persistent=False)
        self.space_cos: Tensor
        self.space_sin: Tensor
        self.own_TT: Tensor
        self._sees_whole_frame = bool(own_TT.all())
        self._kept: tuple[tuple[int, bool, torch.device], tuple[Rotation, Sight]] | None = None
        self._kept_turns: dict[int, Rotation] = {}

    @property
    def device(self) -> torch.device:
        """Where the constants are."""
        return self.own_TT.device

    def window(self, frames: int, batch: int, /, *, twice: bool = False) -> tuple[Rotation, Sight]:
        """Return rotation and sight of the meta tokens and a batch of windows, packed.

        Args:
            frames: latent frames of a window.
            batch: how many windows.
            twice: whether each has tokens that refine its frames behind those that do not.
        """
        key = (frames, twice, self.device)
        # Made while generating, they may be needed for training: not as inference tensors.
        with torch.inference_mode(mode=False):
            if self._kept is None or self._kept[0] != key:
                self._kept = (key, self._make_window(frames, twice))
                self._kept_turns = {}
            turn, sight = self._kept[1]
            if batch not in self._kept_turns:
                # A batch is cut into parts of one size, and perhaps a smaller one.
                self._kept_turns = dict([*self._kept_turns.items()][-1:])
                self._kept_turns[batch] = turn.packed(batch, num_meta=self.num_meta)
        return self._kept_turns[batch], sight

    def meta(self) -> Rotation:
        """Return the rotation of the meta tokens alone."""
        return no_place(self.num_meta, self.axes).rotation().to(self.device)

    def frame(self, frame: int, cache: KVCache, /) -> tuple[Rotation, Tensor | None]:
        """Return a frame's rotation, and which of the visible keys its tokens may see.

        0 where they may, -inf where not: torch would make this of booleans in every layer. No mask
        where they may see all, or where layers take turns.
        """
        now = in_time(torch.tensor([frame]), self.axes).to(self.device)
        turn = every(now, Rotary(self.space_cos, self.space_sin)).rotation()
        if self.factorised or self._sees_whole_frame:
            return turn, None
        # What lies in the frame's place behind the cells decided so far is left over from the
        # frame that slid out.
        mask_TM = cache.keys.new_zeros(self.grid.tokens, cache.visible(frame))
        own_TT = mask_TM[:, cache.places(frame, 0, self.grid.tokens)]
        own_TT.masked_fill_(~self.own_TT, -torch.inf)
        return turn, mask_TM

    def in_frame(
        self, frame: int, span: slice, mask_TM: Tensor | None, cache: KVCache, /
    ) -> FrameCache | FactorisedFrameCache:
        """Return what tokens [span) of a frame see, before a cache; `mask_TM` is from `frame`."""
        if self.factorised:
            return FactorisedFrameCache(
                cache, frame, span.start, span.stop,
                own_LT=self.own_TT[span], frame_before=self.grid.beside > 0,
            )  # fmt: skip
        mask_LM = None if mask_TM is None else mask_TM[span]
        return FrameCache(cache, frame, span.start, span.stop, mask_LM)

    def _make_window(self, frames: int, twice: bool) -> tuple[Rotation, Sight]:
        frames_f = torch.arange(self.grid.first_frame, frames)
        earlier_ff = earlier_frames(
            frames=len(frames_f), context_frames=self.context_frames, twice=twice
        )
        now_f = in_time(frames_f.repeat(2) if twice else frames_f, self.axes)
        turn = join(no_place(self.num_meta, self.axes), every(now_f, self._space_rotary()))
        turn_there = turn.rotation().to(self.device)
        if self.factorised:
            within = space_mask(self.grid, frames=len(earlier_ff), num_meta=self.num_meta)
            along = time_mask(earlier_ff, num_meta=self.num_meta)
            masks = (within.to(self.device), along.to(self.device))
            return turn_there, FactorisedWindow(self.num_meta, *masks)
        mask_LM = sight_mask(self.grid, earlier_ff, num_meta=self.num_meta)
        blocks = blocks_of(mask_LM.to(self.device), num_meta=self.num_meta)
        return turn_there, Window(self.num_meta, len(mask_LM), blocks)

    def _space_rotary(self) -> Rotary:
        """Return the part of the rotation of a frame's tokens that rows and columns decide."""
        return join(
            nowhere_in_space(self.grid.lead, self.axes), in_space(*self.grid.places(), self.axes)
        )
