"""Vector quantization: the nearest of V learned vectors.

    latents_BNZ  ->  codes_BN, the index of the nearest codebook vector

The codebook is a moving average of the latents it stands for; the gradient passes by the rotation
trick (arXiv:2410.06424); entries nobody uses are replaced by latents of the batch.

Source: VQ-VAE (arXiv:1711.00937) through vector-quantize-pytorch. Departs from its eval path, which
builds an N x V one-hot array: we take the argmin in pieces.
"""

import torch
from torch import Tensor
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
            tokens_per_step: latents per training step, from which the threshold under which a code
                counts as dead follows; it does not matter after training.
        """
        super().__init__()
        self.vq = VectorQuantize(
            dim=config.code_dim,
            codebook_size=config.vocab_size,
            decay=config.decay,
            commitment_weight=config.commitment,
            kmeans_init=True,
            kmeans_iters=10,
            rotation_trick=True,
            threshold_ema_dead_code=config.dead_code_threshold
            * tokens_per_step
            / config.vocab_size,
        )

    def forward(self, latents_BNZ: Tensor, /) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize one training batch and move the codebook towards it."""
        with torch.autocast(latents_BNZ.device.type, enabled=False):
            quantized_BNZ, codes_BN, loss = self.vq(latents_BNZ.float())
        return quantized_BNZ, codes_BN, loss.sum()

    @torch.no_grad()
    def quantize(self, latents_BNZ: Tensor, /) -> Tensor:
        """Return the code of the nearest codebook vector; of equally near ones, the first."""
        with torch.autocast(latents_BNZ.device.type, enabled=False):
            codebook_VZ = self.codebook
            half_square_V = codebook_VZ.pow(2).sum(-1) / 2
            flat = latents_BNZ.float().flatten(0, 1)
            pieces = [
                (half_square_V - piece @ codebook_VZ.mT).argmin(-1) for piece in flat.split(_PIECE)
            ]
        return torch.cat(pieces).unflatten(0, latents_BNZ.shape[:2])

    @property
    def codebook(self) -> Tensor:
        """The codebook vectors codebook_VZ, float32."""
        codebook_VZ: Tensor = self.vq.codebook
        return codebook_VZ.float()
