"""One frame of a rollout as a function: the codes so far -> the codes of the cells asked for.

    OpenFrame, seeds_B, SamplingConfig  ->  FrameDraw;   cells, codes_BSQ  ->  codes_BsQ

Each call is one cached forward: of B rows, or with guidance of 2 B, the worlds under their actions
and then the same worlds under none, which go through every layer together.
"""

import torch
from torch import Tensor

from ..guidance import guide
from ..model import DynamicsModel, OpenFrame
from ..sampling import keyed_gumbel, sample_codes
from ..sampling_config import SamplingConfig

_MOST_NOISE = 1 << 23
"""Numbers up to which a frame's noise is made at once, 32 MiB: one call takes less than many."""


class FrameDraw:
    """Draws codes of a frame's cells."""

    def __init__(
        self,
        model: DynamicsModel,
        there: OpenFrame,
        sampling: SamplingConfig,
        seeds_B: Tensor,
        /,
        *,
        keep_tokens: bool,
    ) -> None:
        """Begin a frame.

        Args:
            model: what predicts.
            there: its open frame, of 2 B rows if `sampling` is guided.
            sampling: how codes are drawn.
            seeds_B: one a world.
            keep_tokens: whether `tokens_BSD` is wanted.
        """
        self.group = model.grid.group
        self.forwards = 0
        """How many there were."""
        self.tokens_BSD: Tensor | None = None
        """The cells' tokens under their actions, as far as they were asked for."""
        self._model = model
        self._there = there
        self._sampling = sampling
        self._seeds_B = seeds_B
        self._keep_tokens = keep_tokens
        self._noise: dict[int, Tensor] = {}
        self._codes = model.spec.tokenizer.codes
        numbers = len(seeds_B) * model.grid.cells * self._codes.vocab_size * self._codes.num_levels
        self._at_once = numbers <= _MOST_NOISE

    def __call__(self, cells: slice, codes_BSQ: Tensor, /) -> Tensor:
        """Return codes_BsQ of some cells, given the codes before them."""
        self.forwards += 1
        rows_BSQ = torch.cat([codes_BSQ, codes_BSQ]) if self._sampling.guided else codes_BSQ
        tokens_BsD = self._model.cached_tokens(self._there, cells, rows_BSQ)
        if self._keep_tokens:
            self._keep(tokens_BsD[: len(codes_BSQ)], cells)
        drawn_BsQ = torch.empty_like(codes_BSQ[:, cells])
        for level in range(self._codes.num_levels):
            logits_BsV = self._logits(tokens_BsD, drawn_BsQ[..., :level])
            noise_BsV = None if self._sampling.temperature == 0 else self._gumbel(cells, level)
            drawn_BsQ[..., level] = sample_codes(logits_BsV, noise_BsV, self._sampling)
        return drawn_BsQ

    def _logits(self, tokens_BsD: Tensor, below_Bsq: Tensor) -> Tensor:
        """Return logits_BsV of a level given the codes below it, guided if so asked."""
        if not self._sampling.guided:
            return self._model.level_logits(tokens_BsD, below_Bsq)
        both = self._model.level_logits(tokens_BsD, torch.cat([below_Bsq, below_Bsq]))
        given_BsV, free_BsV = both.chunk(2)
        return guide(
            given_BsV,
            free_BsV,
            scale=self._sampling.guidance_scale,
            parallel_keep_frac=self._sampling.parallel_keep_frac,
        )

    def _gumbel(self, cells: slice, level: int) -> Tensor:
        """Return noise_BsV of some cells' level."""
        frame, vocab_size = self._there.frame, self._codes.vocab_size
        if not self._at_once:
            return keyed_gumbel(self._seeds_B, frame, cells, vocab_size, level=level)
        if level not in self._noise:
            whole = slice(0, self._model.grid.cells)
            self._noise[level] = keyed_gumbel(self._seeds_B, frame, whole, vocab_size, level=level)
        return self._noise[level][:, cells]

    def _keep(self, tokens_BsD: Tensor, cells: slice) -> None:
        """Keep cells' tokens; those of a wrong guess are overwritten when it is put right."""
        if self.tokens_BSD is None:
            shape = (len(tokens_BsD), self._model.grid.cells, tokens_BsD.shape[-1])
            self.tokens_BSD = tokens_BsD.new_zeros(shape)
        self.tokens_BSD[:, cells] = tokens_BsD
