"""Finite scalar quantization: the codebook is a grid, so no entry can die.

    latents_BNZ  ->  codes_BN, every channel rounded to the nearest of its values

Channel z takes one of levels[z] evenly spaced values from -1 to 1; V is the product of levels, and
the code is the number whose digits (the first channel's the lowest) are the values' indices.
Nothing is learned. The gradient passes straight through; what lies outside counts as the nearest
end, and the commitment loss brings it back.

Source: arXiv:2309.15505 and, for the symmetric grid, arXiv:2411.19842. Departs from both, and from
the class of vector-quantize-pytorch, which bound latents by a tanh and have no loss: a saturated
tanh passes no gradient, and of 1,000 codes a tokenizer of Pong kept 4 (docs/log.md). Digits and
codes are integers throughout, where the library sums them in float32.
"""

import torch
from einops import reduce
from torch import Tensor
from torch.nn.functional import mse_loss

from ..config import QuantizerConfig
from .adapter import Quantizer


class FSQ(Quantizer):
    """Rounding to a grid, behind the adapter."""

    steps_Z: Tensor
    places_Z: Tensor
    codebook_VZ: Tensor

    def __init__(self, config: QuantizerConfig) -> None:
        """Build the grid of config.fsq_levels."""
        super().__init__()
        self.commitment = config.commitment
        levels_Z = torch.tensor(config.fsq_levels)
        places_Z = levels_Z.cumprod(0) // levels_Z
        digits_VZ = torch.arange(config.size)[:, None] // places_Z % levels_Z
        # Functions of the settings, hence in no file.
        self.register_buffer("steps_Z", levels_Z - 1, persistent=False)
        self.register_buffer("places_Z", places_Z, persistent=False)
        self.register_buffer(
            "codebook_VZ", 2 * digits_VZ.float() / (levels_Z - 1) - 1, persistent=False
        )

    def forward(self, latents_BNZ: Tensor, /) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize one batch."""
        with torch.autocast(latents_BNZ.device.type, enabled=False):
            latents_BNZ = latents_BNZ.float()
            codes_BN = self.quantize(latents_BNZ)
            quantized_BNZ = self.lookup(codes_BN)
            loss = self.commitment * mse_loss(latents_BNZ, quantized_BNZ)
            if self.training:
                quantized_BNZ = latents_BNZ + (quantized_BNZ - latents_BNZ).detach()
        return quantized_BNZ, codes_BN, loss

    @torch.no_grad()
    def quantize(self, latents_BNZ: Tensor, /) -> Tensor:
        """Return the code of the nearest point of the grid."""
        # Codebook values fall on half-integers before the floor, the farthest from its jumps.
        digits_BNZ = (self.steps_Z * (latents_BNZ.float().clamp(-1, 1) + 1) / 2 + 0.5).long()
        codes_BN: Tensor = reduce(digits_BNZ * self.places_Z, "B N Z -> B N", "sum")
        return codes_BN

    @property
    def codebook(self) -> Tensor:
        """The codebook vectors codebook_VZ, float32, in [-1, 1]."""
        return self.codebook_VZ.float()
