"""All cells at once, and then again those that were least sure: few passes, for order masked.

    Refine  ->  codes_BSQ

The first pass draws every cell from the frames before alone, as order frame does. Each further one
knows the cells that were surest so far and draws the others anew, so that they may agree; what is
known stays. After pass i of n, floor(S cos(pi i / 2n)) of S cells are unknown, and one fewer than
before at least: few are settled at first, when little is known, many at last. Approximate: cells
that are drawn in one pass do not look at each other, so n passes draw from another distribution
than one cell after the other would, and one pass draws what order frame does.

A frame is remembered as the first pass saw it, with all cells masked, as training has it.

Source: MaskGIT (arXiv:2202.04200), section 3.2. Departs: noise is keyed, by cell and level and not
by pass, so that a frame depends on its seed and on nothing else; at temperature 0 there is none.
"""

import math
from typing import Protocol, cast

import torch
from torch import Tensor

from .decoder import Draw


class Refine(Protocol):
    """What is drawn with: drawing.py has it for a frame of a rollout."""

    passes: int
    """Forwards to make for the frame; no more are made than there are cells."""

    def refine(
        self, codes_BSQ: Tensor, known_BS: Tensor | None, /, *, boldness: float
    ) -> tuple[Tensor, Tensor]:
        """Return codes_BSQ with those drawn anew that are not known, and sureness_BS."""


class MaskGIT:
    """Refines a frame in as many passes as the draw asks for."""

    def decide(self, draw: Draw, guess_BSQ: Tensor, /) -> Tensor:
        """Return codes_BSQ; the guess is not looked at."""
        refining = cast(Refine, draw)  # open_decoder gives this decoder to models that refine
        codes_BSQ, known_BS = torch.zeros_like(guess_BSQ), None
        counts = known_after(refining.passes, guess_BSQ.shape[1])
        for number, count in enumerate(counts, 1):
            codes_BSQ, sureness_BS = refining.refine(
                codes_BSQ, known_BS, boldness=1 - number / len(counts)
            )
            # Stable, so that cells that are equally sure are known in their order.
            surest_Bs = sureness_BS.argsort(dim=-1, descending=True, stable=True)[:, :count]
            known_BS = torch.zeros_like(sureness_BS, dtype=torch.bool).scatter(1, surest_Bs, True)
        return codes_BSQ


def known_after(passes: int, cells: int, /) -> list[int]:
    """Return how many cells are known after every pass: more each time, and all at the end."""
    counts: list[int] = []
    for number in range(1, min(passes, cells) + 1):
        unknown = math.floor(cells * math.cos(math.pi / 2 * number / passes))
        known = max(cells - unknown, counts[-1] + 1 if counts else 1)
        counts.append(min(known, cells))
    return counts
