"""Promises of shard_stream.py and streaming.py: nothing that comes is taken on trust."""

import hashlib
import io
import pickle  # noqa: TID251 - what strangers may send
import shutil
import tarfile
from pathlib import Path

import pytest
from dynamics.test_streaming import open_stream
from worldloom.common import (
    ConfigError,
    FormatError,
    StorageError,
    TokenShards,
    read_json,
    write_json,
)
from worldloom.dynamics import StreamConfig


def read_all(shards: TokenShards, url: str = "") -> None:
    """Read two passes."""
    stream = open_stream(shards, url=url, lanes=1, buffer=1)
    for index in range(2 * len(stream)):
        stream.batch(index, size=1, seed=0)


def members(path: Path) -> list[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(path) as tar:
        return [(info, tar.extractfile(info).read()) for info in tar]


def write_tar(path: Path, rows: list[tuple[tarfile.TarInfo, bytes]], mode: str = "w") -> None:
    with tarfile.open(path, mode, format=tarfile.GNU_FORMAT) as tar:
        for info, content in rows:
            tar.addfile(info, io.BytesIO(content))


def copied(walks: TokenShards, tmp_path: Path) -> tuple[TokenShards, Path]:
    shutil.copytree(walks.folder, tmp_path / "shards")
    return TokenShards(tmp_path / "shards", tars_elsewhere=True), tmp_path / "shards"


def trust(folder: Path) -> TokenShards:
    """Make the manifest say of the tars what they are: a stranger wrote both."""
    path = folder / "manifest.json"
    data = read_json(path, what="manifest")
    for row in data["shards"]:
        content = (folder / row["file"]).read_bytes()
        row["size_bytes"], row["sha256"] = len(content), hashlib.sha256(content).hexdigest()
    write_json(path, data)
    return TokenShards(folder, tars_elsewhere=True)


class Canary:
    """Whoever unpickles it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return (open, (self.path, "w"))


def test_undisturbed_shards_are_read_whole(walks):
    read_all(walks)
    read_all(walks, f"pipe:cat {walks.folder}/{{file}}")
    read_all(walks, f"file:{walks.folder}/{{file}}")


@pytest.mark.parametrize("where", ["first", "between", "last"])
@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "x.pkl", "x.pickle", "x.pyd", "x.pth", "x.pt", "x.npy", "x.npz", "x.json", "x.cls",
        "e0.pkl", "e0.pyd", "e0.codes.pyd", "e0.codes.npy", "../../x.codes.npy", "/abs.codes.npy",
        "a\nb.codes.npy", "x" * 99, "y" * 10_000,
    ],
)  # fmt: skip
def test_a_member_that_the_manifest_does_not_list_is_refused_and_never_unpickled(
    walks, tmp_path, name, trusted, where
):
    shards, folder = copied(walks, tmp_path)
    canary = tmp_path / "canary"
    content = pickle.dumps(Canary(canary))
    info = tarfile.TarInfo(name)
    info.size = len(content)
    path = folder / "shard-000000.tar"
    rows = members(path)
    place = {"first": 0, "between": 3, "last": len(rows)}[where]
    write_tar(path, [*rows[:place], (info, content), *rows[place:]])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FormatError, match=r"shard-000000\.tar"):
        read_all(trust(folder) if trusted else shards)
    assert not canary.exists()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", ["codes.npy", "actions.npy", "json"])
def test_a_member_that_is_missing_or_stands_twice_is_refused_by_name(walks, tmp_path, kind):
    _, folder = copied(walks, tmp_path)
    path = folder / "shard-000000.tar"
    rows = members(path)
    (which,) = [n for n, (info, _) in enumerate(rows) if info.name == f"e0.{kind}"]
    write_tar(path, rows[:which] + rows[which + 1 :])
    with pytest.raises(FormatError, match=r"shard-000000\.tar.*'e[01]\..* has .* bytes at"):
        read_all(trust(folder))
    write_tar(path, [*rows[: which + 1], rows[which], *rows[which + 1 :]])
    with pytest.raises(FormatError, match=r"shard-000000\.tar.*'e[01]\..* has .* bytes at"):
        read_all(trust(folder))


def test_links_folders_devices_and_sparse_members_are_refused(walks, tmp_path):
    _, folder = copied(walks, tmp_path)
    path = folder / "shard-000000.tar"
    rows = members(path)
    for kind in (
        tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE,
        tarfile.GNUTYPE_SPARSE, tarfile.CONTTYPE,
    ):  # fmt: skip
        info = tarfile.TarInfo("e0.actions.npy")
        info.type, info.linkname = kind, "/etc/passwd"
        write_tar(path, [(info, b""), *rows[1:]])
        with pytest.raises(FormatError, match=r"shard-000000\.tar.*no plain file"):
            read_all(trust(folder))


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_a_compressed_tar_is_refused_and_not_unpacked(walks, tmp_path, mode):
    shards, folder = copied(walks, tmp_path)
    path = folder / "shard-000001.tar"
    write_tar(path, members(path), mode)
    with pytest.raises(FormatError, match=r"shard-000001\.tar: (header at byte 0|ends after)"):
        read_all(shards)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{'descr': '<u1', 'fortran_order': False, 'shape': (99999999999, 4, 4)}", "asks for"),
        ("{'descr': '|O', 'fortran_order': False, 'shape': (9, 4, 4)}", "only plain numbers"),
        ("{'descr': '<u1', 'fortran_order': True, 'shape': (9, 4, 4)}", "Fortran"),
        ("{'descr': '<u1', 'fortran_order': False, 'shape': (4, 9, 4)}", "must be"),
        ("{'descr': '<i1', 'fortran_order': False, 'shape': (9, 4, 4)}", "must be"),
        ("__import__('os')", "not an npy array"),
    ],
)
def test_an_npy_that_is_not_what_the_manifest_promises_is_refused(walks, tmp_path, header, message):
    _, folder = copied(walks, tmp_path)
    path = folder / "shard-000000.tar"
    row = walks.episodes[0]
    content = bytearray(path.read_bytes())
    offset, _ = row.span("codes")
    head = f"{header:<117}\n".encode()
    forged = b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head
    assert len(forged) == 128
    content[offset : offset + 128] = forged
    path.write_bytes(content)
    with pytest.raises(FormatError, match=rf"shard-000000\.tar: e0\.codes\.npy.*{message}"):
        read_all(trust(folder))


@pytest.mark.parametrize("member", ["codes", "actions"])
def test_a_number_out_of_range_is_refused_before_any_window_of_it_is_given(walks, tmp_path, member):
    _, folder = copied(walks, tmp_path)
    path = folder / "shard-000000.tar"
    content = bytearray(path.read_bytes())
    offset, size = walks.episodes[0].span(member)
    content[offset + size - 1] = 0xEE  # neither a code of two, nor an action of five
    path.write_bytes(content)
    with pytest.raises(FormatError, match=rf"e0\.{member}\.npy"):
        read_all(trust(folder))


def test_a_flipped_bit_is_found_at_the_latest_when_its_shard_is_through(walks, tmp_path):
    shards, folder = copied(walks, tmp_path)
    path = folder / "shard-000001.tar"
    content = bytearray(path.read_bytes())
    offset, size = walks.episodes[4].span("codes")
    content[offset + size - 1] ^= 1  # another code, but one of the vocabulary
    path.write_bytes(content)
    with pytest.raises(FormatError, match=r"shard-000001\.tar: its bytes are not those"):
        read_all(shards)


def test_a_tar_cut_anywhere_is_an_error_and_not_fewer_samples(walks, tmp_path):
    shards, folder = copied(walks, tmp_path)
    path = folder / "shard-000001.tar"
    whole = path.read_bytes()
    for size in [*range(0, len(whole), 512), len(whole) - 1, 700, 513, 3]:
        path.write_bytes(whole[:size])
        with pytest.raises(FormatError, match=rf"shard-000001\.tar: ends after {size} bytes"):
            read_all(shards)
    path.write_bytes(whole + b"\0")
    with pytest.raises(FormatError, match=r"shard-000001\.tar: goes on after"):
        read_all(shards)


@pytest.mark.parametrize(
    ("url", "error", "message"),
    [
        ("pipe:false {file}", StorageError, r"pipe:false shard-\d+\.tar: broke off \(exit 1\)"),
        ("pipe:no-such-command {file}", StorageError, r"shard-\d+\.tar: broke off \(exit 127\)"),
        ("pipe:head -c 700 {folder}/{file}", FormatError, r"\.tar: ends after 700 bytes"),
        (
            "pipe:head -c 700 {folder}/{file}; exit 3",
            StorageError,
            r"shard-\d+\.tar.*broke off \(exit 3\)",
        ),
        ("pipe:cat {folder}/{file}; exit 4", StorageError, r"broke off \(exit 4\)"),
        ("pipe:yes {file}", FormatError, "header at byte 0"),
        ("pipe:true {file}", FormatError, "ends after 0 bytes"),
        ("{folder}/no/{file}", StorageError, r"no/shard-\d+\.tar: cannot be opened"),
        ("gopher://host/{file}", ConfigError, r"gopher://host/shard-\d+\.tar: no gopen handler"),
    ],
)
def test_a_source_that_fails_is_an_error_that_names_the_shard(walks, url, error, message):
    with pytest.raises(error, match=message):
        read_all(walks, url.replace("{folder}", str(walks.folder)))


def test_an_address_without_a_place_for_the_name_is_refused():
    with pytest.raises(ConfigError, match=r"has no \{file\}"):
        StreamConfig(url="https://host/shard.tar")
    with pytest.raises(ConfigError, match="lanes is 0"):
        StreamConfig(url="{file}", lanes=0)
