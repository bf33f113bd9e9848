"""What a step showed -> image files under a header, one a pixel frame, each with its moment.

Shown, the input it answers  ->  pack  ->  PackedFrames;    frame_HWC  ->  pack_image  ->  bytes
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from worldloom.common import Frames

if TYPE_CHECKING:
    from .session import Shown

ImageKind = Literal["jpeg", "png"]

_JPEG_QUALITY = 90


@dataclass(frozen=True, slots=True)
class PackedFrame:
    """One pixel frame, ready to be sent."""

    header: Mapping[str, Any]
    """As docs/protocol.md says, but for what is known only when it is sent."""
    images: Sequence[bytes]
    """The world's, then what is beside it, if anything is."""
    due: float
    """When it should be seen, by time.monotonic."""


def pack(
    shown: "Shown", /, *, answers: Mapping[str, Any], image: ImageKind, now: float, spacing_s: float
) -> list[PackedFrame]:
    """Return the frames of a step, spread over its time.

    Args:
        shown: what it led to.
        answers: the header's fields that say which input this answers, and what was held.
        image: the kind of file.
        now: when the first is due, by time.monotonic.
        spacing_s: seconds from one to the next.
    """
    beside = shown.companion_THWC
    last = len(shown.frames_THWC) - 1
    packed = []
    for number, frame_HWC in enumerate(shown.frames_THWC):
        header = {
            **answers,
            "position": shown.position,
            "length": shown.length,
            "action": shown.action,
            "model_ms": round(shown.model_ms, 3),
            "forwards": shown.forwards,
            "context_frames": shown.context_frames,
            "last": number == last,
        }
        seen = [frame_HWC] if beside is None else [frame_HWC, beside[number]]
        images = [pack_image(seen_HWC, image) for seen_HWC in seen]
        packed.append(PackedFrame(header, images, now + number * spacing_s))
    return packed


def pack_image(frame_HWC: Frames, kind: ImageKind, /) -> bytes:
    """Return a frame as a JPEG file, small, or as a PNG file, exact."""
    from PIL import Image

    file, picture = BytesIO(), Image.fromarray(np.ascontiguousarray(frame_HWC))
    if kind == "png":
        picture.save(file, "PNG", compress_level=1)
    else:
        # Colours at full resolution: what matters in such a frame is often one pixel of colour.
        picture.save(file, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return file.getvalue()
