"""Any bytes where a file of ours should be: an error of ours or a value, soon, in little memory.

Valid files are changed in their own structure (a field of a tar's header and its checksum with it,
a word of an npy's header, a value of JSON), since noise rarely gets past the first check. Every
number of inputs below is counted, and together they are over 10,000.
"""

import hashlib
import io
import json
import random
import resource
import tarfile
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worldloom.common import (
    Episodes,
    FormatError,
    TokenShards,
    finished_shard,
    npy_bytes,
    shard_name,
    stream_episodes,
)
from worldloom.common.shard_members import tar_spans

SEEDS = st.integers(0, 2**32)
PER_SEED = 25
FIELDS = [
    (0, 100), (100, 8), (108, 8), (116, 8), (124, 12), (136, 12), (148, 8), (156, 1), (157, 100),
    (257, 6), (263, 2), (265, 32), (329, 8), (345, 155),
]  # fmt: skip
"""Where the fields of a tar's header begin, and how long they are."""
STRANGE = [
    b"", b"\0", b"\xff" * 200, b"0", b"7" * 11, b"00000000000", b"77777777777", b"-1", b" 12 ",
    b"0o17", b"1_0", b"\x80" + b"\0" * 6 + b"\xff" * 5, b"\xff" * 12, b"\x80" + b"\xff" * 11,
    b"../../x", b"/abs", b"a\nb", b"episode-0000.codes.npy", b"episode-0001.json", b"\xc3\xa9" * 60,
    b"L", b"x", b"g", b"S", b"K", b"1", b"2", b"5", b"ustar  ", b"e" * 155,
]  # fmt: skip
WORDS = [
    "'<u2'", "'|u1'", "'<u4'", "'>u2'", "'|O'", "'<f2'", "'<c8'", "'|S9'", "'<M8[s]'", "True",
    "False", "None", "(5, 2, 3)", "(2, 5, 3)", "(5, 2)", "()", "(-1,)", "(10000000000,)", "(1e9,)",
    "(4294967296, 4294967296, 4)", "(0, 1000000000000000000000)", "((", "))", "{", "}", ",", "#",
    "'descr'", "'shape'", "'fortran_order'", "__import__('os')", "\\x00", "'''", "[('a', '<u2')]",
    "9" * 5000, "(" * 200,
]  # fmt: skip


@pytest.fixture(autouse=True)
def little_memory():
    """What a claimed size would allocate does not fit, and ends the test with a MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + (256 << 20)
    limits = [limit, *(bound for bound in (soft, hard) if bound != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def soon():
    """A block that takes little of the processor's time."""
    began = time.process_time()
    yield
    assert time.process_time() - began < 2


def rewrite(path, content):
    path.unlink(missing_ok=True)  # rewriting in place makes the file system flush every time
    path.write_bytes(content)


def changed_bytes(content, rng):
    """A few bytes flipped, cut out, repeated, or cut off behind."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5])):
        place = rng.randrange(len(content) + 1)
        match rng.randrange(5):
            case 0 | 1 if place < len(content):
                content[place] = rng.randrange(256)
            case 2:
                del content[place : place + rng.choice([1, 7, 512])]
            case 3:
                content[place:place] = content[: rng.choice([1, 7, 512])]
            case _:
                content = content[:place] if rng.random() < 0.3 else content
    return bytes(content)


def changed_tar(content, rng):
    """A tar some of whose headers tell something else, with checksums that fit, mostly."""
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        headers = [info.offset for info in tar]
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 4])):
        place = rng.choice(headers)
        start, length = rng.choice(FIELDS)
        value = rng.choice(STRANGE)[:length].ljust(length, rng.choice([b"\0", b" "]))
        content[place + start : place + start + length] = value
        if rng.random() < 0.8:
            header = content[place : place + 512]
            total = sum(header) - sum(header[148:156]) + 8 * 0x20
            content[place + 148 : place + 156] = b"%06o\0 " % total
    match rng.randrange(8):
        case 0:
            place = rng.choice(headers)
            del content[place : place + 512 * rng.randrange(1, 4)]
        case 1:
            place = rng.choice(headers)
            content[place:place] = content[headers[0] : headers[0] + 1024]
        case 2:
            return bytes(content[: 512 * rng.randrange(len(content) // 512 + 1)])
        case 3:
            return changed_bytes(content, rng)
        case 4:
            place = rng.choice(headers)
            content[place : place + 512] = bytes(512)
    return bytes(content)


def changed_npy(content, rng):
    """An npy whose header has other words in it, of a length that fits, mostly."""
    length = int.from_bytes(content[8:10], "little")
    header, data = content[10 : 10 + length].decode("latin1"), content[10 + length :]
    for _ in range(rng.choice([1, 1, 2])):
        start = rng.randrange(len(header))
        header = header[:start] + rng.choice(WORDS) + header[start + rng.choice([0, 1, 5, 12]) :]
    if rng.random() < 0.5:  # words that stand where others stood are understood more often
        header = content[10 : 10 + length].decode("latin1")
        for old in ("(5, 2, 3)", "(4, 1)", "'<u2'", "'|u1'", "False"):
            if rng.random() < 0.4:
                header = header.replace(old, rng.choice(WORDS))
    claimed = len(header) if rng.random() < 0.9 else rng.choice([0, 1, 60_000, 65_535])
    version = b"\1\0" if rng.random() < 0.9 else rng.choice([b"\2\0", b"\3\0", b"\0\0"])
    size = claimed.to_bytes(4 if version == b"\2\0" else 2, "little", signed=False)
    return b"\x93NUMPY" + version + size + header.encode("latin1") + data


class Shards:
    """A small folder of shards whose first tar is replaced, under a manifest that fits."""

    def __init__(self, folder, write_shards):
        self.folder, self.tar = folder, folder / shard_name(0)
        if not folder.exists():
            write_shards(folder, lengths=((5, 1), (4,)))
            for path in (self.tar, folder / "manifest.json", self.tar.with_suffix(".json")):
                path.with_name(f"{path.name}.good").write_bytes(path.read_bytes())
        self.good = self.original(self.tar.name)
        self.manifest = json.loads(self.original("manifest.json"))

    def original(self, name):
        return (self.folder / f"{name}.good").read_bytes()

    def replace_tar(self, content, *, row=None):
        rewrite(self.tar, content)
        digest = hashlib.sha256(content).hexdigest()
        self.manifest["shards"][0].update(size_bytes=len(content), sha256=digest)
        if row is not None:
            self.manifest["episodes"][0].update(row)
        rewrite(self.folder / "manifest.json", json.dumps(self.manifest).encode())

    def read(self):
        """Read as training does, verify, and read as from a pipe."""
        there = TokenShards(self.folder)
        for index, row in enumerate(there.episodes):
            assert there.codes_thw(index).shape == there.codes.codes_shape(row.latent_frames)
            assert there.slots_TA(index).shape[0] == row.num_frames - 1
            there.metadata(index)
        there.verify()

    def stream(self):
        there = TokenShards(self.folder)
        with self.tar.open("rb") as file:
            list(stream_episodes(there, 0, file, where=str(self.tar)))


@pytest.fixture
def shards(tmp_path, write_shards):
    return Shards(tmp_path / "shards", write_shards)


@pytest.mark.slow
@settings(max_examples=120)
@given(seed=SEEDS)
def test_3000_changed_tars_are_read_or_refused_with_the_folders_name(shards, may_refuse, seed):
    rng = random.Random(seed)
    for _ in range(PER_SEED):
        shards.replace_tar(changed_tar(shards.good, rng))
        for read in (lambda: tar_spans(shards.tar), shards.read, shards.stream):
            with soon(), may_refuse(FormatError, str(shards.folder)):
                read()


@pytest.mark.slow
@settings(max_examples=60)
@given(seed=SEEDS)
def test_1500_changed_arrays_inside_a_tar_are_read_or_refused(shards, may_refuse, seed):
    """A tar is made of any two npy; the manifest tells where they lie and how long they are."""
    rng = random.Random(seed)
    with tarfile.open(fileobj=io.BytesIO(shards.good)) as tar:
        members = [(info.name, tar.extractfile(info).read()) for info in tar]
    for _ in range(PER_SEED):
        buffer, row = io.BytesIO(), {}
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for index, (name, content) in enumerate(members):
                if index < 2:
                    content = changed_npy(content, rng) if rng.random() < 0.8 else content
                    part = name.split(".")[1]
                    row |= {f"{part}_offset": tar.offset + 512, f"{part}_bytes": len(content)}
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        shift = {}
        with tarfile.open(fileobj=io.BytesIO(buffer.getvalue())) as tar:
            for info in tar:
                shift[info.name] = info.offset_data
        for part in ("codes", "actions"):
            place = shift[f"episode-0001.{part}.npy"]
            shards.manifest["episodes"][1][f"{part}_offset"] = place
        shards.replace_tar(buffer.getvalue(), row=row)
        for read in (shards.read, shards.stream):
            with soon(), may_refuse(FormatError, str(shards.folder)):
                read()


@settings(max_examples=60)
@given(seed=SEEDS)
def test_1500_manifests_of_other_bytes_are_read_or_refused(shards, may_refuse, seed):
    """The values are changed by the thousand in test_shards.py; here, what JSON is made of."""
    rng = random.Random(seed)
    good = shards.original("manifest.json")
    rewrite(shards.tar, shards.good)
    for _ in range(PER_SEED):
        rewrite(shards.folder / "manifest.json", changed_bytes(good, rng))
        with soon(), may_refuse(FormatError, str(shards.folder)):
            shards.read()


@settings(max_examples=80)
@given(seed=SEEDS)
def test_2000_changed_markers_are_believed_only_if_they_are_true(shards, mutations, seed):
    rng = random.Random(seed)
    marker = shards.tar.with_suffix(".json")
    rewrite(shards.tar, shards.good)
    good = shards.original(marker.name)
    for data in mutations(json.loads(good), seed=seed, count=PER_SEED):
        changed = rng.random() < 0.7
        rewrite(marker, json.dumps(data).encode() if changed else changed_bytes(good, rng))
        with soon():
            record = finished_shard(shards.folder, 0)
        if record is not None:
            digest = hashlib.sha256(shards.good).hexdigest()
            assert (record.file, record.size_bytes) == (shards.tar.name, len(shards.good))
            assert record.sha256 == digest


@settings(max_examples=100)
@given(seed=SEEDS)
def test_2500_changed_files_of_episodes_are_read_or_refused_with_their_name(
    tmp_path, write_episode, episodes_spec, may_refuse, seed
):
    folder, good = tmp_path / "episodes", tmp_path / "good.npz"
    path = folder / "a.npz"
    if not good.exists():
        write_episode(folder, "a", spec=episodes_spec, num_frames=5)
        good.write_bytes(path.read_bytes())
    rng = random.Random(seed)
    with zipfile.ZipFile(good) as file:
        members = {name: file.read(name) for name in file.namelist()}
    for _ in range(PER_SEED):
        rewrite(path, changed_zip(good.read_bytes(), members, rng))
        with soon(), may_refuse(FormatError, str(folder)), Episodes(folder).open("a") as episode:
            for _ in episode.pieces():
                pass
            assert len(episode.actions) == episode.num_frames - 1
            assert episode.rewards is None or episode.rewards.dtype == np.float32
            assert isinstance(episode.metadata, dict)


def changed_zip(content, members, rng):
    """A zip with other bytes, or one whose members are others."""
    if rng.random() < 0.4:
        return changed_bytes(content, rng)
    changed = dict(members)
    name = rng.choice(sorted(changed))
    match rng.randrange(5):
        case 0:
            del changed[name]
        case 1:
            changed[rng.choice(["../x", "/abs", "frames/000001.npy", "x.pkl", "a\nb"])] = b"evil"
        case 2 if name.endswith(".npy"):
            changed[name] = npy_bytes(np.zeros(rng.choice([(4,), (5,), (4, 1), (0, 16, 24, 3)])))
        case _ if name.endswith(".npy"):
            changed[name] = changed_npy(changed[name], rng)
        case _:
            changed[name] = changed_bytes(changed[name], rng)
    buffer = io.BytesIO()
    method = rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    with zipfile.ZipFile(buffer, "w", method) as file:
        for name, data in changed.items():
            file.writestr(name, data)
    return buffer.getvalue()
