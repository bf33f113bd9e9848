"""Several residual streams around one branch: what goes into it, and what comes of it.

    tokens_BLsD, branch  ->  tokens_BLsD

A branch (attention, feed-forward) reads a weighted sum of the streams and writes to each with a
weight; the streams mix among themselves on the way. All weights are learned, and depend a little on
the token. At the start the streams do not mix, a branch reads one of them and writes to all, which
is the plain residual connection.

The streams stay in float32, like a single one: mixing them in bf16 would round them in every layer.

Source: hyper-connections, arXiv:2409.19606, algorithm 2. Departs: no normalisation but that of the
weights' input. x-transformers' (2.31) is not used: whatever its weights are, it adds all streams up
in each, so that they double in every half-layer and later layers drown.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .norm import Norm


class HyperConnection(nn.Module):
    """The connections of one branch."""

    def __init__(self, dim: int, /, *, index: int, num_streams: int) -> None:
        """Build it with fresh weights.

        Args:
            dim: width of a stream, D.
            index: which branch it is, from 0: neighbours begin with different streams.
            num_streams: s, at least 2.
        """
        super().__init__()
        self.num_streams = num_streams
        self.norm = Norm(dim)
        read_s1 = torch.zeros(num_streams, 1)
        read_s1[index % num_streams] = 1.0
        share_st = torch.cat([read_s1, torch.eye(num_streams), torch.ones(num_streams, 1)], dim=1)
        # A vector, since matrices decay, and these are to stay near where they begin.
        self.share = nn.Parameter(share_st.flatten())
        self.share_of_token = nn.Parameter(torch.zeros(dim, num_streams + 2))
        self.scale = nn.Parameter(torch.full((num_streams + 2,), 0.01))

    def forward(self, tokens_BLsD: Tensor, branch: Callable[[Tensor], Tensor], /) -> Tensor:
        """Return the streams after a branch that takes and gives tokens_BLD."""
        with torch.autocast(tokens_BLsD.device.type, enabled=False):
            # Of weights that are dealt out, layers may be gathered in bf16.
            share, share_of_token, scale = (
                weight.to(tokens_BLsD.dtype)
                for weight in (self.share, self.share_of_token, self.scale)
            )
            moved = torch.tanh(self.norm(tokens_BLsD) @ share_of_token) * scale
            shares_BLst = share.view(self.num_streams, -1) + moved
            # (1 + s, s) @ (s, D): the branch's sum first, then those of the streams.
            mixed_BLtD = shares_BLst[..., :-1].transpose(-1, -2) @ tokens_BLsD
        added_BLD = branch(mixed_BLtD[..., 0, :])
        return torch.addcmul(mixed_BLtD[..., 1:, :], shares_BLst[..., -1:], added_BLD[..., None, :])
