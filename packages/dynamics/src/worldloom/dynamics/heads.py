"""Tokens -> logits of the codes of one level.

    tokens_BLD  ->  logits_BLV

Three ways out. A matrix of its own knows nothing of the codebook. The other two bring the token
into the codebook's space and compare it there with every vector: so codes that look alike get like
logits from the first update on. Both need a learned scale: distances in a codebook are what they
are, and an unscaled one bounds how sure a model can be (genie2-pytorch's loss never gets low).

    linear    W x + b
    dot       s <P x, e_v> + b_v
    distance  -s |P x - e_v|^2       (the square: a Gaussian around each code, and one product)
"""

import math

import torch
from torch import Tensor, nn

from .config import Head
from .linear import Linear


class CodeHead(nn.Module):
    """Logits of one level's codes."""

    def __init__(self, kind: Head, codebook_VZ: Tensor, /, *, dim: int) -> None:
        super().__init__()
        self.kind = kind
        vocab_size, code_dim = codebook_VZ.shape
        if kind == "linear":
            self.to_logits = Linear(dim, vocab_size)
            nn.init.normal_(self.to_logits.weight, std=0.02)
            return
        # Codebooks come at any scale and anywhere; in here they have unit variance about 0.
        spread = codebook_VZ.std(correction=0).clamp_min(1e-6)
        self.register_buffer("vectors_VZ", (codebook_VZ - codebook_VZ.mean(0)) / spread)
        self.vectors_VZ: Tensor
        self.model_to_latent = Linear(dim, code_dim, bias=False)
        # Logits of about unit variance at the start, from tokens of unit variance.
        nn.init.normal_(self.model_to_latent.weight, std=dim**-0.5)
        self.log_scale = nn.Parameter(torch.tensor([-0.5 * math.log(code_dim)]))
        self.bias_V = nn.Parameter(torch.zeros(vocab_size)) if kind == "dot" else None

    def forward(self, tokens_BLD: Tensor, /) -> Tensor:
        """Return logits_BLV."""
        if self.kind == "linear":
            logits_BLV: Tensor = self.to_logits(tokens_BLD)
            return logits_BLV
        latents_BLZ = self.model_to_latent(tokens_BLD)
        products_BLV = latents_BLZ @ self.vectors_VZ.to(latents_BLZ.dtype).T
        scale = self.log_scale.exp()
        if self.bias_V is not None:
            logits_BLV = scale * products_BLV + self.bias_V
        else:  # |z - e|^2 without |z|^2, which is the same for every code
            logits_BLV = scale * (2 * products_BLV - self.vectors_VZ.square().sum(-1))
        return logits_BLV
