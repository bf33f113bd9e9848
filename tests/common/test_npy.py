"""Promises of npy.py: exact round trips, and no header is believed before the bytes are counted."""

import io
import struct
import time
import tracemalloc
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from worldloom.common import FormatError
from worldloom.common.npy import npy_array, npy_bytes, npy_layout

PLAIN = st.sampled_from(
    ["bool", "uint8", "int8", "uint16", "<i4", ">i4", "uint64", "int64", "<f2", "float32", ">f8"]
)


def npy(header: str, data: bytes = b"", *, version: tuple[int, int] = (1, 0)) -> bytes:
    """A hand-made npy with any header."""
    text = header.encode("latin1")
    size = struct.pack("<H" if version == (1, 0) else "<I", len(text))
    return b"\x93NUMPY" + bytes(version) + size + text + data


def header(shape: str, descr: str = "'|u1'", order: str = "False") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n"


@given(array=hnp.arrays(PLAIN, hnp.array_shapes(min_dims=0, min_side=0, max_side=4)))
def test_an_array_comes_back_with_every_bit_shape_and_type(array):
    back = npy_array(npy_bytes(array), where="test")
    assert back.shape == array.shape
    assert back.dtype == array.dtype.newbyteorder("<")
    assert back.tobytes() == array.astype(array.dtype.newbyteorder("<")).tobytes()


@given(array=hnp.arrays(PLAIN, hnp.array_shapes(min_side=0, max_side=4)))
def test_numpy_reads_what_we_write_and_the_numbers_are_aligned_to_64(array):
    content = npy_bytes(array)
    back = np.load(io.BytesIO(content), allow_pickle=False)
    assert back.tobytes() == npy_array(content, where="test").tobytes()
    layout = npy_layout(io.BytesIO(content), len(content), where="test")
    assert layout.data_offset % 64 == 0


def test_memory_order_and_byte_order_do_not_change_the_bytes():
    array = np.arange(6, dtype="<u2").reshape(2, 3)
    assert npy_bytes(array) == npy_bytes(np.asfortranarray(array)) == npy_bytes(array.astype(">u2"))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not an npy"),
        (b"\x93NUMPY", "not an npy"),
        (npy(header("(2,)"), b"a"), "asks for 2 bytes"),
        (npy(header("(2,)"), b"abc"), "asks for 2 bytes"),
        (npy(header("(10000000000,)"), b"a"), "asks for 10000000000 bytes"),
        (npy(header("(4294967296, 4294967296)")), "shape"),
        (npy(header(f"(0, {10**30})")), "shape"),
        (npy(header("(" + "1," * 65 + ")"), b"a"), "shape"),
        (npy(header("(True,)"), b"a"), "shape"),
        (npy(header("(-1,)"), b""), "not an npy|shape"),
        (npy(header("(1,)", "'|O'"), b"a" * 8), "only plain numbers"),
        (npy(header("(1,)", "[('a', '|u1')]"), b"a"), "only plain numbers"),
        (npy(header("(1,)", "'<c8'"), b"a" * 8), "only plain numbers"),
        (npy(header("(1,)", "'<U2'"), b"a" * 8), "only plain numbers"),
        (npy(header("(1,)", "'<M8[s]'"), b"a" * 8), "only plain numbers"),
        (npy(header("(2, 2)", order="True"), b"abcd"), "Fortran order"),
        (npy(header("(1,)"), b"a", version=(3, 0)), "version"),
        (npy(header("(1,)") + " " * 20_000, b"a"), "not an npy"),
        (npy(header("(1,)") + " " * 70_000, b"a", version=(2, 0)), "not an npy"),
        (npy("__import__('os').abort()", b"a"), "not an npy"),
        (npy("(" * 5000, b"a"), "not an npy"),
    ],
)
def test_a_forged_header_is_a_format_error_and_allocates_nothing(content, reason):
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=reason) as caught:
            npy_array(content, where="x.npy")
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert str(caught.value).startswith("x.npy: ")


class Canary:
    """Says so if somebody unpickles it."""

    def __reduce__(self):
        return (Canary.sing, ())

    @staticmethod
    def sing():
        raise AssertionError("a pickle was executed")


def test_a_pickled_object_array_is_refused_and_never_executed():
    buffer = io.BytesIO()
    np.save(buffer, np.array([Canary()], dtype=object), allow_pickle=True)
    with pytest.raises(AssertionError, match="executed"):  # the canary lives: numpy would fire it
        np.load(io.BytesIO(buffer.getvalue()), allow_pickle=True)
    with pytest.raises(FormatError, match="only plain numbers"):
        npy_array(buffer.getvalue(), where="test")


@pytest.fixture
def read_or_refuse(may_refuse):
    return partial(_read_or_refuse, may_refuse)


def _read_or_refuse(may_refuse, content):
    """Only an array or a FormatError may come of any bytes, and soon."""
    began = time.process_time()  # others may be busy with the machine
    with may_refuse(FormatError, "fuzz: "):
        array = npy_array(content, where="fuzz")
        assert array.nbytes <= len(content)
    assert time.process_time() - began < 2


@settings(max_examples=2000)
@given(
    start=st.sampled_from([b"", b"\x93NUMPY\x01\x00", b"\x93NUMPY\x02\x00", npy(header("(3,)"))]),
    rest=st.binary(max_size=80),
)
def test_any_bytes_are_an_array_or_a_format_error(read_or_refuse, start, rest):
    read_or_refuse(start + rest)


@settings(max_examples=300)
@given(seed=st.integers(0, 2**32))
def test_9000_npys_with_changed_bytes_are_arrays_or_format_errors(read_or_refuse, seed):
    rng = np.random.default_rng(seed)
    original = npy_bytes(np.arange(12, dtype=rng.choice(["<u2", "<f4", "|u1"])).reshape(3, 4))
    for _ in range(30):
        content = bytearray(original)
        for position in rng.integers(0, len(content), rng.integers(1, 6)):
            content[position] = rng.choice([rng.integers(256), *b"0123456789'(),{}<>|iufOV "])
        read_or_refuse(bytes(content[: rng.integers(len(content) * 3)]))
