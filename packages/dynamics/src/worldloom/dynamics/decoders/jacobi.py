"""Many groups at once, from a guess: raster's codes in fewer forwards.

    Draw, guess_BSQ  ->  codes_BSQ

A forward draws the next groups that are not settled, each as if the guess were right before it. Up
to and including the first group that comes out otherwise than guessed, all that was looked at was
right, so these are raster's codes and settled. What came out behind it is the next guess. Every
forward settles one group at least; the frame before is a good first guess where little moves.

Where the whole picture moves, that guess is wrong everywhere, and what comes out behind the first
wrong group often is, too: a cell follows the cells beside it, which were wrong. So where a forward
settles hardly anything, the last codes that are settled are looked for elsewhere in the frame
before, and what came behind them there is the guess.

The width, how many groups a forward draws, follows what forwards settle: on a CPU a group more
costs time, on a GPU hardly any. In a batch the world that agrees least decides, since a forward
draws the same cells of all.

Source: Song et al., arXiv:2002.03629; Santilli et al., arXiv:2305.10427, for transformers; guesses
from matches, arXiv:2304.04487. Departs: noise is keyed, so that it is exact at every temperature;
the first guess is the frame before.
"""

import torch
from einops import rearrange
from torch import Tensor

from .decoder import Draw

_SLOWNESS = 0.8
"""How much of what earlier forwards settled stays in the mean after one more: about five count."""


_FEW = 2
"""Groups: a forward that settles no more had a bad guess."""
_LEAST_MATCH, _MOST_MATCH = 3, 8
"""Codes in a row that must be found again for a match, and up to which a longer one is better."""


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
        done, copied = 0, False
        while done < num_groups:
            width = int(min(num_groups - done, max(2.0, self._reach * self._settled)))
            cells = slice(done * draw.group, (done + width) * draw.group)
            drawn_BsQ = draw(cells, codes_BSQ)
            settled = _settled(drawn_BsQ, codes_BSQ[:, cells], draw.group)
            codes_BSQ[:, cells] = drawn_BsQ
            done += min(settled, width)
            self._learn(settled, most=num_groups)
            # A copy that settled nothing by itself is given up for what came out.
            failed = copied and settled == 1
            if done < num_groups and settled <= _FEW and not failed:
                copied = _copy_what_moved(codes_BSQ, guess_BSQ, done * draw.group)
            else:
                copied = False
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


def _copy_what_moved(codes_BSQ: Tensor, before_BSQ: Tensor, done: int, /) -> bool:
    """Guess the cells from `done` on from where the settled ones lay in the frame before.

    Tell whether there was a world in which they lay elsewhere.
    """
    recent = codes_BSQ[:, max(0, done - _MOST_MATCH) : done].tolist()
    copied = False
    for world, (now, before) in enumerate(zip(recent, before_BSQ.tolist(), strict=True)):
        end = _end_of_match(now, before, done)
        if end is not None and end != done:
            length = len(before) - max(end, done)
            codes_BSQ[world, done : done + length] = before_BSQ[world, end : end + length]
            copied = True
    return copied


def _end_of_match(now: list[list[int]], before: list[list[int]], done: int, /) -> int | None:
    """Return where in the frame before most of the last settled codes end; the nearest of such."""
    best: tuple[int, int] | None = None
    found: int | None = None
    for end in range(_LEAST_MATCH, len(before) + 1):
        length = 0
        while length < min(len(now), end) and before[end - 1 - length] == now[-1 - length]:
            length += 1
        if length >= _LEAST_MATCH and (best is None or (length, -abs(end - done)) > best):
            best, found = (length, -abs(end - done)), end
    return found
