"""Causal convolutions over time, their caches, and the residual blocks of both architectures.

What goes in and comes out, with the frames before it kept in a cache:

    latents_BZthw, cache of the frames before  ->  latents_BZthw, cache for the next call
    frames_BTCHW, cache of the frames before   ->  frames_BTCHW, cache for the next call

Time is padded in front only, so no output depends on a later frame; with the cache, any split of
a stream gives what the whole gives. Before the first frame stands the first frame, repeated: a
video starts at rest, and zeros would be a flash.

Source: genie2-pytorch's design, kernel (k, 1, 1) around the quantizer; causal padding as in
MAGVIT-v2 (arXiv:2310.05737, section 3.2), which pads with zeros.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import silu

Caches = tuple[Tensor, ...]
"""The caches of all convolutions over time of one half, in order; None before the first frame."""


class CausalConv3d(nn.Conv3d):
    """A convolution over time only, kernel (k, 1, 1), that starts as the identity.

    Identity at the start: an image tokenizer that learns to use the past, never one that has to
    unlearn a random mixture of it.
    """

    def __init__(self, dim: int, kernel_frames: int) -> None:
        super().__init__(dim, dim, (kernel_frames, 1, 1))
        self.context = kernel_frames - 1
        with torch.no_grad():
            nn.init.zeros_(self.weight)
            self.weight[:, :, -1, 0, 0] = torch.eye(dim)
            if self.bias is not None:
                nn.init.zeros_(self.bias)

    def forward(  # type: ignore[override]
        self, latents_BZthw: Tensor, caches: Caches | None = None, /
    ) -> tuple[Tensor, Caches]:
        """Return the filtered latents and the cache for the frames that follow."""
        if self.context == 0:
            return super().forward(latents_BZthw), ()
        if caches is None:
            caches = (latents_BZthw[:, :, :1].expand(-1, -1, self.context, -1, -1),)
        padded = torch.cat([*caches, latents_BZthw], dim=2)
        return super().forward(padded), (padded[:, :, -self.context :],)


class ChannelNorm(nn.Module):
    """Root-mean-square norm over the channels of each pixel: it mixes neither space nor time."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, image_BCHW: Tensor, /) -> Tensor:
        """Scale every pixel's channels to unit root mean square, then by the learned scale."""
        mean_square = image_BCHW.float().pow(2).mean(1, keepdim=True)
        normed = image_BCHW * torch.rsqrt(mean_square + 1e-6).to(image_BCHW.dtype)
        return normed * self.scale.to(image_BCHW.dtype)[:, None, None]


class ResidualBlock(nn.Module):
    """norm, 3x3, activation, 1x1, added to the input; the last layer starts at zero."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(dim)
        self.mix = nn.Conv2d(dim, dim, 3, padding=1)
        self.out = nn.Conv2d(dim, dim, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def forward(self, image_BCHW: Tensor, /) -> Tensor:
        """Return the image plus what the block adds."""
        added: Tensor = self.out(silu(self.mix(self.norm(image_BCHW))))
        return image_BCHW + added


class TimeConv(nn.Module):
    """A causal convolution over time: a 1x1 kernel over the stacked channels of k frames.

    The same map as a Conv3d of kernel (k, 1, 1), but frames lie in front of channels, so that
    the layers in between fold them into the batch without a copy; and a CPU's 2D kernels are the
    fast ones. With a stride of 2, output j sees inputs up to 2j: of 1 + 2m frames become 1 + m.
    """

    def __init__(self, dim: int, out_dim: int, /, *, kernel_frames: int, stride: int = 1) -> None:
        super().__init__()
        self.kernel_frames = kernel_frames
        self.stride = stride
        self.mix = nn.Conv2d(kernel_frames * dim, out_dim, 1)

    def forward(self, frames_BTCHW: Tensor, cache_BTCHW: Tensor | None, /) -> tuple[Tensor, Tensor]:
        """Return the filtered frames, and the frames that the next call needs before its own."""
        if cache_BTCHW is None:
            cache_BTCHW = frames_BTCHW[:, :1].expand(-1, self.kernel_frames - 1, -1, -1, -1)
        padded = torch.cat([cache_BTCHW, frames_BTCHW], dim=1)
        last = padded.shape[1] - self.kernel_frames
        shifted = [padded[:, i : last + i + 1 : self.stride] for i in range(self.kernel_frames)]
        stacked = torch.cat(shifted, dim=2)
        mixed = self.mix(rearrange(stacked, "B T C H W -> (B T) C H W"))
        kept = self.kernel_frames - self.stride
        return (
            rearrange(mixed, "(B T) C H W -> B T C H W", B=len(padded)),
            padded[:, padded.shape[1] - kept :],
        )


class TimeBlock(nn.Module):
    """A residual block whose last layer sees k frames: the 3D block of the video architecture."""

    def __init__(self, dim: int, /, *, kernel_frames: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(dim)
        self.mix = nn.Conv2d(dim, dim, 3, padding=1)
        self.out = TimeConv(dim, dim, kernel_frames=kernel_frames)
        nn.init.zeros_(self.out.mix.weight)
        nn.init.zeros_(self.out.mix.bias)  # type: ignore[arg-type]

    def forward(self, frames_BTCHW: Tensor, cache: Tensor | None, /) -> tuple[Tensor, Tensor]:
        """Return the frames plus what the block adds, and the cache."""
        images = rearrange(frames_BTCHW, "B T C H W -> (B T) C H W")
        mixed = silu(self.mix(self.norm(images)))
        added, cache = self.out(
            rearrange(mixed, "(B T) C H W -> B T C H W", B=len(frames_BTCHW)), cache
        )
        return frames_BTCHW + added, cache


class TimeHalving(TimeConv):
    """Every two frames become one; the first stays by itself: 1 + 2m frames become 1 + m."""

    def __init__(self, dim: int, /, *, kernel_frames: int) -> None:
        super().__init__(dim, dim, kernel_frames=kernel_frames, stride=2)


class TimeDoubling(nn.Module):
    """Every frame becomes two, but the first one: 1 + m frames become 1 + 2m."""

    def __init__(self, dim: int, /, *, kernel_frames: int) -> None:
        super().__init__()
        self.conv = TimeConv(dim, 2 * dim, kernel_frames=kernel_frames)

    def forward(self, frames_BTCHW: Tensor, cache: Tensor | None, /) -> tuple[Tensor, Tensor]:
        """Return twice the frames, and the cache; without a cache, one less."""
        pairs, following = self.conv(frames_BTCHW, cache)
        doubled = rearrange(pairs, "B T (two C) H W -> B (T two) C H W", two=2)
        return doubled[:, 1:] if cache is None else doubled, following


class TimeChain(nn.ModuleList):
    """Layers one after the other: those over time with their caches, others frame by frame."""

    def forward(self, frames_BTCHW: Tensor, caches: Caches | None, /) -> tuple[Tensor, Caches]:
        """Return the frames after all layers, and the caches for the next call."""
        before = iter(caches) if caches is not None else None
        after: list[Tensor] = []
        for layer in self:
            if isinstance(layer, TimeConv | TimeBlock | TimeDoubling):
                frames_BTCHW, cache = layer(frames_BTCHW, next(before) if before else None)
                after.append(cache)
            else:
                images = layer(rearrange(frames_BTCHW, "B T C H W -> (B T) C H W"))
                frames_BTCHW = rearrange(images, "(B T) C H W -> B T C H W", B=len(frames_BTCHW))
        return frames_BTCHW, tuple(after)
