"""What the tokenizer is trained to keep. Each a pure function.

    true frames_BTHWC                                   ->  weight_B1THW, what counts
    true and reconstructed video_BCTHW, weight_B1THW    ->  a scalar

What moves is a rule of metrics.py, so that training and measuring mean the same pixels.
"""

from einops import rearrange
from torch import Tensor

from .metrics import moving_pixels


def motion_weight(frames_BTHWC: Tensor, /, *, extra: float) -> Tensor:
    """Return weight_B1THW, float32 of mean 1: the moving pixels of each clip weigh more.

    In an unweighted mean a ball of two pixels is worth less than the noise of the background, and
    a tokenizer that erases it scores better (measured in docs/log.md); 1 + extra on the pixels of
    moving things keeps them. What moves is what `metrics.moving_pixels` says, which the moving
    PSNR is measured on.

    Args:
        frames_BTHWC: the true frames, uint8.
        extra: weight of a moving pixel above that of a still one, at least 0.
    """
    moving_B1THW = rearrange(moving_pixels(frames_BTHWC), "B T H W -> B 1 T H W")
    weight_B1THW = 1 + extra * moving_B1THW.float()
    return weight_B1THW / weight_B1THW.mean()


def reconstruction_loss(true_BCTHW: Tensor, recon_BCTHW: Tensor, weight_B1THW: Tensor, /) -> Tensor:
    """Return the weighted mean of 0.5 |error| + error^2."""
    error = recon_BCTHW.float() - true_BCTHW
    return (weight_B1THW * (0.5 * error.abs() + error.square())).mean()
