"""Causal 3D convolution, its cache, and the residual block of the 2D halves.

    latents_BZthw, cache of the k - 1 frames before  ->  latents_BZthw, cache for the next call

Time is padded in front only, so no output depends on a later frame; with the cache, any split of
a stream gives what the whole gives. Before the first frame stands the first frame, repeated: a
video starts at rest, and zeros would be a flash.

Source: genie2-pytorch's design, kernel (k, 1, 1) around the quantizer; causal padding as in
MAGVIT-v2 (arXiv:2310.05737, section 3.2), which pads with zeros.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import silu


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
        self, latents_BZthw: Tensor, cache: Tensor | None = None, /
    ) -> tuple[Tensor, Tensor | None]:
        """Return the filtered latents and the cache for the frames that follow."""
        if self.context == 0:
            return super().forward(latents_BZthw), None
        if cache is None:
            cache = latents_BZthw[:, :, :1].expand(-1, -1, self.context, -1, -1)
        padded = torch.cat([cache, latents_BZthw], dim=2)
        return super().forward(padded), padded[:, :, -self.context :]


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
