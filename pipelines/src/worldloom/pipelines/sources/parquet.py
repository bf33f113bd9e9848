"""Parquet files of strangers -> the numbers or pictures of some of their rows, a piece at a time.

    FILE.parquet, rows [start, stop)  ->  read_numbers  ->  one array a column
                                      ->  read_images   ->  frame_HWC, frame_HWC, ...

Only the columns asked for are read, row group by row group, so memory does not depend on how many
episodes share a file. What a row group says of its own size is checked before it is unpacked.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from worldloom.common import ConfigError, FormatError, Frames, WorldloomError

_BATCH_ROWS = 1024
_IMAGE_ROWS = 16
_BUFFER_BYTES = 1 << 20
"""Bytes of a column read from the disk at once; without it pyarrow takes whole row groups."""
_MAX_UNPACKED_BYTES = 1 << 31
"""Of one column of one row group: a thousand pictures of 2 MB."""
_MODES = ("RGB", "RGBA", "L")


def require_pyarrow() -> tuple[ModuleType, ModuleType]:
    """Return the modules pyarrow and pyarrow.parquet.

    Raises:
        ConfigError: naming the extra that installs them.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            "reading parquet needs pyarrow, which is not installed: pip install 'worldloom[ingest]'"
        ) from error
    return pyarrow, pyarrow.parquet


@contextmanager
def _damage(where: str) -> Iterator[None]:
    """Turn whatever pyarrow says of a damaged file into our sentence."""
    try:
        yield
    except WorldloomError:
        raise
    except Exception as error:  # ArrowException, OSError, ValueError, KeyError, ...
        raise FormatError(f"{where}: cannot be read as parquet ({error!s:.200})") from error


class ParquetFile:
    """One parquet file, open for reading; a context manager."""

    def __init__(self, path: Path, /) -> None:
        _, parquet = require_pyarrow()
        self._path = path
        if not path.is_file():
            raise FormatError(f"{path}: no such file; expected parquet")
        with _damage(str(path)):
            self._file = parquet.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False)
            self._names = list(self._file.schema_arrow.names)
            groups = self._file.metadata.num_row_groups
            self._lengths = [self._file.metadata.row_group(g).num_rows for g in range(groups)]

    def __enter__(self) -> "ParquetFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    @property
    def num_rows(self) -> int:
        """Rows of the file."""
        return sum(self._lengths)

    @property
    def names(self) -> Sequence[str]:
        """Columns of the file."""
        return self._names

    def batches(
        self, columns: Sequence[str], start: int, stop: int, /, *, batch_rows: int = _BATCH_ROWS
    ) -> Iterator[tuple[int, Any]]:
        """Yield the number of the first row, and a record batch, until rows [start, stop) are done.

        Raises:
            FormatError: if a column or a row is missing or damaged.
        """
        for name in columns:
            if name not in self._names:
                listed = ", ".join(self._names[:20])
                raise FormatError(f"{self._path}: has no column {name!r:.60}; there are {listed}")
        if stop > self.num_rows:
            raise FormatError(f"{self._path}: {self.num_rows} rows, but row {stop - 1} is wanted")
        first = 0
        for group, length in enumerate(self._lengths):
            if first < stop and first + length > start:
                self._check_size(group, columns)
                yield from self._group(group, columns, (first, start, stop), batch_rows)
            first += length

    def _group(
        self, group: int, columns: Sequence[str], rows: tuple[int, int, int], batch_rows: int
    ) -> Iterator[tuple[int, Any]]:
        """Yield what a row group has of rows [start, stop); `first` is its first row."""
        first, start, stop = rows
        where = f"{self._path}: row group {group}"
        with _damage(where):
            batches = self._file.iter_batches(
                batch_rows, row_groups=[group], columns=list(columns), use_threads=False
            )
        while first < stop:
            with _damage(where):
                batch = next(batches, None)
            if batch is None:
                return
            low, high = max(0, start - first), min(batch.num_rows, stop - first)
            if low < high:
                yield first + low, batch.slice(low, high - low)
            first += batch.num_rows

    def _check_size(self, group: int, columns: Sequence[str]) -> None:
        """Refuse a row group that would not fit into memory."""
        with _damage(f"{self._path}: row group {group}"):
            about = self._file.metadata.row_group(group)
            sizes = {
                (part := about.column(i)).path_in_schema: part.total_uncompressed_size
                for i in range(about.num_columns)
            }
        for path, size in sizes.items():
            wanted = any(path == name or path.startswith(f"{name}.") for name in columns)
            if wanted and not 0 <= size <= _MAX_UNPACKED_BYTES:
                raise FormatError(
                    f"{self._path}: row group {group}: {path:.60} claims {size} bytes unpacked, at "
                    f"most {_MAX_UNPACKED_BYTES} are read"
                )

    def numbers(
        self, columns: Sequence[str], start: int, stop: int, /
    ) -> dict[str, npt.NDArray[Any]]:
        """Return rows [start, stop) of columns of numbers: (rows,), or (rows, n) for lists.

        Raises:
            FormatError: if a value is missing, no number, or the lists differ in length.
        """
        parts: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in columns}
        for first, batch in self.batches(columns, start, stop):
            for name in columns:
                where = f"{self._path}: {name} from row {first} on"
                with _damage(where):
                    parts[name].append(_array(batch.column(name), where))
        columns_there = {}
        for name, arrays in parts.items():
            if len({array.shape[1:] for array in arrays}) > 1:
                raise FormatError(f"{self._path}: {name}: lists of different lengths")
            columns_there[name] = np.concatenate(arrays) if arrays else np.zeros(0, np.int64)
            if len(columns_there[name]) != stop - start:
                raise FormatError(
                    f"{self._path}: {name}: {len(columns_there[name])} of {stop - start} rows"
                )
        return columns_there

    def images(
        self, column: str, start: int, stop: int, /, *, height: int, width: int
    ) -> Iterator[Frames]:
        """Yield frame_HWC, uint8 RGB, of rows [start, stop) of a column of PNG or JPEG.

        Raises:
            FormatError: naming the row that is no picture of that size.
        """
        for first, batch in self.batches([column], start, stop, batch_rows=_IMAGE_ROWS):
            for i in range(batch.num_rows):
                where = f"{self._path}: {column} of row {first + i}"
                with _damage(where):
                    value = batch.column(column)[i].as_py()
                content = value.get("bytes") if isinstance(value, dict) else value
                if not isinstance(content, bytes):
                    raise FormatError(
                        f"{where}: has no bytes of a picture; pictures in files of their own are "
                        "not read"
                    )
                yield _picture(content, height, width, where)


def _array(column: Any, where: str) -> npt.NDArray[Any]:
    """Return a column of numbers, or of lists of as many numbers each."""
    pyarrow, _ = require_pyarrow()
    types = pyarrow.types
    if isinstance(column, pyarrow.ExtensionArray):
        column = column.storage
    width = None
    if types.is_fixed_size_list(column.type):
        width = column.type.list_size
    elif types.is_list(column.type) or types.is_large_list(column.type):
        lengths = set(column.value_lengths().to_pylist())
        if len(lengths) > 1:
            raise FormatError(
                f"{where}: lists of different lengths {sorted(map(str, lengths))!s:.60}"
            )
        width = lengths.pop() if lengths else 0
    rows = len(column)
    if column.null_count:
        raise FormatError(f"{where}: a value is missing")
    if width is not None:
        column = column.flatten()
    if column.null_count:
        raise FormatError(f"{where}: a value is missing")
    kind = column.type
    if not (types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)):
        raise FormatError(f"{where}: {kind}, expected numbers or lists of them")
    array: npt.NDArray[Any] = column.to_numpy(zero_copy_only=False)
    return array if width is None else array.reshape(rows, width)


def _picture(content: bytes, height: int, width: int, where: str) -> Frames:
    """Return the RGB frame that the bytes of a PNG or JPEG hold."""
    try:
        with Image.open(io.BytesIO(content), formats=["PNG", "JPEG"]) as image:
            # Before it is unpacked: a PNG of a kilobyte may claim any number of pixels.
            if image.size != (width, height) or image.mode not in _MODES:
                raise FormatError(
                    f"{where}: {image.mode} of {image.size[1]}x{image.size[0]}, expected RGB of "
                    f"{height}x{width} (height x width)"
                )
            return np.array(image.convert("RGB"), np.uint8)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise FormatError(f"{where}: not a PNG or JPEG ({error!s:.100})") from error
