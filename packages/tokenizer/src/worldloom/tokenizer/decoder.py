"""Quantized latents -> video: a causal convolution over time, then a 2D decoder over every frame.

    quantized_BZthw  ->  video_BCTHW float, about [-1, 1]

The mirror of the encoder. The convolution sees the past's codes, which steadies what one frame's
codes leave open.
"""

from einops import rearrange
from torch import Tensor, nn

from .config import TokenizerConfig
from .conv3d import CausalConv3d, ResidualBlock


class Decoder(nn.Module):
    """Causal convolution, residual blocks, doublings by depth-to-space, patch head."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        widths = config.widths
        self.time = CausalConv3d(config.quantizer.code_dim, config.temporal_kernel)
        layers: list[nn.Module] = [nn.Conv2d(config.quantizer.code_dim, widths[-1], 3, padding=1)]
        for level in reversed(range(len(widths))):
            layers += [ResidualBlock(widths[level]) for _ in range(config.num_blocks[level])]
            if level:
                layers += [nn.Conv2d(widths[level], 4 * widths[level - 1], 1), nn.PixelShuffle(2)]
        layers += [nn.Conv2d(widths[0], 3 * config.patch**2, 3, padding=1)]
        self.image = nn.Sequential(*layers, nn.PixelShuffle(config.patch))

    def forward(
        self, quantized_BZthw: Tensor, cache: Tensor | None = None, /
    ) -> tuple[Tensor, Tensor | None]:
        """Return video_BCTHW, and the cache with which the next latent frames continue."""
        filtered_BZthw, cache = self.time(quantized_BZthw, cache)
        images = self.image(rearrange(filtered_BZthw, "B Z t h w -> (B t) Z h w"))
        return rearrange(images, "(B T) C H W -> B C T H W", B=len(quantized_BZthw)), cache
