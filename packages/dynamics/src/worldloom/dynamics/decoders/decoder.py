"""What a decoder is, and what it is given."""

from typing import Protocol

from torch import Tensor


class Draw(Protocol):
    """Draws the codes of cells: a function of the codes before each cell's group."""

    group: int
    """Cells that are decided together: none of them looks at another's code."""

    def __call__(self, cells: slice, codes_BSQ: Tensor, /) -> Tensor:
        """Return codes_BsQ of some cells, whole groups, whose codes are not looked at.

        The codes before the first of them are what was drawn for them. Those behind it may be
        guesses: then a group's codes are right if all before it are, and may be asked for again.
        """
        ...


class Decoder(Protocol):
    """Decides frames, one after the other; may learn from one how to be faster in the next."""

    def decide(self, draw: Draw, guess_BSQ: Tensor, /) -> Tensor:
        """Return codes_BSQ of a latent frame.

        Args:
            draw: of that frame.
            guess_BSQ: codes that might be right, such as the frame before.
        """
        ...
