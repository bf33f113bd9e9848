"""Shards made by somebody who means harm: refused by every reader, and nothing else happens."""

import hashlib
import io
import os
import shutil
import tarfile
import time
import tracemalloc
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
from shard_forging import (
    KEY,
    change_manifest,
    forge,
    members_of,
    mend,
    read_everything,
    replaced,
    stream_everything,
)
from worldloom.common import FormatError, TokenShards, shard_name


@pytest.fixture
def folder(tmp_path, write_shards):
    """Two shards of an episode each: 5 frames and 6, both to train on."""
    write_shards(tmp_path / "shards", lengths=((5,), (6,)))
    return tmp_path / "shards"


# Hostile members


def hostile_members():
    link = tarfile.TarInfo("link")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    hard = tarfile.TarInfo(f"{KEY}.extra.npy")
    hard.type, hard.linkname = tarfile.LNKTYPE, f"{KEY}.codes.npy"
    directory = tarfile.TarInfo("../out")
    directory.type = tarfile.DIRTYPE
    device = tarfile.TarInfo("zero")
    device.type, device.devmajor, device.devminor = tarfile.CHRTYPE, 1, 5
    plain = ("../../x", "/abs", "a\nb.npy", "..", "é" * 20, f"../{KEY}.codes.npy", "e" * 10_000)
    return [link, hard, directory, device, *plain]


@pytest.mark.parametrize("index", range(11))
@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_hostile_member_is_refused_and_reaches_no_file(folder, tmp_path, commands, index, format):
    member = hostile_members()[index]
    forge(folder, [*members_of(folder), (member, b"" if index < 4 else b"evil")], format=format)
    before = sorted(tmp_path.rglob("*"))
    for read in (stream_everything, lambda f: TokenShards(f).verify()):
        with pytest.raises(FormatError, match=r"shard-000000\.tar"):
            read(folder)
    ended = commands.run("info", folder, "--verify")
    assert ended.code == 3
    assert len(ended.err) < 2000
    assert len(ended.err.strip().splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("size", [1 << 33, (1 << 33) - 1, -1, 1 << 62])
@pytest.mark.parametrize("kind", [b"0", b"L", b"x", b"S", b"g"])
def test_a_header_that_claims_gigabytes_allocates_nothing(folder, size, kind):
    """A name, a pax header or a sparse map of that size is what tarfile would begin to read."""
    info = tarfile.TarInfo("claimed")
    info.size, info.type = 0, kind
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    wide = b"\x80" if size >= 0 else b"\xff"
    header[124:136] = (
        b"%011o\0" % size if 0 <= size < 1 << 33 else wide + size.to_bytes(11, "big", signed=True)
    )
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    path = folder / shard_name(0)
    content = path.read_bytes()
    path.write_bytes(header + content[: len(content) - 512])

    def shift(data):
        row = data["episodes"][0]
        row.update(codes_offset=row["codes_offset"] + 512)
        row.update(actions_offset=row["actions_offset"] + 512)

    change_manifest(folder, shift)
    mend(folder)
    tracemalloc.start()
    began = time.process_time()  # others may be busy with the machine
    try:
        for read in (read_everything, stream_everything):
            with pytest.raises(FormatError, match=r"shard-000000\.tar: .*'claimed'"):
                read(folder)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert time.process_time() - began < 5


def change_header(folder, suffix, field, value, *, mend_checksum):
    """Put something else into the header of a member of the first episode."""
    path = folder / shard_name(0)
    with tarfile.open(path, "r:") as tar:
        start = tar.getmember(f"{KEY}.{suffix}").offset
    content = bytearray(path.read_bytes())
    content[start + field : start + field + len(value)] = value
    if mend_checksum:
        header = content[start : start + 512]
        total = sum(header) - sum(header[148:156]) + 8 * 0x20
        content[start + 148 : start + 156] = b"%06o\0 " % total
    path.write_bytes(content)
    mend(folder)


@pytest.mark.parametrize("suffix", ["codes.npy", "actions.npy", "json"])
@pytest.mark.parametrize("kind", [b"1", b"2", b"3", b"5", b"7", b"L", b"x", b"g", b"S"])
def test_a_member_of_the_right_name_that_is_no_plain_file_is_refused(folder, suffix, kind):
    """Another reader would follow the link, or take the numbers for a name."""
    change_header(folder, suffix, 156, kind, mend_checksum=True)
    for read in (lambda f: TokenShards(f).verify(), stream_everything):
        with pytest.raises(FormatError, match=r"shard-000000\.tar: .* no plain file"):
            read(folder)


@pytest.mark.parametrize("field", [100, 108, 136, 157, 265, 329])
def test_a_header_whose_checksum_does_not_fit_is_refused(folder, field):
    """Mode, owner, time: fields that nobody reads here, but a damaged header is a damaged tar."""
    change_header(folder, "codes.npy", field, b"1", mend_checksum=False)
    for read in (lambda f: TokenShards(f).verify(), stream_everything):
        with pytest.raises(FormatError, match=r"shard-000000\.tar: .* checksum does not fit"):
            read(folder)


def test_what_stands_behind_the_end_of_a_tar_is_refused(folder):
    """Where readers that pass zeros by would find it."""
    path = folder / shard_name(0)
    with path.open("ab") as file:
        file.write(path.read_bytes())
    mend(folder)
    for read in (lambda f: TokenShards(f).verify(), stream_everything):
        with pytest.raises(FormatError, match=r"shard-000000\.tar: (goes on|has members) behind"):
            read(folder)


# Bombs and pickles


def npy(header, data=b"", *, version=1):
    text = header.encode()
    width = 2 if version == 1 else 4
    return b"\x93NUMPY" + bytes((version, 0)) + len(text).to_bytes(width, "little") + text + data


BOMBS = {
    "a shape of 10**10": npy(
        "{'descr': '<u2', 'fortran_order': False, 'shape': (10000000000,), }\n"
    ),
    "a shape that overflows": npy(
        "{'descr': '<u2', 'fortran_order': False, 'shape': (4294967296, 4294967296, 4), }\n"
    ),
    "a shape of nothing, endlessly": npy(
        "{'descr': '<u2', 'fortran_order': False, 'shape': (0, 1000000000000000000000), }\n"
    ),
    "a header of 70 kB": npy(
        "{'descr': '<u2', 'fortran_order': False, 'shape': (5, 2, 3), }" + " " * 70_000, version=2
    ),
    "a header that claims 4 GB": b"\x93NUMPY\x02\x00\xff\xff\xff\xff{",
    "a header of brackets": npy("(" * 9000),
    "objects": npy("{'descr': '|O', 'fortran_order': False, 'shape': (5, 2, 3), }\n", b"x" * 240),
    "no npy at all": b"",
}  # fmt: skip


@pytest.mark.parametrize("part", ["codes", "actions"])
@pytest.mark.parametrize("what", BOMBS)
def test_an_npy_bomb_is_refused_within_64_mb(folder, what, part):
    forge(folder, replaced(folder, {f"{KEY}.{part}.npy": BOMBS[what]}))
    tracemalloc.start()
    try:
        for read in (read_everything, stream_everything):
            with pytest.raises(FormatError):
                read(folder)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


class Canary:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def pickled(path, suffix):
    """A pickle of the canary as a file of that suffix has it."""
    buffer = io.BytesIO()
    if suffix.endswith("npy"):
        np.save(buffer, np.array([Canary(path)], dtype=object), allow_pickle=True)
    elif suffix.endswith("npz"):
        np.savez(buffer, allow_pickle=True, a=np.array([Canary(path)], dtype=object))
    else:
        buffer.write(bytes(ForkingPickler.dumps(Canary(path))))
    return buffer.getvalue()


def test_the_canary_lives(tmp_path):
    ForkingPickler.loads(pickled(tmp_path / "a", "pkl"))
    np.load(io.BytesIO(pickled(tmp_path / "b", "npy")), allow_pickle=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize(
    "suffix",
    ["codes.npy", "actions.npy", "json", "npy", "pkl", "pickle", "pyd", "pth", "pt", "npz", "cbor",
     "msgpack", "txt", "cls", "codes.pyd", "tar", "gz", "jpg"],
)  # fmt: skip
def test_a_pickle_under_any_suffix_is_refused_and_never_executed(
    folder, tmp_path, commands, suffix
):
    canary = tmp_path / "canary"
    content = pickled(canary, suffix)
    forge(folder, replaced(folder, {f"{KEY}.{suffix}": content}))
    with pytest.raises(FormatError):
        TokenShards(folder).verify()
    if suffix == "json":
        stream_everything(folder)  # which lets an episode's JSON pass by unread
    else:
        with pytest.raises(FormatError):
            stream_everything(folder)
    assert commands.run("info", folder, "--verify").code == 3
    commands.run("info", folder)
    copied = commands.run(
        "shards", "subset", folder, "--split", "train", "--output", tmp_path / "c"
    )
    assert copied.code in (0, 3)  # a member that no episode has is left behind
    assert not canary.exists()


@pytest.mark.parametrize(
    "name", ["manifest.json", "codebook.safetensors", "shard-000000.tar", "plan.json"]
)
def test_a_pickle_in_place_of_a_file_is_refused_and_never_executed(
    folder, tmp_path, commands, name
):
    canary = tmp_path / "canary"
    (folder / name).write_bytes(pickled(canary, "pkl"))
    if name == "codebook.safetensors":
        digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        change_manifest(folder, lambda d: d["codebook"].update(sha256=digest))
    if name == "plan.json":
        words = ("shards", "split", tmp_path / "other", "--by-split", "--output", folder)
        shutil.copytree(folder, tmp_path / "other")
    else:
        words = ("info", folder, "--verify")
        with pytest.raises(FormatError, match=name):
            read_everything(folder)
    ended = commands.run(*words)
    assert ended.code == 3
    assert name in ended.err
    assert not canary.exists()
