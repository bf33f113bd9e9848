"""Residual vector quantization: Q codebooks, each for what the ones before it left over.

    latents_BNZ  ->  codes_BNQ: level 0 the vector nearest to the latent, level 1 the one nearest to
                     what is left, and so on
    codes_...Q   ->  the sum of the levels' vectors

Q levels of V codes describe as much as one codebook of V^Q. Every level's codebook is trained as
`VQ`'s is (k-means, moving averages, dead codes replaced), and the gradient passes by one rotation
from the latent to the sum.

A level's vector is nearest to itself among its level's, always. The sum of two levels' vectors
need not give their codes back: levels are chosen one after another, and the sum a + b may lie
nearer to another vector of level 0 than to a. So a latent's codes are those that `quantize` found,
and what round-trips exactly is each level.

With cosine every level chooses by angle and adds a vector of length 1.

Source: SoundStream (arXiv:2107.03312), algorithm 1, through vector-quantize-pytorch. Departs from
it as `VQ` does, and in the gradient, which the library passes once through every level, so that it
grows with Q.
"""

import torch
from torch import Tensor
from torch.nn.functional import mse_loss
from vector_quantize_pytorch import ResidualVQ as LibraryResidualVQ
from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to

from ..config import QuantizerConfig
from .adapter import Quantizer
from .nearest import nearest
from .vq import fresh_codebook, learned_codebook, on_sphere


class ResidualVQ(Quantizer):
    """ResidualVQ of vector-quantize-pytorch behind the adapter."""

    def __init__(self, config: QuantizerConfig, *, tokens_per_step: int = 2048) -> None:
        """Build the quantizer.

        Args:
            config: its settings.
            tokens_per_step: as for `VQ`.
        """
        super().__init__()
        self.depth = config.num_levels
        self.commitment = config.commitment
        self.cosine = config.cosine
        self.rvq = LibraryResidualVQ(
            dim=config.code_dim,
            num_quantizers=config.num_levels,
            route_gradients_to_input=False,  # ours is one rotation, to the sum
            **learned_codebook(config, tokens_per_step=tokens_per_step),
        )
        for level in self.rvq.layers:
            level.codebook = fresh_codebook(config)

    def forward(self, latents_BNZ: Tensor, /) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize one batch; in training, also move the codebooks towards it."""
        with torch.autocast(latents_BNZ.device.type, enabled=False):
            latents_BNZ = latents_BNZ.float()
            if not self.training:
                codes_BNQ, loss = self._by_level(latents_BNZ)
                return self.lookup(codes_BNQ), codes_BNQ, loss
            quantized_BNZ, codes_BNQ, losses = self.rvq(latents_BNZ)
            if latents_BNZ.requires_grad:
                quantized_BNZ = rotate_to(latents_BNZ, quantized_BNZ)
        return quantized_BNZ, codes_BNQ, losses.sum()

    @torch.no_grad()
    def quantize(self, latents_BNZ: Tensor, /) -> Tensor:
        """Return every level's code of the nearest to what is left; of equally near, the first."""
        with torch.autocast(latents_BNZ.device.type, enabled=False):
            return self._by_level(latents_BNZ.float())[0]

    def _by_level(self, latents_BNZ: Tensor, /) -> tuple[Tensor, Tensor]:
        """Return codes_BNQ and the commitment loss."""
        left_BNZ, codes, loss = latents_BNZ, [], latents_BNZ.new_zeros(())
        for codebook_VZ in self.codebook:
            wanted_BNZ = on_sphere(left_BNZ) if self.cosine else left_BNZ
            codes.append(nearest(wanted_BNZ, codebook_VZ))
            found_BNZ = codebook_VZ[codes[-1]]
            loss = loss + self.commitment * mse_loss(wanted_BNZ, found_BNZ)
            left_BNZ = left_BNZ - found_BNZ
        return torch.stack(codes, dim=-1), loss

    @property
    def codebook(self) -> Tensor:
        """The codebook vectors codebook_QVZ, float32."""
        codebook_QVZ: Tensor = self.rvq.codebooks
        return codebook_QVZ.float()

    def lookup(self, codes: Tensor, /) -> Tensor:
        """Return the sums of the levels' vectors of codes_...Q, with a last axis Z."""
        quantized = self.codebook[torch.arange(self.depth, device=codes.device), codes]
        return quantized.sum(-2)
