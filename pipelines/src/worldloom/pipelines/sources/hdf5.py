"""HDF5 files of strangers: plain numbers are read in pieces, and no link is followed.

    FILE.hdf5  -> open_hdf5 -> group -> child -> a group, or Numbers
    Numbers    -> pieces    -> arrays of consecutive rows; memory does not depend on their count

HDF5 can point anywhere: soft and external links, raw data in other files, virtual data sets, object
references. All of them are refused, and so are filters other than the built-in ones. A shape is
believed only where the file holds enough bytes for it: without that check a file of a kilobyte may
claim terabytes.
"""

import math
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from worldloom.common import ConfigError, FormatError, WorldloomError

_PIECE_BYTES = 1 << 26
_PIECE_ROWS = 64
_MAX_ROW_BYTES = 1 << 28
"""Largest row: a frame of 8k is 100 MB."""
_MAX_CHUNK_BYTES = 1 << 28
"""HDF5 holds a whole chunk in memory to read one number of it."""
_FILTERS = {1: "deflate", 2: "shuffle", 3: "fletcher32", 32000: "lzf"}
_COMPRESSORS = {1, 32000}
_MOST_COMPRESSION = 1032
"""No deflated byte becomes more bytes than this (lzf: 88)."""


def require_h5py() -> types.ModuleType:
    """Return the module h5py.

    Raises:
        ConfigError: naming the extra that installs it.
    """
    try:
        import h5py
    except ImportError as error:
        raise ConfigError(
            "reading HDF5 needs h5py, which is not installed: pip install 'worldloom[ingest]'"
        ) from error
    return h5py  # type: ignore[no-any-return] # h5py ships no types


@contextmanager
def _damage(where: str) -> Iterator[None]:
    """Turn whatever HDF5 says of a damaged file into our sentence."""
    try:
        yield
    except WorldloomError:
        raise
    except Exception as error:  # OSError, RuntimeError, KeyError, ValueError, TypeError, ...
        raise FormatError(f"{where}: cannot be read as HDF5 ({error!s:.200})") from error


@contextmanager
def open_hdf5(path: Path, /) -> Iterator[Any]:
    """Yield the root group of an HDF5 file, opened for reading alone.

    Raises:
        FormatError: if it is missing or not HDF5.
    """
    h5py = require_h5py()
    if not path.is_file():
        raise FormatError(f"{path}: no such file; expected HDF5")
    with _damage(str(path)):
        file = h5py.File(path, "r", locking="best-effort")
    try:
        yield file
    finally:
        with _damage(str(path)):
            file.close()


def child_names(group: Any, /, *, where: str) -> list[str]:
    """Return the names in a group, in HDF5's own order."""
    with _damage(where):
        return [str(name) for name in group]


def child(group: Any, path: str, /, *, where: str) -> Any:
    """Return what stands at `path` in a group, reached by hard links alone.

    Returns:
        A group of h5py, or Numbers.

    Raises:
        FormatError: naming the part that is missing, a link to elsewhere, or of no known sort.
    """
    h5py = require_h5py()
    here = group
    for name in path.split("/"):
        with _damage(where):
            if not isinstance(here, h5py.Group) or not name or name not in here:
                raise FormatError(f"{where}: has no {path!r:.100}")
            link = here.get(name, getlink=True)
            if not isinstance(link, h5py.HardLink):
                raise FormatError(
                    f"{where}: {path!r:.100} is a {type(link).__name__}; links are not followed, "
                    "for they may lead to any file of this machine"
                )
            here = here.get(name)
    if isinstance(here, h5py.Group):
        return here
    if isinstance(here, h5py.Dataset):
        return Numbers(here, where=f"{where}: {path:.100}")
    raise FormatError(f"{where}: {path!r:.100} is a {type(here).__name__}, not numbers")


class Numbers:
    """A data set of plain numbers, or of byte strings, whose shape was checked against the file."""

    def __init__(self, dataset: Any, /, *, where: str) -> None:
        h5py = require_h5py()
        self._dataset = dataset
        self.where = where
        with _damage(where):
            self.shape: tuple[int, ...] = tuple(dataset.shape or ())
            strings = h5py.check_vlen_dtype(dataset.dtype)
            self.is_bytes = strings is not None
            """Whether each element is a string of bytes of its own length."""
            if dataset.shape is None or not self.shape:
                raise FormatError(f"{where}: one number or none, expected a row a step")
            if strings not in (None, np.uint8) or (
                strings is None and dataset.dtype.kind not in "biuf"
            ):
                raise FormatError(f"{where}: dtype {dataset.dtype}, only plain numbers are read")
            self._check_storage()
            # The 16 bytes of a string's address, not the string: HDF5 keeps that elsewhere.
            self._row_bytes = math.prod(self.shape[1:]) * dataset.dtype.itemsize
        if self._row_bytes > _MAX_ROW_BYTES:
            raise FormatError(
                f"{where}: {self._row_bytes} bytes a row, at most {_MAX_ROW_BYTES} are read"
            )

    def _check_storage(self) -> None:
        """Refuse data outside the file, and a shape that the bytes in the file cannot fill."""
        dataset, where = self._dataset, self.where
        if dataset.external is not None or dataset.is_virtual:
            raise FormatError(f"{where}: its numbers lie in other files, which are not read")
        settings = dataset.id.get_create_plist()
        filters = [settings.get_filter(i)[0] for i in range(settings.get_nfilters())]
        unknown = [code for code in filters if code not in _FILTERS]
        # Twice packed, a byte may become a million.
        packed = sum(code in _COMPRESSORS for code in filters)
        if unknown or packed > 1:
            raise FormatError(
                f"{where}: packed by the filters {filters}; read are at most one of deflate (1) "
                "and lzf (32000), with shuffle (2) and fletcher32 (3)"
            )
        itemsize = dataset.id.get_type().get_size()
        chunk = math.prod(dataset.chunks) * itemsize if dataset.chunks else 0
        if chunk > _MAX_CHUNK_BYTES:
            raise FormatError(f"{where}: chunks of {chunk} bytes, at most {_MAX_CHUNK_BYTES}")
        claimed = math.prod(self.shape) * itemsize
        stored, size = dataset.id.get_storage_size(), Path(dataset.file.filename).stat().st_size
        if stored > size or claimed > stored * (_MOST_COMPRESSION if packed else 1):
            raise FormatError(
                f"{where}: claims {claimed} bytes (shape {self.shape}), but {min(stored, size)} "
                "are there"
            )

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the numbers; objects for strings of bytes."""
        dtype: np.dtype[Any] = self._dataset.dtype
        return dtype

    def pieces(self) -> Iterator[npt.NDArray[Any]]:
        """Yield arrays of consecutive rows that join to the whole.

        Raises:
            FormatError: if HDF5 cannot read one.
        """
        # As many rows as a chunk has: fewer would unpack it anew for every piece.
        chunk = self._dataset.chunks[0] if self._dataset.chunks else 1
        most = 1 if self.is_bytes else _PIECE_BYTES // max(1, self._row_bytes)
        rows = max(1, min(max(chunk, _PIECE_ROWS), most))
        for start in range(0, len(self), rows):
            with _damage(f"{self.where}: row {start}"):
                piece = self._dataset[start : start + rows]
            yield piece

    def whole(self, *, limit_bytes: int = 1 << 30) -> npt.NDArray[Any]:
        """Return all rows at once, for what has a few numbers a step.

        Raises:
            FormatError: if it is larger than `limit_bytes`, or strings of bytes.
        """
        if self.is_bytes or len(self) * self._row_bytes > limit_bytes:
            raise FormatError(f"{self.where}: not a few numbers a step, so it is not read whole")
        with _damage(self.where):
            array: npt.NDArray[Any] = self._dataset[()]
        return array
