"""Quantized latents -> video, by either architecture.

    quantized_BZthw  ->  video_BCTHW float, about [-1, 1]

The mirrors of the encoders. A convolution over time sees the past's codes, which steadies what one
frame's codes leave open.
"""

from typing import NamedTuple

from einops import rearrange
from torch import Tensor, nn

from .config import TokenizerConfig
from .conv3d import Caches, CausalConv3d, ResidualBlock, TimeBlock, TimeChain, TimeDoubling


class Decoded(NamedTuple):
    """What a decoder makes of some latent frames."""

    video_BCTHW: Tensor
    caches: Caches
    """With which the next latent frames continue."""
    filtered_BZthw: Tensor | None
    """The image architecture's latents after the convolution over time."""


class ImageDecoder(nn.Module):
    """Causal convolution, residual blocks, doublings by depth-to-space, patch head."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        widths = config.widths
        self.time = CausalConv3d(config.quantizer.dim, config.temporal_kernel)
        layers: list[nn.Module] = [nn.Conv2d(config.quantizer.dim, widths[-1], 3, padding=1)]
        for level in reversed(range(len(widths))):
            layers += [ResidualBlock(widths[level]) for _ in range(config.num_blocks[level])]
            if level:
                layers += _doubling(widths[level], widths[level - 1])
        self.image = nn.Sequential(*layers, *_head(config))

    def forward(self, quantized_BZthw: Tensor, caches: Caches | None = None, /) -> Decoded:
        """Return the frames of latent frames that follow those of the caches."""
        filtered_BZthw, caches = self.time(quantized_BZthw, caches)
        images = self.image(rearrange(filtered_BZthw, "B Z t h w -> (B t) Z h w"))
        video_BCTHW = rearrange(images, "(B T) C H W -> B C T H W", B=len(quantized_BZthw))
        return Decoded(video_BCTHW, caches, filtered_BZthw)


class VideoDecoder(nn.Module):
    """The same, with blocks over time, and doublings of time where the grid is smallest."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        widths, k = config.widths, config.temporal_kernel
        layers: list[nn.Module] = [nn.Conv2d(config.quantizer.dim, widths[-1], 3, padding=1)]
        for _ in range(config.time_halvings):
            layers += [
                TimeBlock(widths[-1], kernel_frames=k),
                TimeDoubling(widths[-1], kernel_frames=k),
            ]
        for level in reversed(range(len(widths))):
            blocks = config.num_blocks[level]
            layers += [TimeBlock(widths[level], kernel_frames=k) for _ in range(blocks)]
            if level:
                layers += _doubling(widths[level], widths[level - 1])
        self.layers = TimeChain([*layers, *_head(config)])

    def forward(self, quantized_BZthw: Tensor, caches: Caches | None = None, /) -> Decoded:
        """Return the frames of latent frames that follow those of the caches.

        Without caches 1 + kr frames, with them kr.
        """
        latents_BtZhw = rearrange(quantized_BZthw, "B Z t h w -> B t Z h w")
        frames_BTCHW, caches = self.layers(latents_BtZhw, caches)
        return Decoded(rearrange(frames_BTCHW, "B T C H W -> B C T H W"), caches, None)


def build_decoder(config: TokenizerConfig, /) -> ImageDecoder | VideoDecoder:
    """Return the decoder of a config's architecture."""
    return ImageDecoder(config) if config.architecture == "image" else VideoDecoder(config)


def _doubling(width: int, next_width: int) -> list[nn.Module]:
    """Return the layers between two resolutions."""
    return [nn.Conv2d(width, 4 * next_width, 1), nn.PixelShuffle(2)]


def _head(config: TokenizerConfig) -> list[nn.Module]:
    """Return the layers that unfold channels into patches."""
    return [
        nn.Conv2d(config.widths[0], 3 * config.patch**2, 3, padding=1),
        nn.PixelShuffle(config.patch),
    ]
