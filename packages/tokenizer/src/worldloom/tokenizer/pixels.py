"""Pixels change their range in exactly two places, and their size in one; all three are here.

    frames_BTHWC uint8             -> to_video      -> video_BCTHW float32 in [-1, 1]
    video_BCTHW                    -> to_frames     -> frames_BTHWC uint8
    frames_THWC uint8, any size    -> resize_frames -> frames_THWC uint8 of height x width

to_frames(to_video(frames)) == frames for every grey level. Resizing averages over the area that a
new pixel covers (bilinear with antialiasing, in float32, then rounded), so that a ball of two
pixels fades instead of vanishing between the samples.
"""

from typing import get_args

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional
from worldloom.common import ConfigError, ResizeRule, ShapeError, bind_shape

Frames = npt.NDArray[np.uint8]

_MOST_CUT = 16
"""A picture is scaled before it is cut, unless that made it so many times what is kept."""


def to_video(frames_BTHWC: Tensor, /) -> Tensor:
    """Return video_BCTHW, float32 in [-1, 1], of uint8 frames.

    Raises:
        ShapeError: if the frames are not (B, T, H, W, C=3) or not uint8.
    """
    bind_shape("frames", frames_BTHWC, "B T H W C", C=3)
    if frames_BTHWC.dtype != torch.uint8:
        raise ShapeError(f"frames: dtype {frames_BTHWC.dtype}, must be torch.uint8 (0 to 255)")
    video_BCTHW = rearrange(frames_BTHWC, "B T H W C -> B C T H W")
    return video_BCTHW.to(torch.float32) / 127.5 - 1


def to_frames(video_BCTHW: Tensor, /) -> Tensor:
    """Return frames_BTHWC, uint8, of a float video; values outside [-1, 1] are clamped.

    Raises:
        ShapeError: if the video is not (B, C=3, T, H, W).
    """
    bind_shape("video", video_BCTHW, "B C T H W", C=3)
    # Round, never truncate: truncation darkens 63 of the 256 grey levels by one, every round trip.
    levels = ((video_BCTHW.to(torch.float32) + 1) * 127.5).round().clamp(0, 255)
    return rearrange(levels.to(torch.uint8), "B C T H W -> B T H W C").contiguous()


def resize_frames(frames_THWC: Frames, /, *, height: int, width: int, rule: ResizeRule) -> Frames:
    """Return the frames as uint8 of height x width; frames that fit come back as they are.

    Args:
        frames_THWC: uint8, RGB, any number of frames.
        height: rows wanted, H.
        width: columns wanted, W.
        rule: what becomes of another size; see `worldloom.common.ResizeRule`.

    Raises:
        ShapeError: if the frames are not uint8 of (T, H, W, C=3).
        ConfigError: if the size differs and the rule is "exact", or the rule is not known.
    """
    size = bind_shape("frames", frames_THWC, "T H W C", C=3)
    if frames_THWC.dtype != np.uint8:
        raise ShapeError(f"frames: dtype {frames_THWC.dtype}, must be uint8 (0 to 255)")
    if rule not in get_args(ResizeRule):
        raise ConfigError(
            f"resize rule {rule!r} is unknown; there are {', '.join(get_args(ResizeRule))}"
        )
    if (size["H"], size["W"]) == (height, width):
        return frames_THWC
    if rule == "exact":
        raise ConfigError(
            f"frames are {size['H']}x{size['W']} (height x width), wanted are {height}x{width}, "
            "and the resize rule is 'exact', because any other changes the picture; "
            "choose stretch, crop or pad, or ask for their own size"
        )
    if rule == "stretch":
        return _scale(frames_THWC, height, width)
    scales = height / size["H"], width / size["W"]
    scale = max(scales) if rule == "crop" else min(scales)
    inner_height, inner_width = (max(1, round(size[axis] * scale)) for axis in "HW")
    if rule == "crop" and inner_height * inner_width > _MOST_CUT * height * width:
        # Of a stripe nearly all would be scaled in vain, a million pixels a row: it is cut first.
        kept = (max(1, round(wanted / scale)) for wanted in (height, width))
        return _scale(_middle(frames_THWC, *kept), height, width)
    scaled_THWC = _scale(frames_THWC, inner_height, inner_width)
    if rule == "crop":
        return np.ascontiguousarray(_middle(scaled_THWC, height, width))
    padded_THWC = np.zeros((size["T"], height, width, 3), np.uint8)
    top, left = (height - inner_height) // 2, (width - inner_width) // 2
    padded_THWC[:, top : top + inner_height, left : left + inner_width] = scaled_THWC
    return padded_THWC


def _middle(frames_THWC: Frames, height: int, width: int) -> Frames:
    """Return what remains of frames at least so large when all sides are cut alike."""
    top, left = (frames_THWC.shape[1] - height) // 2, (frames_THWC.shape[2] - width) // 2
    return frames_THWC[:, top : top + height, left : left + width]


def _scale(frames_THWC: Frames, height: int, width: int) -> Frames:
    """Return frames scaled axis by axis."""
    if frames_THWC.shape[1:3] == (height, width):
        return frames_THWC
    video_TCHW = rearrange(
        torch.from_numpy(np.require(frames_THWC, requirements=["C", "W"])), "T H W C -> T C H W"
    )
    scaled_THWC = torch.empty((len(frames_THWC), height, width, 3), dtype=torch.uint8)
    levels_TCHW = rearrange(scaled_THWC, "T H W C -> T C H W")
    # A few frames at a time stay in the processor's cache: a fifth faster than all at once.
    pieces = zip(torch.split(video_TCHW, 8), torch.split(levels_TCHW, 8), strict=True)
    for few, levels in pieces:
        # float32: torch's kernel for uint8 rounds by itself, differently from processor to
        # processor.
        scaled = functional.interpolate(
            few.to(torch.float32), (height, width), mode="bilinear", antialias=True
        )
        levels.copy_(scaled.round_().clamp_(0, 255))
    return scaled_THWC.numpy()
