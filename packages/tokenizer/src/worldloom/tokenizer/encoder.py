"""Clips -> latents: a 2D encoder over every frame, then a causal convolution over time.

    video_BCTHW float in [-1, 1]  ->  latents_BZthw, one latent frame per frame

Frames are folded into the batch for the 2D part, so no norm and no convolution mixes time there.
"""

from einops import rearrange
from torch import Tensor, nn

from .config import TokenizerConfig
from .conv3d import CausalConv3d, ResidualBlock


class Encoder(nn.Module):
    """Patch stem, residual blocks, halvings by 2x2 kernels of stride 2, causal convolution."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        widths = config.widths
        layers: list[nn.Module] = [
            nn.PixelUnshuffle(config.patch),
            nn.Conv2d(3 * config.patch**2, widths[0], 3, padding=1),
        ]
        for level, (width, blocks) in enumerate(zip(widths, config.num_blocks, strict=True)):
            if level:
                # Space-to-depth and a 1x1 kernel are the same map, at twice the time.
                layers += [nn.Conv2d(widths[level - 1], width, 2, stride=2)]
            layers += [ResidualBlock(width) for _ in range(blocks)]
        self.image = nn.Sequential(*layers, nn.Conv2d(widths[-1], config.quantizer.code_dim, 1))
        self.time = CausalConv3d(config.quantizer.code_dim, config.temporal_kernel)

    def forward(
        self, video_BCTHW: Tensor, cache: Tensor | None = None, /
    ) -> tuple[Tensor, Tensor | None]:
        """Return latents_BZthw, and the cache with which the next frames continue."""
        images = rearrange(video_BCTHW, "B C T H W -> (B T) C H W")
        latents = self.image(images)
        latents_BZthw = rearrange(latents, "(B t) Z h w -> B Z t h w", B=len(video_BCTHW))
        filtered: tuple[Tensor, Tensor | None] = self.time(latents_BZthw, cache)
        return filtered
