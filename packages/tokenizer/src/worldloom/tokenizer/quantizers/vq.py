"""Vector quantization: the nearest of V learned vectors.

    latents_BNZ  ->  codes_BN, the index of the nearest codebook vector

The codebook is a moving average of the latents it stands for; the gradient passes by the rotation
trick (arXiv:2410.06424); entries nobody uses are replaced by latents of the batch. Such a latent
may equal another entry (a game's empty sky does): of equal entries the first is everybody's code.

Source: VQ-VAE (arXiv:1711.00937) through vector-quantize-pytorch. Departs from its evaluation,
which builds an N x V one-hot array (we take the argmin in pieces) and runs k-means on the first
batch even then (a codebook of ours moves in training only).
"""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import mse_loss
from vector_quantize_pytorch import VectorQuantize

from ..config import QuantizerConfig
from .adapter import Quantizer

_PIECE = 1 << 15
"""Vectors per distance matrix: 128 MiB at V = 1024."""


class VQ(Quantizer):
    """VectorQuantize of vector-quantize-pytorch behind the adapter."""

    def __init__(self, config: QuantizerConfig, *, tokens_per_step: int = 2048) -> None:
        """Build the quantizer.

        Args:
            config: its settings.
            tokens_per_step: latents per training step, from which the threshold under which a
                code counts as dead follows; it does not matter after training.
        """
        super().__init__()
        even_share = tokens_per_step / config.vocab_size
        self.commitment = config.commitment
        self.vq = VectorQuantize(
            dim=config.code_dim,
            codebook_size=config.vocab_size,
            decay=config.decay,
            commitment_weight=config.commitment,
            kmeans_init=True,
            kmeans_iters=10,
            rotation_trick=True,
            threshold_ema_dead_code=config.dead_code_threshold * even_share,
        )
        # The library begins with zeros, all of them one code. K-means replaces either.
        self.vq.codebook = torch.randn(config.vocab_size, config.code_dim)

    def forward(self, latents_BNZ: Tensor, /) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize one batch; in training, also move the codebook towards it."""
        with torch.autocast(latents_BNZ.device.type, enabled=False):
            latents_BNZ = latents_BNZ.float()
            if not self.training:
                codes_BN = self.quantize(latents_BNZ)
                quantized_BNZ = self.lookup(codes_BN)
                return quantized_BNZ, codes_BN, self.commitment * mse_loss(
                    latents_BNZ, quantized_BNZ
                )  # fmt: skip
            quantized_BNZ, codes_BN, loss = self.vq(latents_BNZ)
        return quantized_BNZ, codes_BN, loss.sum()

    @torch.no_grad()
    def quantize(self, latents_BNZ: Tensor, /) -> Tensor:
        """Return the code of the nearest codebook vector; of equally near ones, the first."""
        with torch.autocast(latents_BNZ.device.type, enabled=False):
            codebook_VZ = self.codebook
            half_square_V = codebook_VZ.square().sum(-1) / 2
            flat = rearrange(latents_BNZ.float(), "B N Z -> (B N) Z")
            # |latent - entry|^2 / 2, without the part that all entries share.
            nearest = [
                (half_square_V - piece @ codebook_VZ.mT).argmin(-1)
                for piece in torch.split(flat, _PIECE)
            ]
        return rearrange(torch.cat(nearest), "(B N) -> B N", B=len(latents_BNZ))

    @property
    def codebook(self) -> Tensor:
        """The codebook vectors codebook_VZ, float32."""
        codebook_VZ: Tensor = self.vq.codebook
        return codebook_VZ.float()
