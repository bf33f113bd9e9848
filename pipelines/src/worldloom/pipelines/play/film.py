"""Frames as they come -> an mp4 file, frame by frame.

    first_HWC, then frames_THWC ...  ->  Film  ->  PATH, H.264 near to lossless, frames enlarged

Every frame is in the file when `add` returns, and none wait in memory. What a killed process leaves
still plays; `close` makes it a common mp4, playable in any browser.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

import numpy as np
from worldloom.common import Frames, StorageError, storage_errors

from ..pictures import enlarge, fitting_scale

_TARGET_PIXELS = 512
"""Frames are enlarged up to this many pixels a side, so that players do not blur them."""
_USUAL_FPS = 10.0
"""Of worlds that do not know theirs."""


class Film:
    """A video in progress; a context manager."""

    def __init__(self, path: Path, /, *, fps: float, first_HWC: Frames) -> None:
        """Begin with a frame, whose size all frames have.

        Args:
            path: of the mp4 file; one that is there is replaced.
            fps: frames per second; 0 if nobody knows.
            first_HWC: the first frame.

        Raises:
            StorageError: if it cannot be written.
        """
        import av

        self.path = path
        self.frames = 0
        """Frames written so far."""
        self._closed = False
        height, width = first_HWC.shape[:2]
        self._scale = fitting_scale(height, width, target=_TARGET_PIXELS)
        with self._writing():
            self._container = av.open(
                str(path),
                "w",
                format="mp4",
                # A common mp4 once it is closed; until then pieces that play by themselves.
                options={
                    "movflags": "hybrid_fragmented+frag_every_frame",
                    "flush_packets": "1",
                },
            )
            rate = Fraction(fps or _USUAL_FPS).limit_denominator(1001)
            stream: Any = self._container.add_stream("libx264", rate)
            # 4:2:0 is even: an odd side has its end twice.
            stream.height, stream.width = (
                2 * -(-side * self._scale // 2) for side in (height, width)
            )
            stream.pix_fmt = "yuv420p"
            stream.options = {"crf": "12", "preset": "veryfast", "tune": "zerolatency"}
            # The world needs the other cores.
            stream.codec_context.thread_count = 1
            self._stream = stream
        self.add(first_HWC[None])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def add(self, frames_THWC: Frames, /) -> None:
        """Write frames.

        Raises:
            StorageError: if there is no room; what was written before stays.
        """
        import av

        for frame_HWC in frames_THWC:
            large = enlarge(frame_HWC, times=self._scale)
            height, width = large.shape[:2]
            even = np.pad(large, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(even), format="rgb24")
            with self._writing():
                self._container.mux(self._stream.encode(picture))
            self.frames += 1

    def close(self) -> None:
        """Complete the file; further calls do nothing.

        Raises:
            StorageError: if there is no room.
        """
        if self._closed:
            return
        self._closed = True
        with self._writing():
            try:
                self._container.mux(self._stream.encode())
            finally:
                self._container.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Name the file when it cannot be written."""
        import av

        try:
            with storage_errors(self.path):
                yield
        except av.error.FFmpegError as error:
            raise StorageError(f"{self.path}: cannot be written ({error})") from error
