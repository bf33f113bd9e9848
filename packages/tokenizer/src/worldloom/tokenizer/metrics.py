"""How close frames are to the true ones, and how codes are used. Pure functions.

    true and other frames_BTHWC  ->  squared_error_BTHW  ->  a mean   ->  decibels
    true and other frames_BTHWC  ->  small_objects       ->  counts   ->  numbers
    codes_Bthw or codes_BthwQ    ->  count_codes         ->  counts   ->  numbers

Errors are in [0, 1] of the pixel range. A PSNR over many frames is that of their mean squared
error: means of decibels would let a few perfect frames outweigh many poor ones. To pool over
batches, add up squared errors and counts, then turn them into a number once. A share of nothing
is None.
"""

import math
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import conv2d, max_pool2d, pad
from worldloom.common import CodeSpec, FormatError, ShapeError, bind_shape

MOVING = 0.1
"""A pixel moves where a channel is further than this part of the range from its clip's median."""

LIMIT_DB = 100.0
"""PSNR of equal frames: true infinity is no JSON value, and no uint8 difference comes near."""


def squared_error(true_BTHWC: Tensor, other_BTHWC: Tensor, /) -> Tensor:
    """Return error_BTHW, float32: squared differences in [0, 1], the mean over the channels.

    Raises:
        ShapeError: if the two are not uint8 of one shape.
    """
    require_alike(true_BTHWC, other_BTHWC)
    return ((true_BTHWC.float() - other_BTHWC.float()) / 255).square().mean(-1)


def require_alike(true_BTHWC: Tensor, other_BTHWC: Tensor) -> None:
    """Refuse frames that cannot be compared."""
    if true_BTHWC.shape != other_BTHWC.shape:
        raise ShapeError(
            f"frames: shapes {tuple(true_BTHWC.shape)} and {tuple(other_BTHWC.shape)} differ"
        )
    if true_BTHWC.dtype != torch.uint8 or other_BTHWC.dtype != torch.uint8:
        raise ShapeError(
            f"frames: dtypes {true_BTHWC.dtype} and {other_BTHWC.dtype}, must be uint8 in [0, 255]"
        )


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
    return _far(true_BTHWC, clip_median(true_BTHWC).unsqueeze(1))


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


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallObjects:
    """Counts of small moving things, true and reconstructed; those of batches are added up."""

    frames: int
    """All frames looked at."""
    small_pixels: int
    """Pixels of small moving things in the true frames."""
    recalled_pixels: int
    """Those that look more like the truth than like the background."""
    false_pixels: int
    """Pixels that look like a moving thing where nothing moves."""
    small_frames: int
    """Frames that have small pixels."""
    recalled_frames: int
    """Those in which at least half of the small pixels are recalled."""

    def __add__(self, other: "SmallObjects", /) -> "SmallObjects":
        """Return the counts of both."""
        return SmallObjects(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        )

    def numbers(self) -> dict[str, float | None]:
        """Return shares; None where there is nothing that they could be a share of.

        recall                      of the small pixels, those recalled
        frame_recall                of the frames with small pixels, those with half of them or more
        false_share                 false pixels for each small one; may be above 1
        false_pixels_per_frame      over all frames, also those without small things
        """
        return {
            "recall": _share(self.recalled_pixels, self.small_pixels),
            "frame_recall": _share(self.recalled_frames, self.small_frames),
            "false_share": _share(self.false_pixels, self.small_pixels),
            "false_pixels_per_frame": _share(self.false_pixels, self.frames),
        }


class SmallMasks(NamedTuple):
    """Where small moving things are kept, lost and invented; see `small_object_masks`."""

    moving_BTHW: Tensor
    """All that moves, in truth."""
    small_BTHW: Tensor
    """Of the moving ones."""
    recalled_BTHW: Tensor
    """Of the small ones."""
    false_BTHW: Tensor


def small_object_masks(
    true_BTHWC: Tensor, other_BTHWC: Tensor, /, *, narrower_than: int = 5
) -> SmallMasks:
    """Mark the pixels of small moving things, and what another clip makes of them.

    Moving pixels (see `moving_pixels`) that touch, or lie at most two pixels apart, are one thing;
    it is small if it holds no square of `narrower_than` x `narrower_than` pixels: a ball, a bullet,
    a paddle, a far-off monster. The gaps are closed because the texture of a large moving wall
    resembles the background here and there, and would fall to pieces that look like small things.
    A small pixel is recalled where the other clip is nearer to the truth than to the median of the
    true clip, by squared distance over the channels: of an erased ball the median is left. A pixel
    is false where nothing moves in truth, nor in the eight around it, but the other clip is over
    MOVING from the median: an invented ball, one in the wrong place, and a background of the wrong
    colour.

    Args:
        true_BTHWC: the true clips, uint8; their median over T is the background.
        other_BTHWC: the same clips reconstructed, uint8.
        narrower_than: pixels, at least 1; 5 suits frames of 64 x 64.

    Raises:
        ShapeError: if the two are not uint8 of one shape.
        ValueError: if narrower_than is below 1.
    """
    require_alike(true_BTHWC, other_BTHWC)
    if narrower_than < 1:
        raise ValueError(f"narrower_than must be at least 1 pixel, got {narrower_than}")
    median_B1HWC = clip_median(true_BTHWC).unsqueeze(1)
    moving_BTHW = _far(true_BTHWC, median_B1HWC)
    small_BTHW = moving_BTHW & ~_large(moving_BTHW, narrower_than)
    to_true_BTHW = _squared_distance(other_BTHWC, true_BTHWC)
    to_median_BTHW = _squared_distance(other_BTHWC, median_B1HWC)
    return SmallMasks(
        moving_BTHW=moving_BTHW,
        small_BTHW=small_BTHW,
        recalled_BTHW=small_BTHW & (to_true_BTHW < to_median_BTHW),
        false_BTHW=_far(other_BTHWC, median_B1HWC) & ~_grown(moving_BTHW),
    )


def count_small_objects(masks: SmallMasks, /) -> SmallObjects:
    """Return the counts of masks."""
    small_BT, recalled_BT = masks.small_BTHW.sum((2, 3)), masks.recalled_BTHW.sum((2, 3))
    return SmallObjects(
        frames=small_BT.numel(),
        small_pixels=int(small_BT.sum()),
        recalled_pixels=int(recalled_BT.sum()),
        false_pixels=int(masks.false_BTHW.sum()),
        small_frames=int((small_BT > 0).sum()),
        recalled_frames=int(((small_BT > 0) & (2 * recalled_BT >= small_BT)).sum()),
    )


def small_objects(
    true_BTHWC: Tensor, other_BTHWC: Tensor, /, *, narrower_than: int = 5
) -> SmallObjects:
    """Count the pixels of small moving things that another clip keeps, loses and invents.

    Arguments and meaning as in `small_object_masks`. Add up the counts of all batches, then ask
    for their `numbers()`.
    """
    return count_small_objects(
        small_object_masks(true_BTHWC, other_BTHWC, narrower_than=narrower_than)
    )


def _large(moving_BTHW: Tensor, size: int) -> Tensor:
    """Return large_BTHW, bool: the things that hold a square of size x size, gaps included."""
    things_BTHW = ~_grown(~_grown(moving_BTHW))
    large_BTHW = _opened(things_BTHW, size)
    while True:  # from the squares to the ends of the things they lie in
        more_BTHW = _grown(large_BTHW) & things_BTHW
        if torch.equal(more_BTHW, large_BTHW):
            return large_BTHW
        large_BTHW = more_BTHW


def _grown(mask_BTHW: Tensor) -> Tensor:
    """Return the mask with the eight neighbours of each of its pixels."""
    wide_BTHW = mask_BTHW.clone()
    wide_BTHW[..., 1:] |= mask_BTHW[..., :-1]
    wide_BTHW[..., :-1] |= mask_BTHW[..., 1:]
    grown_BTHW = wide_BTHW.clone()
    grown_BTHW[..., 1:, :] |= wide_BTHW[..., :-1, :]
    grown_BTHW[..., :-1, :] |= wide_BTHW[..., 1:, :]
    return grown_BTHW


def _opened(mask_BTHW: Tensor, size: int) -> Tensor:
    """Return where the mask holds a whole square of size x size: its opening."""
    if min(mask_BTHW.shape[2:]) < size:
        return torch.zeros_like(mask_BTHW)
    corner_BTHW = 1 - max_pool2d((~mask_BTHW).float(), size, stride=1)
    # Each corner stands for the square below and right of it; the margin makes room for the others.
    margin = (size - 1,) * 4
    return max_pool2d(pad(corner_BTHW, margin), size, stride=1).bool()


def _far(frames_BTHWC: Tensor, median_B1HWC: Tensor) -> Tensor:
    """Return far_BTHW, bool: where a channel is over MOVING from the median."""
    low, high = torch.minimum(frames_BTHWC, median_B1HWC), torch.maximum(frames_BTHWC, median_B1HWC)
    return (high - low > int(MOVING * 255)).any(-1)  # whole levels: above 25.5 is above 25


def _squared_distance(one_BTHWC: Tensor, other_BTHWC: Tensor) -> Tensor:
    """Return distance_BTHW, int32, exact, over the channels."""
    return (one_BTHWC.int() - other_BTHWC.int()).square().sum(-1, dtype=torch.int32)


def _share(part: int, whole: int) -> float | None:
    """Return part / whole, None of nothing."""
    return part / whole if whole else None


def ssim(true_BTHWC: Tensor, other_BTHWC: Tensor, /) -> float:
    """Return the mean structural similarity, in [-1, 1] (Wang et al., 2004).

    Gaussian windows of 11 x 11 with sigma 1.5, wholly inside the frame, every channel by itself;
    K1 = 0.01, K2 = 0.03: the settings of the paper.

    Raises:
        ShapeError: if the two are not uint8 of one shape, at least 11 x 11.
    """
    require_alike(true_BTHWC, other_BTHWC)
    height, width = true_BTHWC.shape[2:4]
    if min(height, width) < 11:
        raise ShapeError(
            f"frames: {height} x {width} pixels; ssim looks through windows of 11 x 11, so they "
            "must be at least that large"
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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CodeCounts:
    """How often each code occurs and how many cells change; those of clips are added up."""

    counts_QV: Tensor
    """int64: how often each code of each level occurs."""
    changed_Q: Tensor
    """int64: cells whose code of a level is another than one latent frame before."""
    changed: int
    """Cells of which any level is."""
    compared: int
    """Cells that have a latent frame before theirs."""

    def __add__(self, other: "CodeCounts", /) -> "CodeCounts":
        """Return the counts of both."""
        return CodeCounts(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        )

    def numbers(self) -> dict[str, Any]:
        """Return shares and perplexity, of all levels together and under "levels" of each.

        codes_used_fraction     of the codebook's entries, those that occur
        perplexity              exp of the entropy of the codes: as many equally frequent ones would
                                be as varied; of several levels, the geometric mean
        code_change_rate        of the cells, those whose code changes from one latent frame to the
                                next, in any level; None where there is only one frame
        """
        levels = [usage_of(counts_V) for counts_V in self.counts_QV]
        used = [fraction for fraction, _ in levels]
        perplexities = [perplexity for _, perplexity in levels]
        return {
            "codes_used_fraction": sum(used) / len(used),
            "perplexity": math.exp(sum(map(math.log, perplexities)) / len(perplexities)),
            "code_change_rate": _share(self.changed, self.compared),
            "levels": {
                "codes_used_fraction": used,
                "perplexity": perplexities,
                "code_change_rate": [_share(n, self.compared) for n in self.changed_Q.tolist()],
            },
        }


def count_codes(codes_Bthw: Tensor, spec: CodeSpec, /) -> CodeCounts:
    """Return the counts of codes.

    Args:
        codes_Bthw: integers in [0, V), t >= 1; codes_BthwQ where the spec has levels.
        spec: of the codes.

    Raises:
        ShapeError: if the codes are not on the spec's grid.
        FormatError: if one is outside the vocabulary.
    """
    letters = "B t h w Q" if spec.num_levels > 1 else "B t h w"
    levels = {"Q": spec.num_levels} if spec.num_levels > 1 else {}
    bind_shape("codes", codes_Bthw, letters, h=spec.grid_height, w=spec.grid_width, **levels)
    codes_BthwQ = codes_Bthw.long() if levels else codes_Bthw.long().unsqueeze(-1)
    low, high = codes_BthwQ.min(), codes_BthwQ.max()
    if low < 0 or high >= spec.vocab_size:
        raise FormatError(
            f"codes: {int(low)} to {int(high)}, but the vocabulary has {spec.vocab_size}; "
            "the tokenizer's spec does not tell the truth"
        )
    differ_BthwQ = codes_BthwQ[:, 1:] != codes_BthwQ[:, :-1]
    return CodeCounts(
        counts_QV=torch.stack(
            [
                torch.bincount(codes_N, minlength=spec.vocab_size)
                for codes_N in codes_BthwQ.flatten(0, -2).unbind(-1)
            ]
        ),
        changed_Q=differ_BthwQ.sum((0, 1, 2, 3)),
        changed=int(differ_BthwQ.any(-1).sum()),
        compared=differ_BthwQ[..., 0].numel(),
    )


def usage(codes: Tensor, vocab_size: int, /) -> tuple[float, float]:
    """Return (fraction of the codes that occur, perplexity of their distribution).

    Args:
        codes: integers in [0, V), any shape, at least one.
        vocab_size: number of codes, V.
    """
    return usage_of(torch.bincount(codes.flatten(), minlength=vocab_size))


def usage_of(counts_V: Tensor, /) -> tuple[float, float]:
    """Return (fraction of the codes that occur, perplexity) of how often each code occurs."""
    probs_V = counts_V.double() / counts_V.sum()
    perplexity = torch.special.entr(probs_V).sum().exp()
    return float((counts_V > 0).double().mean()), float(perplexity)
