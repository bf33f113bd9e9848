"""Codes -> vectors: the codebook vector through a projection, plus a learned vector.

    codes int64 in [0, V], any shape  ->  vectors, with a last axis D

The codebook vector tells at the first step already which codes look alike; the learned one adds
what looks do not tell. Entry V stands for "no code": before the first frame, beside the first cell.
"""

import torch
from torch import Tensor, nn


class CodeEmbedding(nn.Module):
    """One table of V + 1 entries."""

    def __init__(self, codebook_VZ: Tensor, dim: int, /) -> None:
        super().__init__()
        vectors = torch.cat([codebook_VZ, torch.zeros_like(codebook_VZ[:1])])
        self.register_buffer("vectors", vectors)
        self.vectors: Tensor
        # Codebooks come at any scale; the projection should see unit variance.
        scale = codebook_VZ.std(correction=0).clamp_min(1e-6).reciprocal()
        self.register_buffer("scale", scale)
        self.scale: Tensor
        self.latent_to_model = nn.Linear(codebook_VZ.shape[1], dim, bias=False)
        self.learned = nn.Embedding(len(vectors), dim)
        nn.init.normal_(self.learned.weight, std=0.02)

    def forward(self, codes: Tensor, /) -> Tensor:
        """Return the vectors of codes."""
        projected: Tensor = self.latent_to_model(self.vectors[codes] * self.scale)
        summed: Tensor = projected + self.learned(codes)
        return summed
