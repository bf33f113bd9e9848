"""The later levels of a cell's code, one after the other, each from those before it.

    tokens_BLD, codes_BLq of the first q levels  ->  logits_BLV of level q, for q = 1 .. Q-1

A residual tokenizer gives a cell Q codes, each for what the ones before it left over. The
transformer has one token a cell, and level 0 comes from it alone; level q adds what levels 0 .. q-1
amount to, as their vectors' sum, and a learned vector of the level. A gated feed-forward layer,
shared by the levels, mixes the three, and every level has a head of its own. So Q codes
cost one pass through the transformer and Q - 1 through one layer of this.

Source: RQ-Transformer (arXiv:2203.01941), section 3.2. Departs: its depth transformer attends to
the levels before; here their sum stands for them, which is what the decoder will see of them.
"""

from torch import Tensor, nn

from .code_embedding import CodeEmbedding
from .config import Head
from .heads import CodeHead
from .norm import Norm
from .transformer import gated_feed_forward


class LevelHead(nn.Module):
    """Logits of levels 1 .. Q-1."""

    def __init__(self, codebook_QVZ: Tensor, /, *, dim: int, ff_mult: float, head: Head) -> None:
        super().__init__()
        levels = len(codebook_QVZ)
        self.below = CodeEmbedding(codebook_QVZ[:-1], dim)
        self.level = nn.Embedding(levels - 1, dim)
        nn.init.normal_(self.level.weight, std=0.02)
        self.mix = gated_feed_forward(dim, mult=ff_mult)
        self.norm = Norm(dim)
        self.heads = nn.ModuleList(CodeHead(head, book, dim=dim) for book in codebook_QVZ[1:])

    def forward(self, tokens_BLD: Tensor, below_BLq: Tensor, /) -> Tensor:
        """Return logits_BLV of level q, given the tokens' codes of the q >= 1 levels below it."""
        place = below_BLq.shape[-1] - 1
        tokens_BLD = tokens_BLD + self.below(below_BLq) + self.level.weight[place]
        tokens_BLD = tokens_BLD + self.mix(tokens_BLD)
        logits_BLV: Tensor = self.heads[place](self.norm(tokens_BLD))
        return logits_BLV
