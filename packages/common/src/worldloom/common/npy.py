"""npy bytes <-> arrays, for files that may come from strangers.

    array              -> npy_bytes  -> bytes
    bytes at an offset -> npy_layout -> (dtype, shape, data offset)

Only plain numbers in C order, versions 1.0 and 2.0 (NumPy enhancement proposal 1). The header is
checked against the bytes that are there *before* anything is allocated: a forged one may ask for
37 GiB. Objects (pickles) are refused by their dtype.
"""

import io
import math
import warnings
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from .errors import FormatError

_MAX_HEADER = 10_000
_MAX_AXES = 32


_READ_HEADER = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


@dataclass(frozen=True, slots=True)
class NpyLayout:
    """Where the numbers of an npy member are and what they are."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    data_offset: int
    """Bytes from the start of the npy to its first number."""


def npy_bytes(array: npt.NDArray[Any], /) -> bytes:
    """Return an array as npy 1.0, little-endian and in C order: the same array, the same bytes."""
    array = np.asarray(array, array.dtype.newbyteorder("<"), order="C")
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def npy_layout(file: BinaryIO, size_bytes: int, /, *, where: str) -> NpyLayout:
    """Read the header at the file's position and check it against the member's size.

    Raises:
        FormatError: if it is not npy, holds anything but plain numbers, or if its shape does not
            fill exactly the bytes that are there.
    """
    start = file.tell()
    try:
        version = np.lib.format.read_magic(file)
        read_header = _READ_HEADER.get(version)
        if read_header is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # numpy's advice on headers written by Python 2
                header = read_header(file, max_header_size=_MAX_HEADER)
    except Exception as error:  # numpy raises ValueError, SyntaxError, TypeError, TokenError, ...
        raise FormatError(f"{where}: not an npy array ({error!s:.200})") from error
    if read_header is None:
        raise FormatError(f"{where}: npy version {version}, readable are 1.0 and 2.0")
    shape, fortran_order, dtype = header
    offset = file.tell() - start
    if dtype.hasobject or dtype.kind not in "biuf" or dtype.subdtype is not None:
        raise FormatError(f"{where}: dtype {dtype}, only plain numbers are read")
    # numpy multiplies the lengths that are not 0, so (0, 10**30) would overflow it at no bytes.
    if (
        len(shape) > _MAX_AXES
        or any(type(length) is not int or length < 0 for length in shape)
        or math.prod(length or 1 for length in shape) * dtype.itemsize > 1 << 62
    ):
        raise FormatError(f"{where}: shape {shape!s:.80} in an npy header")
    if fortran_order and len(shape) > 1:
        raise FormatError(f"{where}: an array in Fortran order; write it in C order")
    wanted = math.prod(shape) * dtype.itemsize
    if wanted != size_bytes - offset:
        raise FormatError(
            f"{where}: the header asks for {wanted} bytes ({shape}, {dtype}), "
            f"but {size_bytes - offset} are there"
        )
    return NpyLayout(dtype=dtype, shape=tuple(shape), data_offset=offset)


def npy_array(content: bytes, /, *, where: str) -> npt.NDArray[Any]:
    """Return the array that `content`, a whole npy, holds (read-only, sharing its memory)."""
    layout = npy_layout(io.BytesIO(content), len(content), where=where)
    flat = np.frombuffer(content, layout.dtype, offset=layout.data_offset)
    return flat.reshape(layout.shape)
