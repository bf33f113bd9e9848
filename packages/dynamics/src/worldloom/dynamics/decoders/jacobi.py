"""Many groups at once, from a guess: raster's codes in fewer forwards.

    Draw, guess_BSQ  ->  codes_BSQ

A forward draws the next groups that are not settled, each as if the guess were right before it. Up
to and including the first group that comes out otherwise than guessed, all that was looked at was
right, so these are raster's codes and settled. What came out behind it is the next guess. Every
forward settles one group at least; the frame before is a good first guess where little moves.

The width, how many groups a forward draws, follows what forwards settle: on a CPU a group more
costs time, on a GPU hardly any. In a batch the world that agrees least decides, since a forward
draws the same cells of all.

Source: Song et al., arXiv:2002.03629; Santilli et al., arXiv:2305.10427, for transformers. Departs:
noise is keyed, so that it is exact at every temperature; the first guess is the frame before.
"""

import torch
from einops import rearrange
from torch import Tensor

from .decoder import Draw

_SLOWNESS = 0.8
"""How much of what earlier forwards settled stays in the mean after one more: about five count."""


class Jacobi:
    """Draws `reach` times as many groups as forwards settled lately."""

    def __init__(self, *, reach: float = 8.0) -> None:
        """Begin.

        Args:
            reach: groups to draw for each that is likely to be settled; infinity draws all there
                are. Measured by benchmarks/generate.py.
        """
        self._reach = reach
        self._settled = 4.0

    def decide(self, draw: Draw, guess_BSQ: Tensor, /) -> Tensor:
        """Return codes_BSQ, those of `Raster`."""
        codes_BSQ = guess_BSQ.clone()
        num_groups = codes_BSQ.shape[1] // draw.group
        done = 0
        while done < num_groups:
            width = int(min(num_groups - done, max(2.0, self._reach * self._settled)))
            cells = slice(done * draw.group, (done + width) * draw.group)
            drawn_BsQ = draw(cells, codes_BSQ)
            settled = _settled(drawn_BsQ, codes_BSQ[:, cells], draw.group)
            codes_BSQ[:, cells] = drawn_BsQ
            done += min(settled, width)
            self._learn(settled, most=num_groups)
        return codes_BSQ

    def _learn(self, settled: int, /, *, most: int) -> None:
        """Take a forward's count into the mean."""
        self._settled = min(most, _SLOWNESS * self._settled + (1 - _SLOWNESS) * settled)


def _settled(drawn_BsQ: Tensor, guess_BsQ: Tensor, group: int) -> int:
    """Return how many groups come first up to and including one that was guessed wrong.

    One more than there are, where none was: had there been more, they would have been settled.
    """
    wrong = rearrange(drawn_BsQ != guess_BsQ, "B (g s) Q -> g (B s Q)", s=group)
    wrong_g = wrong.any(dim=1)
    # The end counts as wrong, so that one look at the device tells all.
    wrong_g = torch.cat([wrong_g, torch.ones_like(wrong_g[:1])])
    return int(wrong_g.to(torch.uint8).argmax()) + 1
