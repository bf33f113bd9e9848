"""Vectors -> the index of the nearest of a codebook, without an array of all distances.

    latents_BNZ, codebook_VZ  ->  codes_BN int64 in [0, V)

Of equally near codebook vectors the first is the code.
"""

import torch
from einops import rearrange
from torch import Tensor

_PIECE = 1 << 15
"""Vectors per distance matrix, at most."""
_PIECE_DISTANCES = 1 << 25
"""Entries of a distance matrix, at most: 128 MiB."""


@torch.no_grad()
def nearest(latents_BNZ: Tensor, codebook_VZ: Tensor, /) -> Tensor:
    """Return codes_BN of the nearest codebook vectors; both are float32."""
    half_square_V = codebook_VZ.square().sum(-1) / 2
    flat = rearrange(latents_BNZ, "B N Z -> (B N) Z")
    # |latent - entry|^2 / 2, without the part that all entries share.
    codes = [
        (half_square_V - piece @ codebook_VZ.mT).argmin(-1)
        for piece in torch.split(flat, max(1, min(_PIECE, _PIECE_DISTANCES // len(codebook_VZ))))
    ]
    return torch.cat(codes).view(latents_BNZ.shape[:-1])  # einops cannot divide by a B of zero
