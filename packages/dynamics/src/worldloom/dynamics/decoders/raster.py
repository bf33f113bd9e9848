"""Group by group, in the model's order: the reference, and as many forwards as there are groups.

    Draw  ->  codes_BSQ

A group is a cell with order raster, a row with row, the frame with frame.
"""

import torch
from torch import Tensor

from .decoder import Draw


class Raster:
    """Asks for every group once, when all before it is decided."""

    def decide(self, draw: Draw, guess_BSQ: Tensor, /) -> Tensor:
        """Return codes_BSQ; the guess is not looked at."""
        codes_BSQ = torch.zeros_like(guess_BSQ)
        for start in range(0, codes_BSQ.shape[1], draw.group):
            cells = slice(start, start + draw.group)
            codes_BSQ[:, cells] = draw(cells, codes_BSQ)
        return codes_BSQ
