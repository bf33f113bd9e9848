"""Video files of strangers -> frames: every one of them, in order, or a refusal that names it.

    VideoFile(path)  ->  .fps, .height, .width, then .frames()  ->  frame_HWC, frame_HWC, ...

Frames are decoded in order by PyAV (ffmpeg). What it passes over in silence is refused here: frames
it calls damaged, fewer frames than the file claims, times that are no steady rate. A file can name
other files or addresses (playlists do); only containers that hold their video themselves are read.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from worldloom.common import FormatError, Frames

from .checks import require_file

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".gif", ".avi", ".mov")
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,gif,avi"
_MAX_PIXELS = 1 << 26
"""Of one frame: twice 8K. A header may claim any size, and the decoder would ask for it."""
_THREADS = 4
"""Frames decoded at once: more of them cost memory for little time."""
_LEAD_S = 2.0
"""A seek lands this much earlier: frames are stored in another order than they are shown."""
# Where every packet is one frame, a frame that does not come out was lost. VP8 hides some.
_ONE_FRAME_A_PACKET = {"h264", "hevc", "vp9", "libdav1d", "av1", "ffv1", "gif", "mjpeg"}


class VideoFile:
    """One video, open for reading; a context manager. Frames can be read once."""

    fps: float
    """Frames per second that the container claims, or those that were given."""
    height: int
    """Rows of the stored frames; a file may ask to show them turned, and `frames` does."""
    width: int
    """Columns of the stored frames."""

    def __init__(self, path: Path, /, *, fps: float | None = None) -> None:
        """Open a video.

        Args:
            path: an ordinary file.
            fps: frames per second where the file's own do not count: frames are taken as they
                come, and their times are not looked at.

        Raises:
            FormatError: naming the file, if it is no video that can be read.
        """
        import av

        self._path = path
        self._steady = fps is None
        require_file(path, expected="a video")
        if path.stat().st_size == 0:
            raise FormatError(f"{path}: is empty; expected a video")
        with self._refusing("not a video that can be read, or cut short"):
            # "file:", or a name such as "concat:a|b" would be an order to ffmpeg.
            self._container = av.open(
                f"file:{path.absolute()}", options={"format_whitelist": _CONTAINERS}
            )
        try:
            self._open_stream()
            self.fps = self._own_fps() if fps is None else fps
        except BaseException:
            self.close()
            raise

    def _open_stream(self) -> None:
        """Find the video in the container, and make its decoder ready."""
        stream = self._container.streams.best("video")  # rather than a cover picture
        if stream is None:
            raise FormatError(f"{self._path}: holds no video")
        self._stream: Any = stream
        context: Any = stream.codec_context
        if context is None:
            raise FormatError(f"{self._path}: its video is coded in a way that is not known here")
        self.height, self.width = context.height, context.width
        if self.height * self.width > _MAX_PIXELS:
            raise FormatError(f"{self._path}: frames of {self.height}x{self.width} are too large")
        context.options = {"max_pixels": str(_MAX_PIXELS)}
        context.thread_type, context.thread_count = "FRAME", _THREADS

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._container.close()

    def frames(self, *, start_s: float = 0.0, num_frames: int | None = None) -> Iterator[Frames]:
        """Yield frame_HWC, uint8 RGB, each an array of its own, in order.

        Args:
            start_s: time of the first frame wanted, to half a frame.
            num_frames: how many are wanted, all of which must be there; up to the end if not
                given, and then the end must be where the file says it is.

        Raises:
            FormatError: naming the file and the frame that is damaged or missing.
        """
        from av.video.reformatter import VideoReformatter

        reformatter = VideoReformatter()
        clock = _Clock(self._path, self.fps)
        size, number = None, 0
        if num_frames == 0:
            return
        for frame in self._decoded(start_s):
            where = f"{self._path}: frame {number}"
            if frame.is_corrupt:
                raise FormatError(f"{where} is damaged")
            if self._steady:
                clock.check(frame, number)
            with self._refusing(f"frame {number} cannot be read"):
                rgb = reformatter.reformat(frame, format="rgb24", threads=1)
                frame_HWC = _turned(rgb.to_ndarray(), frame.rotation, where)
            size = size or frame_HWC.shape
            if frame_HWC.shape != size:
                raise FormatError(
                    f"{where} is {frame_HWC.shape[0]}x{frame_HWC.shape[1]}, those before are "
                    f"{size[0]}x{size[1]}; a recording has one size"
                )
            yield frame_HWC
            number += 1
            if number == num_frames:
                return
        if num_frames is not None:
            raise FormatError(
                f"{self._path}: ends after {number} frames from {start_s:g} s on, "
                f"but {num_frames} are wanted; it was cut short"
            )
        if number == 0:
            raise FormatError(f"{self._path}: holds no frames")
        self._check_end(number, clock)

    def _decoded(self, start_s: float) -> Iterator[Any]:
        """Yield decoded frames from `start_s` on, and count what passes."""
        self._packets = self._left_out = 0
        zero = self._stream.start_time or 0
        base = self._stream.time_base or Fraction(1, 1)
        first = start_s - 0.5 / self.fps if start_s > 0 else -math.inf
        lead = _LEAD_S
        while start_s > 0:
            wanted = zero + int(max(0.0, start_s - lead) / base)
            with self._refusing(f"cannot be read at {start_s:g} s"):
                self._container.seek(wanted, stream=self._stream)
            if lead >= start_s:
                break
            found = next(self._frames_there(), None)
            if found is not None and found.pts is not None and (found.pts - zero) * base <= start_s:
                self._container.seek(wanted, stream=self._stream)
                break
            lead *= 8
        for frame in self._frames_there():
            if frame.pts is None and start_s > 0:
                raise FormatError(f"{self._path}: its frames have no times, so none can be found")
            if frame.pts is None or float((frame.pts - zero) * base) >= first:
                yield frame

    def _frames_there(self) -> Iterator[Any]:
        """Yield the frames from where the file stands."""
        number = 0
        with self._refusing(lambda: f"frame {number} cannot be read"):
            for packet in self._container.demux(self._stream):
                self._packets += packet.size > 0
                self._left_out += packet.is_discard
                for frame in packet.decode():
                    yield frame
                    number += 1

    def _own_fps(self) -> float:
        """Return the rate that the container claims."""
        rate = self._stream.average_rate or self._stream.guessed_rate or self._stream.base_rate
        if not rate or not 0 < rate < 1e4:
            raise FormatError(f"{self._path}: does not say its frames per second; give --fps")
        return float(rate)

    def _check_end(self, decoded: int, clock: "_Clock") -> None:
        """Refuse a file that ends before its end, as ffmpeg does not always."""
        claimed = self._stream.frames
        if self._packets < claimed:
            raise FormatError(
                f"{self._path}: ends after frame {decoded - 1}, but claims {claimed} frames; "
                "it was cut short"
            )
        codec = self._stream.codec_context.name
        if codec in _ONE_FRAME_A_PACKET and decoded < self._packets - self._left_out:
            raise FormatError(
                f"{self._path}: only {decoded} of its {self._packets} frames can be read; "
                "it is damaged"
            )
        if self._container.format.name == "gif" and _count_gif_images(self._path) != decoded:
            raise FormatError(f"{self._path}: ends or is damaged after frame {decoded - 1}")
        ends = self._claimed_end_s()
        if ends is not None and clock.last_s is not None:
            missing = ends - clock.last_s - 1 / self.fps
            if missing > 0.75 / self.fps:
                raise FormatError(
                    f"{self._path}: ends after frame {decoded - 1}, {missing:.3f} s before the "
                    "end that it claims; it was cut short"
                )
        if self._steady:
            clock.check_rate(decoded)

    def _claimed_end_s(self) -> float | None:
        """Return where a Matroska file says that its video ends, if it does."""
        if "matroska" not in self._container.format.name:
            return None
        text = str(self._stream.metadata.get("DURATION", ""))
        parts = text.split(":")
        try:
            if len(parts) == 3:
                return int(parts[0]) * 3600 + int(parts[1]) * 60 + float(parts[2])
        except ValueError:
            return None
        alone = len(self._container.streams) == 1
        duration = self._container.duration
        return duration / 1e6 if alone and duration is not None else None

    @contextmanager
    def _refusing(self, what: Any) -> Iterator[None]:
        """Turn ffmpeg's errors into a sentence that names the file."""
        import av

        try:
            yield
        except (av.error.FFmpegError, OSError, ValueError, ArithmeticError, RuntimeError,
                IndexError) as error:  # fmt: skip
            text = what() if callable(what) else what
            reason = getattr(error, "strerror", None) or error
            raise FormatError(f"{self._path}: {text} ({reason})") from error


class _Clock:
    """Watches the times of the frames: they must be those of one steady rate."""

    def __init__(self, path: Path, fps: float) -> None:
        self._path, self._fps = path, fps
        self._first_s: float | None = None
        self.last_s: float | None = None

    def check(self, frame: Any, number: int) -> None:
        """Refuse a frame that does not follow the one before by one period, or nearly so."""
        if frame.pts is None or frame.time_base is None:
            return
        now = float(frame.pts * frame.time_base)
        if self.last_s is not None:
            # Times are whole ticks: a gif's are 1/100 s, so that 30 a second go 3, 3, 4.
            ticks = 2 * float(frame.time_base) * self._fps
            if abs((now - self.last_s) * self._fps - 1) > 0.4 + ticks:
                raise FormatError(
                    f"{self._path}: frame {number} comes {now - self.last_s:.4f} s after the one "
                    f"before, at {self._fps:g} frames per second; the rate varies. Convert it to a "
                    "steady rate, or take the frames as they come: --fps says at what rate"
                )
        else:
            self._first_s = now
        self.last_s = now

    def check_rate(self, count: int) -> None:
        """Refuse a rate that the frames as a whole do not keep."""
        if self._first_s is None or self.last_s is None or count < 2:
            return
        off = (self.last_s - self._first_s) * self._fps - (count - 1)
        if abs(off) > max(1.0, 0.002 * count):
            raise FormatError(
                f"{self._path}: {count} frames in {self.last_s - self._first_s:.3f} s are not the "
                f"{self._fps:g} per second that it claims; --fps says at what rate to take them"
            )


def _turned(frame_HWC: Any, degrees: int, where: str) -> Frames:
    """Return a frame the right way up, as telephones ask in the file for it to be shown."""
    quarters, rest = divmod(degrees, 90)
    if rest:
        raise FormatError(f"{where} is to be turned by {degrees} degrees; quarters are known")
    turned: Frames = np.ascontiguousarray(np.rot90(frame_HWC, quarters))
    return turned


def _count_gif_images(path: Path) -> int:
    """Return how many images a gif holds before its sign of the end, or -1 if it is damaged.

    ffmpeg is content with a gif that ends anywhere, or in which a fault made a sign of the end.
    """
    count = 0
    with path.open("rb") as file:
        _skip_colours(file, file.read(13)[10:11])
        while (kind := file.read(1)) in (b"!", b","):
            if kind == b",":
                count += 1
                _skip_colours(file, file.read(9)[8:9])
            file.read(1)  # what kind of extension, or how the pixels are packed
            while (size := file.read(1)) not in (b"", b"\0"):
                file.seek(size[0], 1)
        return count if kind == b";" and not file.read(1 << 16).strip(b"\0") else -1


def _skip_colours(file: BinaryIO, flags: bytes) -> None:
    """Skip the table of colours that flags announce."""
    if flags and flags[0] & 0x80:
        file.seek(6 << (flags[0] & 7), 1)
