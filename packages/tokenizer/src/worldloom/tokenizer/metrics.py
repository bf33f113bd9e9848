"""How close frames are to the true ones, and how many codes are used. Pure functions.

    true and other frames_BTHWC  ->  squared_error_BTHW  ->  a mean  ->  decibels

Everything is in [0, 1] of the pixel range. A PSNR over many frames is that of their mean squared
error: means of decibels would let a few perfect frames outweigh many poor ones. To pool over
batches, add up squared errors and counts, then call `decibels` once.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import conv2d
from worldloom.common import ShapeError

MOVING = 0.1
"""A pixel moves where a channel is further than this part of the range from its clip's median."""

LIMIT_DB = 100.0
"""PSNR of equal frames: true infinity is no JSON value, and no uint8 difference comes near."""


def squared_error(true_BTHWC: Tensor, other_BTHWC: Tensor, /) -> Tensor:
    """Return error_BTHW, float32: squared differences in [0, 1], the mean over the channels.

    Raises:
        ShapeError: if the two are not uint8 of one shape.
    """
    if true_BTHWC.shape != other_BTHWC.shape:
        raise ShapeError(
            f"frames: shapes {tuple(true_BTHWC.shape)} and {tuple(other_BTHWC.shape)} differ"
        )
    if true_BTHWC.dtype != torch.uint8 or other_BTHWC.dtype != torch.uint8:
        raise ShapeError(
            f"frames: dtypes {true_BTHWC.dtype} and {other_BTHWC.dtype}, must be uint8 in [0, 255]"
        )
    return ((true_BTHWC.float() - other_BTHWC.float()) / 255).square().mean(-1)


def decibels(mean_squared_error: float, /) -> float:
    """Return the PSNR in dB of a mean squared error in [0, 1], at most LIMIT_DB."""
    return min(LIMIT_DB, -10 * math.log10(max(mean_squared_error, 1e-30)))


def psnr(true_BTHWC: Tensor, other_BTHWC: Tensor, /) -> float:
    """Return the peak signal-to-noise ratio in dB, of the mean over all pixels."""
    return decibels(float(squared_error(true_BTHWC, other_BTHWC).mean(dtype=torch.float64)))


def moving_pixels(true_BTHWC: Tensor, /) -> Tensor:
    """Return moving_BTHW, bool: where a channel is over MOVING from the median of its clip, T.

    Backgrounds are most of a game's pixels and easy; what moves is what is played. The same rule
    weighs the training loss.
    """
    median_B1HWC = clip_median(true_BTHWC).unsqueeze(1)
    low, high = torch.minimum(true_BTHWC, median_B1HWC), torch.maximum(true_BTHWC, median_B1HWC)
    return (high - low > int(MOVING * 255)).any(-1)  # whole levels: above 25.5 is above 25


def clip_median(frames_BTHWC: Tensor, /) -> Tensor:
    """Return median_BHWC, uint8: of every pixel over its clip; of two in the middle, the lower."""
    if frames_BTHWC.shape[1] > 16:
        return frames_BTHWC.median(dim=1).values
    # An odd-even transposition sort by whole frames: for the few frames of a training clip it is
    # 30 times faster than torch.median, which was a twentieth of an update.
    ranked = list(frames_BTHWC.unbind(1))
    for turn in range(len(ranked)):
        for i in range(turn % 2, len(ranked) - 1, 2):
            a, b = ranked[i], ranked[i + 1]
            ranked[i], ranked[i + 1] = torch.minimum(a, b), torch.maximum(a, b)
    return ranked[(len(ranked) - 1) // 2]


def moving_psnr(true_BTHWC: Tensor, other_BTHWC: Tensor, /) -> float:
    """Return the PSNR in dB over the moving pixels; LIMIT_DB where none moves."""
    error_BTHW = squared_error(true_BTHWC, other_BTHWC)
    moving_BTHW = moving_pixels(true_BTHWC)
    if not moving_BTHW.any():
        return LIMIT_DB
    return decibels(float(error_BTHW[moving_BTHW].mean(dtype=torch.float64)))


def ssim(true_BTHWC: Tensor, other_BTHWC: Tensor, /) -> float:
    """Return the mean structural similarity, in [-1, 1] (Wang et al., 2004).

    Gaussian windows of 11 x 11 with sigma 1.5, wholly inside the frame, every channel by itself;
    K1 = 0.01, K2 = 0.03: the settings of the paper.

    Raises:
        ShapeError: if the two are not uint8 of one shape, at least 11 x 11.
    """
    squared_error(true_BTHWC[:0], other_BTHWC[:0])  # the same demands
    height, width = true_BTHWC.shape[2:4]
    if true_BTHWC.shape != other_BTHWC.shape or min(height, width) < 11:
        raise ShapeError(
            f"frames: shapes {tuple(true_BTHWC.shape)} and {tuple(other_BTHWC.shape)}; "
            "ssim needs equal ones of at least 11 x 11 pixels"
        )
    offsets = torch.arange(-5, 6, dtype=torch.float64, device=true_BTHWC.device)
    window = torch.exp(-offsets.square() / (2 * 1.5**2))
    window = window / window.sum()

    def blur(planes_N1HW: Tensor) -> Tensor:
        return conv2d(conv2d(planes_N1HW, window.view(1, 1, 11, 1)), window.view(1, 1, 1, 11))

    total, count = 0.0, 0
    # One clip at a time, in float64: the variances are differences of almost equal numbers.
    for true, other in zip(true_BTHWC, other_BTHWC, strict=True):
        x = true.double().div(255).movedim(-1, 1).flatten(0, 1).unsqueeze(1)
        y = other.double().div(255).movedim(-1, 1).flatten(0, 1).unsqueeze(1)
        mean_x, mean_y = blur(x), blur(y)
        var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
        covariance = blur(x * y) - mean_x * mean_y
        luminance = (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
        structure = (2 * covariance + 0.03**2) / (var_x + var_y + 0.03**2)
        total += float((luminance * structure).sum())
        count += mean_x.numel()
    return total / count


def usage(codes: Tensor, vocab_size: int, /) -> tuple[float, float]:
    """Return (fraction of the codes that occur, perplexity of their distribution).

    Args:
        codes: integers in [0, V), any shape, at least one.
        vocab_size: number of codes, V.
    """
    counts_V = torch.bincount(codes.flatten(), minlength=vocab_size).double()
    probs_V = counts_V / counts_V.sum()
    perplexity = torch.special.entr(probs_V).sum().exp()
    return float((counts_V > 0).double().mean()), float(perplexity)
