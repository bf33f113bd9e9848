"""One frame of a rollout as a function: the codes so far -> the codes of the cells asked for.

    OpenFrame, seeds_B, SamplingConfig  ->  FrameDraw;   cells, codes_BSQ  ->  codes_BsQ
                                                         codes_BSQ, known_BS  ->  refine

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
        self.passes = sampling.refinements
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
        return self._draw(tokens_BsD, cells, codes_BSQ)[0]

    def refine(
        self, codes_BSQ: Tensor, known_BS: Tensor | None, /, *, boldness: float
    ) -> tuple[Tensor, Tensor]:
        """Return codes_BSQ with those drawn anew that are not known, and how sure each cell is.

        Sureness is the log-probability of a cell's codes before temperature, plus Gumbel noise
        times temperature and `boldness`, keyed as the codes' own; infinite where a cell was known.

        Args:
            codes_BSQ: codes of the frame; of cells that are not known they are not looked at.
            known_BS: True where a cell's code is known; None where none is, and then what the
                cache remembers of the frame is written. The first call must be one of these.
            boldness: how much chance has a say in what is sure, from 0 on.
        """
        model, cells = self._model, slice(0, codes_BSQ.shape[1])
        self.forwards += 1
        rows_BSQ = torch.cat([codes_BSQ, codes_BSQ]) if self._sampling.guided else codes_BSQ
        if known_BS is None:
            tokens_BSD = model.remember(self._there, rows_BSQ)
            if self._keep_tokens:
                self._keep(tokens_BSD[: len(codes_BSQ)], cells)
        else:
            known_RS = torch.cat([known_BS, known_BS]) if self._sampling.guided else known_BS
            tokens_BSD = model.refined_tokens(self._there, rows_BSQ, known_RS)
        drawn_BSQ, log_prob_BS = self._draw(tokens_BSD, cells, codes_BSQ, sure=True)
        boldness *= self._sampling.temperature
        if boldness:
            # A level more than there are: noise of its own for each cell.
            level = self._codes.num_levels
            noise_BS1 = keyed_gumbel(self._seeds_B, self._there.frame, cells, 1, level=level)
            log_prob_BS = log_prob_BS + boldness * noise_BS1[..., 0]
        if known_BS is None:
            return drawn_BSQ, log_prob_BS
        codes_BSQ = torch.where(known_BS[..., None], codes_BSQ, drawn_BSQ)
        return codes_BSQ, log_prob_BS.masked_fill(known_BS, torch.inf)

    def _draw(
        self, tokens_BsD: Tensor, cells: slice, codes_BSQ: Tensor, *, sure: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return codes_BsQ of some cells, level by level; and their log-probability, if wanted."""
        drawn_BsQ = torch.empty_like(codes_BSQ[:, cells])
        log_prob_Bs = torch.zeros(drawn_BsQ.shape[:2], device=drawn_BsQ.device)
        for level in range(self._codes.num_levels):
            logits_BsV = self._logits(tokens_BsD, drawn_BsQ[..., :level])
            noise_BsV = None if self._sampling.temperature == 0 else self._gumbel(cells, level)
            drawn_BsQ[..., level] = sample_codes(logits_BsV, noise_BsV, self._sampling)
            if sure:
                log_prob_BsV = logits_BsV.float().log_softmax(-1)
                log_prob_Bs += log_prob_BsV.gather(-1, drawn_BsQ[..., level, None])[..., 0]
        return drawn_BsQ, log_prob_Bs

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
