"""Vector quantization: the nearest of V learned vectors.

    latents_BNZ  ->  codes_BN, the index of the nearest codebook vector

The codebook is a moving average of the latents it stands for; the gradient passes by the rotation
trick (arXiv:2410.06424); entries nobody uses are replaced by latents of the batch. Such a latent
may equal another entry (a game's empty sky does): of equal entries the first is everybody's code.

With cosine, latents and codebook lie on the unit sphere, where the nearest is the nearest by
angle; a latent's length says nothing then, and the decoder receives vectors of length 1.

Source: VQ-VAE (arXiv:1711.00937) and, for cosine, arXiv:2110.04627, through
vector-quantize-pytorch. Departs from its evaluation, which builds an N x V one-hot array (we take
the argmin in pieces) and runs k-means on the first batch even then (a codebook of ours moves in
training only).
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss, normalize
from vector_quantize_pytorch import VectorQuantize

from ..config import QuantizerConfig
from .adapter import Quantizer, num_processes
from .nearest import nearest


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
        self.commitment = config.commitment
        self.cosine = config.cosine
        self.vq = VectorQuantize(
            dim=config.code_dim, **learned_codebook(config, tokens_per_step=tokens_per_step)
        )
        self.vq.codebook = fresh_codebook(config)

    def forward(self, latents_BNZ: Tensor, /) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize one batch; in training, also move the codebook towards it."""
        with torch.autocast(latents_BNZ.device.type, enabled=False):
            latents_BNZ = latents_BNZ.float()
            if not self.training:
                codes_BN = self.quantize(latents_BNZ)
                quantized_BNZ = self.lookup(codes_BN)
                return quantized_BNZ, codes_BN, self.commitment * mse_loss(
                    on_sphere(latents_BNZ) if self.cosine else latents_BNZ, quantized_BNZ
                )  # fmt: skip
            quantized_BNZ, codes_BN, loss = self.vq(latents_BNZ)
        return quantized_BNZ, codes_BN, loss.sum()

    @torch.no_grad()
    def quantize(self, latents_BNZ: Tensor, /) -> Tensor:
        """Return the code of the nearest codebook vector; of equally near ones, the first."""
        with torch.autocast(latents_BNZ.device.type, enabled=False):
            latents_BNZ = latents_BNZ.float()
            return nearest(on_sphere(latents_BNZ) if self.cosine else latents_BNZ, self.codebook)

    @property
    def codebook(self) -> Tensor:
        """The codebook vectors codebook_VZ, float32."""
        codebook_VZ: Tensor = self.vq.codebook
        return codebook_VZ.float()


def on_sphere(latents: Tensor, /) -> Tensor:
    """Return vectors of length 1; eps is the library's."""
    return normalize(latents, dim=-1, eps=1e-6)


def learned_codebook(config: QuantizerConfig, /, *, tokens_per_step: int) -> dict[str, Any]:
    """Return the library's settings of a codebook that moving averages train."""
    even_share = tokens_per_step / config.vocab_size
    return {
        "codebook_size": config.vocab_size,
        "decay": config.decay,
        "commitment_weight": config.commitment,
        "kmeans_init": True,
        "kmeans_iters": 10,
        "rotation_trick": True,
        "use_cosine_sim": config.cosine,
        "threshold_ema_dead_code": config.dead_code_threshold * even_share,
        # The library's own answer is remembered from the first quantizer of the process, which
        # may have been built before there was a group.
        "sync_codebook": num_processes() > 1,
    }


def fresh_codebook(config: QuantizerConfig, /) -> Tensor:
    """Return a codebook to begin with: the library's is zeros, all of them one code.

    K-means on the first training batch replaces either.
    """
    codebook_VZ = torch.randn(config.vocab_size, config.code_dim)
    return on_sphere(codebook_VZ) if config.cosine else codebook_VZ
