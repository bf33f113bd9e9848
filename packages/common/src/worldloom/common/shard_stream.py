"""A shard that comes as a stream (a pipe, a socket) -> its episodes, checked as they pass.

    TokenShards, number of a shard, bytes in order  ->  (episode, codes_thw, slots_TA), ...

The manifest says which members come, in which order, at which byte and how long; anything else is
refused at the first header that differs. So a stranger's tar cannot be a compressed one, name a
path, hold a pickle, claim a size or end early without a word. Nothing is allocated that did not
arrive, nothing is unpickled, and memory holds one episode. At the end the whole has been hashed.

For the same reasons not `tarfile`: on a stream it unpacks what looks compressed, follows the
lengths in extended headers, and gives zeros without end for a sparse member.
"""

import hashlib
from collections.abc import Collection, Iterator
from tarfile import BLOCKSIZE
from typing import Protocol

from .actions import SlotArray
from .errors import FormatError
from .shard_members import read_header
from .shard_reader import TokenShards
from .shards import CodeArray

_PIECE_BYTES = 1 << 20


class ByteStream(Protocol):
    """What bytes are read from, in order."""

    def read(self, size: int, /) -> bytes:
        """Return at most `size` bytes; none at the end."""


def stream_episodes(
    shards: TokenShards,
    shard: int,
    stream: ByteStream,
    /,
    *,
    where: str,
    only: Collection[int] | None = None,
) -> Iterator[tuple[int, CodeArray, SlotArray]]:
    """Yield episodes of a shard as (number in `shards.episodes`, codes_thw, slots_TA as stored).

    Args:
        shards: what the manifest says.
        shard: which of `shards.files` the stream holds.
        stream: the tar; it is read to its end, unless the caller stops earlier.
        where: what it is called in errors.
        only: the episodes that are wanted; the others pass by unread.

    Raises:
        FormatError: naming the shard, and the member, that is not what the manifest says: its
            name, place, size, npy header, a code, an action; a tar that ends early or goes on; and
            at the end, when all episodes were yielded, if the hash of the whole differs.
    """
    file = shards.files[shard]
    tar = _Tar(stream, size_bytes=file.size_bytes, where=where)
    for episode in shards.in_shard(shard):
        row = shards.episodes[episode]
        wanted = only is None or episode in only
        content: dict[str, bytes] = {}
        for _ in ("actions", "codes", "json"):  # in whichever order
            name, start, size_bytes = tar.header()
            part = name.removeprefix(f"{row.key}.").removesuffix(".npy")
            known = name in (f"{row.key}.codes.npy", f"{row.key}.actions.npy")
            if part in content or not (
                (start, size_bytes) == row.span(part) if known else name == f"{row.key}.json"
            ):
                raise FormatError(
                    f"{where}: {name!r:.100} has {size_bytes} bytes at {start}, where the manifest "
                    f"has the codes, actions and JSON of {row.key}; copy the shard again"
                )
            content[part] = tar.read(size_bytes) if wanted and known else tar.skip(size_bytes)
        if wanted:
            codes_thw = shards.member(episode, "codes", content["codes"], where=where)
            slots_TA = shards.member(episode, "actions", content["actions"], where=where)
            yield episode, codes_thw, slots_TA
    tar.end(sha256=file.sha256)


class _Tar:
    """Members of a tar one after the other, counted and hashed."""

    def __init__(self, stream: ByteStream, /, *, size_bytes: int, where: str) -> None:
        self._stream = stream
        self._size_bytes = size_bytes
        self._where = where
        self._place = 0
        self._digest = hashlib.sha256()

    def header(self) -> tuple[str, int, int]:
        """Return name, first byte and size of the member that comes next."""
        place = self._place
        block = self._take(BLOCKSIZE)
        name, size_bytes = read_header(block, where=f"{self._where}: header at byte {place}")
        if self._place + size_bytes > self._size_bytes:
            raise FormatError(f"{self._where}: {name!r:.100} reaches over the end of the tar")
        return name, self._place, size_bytes

    def read(self, size_bytes: int) -> bytes:
        """Return the content of the member whose header was read last."""
        content = self._take(size_bytes)
        self._take(-size_bytes % BLOCKSIZE)
        return content

    def skip(self, size_bytes: int) -> bytes:
        """Pass over the content of a member; return nothing of it."""
        left = size_bytes + -size_bytes % BLOCKSIZE
        while left:
            left -= len(self._take(min(left, _PIECE_BYTES)))
        return b""

    def end(self, *, sha256: str) -> None:
        """Read what is left; refuse anything but the zeros that end a tar, and another hash."""
        while self._place < self._size_bytes:
            if any(self._take(min(self._size_bytes - self._place, _PIECE_BYTES))):
                raise FormatError(
                    f"{self._where}: has members behind its last episode that the manifest does "
                    "not list; copy the shard again"
                )
        if self._stream.read(1):
            raise FormatError(
                f"{self._where}: goes on after its {self._size_bytes} bytes; copy the shard again"
            )
        if self._digest.hexdigest() != sha256:
            raise FormatError(f"{self._where}: its bytes are not those of the manifest's hash")

    def _take(self, size_bytes: int) -> bytes:
        """Return exactly that many bytes, in pieces: what is claimed may never come."""
        pieces, left = [], size_bytes
        while left:
            piece = self._stream.read(min(left, _PIECE_BYTES))
            if not piece:
                raise FormatError(
                    f"{self._where}: ends after {self._place} bytes, the manifest says "
                    f"{self._size_bytes}; copy it again, or see to what sends it"
                )
            pieces.append(piece)
            left -= len(piece)
            self._place += len(piece)
            self._digest.update(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)
