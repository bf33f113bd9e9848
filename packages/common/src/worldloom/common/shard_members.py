"""The members of a shard's tar, by its own headers: what an index is compared with.

    shard-000000.tar        -> tar_spans        -> {"KEY.codes.npy": (offset, size_bytes), ...}
    shard-000000.tar, a row -> episode_metadata -> the metadata in its KEY.json

Ours and strict, because `tarfile` does what a stranger's header asks for: it follows links and
names that go on in further members, and allocates a size before it looks how long the file is.
Nothing is extracted, and no name is used as a path.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from tarfile import BLOCKSIZE
from typing import TYPE_CHECKING, Any

from .errors import FormatError
from .files import parse_json

if TYPE_CHECKING:
    from .shards import EpisodeRecord

_OCTAL = re.compile(rb" *([0-7]+)[ \0]*")
_FILE_TYPES = (b"0", b"\0")
"""A plain file, as POSIX and as tars from before it write it."""
_MAX_JSON_BYTES = 17 << 20
"""Metadata of an episode has at most 16 MiB; the rest is what stands beside it."""
_PIECE_BYTES = 1 << 20

Spans = dict[str, tuple[int, int]]


def tar_spans(path: Path, /) -> Spans:
    """Return (offset of its data, size in bytes) of every member of a tar, by name, in order.

    Raises:
        FormatError: if a header is damaged, a member is no plain file or reaches over the end, a
            name stands twice, or it does not end with zeros and nothing else.
    """
    spans: Spans = {}
    try:
        with path.open("rb") as file:
            end = path.stat().st_size
            place = 0
            while (header := file.read(BLOCKSIZE)) != bytes(BLOCKSIZE):
                name, size_bytes = read_header(header, where=f"{path}: header at byte {place}")
                start = place + BLOCKSIZE
                place = start + -(-size_bytes // BLOCKSIZE) * BLOCKSIZE
                if place > end:
                    raise FormatError(f"{path}: {name!r:.100} reaches over the end of the tar")
                if name in spans:
                    raise FormatError(f"{path}: {name!r:.100} stands twice")
                spans[name] = (start, size_bytes)
                file.seek(place)
            while piece := file.read(_PIECE_BYTES):
                if any(piece):
                    raise FormatError(f"{path}: goes on behind the zeros that end a tar")
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error})") from error
    return spans


def read_header(header: bytes, *, where: str) -> tuple[str, int]:
    """Return the name and size that a tar's header tells."""
    if len(header) < BLOCKSIZE:
        raise FormatError(f"{where}: the tar ends here, without the zeros that end one")
    if header == bytes(BLOCKSIZE):
        raise FormatError(f"{where}: the tar ends here, where a member should begin")
    checksum = _OCTAL.fullmatch(header[148:156])
    if checksum is None or int(checksum[1], 8) != sum(header) - sum(header[148:156]) + 8 * 0x20:
        raise FormatError(f"{where}: not a tar's, or damaged: its checksum does not fit")
    name = header[:100].partition(b"\0")[0].decode("ascii", "backslashreplace")
    if header[156:157] not in _FILE_TYPES or header[345:500].strip(b"\0"):
        raise FormatError(
            f"{where}: {name!r:.100} is no plain file with a short name, and a shard holds no other"
        )
    size = _OCTAL.fullmatch(header[124:136])
    if size is None:
        raise FormatError(f"{where}: the size of {name!r:.100} is no octal number")
    return name, int(size[1], 8)


def episode_metadata(path: Path, spans: Spans, row: "EpisodeRecord", /) -> dict[str, Any]:
    """Return the metadata in an episode's KEY.json, after comparing the rest with the manifest.

    Args:
        path: the shard.
        spans: of its members.
        row: what the manifest says of the episode.

    Raises:
        FormatError: if the member is missing, too large, not JSON, or says something else.
    """
    name = f"{row.key}.json"
    if name not in spans:
        raise FormatError(f"{path}: has no member {name}, which every episode has")
    offset, size_bytes = spans[name]
    if size_bytes > _MAX_JSON_BYTES:
        raise FormatError(f"{path}: {name} has {size_bytes} bytes, at most {_MAX_JSON_BYTES}")
    try:
        with path.open("rb") as file:
            file.seek(offset)
            content = file.read(size_bytes)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error})") from error
    about = parse_json(content, where=f"{path}: {name}")
    wanted = {
        "key": row.key,
        "split": row.split,
        "num_frames": row.num_frames,
        "latent_frames": row.latent_frames,
        **({} if row.labelled else {"labelled": False}),
    }
    if not isinstance(about, Mapping) or about.keys() != {*wanted, "metadata"}:
        raise FormatError(f"{path}: {name} must have the fields {', '.join(wanted)}, metadata")
    for field, value in wanted.items():
        if about[field] != value or type(about[field]) is not type(value):
            raise FormatError(
                f"{path}: {name} says {field} {about[field]!r:.60}, the manifest {value!r}"
            )
    metadata = about["metadata"]
    if not isinstance(metadata, dict):
        raise FormatError(f"{path}: {name} must have an object of metadata")
    return metadata
