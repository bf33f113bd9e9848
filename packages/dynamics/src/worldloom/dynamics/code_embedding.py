"""Codes -> vectors: the codebook vector through a projection, plus a learned vector.

    codes_..Q int64 in [0, V], a cell's levels last  ->  vectors, with D in the place of Q

The codebook vector tells at the first step already which codes look alike; the learned one adds
what looks do not tell. Entry V stands for "no code": before the first frame, beside the first cell.
A residual tokenizer gives a cell several codes, one a level, and its vector is the sum of theirs;
so it is here. Fewer levels than there are, from the first, give what these alone amount to.
"""

import math

import torch
from torch import Tensor, nn

from .linear import Linear


class CodeEmbedding(nn.Module):
    """One table of V + 1 entries a level."""

    def __init__(self, codebook_QVZ: Tensor, dim: int, /) -> None:
        super().__init__()
        none_1Z = torch.zeros_like(codebook_QVZ[0, :1])
        vectors = torch.cat([part for level_VZ in codebook_QVZ for part in (level_VZ, none_1Z)])
        self.register_buffer("vectors", vectors)
        self.vectors: Tensor
        # Codebooks come at any scale; the projection should see unit variance. That of a sum is
        # the sum of the levels' variances: each level holds what the ones before it left over.
        spread = math.hypot(*(level_VZ.std(correction=0).item() for level_VZ in codebook_QVZ))
        self.register_buffer("scale", torch.tensor(spread).clamp_min(1e-6).reciprocal())
        self.scale: Tensor
        levels, size, code_dim = codebook_QVZ.shape
        first_rows_Q = torch.arange(levels) * (size + 1)
        self.register_buffer("first_rows_Q", first_rows_Q, persistent=False)
        self.first_rows_Q: Tensor
        self.latent_to_model = Linear(code_dim, dim, bias=False)
        self.learned = nn.Embedding(len(vectors), dim)
        nn.init.normal_(self.learned.weight, std=0.02)

    def forward(self, codes: Tensor, /) -> Tensor:
        """Return the vectors of codes, summed over the levels that their last axis has."""
        rows = codes + self.first_rows_Q[: codes.shape[-1]]
        projected: Tensor = self.latent_to_model(_sum_levels(self.vectors[rows]) * self.scale)
        summed: Tensor = projected + _sum_levels(self.learned(rows))
        return summed


def _sum_levels(vectors: Tensor) -> Tensor:
    """Return the sum over the last axis but one; of one level itself, without a copy."""
    return vectors.squeeze(-2) if vectors.shape[-2] == 1 else vectors.sum(-2)
