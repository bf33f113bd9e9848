"""Where play may begin: moments of recorded episodes, or a picture.

    SHARDS | EPISODES  -> moments       -> StartPoints, unlike each other
    a picture's bytes  -> picture_start -> StartPoint

A start holds its prompt alone, so that a gallery of long episodes is read in moments and takes no
memory; what truly followed is read when somebody wants to compare with it.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from worldloom.common import ConfigError, FormatError, Frames

from .protocol import MAX_PICTURE_BYTES

if TYPE_CHECKING:
    from ..starts import Moment, Start
    from ..world import World

_PICTURE_PIXELS = 1 << 24
"""4096 x 4096: a file of a few kB can claim more pixels than there is memory."""
_PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""What browsers send. Pillow reads many more kinds, whose readers a stranger need not try."""
_PROMPT_FRAMES = 4
_CANDIDATES = 2
"""Moments looked at for each that is chosen."""
_APART_FRAMES = 16
"""Pixel frames between two moments of an episode."""
_GLANCE = 8
"""Pixels a side at which two frames are compared."""


@dataclass(frozen=True, slots=True)
class StartPoint:
    """Where play may begin."""

    start: "Start"
    """The prompt alone; what followed it, `read_truth` has."""
    frame_HWC: Frames
    """The prompt's last frame: decoded, or where frames are known, the real one."""
    label: str
    """For people: which moment of what."""
    moment: "Moment | None" = None
    """Which part of an episode; None for a picture."""
    source: Path | None = None
    """The token shards or episodes that it is from."""

    def read_truth(self, world: "World", /) -> "Start":
        """Read the whole moment: the same prompt, with its frames and those of all that followed.

        Raises:
            ConfigError: if nothing followed, because it is a picture.
        """
        from ..starts import read_start

        if self.moment is None or self.source is None:
            raise ConfigError(
                f"{self.label}: is a picture, so nobody knows what followed; start from a recorded "
                "moment to compare with it"
            )
        return read_start(self.source, world, replace(self.moment, sequel_steps=None))


def moments(path: Path, world: "World", /, *, count: int) -> list[StartPoint]:
    """Return moments of held-out episodes (of any, if none is), unlike each other, in their order.

    Args:
        path: token shards or episodes.
        world: whose prompts they are.
        count: at most so many.

    Raises:
        FormatError: if it is neither, damaged, or no episode is long enough.
        MismatchError: if it was recorded with other actions, or written by another tokenizer.
    """
    from ..starts import held_out_moments

    prompt_frames = min(_PROMPT_FRAMES, world.model.config.context_frames)
    all_moments = held_out_moments(
        path, world, prompt_frames=prompt_frames, apart_frames=_APART_FRAMES
    )
    stride = max(1, len(all_moments) // (_CANDIDATES * count))
    points = _points(path, world, all_moments[::stride][: _CANDIDATES * count])
    chosen = _unlike([point.frame_HWC for point in points], count)
    return [points[index] for index in sorted(chosen)]


def picture_start(content: bytes, world: "World", /) -> StartPoint:
    """Return a prompt of one frame: a picture, turned as its camera says, at the world's size.

    Args:
        content: a PNG, JPEG, WebP, GIF (its first frame) or BMP; bytes of a stranger.
        world: encodes it.

    Raises:
        FormatError: if it is none of these, or larger than `MAX_PICTURE_BYTES` or 4096 x 4096
            pixels.
        MismatchError: if the tokenizer takes frames of one size only, and it has another.
    """
    from ..starts import start_from_picture

    start = start_from_picture(_read_picture(content), world, source="a picture")
    frames_BTHWC = world.tokenizer.decode(start.codes_thw[None], num_frames=1)
    return StartPoint(start, frames_BTHWC[0, 0].cpu().numpy(), start.source)


def _read_picture(content: bytes) -> Frames:
    """Return frame_HWC of a picture, whose size is looked at before it is unpacked."""
    from PIL import Image, ImageOps

    if len(content) > MAX_PICTURE_BYTES:
        raise FormatError(
            f"the picture: {len(content)} bytes, must be at most {MAX_PICTURE_BYTES}; a start is "
            "shown at the size of the world's frames, so make it smaller"
        )
    try:
        with Image.open(io.BytesIO(content), formats=_PICTURE_FORMATS) as picture:
            width, height = picture.size
            if width * height <= _PICTURE_PIXELS:
                return np.array(ImageOps.exif_transpose(picture).convert("RGB"))
    except Exception as error:  # bytes made to break a reader make it fail with anything
        raise FormatError(
            f"the picture: not readable as {', '.join(_PICTURE_FORMATS)} "
            f"({type(error).__name__}: {error!s:.80}); save it again in one of them"
        ) from error
    raise FormatError(
        f"the picture: {width}x{height} pixels, must be at most {_PICTURE_PIXELS} in all, such as "
        "4096x4096; make it smaller"
    )


def _points(path: Path, world: "World", moments: Sequence["Moment"]) -> list[StartPoint]:
    """Return the start points of moments, their frames decoded together."""
    from ..starts import read_start

    starts = [
        read_start(path, world, replace(moment, sequel_steps=0), with_frames=False)
        for moment in moments
    ]
    frames_BHWC = _shown(world, starts)
    return [
        StartPoint(start, frame_HWC, start.source, moment, path)
        for start, frame_HWC, moment in zip(starts, frames_BHWC, moments, strict=True)
    ]


def _shown(world: "World", starts: Sequence["Start"]) -> Frames:
    """Return the last frames, frames_BHWC, of prompts of one length, as a world shows them."""
    import torch

    codes_Bthw = torch.stack([start.codes_thw for start in starts])
    num_frames = world.tokenizer.spec.codes.pixel_frames(codes_Bthw.shape[1])
    frames_BTHWC = world.tokenizer.decode(codes_Bthw, num_frames=num_frames)
    frames_BHWC: Frames = frames_BTHWC[:, -1].cpu().numpy()
    return frames_BHWC


def _unlike(frames: Sequence[Frames], count: int) -> list[int]:
    """Return the numbers of at most `count` frames, each the farthest from those before it."""
    if not frames:
        return []
    glances = np.stack([_glance(frame_HWC) for frame_HWC in frames])
    chosen, nearest = [0], np.full(len(frames), np.inf)
    while len(chosen) < min(count, len(frames)):
        nearest = np.minimum(nearest, np.square(glances - glances[chosen[-1]]).sum(axis=1))
        nearest[chosen] = -1  # of frames all alike, too, each is chosen once
        chosen.append(int(nearest.argmax()))
    return chosen


def _glance(frame_HWC: Frames) -> np.ndarray[Any, Any]:
    """Return a frame as a few numbers: the means of its parts, seen from afar."""
    rows = np.array_split(frame_HWC.astype(np.float32), _GLANCE, axis=0)
    return np.array(
        [part.mean(axis=(0, 1)) for row in rows for part in np.array_split(row, _GLANCE, axis=1)]
    ).ravel()
