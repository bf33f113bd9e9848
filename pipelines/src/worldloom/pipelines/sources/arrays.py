"""Arrays in npz and npy files of strangers: small ones whole, frames in pieces.

    NAME.npz -> open_npz -> read_member -> an array, once its size was checked
    NAME.npz, NAME.npy   -> open_frames -> FrameArray: .num_frames, .height, .width, then .frames()

No claim of a header is believed before it was compared with the bytes that are there, objects
(pickles) are refused, and frames are read a few at a time, deflated or not.
"""

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from worldloom.common import ActionArray, FormatError, Frames, npy_array
from worldloom.common.npy import npy_layout

from ..checks import require_file

_MAX_ARRAY_BYTES = 1 << 28
_MAX_FRAME_BYTES = 3 << 26
_PIECE_BYTES = 1 << 22
_DAMAGED = (
    OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error, NotImplementedError,
    RuntimeError, OverflowError,
)  # fmt: skip


@contextmanager
def open_npz(path: Path, /) -> Iterator[zipfile.ZipFile]:
    """Open an npz.

    Raises:
        FormatError: if it is no ordinary file or no zip.
    """
    require_file(path, expected="arrays")
    try:
        archive = zipfile.ZipFile(path)
    except _DAMAGED as error:
        raise FormatError(f"{path}: not an npz, or cut short ({error})") from error
    with archive:
        yield archive


def read_member(archive: zipfile.ZipFile, name: str, /, *, where: str) -> ActionArray:
    """Return a small array of an npz.

    Raises:
        FormatError: if it is missing, too large, damaged or not of plain numbers.
    """
    info = _member(archive, name, where=where)
    if info.file_size > _MAX_ARRAY_BYTES:
        raise FormatError(f"{where}: claims {info.file_size} bytes, at most {_MAX_ARRAY_BYTES}")
    try:
        with archive.open(info) as file:
            content = file.read(info.file_size)
    except _DAMAGED as error:
        raise FormatError(f"{where}: is damaged ({error})") from error
    return npy_array(content, where=where)


@dataclass(frozen=True, slots=True)
class FrameArray:
    """An array uint8 [T, H, W, 3] that is read from its beginning to its end, once."""

    num_frames: int
    height: int
    width: int
    file: BinaryIO
    where: str

    def frames(self) -> Iterator[Frames]:
        """Yield frame_HWC in order.

        Raises:
            FormatError: naming the frame at which the file is damaged or ends.
        """
        size = self.height * self.width * 3
        step = max(1, _PIECE_BYTES // size)
        for first in range(0, self.num_frames, step):
            wanted = min(step, self.num_frames - first)
            try:
                content = self.file.read(wanted * size)
            except _DAMAGED as error:
                raise FormatError(
                    f"{self.where}: is damaged at frames {first} to {first + wanted - 1} ({error})"
                ) from error
            if len(content) != wanted * size:
                raise FormatError(f"{self.where}: ends at frame {first + len(content) // size}")
            piece = np.frombuffer(content, np.uint8)
            yield from piece.reshape(wanted, self.height, self.width, 3)


@contextmanager
def open_frames(path: Path, name: str, /) -> Iterator[FrameArray]:
    """Open the frames of NAME.npy, or the array `name` of NAME.npz.

    Raises:
        FormatError: if they are not uint8 [T, H, W, 3], or not as many as there are bytes for.
    """
    require_file(path, expected="arrays")
    if path.suffix.lower() == ".npy":
        with path.open("rb") as file:
            yield _frame_array(file, path.stat().st_size, where=str(path))
        return
    where = f"{path}: {name}"
    with open_npz(path) as archive:
        info = _member(archive, name, where=where)
        try:
            member = archive.open(info)
        except _DAMAGED as error:
            raise FormatError(f"{where}: is damaged ({error})") from error
        with member:
            yield _frame_array(cast(BinaryIO, member), info.file_size, where=where)


def _frame_array(file: BinaryIO, size_bytes: int, *, where: str) -> FrameArray:
    layout = npy_layout(file, size_bytes, where=where)
    shape = layout.shape
    if layout.dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape:
        raise FormatError(
            f"{where}: {layout.dtype} {shape}, must be uint8 [frames, height, width, 3], RGB"
        )
    num_frames, height, width, _ = shape
    if height * width * 3 > _MAX_FRAME_BYTES:
        raise FormatError(f"{where}: frames of {height}x{width} are too large")
    return FrameArray(num_frames, height, width, file, where)


def _member(archive: zipfile.ZipFile, name: str, *, where: str) -> zipfile.ZipInfo:
    """Return the entry of NAME.npy, which must stand there once, stored or deflated."""
    found = [info for info in archive.infolist() if info.filename == f"{name}.npy"]
    if len(found) != 1:
        there = ", ".join(info.filename.removesuffix(".npy") for info in archive.infolist()[:20])
        raise FormatError(
            f"{where}: stands there {len(found)} times, must be once; there are {there}"
        )
    # LZMA and bzip2 inflate without a bound, so a small member could fill the memory.
    if found[0].compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise FormatError(f"{where}: is neither stored nor deflated")
    return found[0]
