"""Tells true frames from made ones, patch by patch; asked only while a tokenizer trains.

The tokenizer is paid for patches that it takes for true (losses.py).

    video_BCTHW float, about [-1, 1]  ->  verdicts_N, one a patch: above 0 for true

Every frame is judged by itself, and every patch by 18 x 18 pixels (and the contrast of its frame,
through the norms): texture, not content. No verdict depends on another frame or clip.

Source: PatchGAN (Isola et al., arXiv:1611.07004), one layer shorter for small frames and with
group norm for batch norm.
"""

from einops import rearrange
from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Two halvings by 4x4 kernels, a 3x3 kernel, a verdict for each place."""

    def __init__(self, width: int = 64) -> None:
        """Build it with fresh weights.

        Args:
            width: channels of the first layer; the next has twice as many, the third four times.
        """
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.GroupNorm(1, 2 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 4 * width, 3, padding=1),
            nn.GroupNorm(1, 4 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(4 * width, 1, 1),
        )

    def forward(self, video_BCTHW: Tensor, /) -> Tensor:
        """Return verdicts_N, one for every 4 x 4 pixels of every frame."""
        verdicts: Tensor = self.layers(rearrange(video_BCTHW, "B C T H W -> (B T) C H W"))
        return verdicts.flatten()
