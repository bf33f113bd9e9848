"""Meta tokens: learned tokens in front of every sequence, seen by all, never predicted.

    nothing  ->  tokens_1MD, M meta tokens, the same before every window

They have no place, so they are as near to frame 5,000 as to frame 0. In a rollout they stay in the
cache for ever, as attention sinks, while old frames slide out. Drawn with standard deviation 0.02:
genie2-pytorch starts them at zero, where a normalising layer divides zero by zero's length and
nothing learns.

Source: Hymba (arXiv:2411.13676); attention sinks, arXiv:2309.17453.
"""

import torch
from torch import Tensor, nn

STD = 0.02


class MetaTokens(nn.Module):
    """M learned tokens."""

    def __init__(self, num_tokens: int, dim: int, /) -> None:
        super().__init__()
        tokens_MD = torch.randn(num_tokens, dim) * STD
        self.tokens_MD: Tensor
        if num_tokens:
            self.tokens_MD = nn.Parameter(tokens_MD)
        else:  # nothing is not a parameter: there is no share of it to deal out
            self.register_buffer("tokens_MD", tokens_MD)

    def forward(self) -> Tensor:
        """Return tokens_1MD."""
        return self.tokens_MD[None]
