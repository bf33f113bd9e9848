"""Clips -> latents, by either architecture.

    video_BCTHW float in [-1, 1]  ->  latents_BZthw

`ImageEncoder` folds frames into the batch for its 2D part, so no norm and no convolution mixes
time there, and ends in one causal convolution: one latent frame per frame (genie2-pytorch's
design). `VideoEncoder` is causal over time in every block and may halve the frames: of 1 + kr
frames become 1 + k (the layout of MAGVIT-v2, arXiv:2310.05737).
"""

from typing import NamedTuple

from einops import rearrange
from torch import Tensor, nn

from .config import TokenizerConfig
from .conv3d import Caches, CausalConv3d, ResidualBlock, TimeBlock, TimeChain, TimeHalving


class Encoded(NamedTuple):
    """What an encoder makes of some frames."""

    latents_BZthw: Tensor
    caches: Caches
    """With which the next frames continue."""
    still_BZthw: Tensor | None
    """The image architecture's latents before the convolution over time."""


class ImageEncoder(nn.Module):
    """Patch stem, residual blocks, halvings by 2x2 kernels of stride 2, causal convolution."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        widths = config.widths
        layers = _stem(config)
        for level, (width, blocks) in enumerate(zip(widths, config.num_blocks, strict=True)):
            if level:
                layers += [_halving(widths[level - 1], width)]
            layers += [ResidualBlock(width) for _ in range(blocks)]
        self.image = nn.Sequential(*layers, nn.Conv2d(widths[-1], config.quantizer.dim, 1))
        self.time = CausalConv3d(config.quantizer.dim, config.temporal_kernel)

    def forward(self, video_BCTHW: Tensor, caches: Caches | None = None, /) -> Encoded:
        """Return the latents of frames that follow those of the caches."""
        images = rearrange(video_BCTHW, "B C T H W -> (B T) C H W")
        latents = self.image(images)
        still_BZthw = rearrange(latents, "(B t) Z h w -> B Z t h w", B=len(video_BCTHW))
        latents_BZthw, caches = self.time(still_BZthw, caches)
        return Encoded(latents_BZthw, caches, still_BZthw)


class VideoEncoder(nn.Module):
    """The same, with blocks over time, and halvings of time where the grid is smallest."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        widths, k = config.widths, config.temporal_kernel
        layers = _stem(config)
        for level, (width, blocks) in enumerate(zip(widths, config.num_blocks, strict=True)):
            if level:
                layers += [_halving(widths[level - 1], width)]
            layers += [TimeBlock(width, kernel_frames=k) for _ in range(blocks)]
        for _ in range(config.time_halvings):
            layers += [
                TimeHalving(widths[-1], kernel_frames=k),
                TimeBlock(widths[-1], kernel_frames=k),
            ]
        self.layers = TimeChain([*layers, nn.Conv2d(widths[-1], config.quantizer.dim, 1)])

    def forward(self, video_BCTHW: Tensor, caches: Caches | None = None, /) -> Encoded:
        """Return the latents of frames that follow those of the caches.

        Without caches of 1 + kr frames, with them of kr.
        """
        frames_BTCHW = rearrange(video_BCTHW, "B C T H W -> B T C H W")
        latents, caches = self.layers(frames_BTCHW, caches)
        return Encoded(rearrange(latents, "B t Z h w -> B Z t h w"), caches, None)


def build_encoder(config: TokenizerConfig, /) -> ImageEncoder | VideoEncoder:
    """Return the encoder of a config's architecture."""
    return ImageEncoder(config) if config.architecture == "image" else VideoEncoder(config)


def _stem(config: TokenizerConfig) -> list[nn.Module]:
    """Return the layers that fold patches into channels."""
    return [
        nn.PixelUnshuffle(config.patch),
        nn.Conv2d(3 * config.patch**2, config.widths[0], 3, padding=1),
    ]


def _halving(width: int, next_width: int) -> nn.Module:
    """Return the layer between two resolutions."""
    # Space-to-depth and a 1x1 kernel are the same map, at twice the time.
    return nn.Conv2d(width, next_width, 2, stride=2)
