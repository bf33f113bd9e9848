"""What the tokenizer is trained to keep. Each a pure function.

    true frames_BTHWC                                   ->  weight_B1THW, what counts
    true and reconstructed video_BCTHW, weight_B1THW    ->  a scalar
    what a discriminator says of true and made patches  ->  a scalar

What moves is a rule of metrics.py, so that training and measuring mean the same pixels. Every loss
is a mean over clips of one size, so the mean over parts of a batch, each by its share of the clips,
is that of the whole.
"""

from einops import rearrange
from torch import Tensor
from torch.nn.functional import avg_pool2d, relu

from .metrics import moving_pixels


def pixel_weight(frames_BTHWC: Tensor, /, *, motion: float) -> Tensor:
    """Return weight_B1THW, float32, at least 1: how much each pixel counts against the others.

    In an unweighted mean a ball of two pixels is worth less than the noise of the background, and
    a tokenizer that erases it scores better (measured in docs/log.md); 1 + motion on the pixels of
    moving things keeps them. What moves is what `metrics.moving_pixels` says, which the moving
    PSNR is measured on. Whoever trains divides by the mean over the whole batch, so that the loss
    keeps its scale.

    Args:
        frames_BTHWC: the true frames, uint8.
        motion: weight of a moving pixel above that of a still one, at least 0.
    """
    moving_B1THW = rearrange(moving_pixels(frames_BTHWC), "B T H W -> B 1 T H W")
    return 1 + motion * moving_B1THW.float()


def hard_pixel_weight(true_BCTHW: Tensor, recon_BCTHW: Tensor, /, *, power: float) -> Tensor:
    """Return weight_B1THW, float32: the present squared error to a power; no gradient.

    What is small and rare (the monster of a room, four pixels wide) is a pixel's whole error and
    nothing in the mean; pixels that are still wrong count more until they are right. Whoever
    trains brings the mean back to what it was. Source: the idea of the focal loss
    (arXiv:1708.02002), on a regression's error.

    Args:
        true_BCTHW: in [-1, 1].
        recon_BCTHW: of the same shape.
        power: at least 0; at 0.5 a pixel twice as wrong weighs twice.
    """
    error = (recon_BCTHW.detach().float() - true_BCTHW).square().mean(1, keepdim=True)
    return error.pow(power)


def reconstruction_loss(true_BCTHW: Tensor, recon_BCTHW: Tensor, weight_B1THW: Tensor, /) -> Tensor:
    """Return the weighted mean of 0.5 |error| + error^2."""
    error = recon_BCTHW.float() - true_BCTHW
    return (weight_B1THW * (0.5 * error.abs() + error.square())).mean()


def gradient_loss(true_BCTHW: Tensor, recon_BCTHW: Tensor, weight_B1THW: Tensor, /) -> Tensor:
    """Return the weighted mean of |error| in the differences of neighbours, down plus across.

    A difference counts as its second pixel does. A blurred edge is wrong in few pixels by little,
    but in all its differences. Source: the gradient difference loss of Mathieu et al.
    (arXiv:1511.05440) with exponent 1, on signed differences.
    """
    error = recon_BCTHW.float() - true_BCTHW
    down = weight_B1THW[..., 1:, :] * error.diff(dim=-2).abs()
    across = weight_B1THW[..., 1:] * error.diff(dim=-1).abs()
    return down.mean() + across.mean()


def multiscale_loss(true_BCTHW: Tensor, recon_BCTHW: Tensor, weight_B1THW: Tensor, /) -> Tensor:
    """Return the mean of `reconstruction_loss` at half and at quarter size.

    Frames are averaged over squares of 2 and 4 pixels, and so are the weights; pixels at the edge
    that fill no square are left out.
    """
    losses = [
        reconstruction_loss(
            _shrink(true_BCTHW, size), _shrink(recon_BCTHW.float(), size),
            _shrink(weight_B1THW, size),
        )
        for size in (2, 4)
    ]  # fmt: skip
    return (losses[0] + losses[1]) / 2


def adversarial_loss(made: Tensor, /) -> Tensor:
    """Return what the tokenizer pays for what a discriminator says of its patches: minus the mean.

    Args:
        made: one number a patch, above 0 where it is taken for true.
    """
    return -made.float().mean()


def hinge_loss(true: Tensor, made: Tensor, /) -> Tensor:
    """Return what the discriminator pays: true patches shall be above 1, made ones below -1.

    Source: the hinge loss of Lim and Ye (arXiv:1705.02894), halved as in VQGAN (arXiv:2012.09841).
    """
    return 0.5 * (relu(1 - true.float()).mean() + relu(1 + made.float()).mean())


def _shrink(video_BCTHW: Tensor, size: int) -> Tensor:
    """Return the means over squares of `size` pixels."""
    images = rearrange(video_BCTHW, "B C T H W -> (B T) C H W")
    return rearrange(avg_pool2d(images, size), "(B T) C H W -> B C T H W", B=len(video_BCTHW))
