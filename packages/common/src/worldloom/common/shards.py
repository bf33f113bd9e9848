"""Token shards, written: codes and actions of many episodes, in tars that webdataset reads.

    TokenEpisode, ...          -> write_shard    -> SHARDS/shard-%06d.tar and its marker .json
    ShardRecord, ..., codebook -> write_manifest -> SHARDS/codebook.safetensors, manifest.json

A shard is a plain tar in webdataset's layout: per episode `KEY.actions.npy`, `KEY.codes.npy` and
`KEY.json`. The manifest holds what a tar cannot: specs, hashes, splits, and the byte offset of
every member, so that a window is one memory-mapped slice. The same episodes give the same bytes.
An episode whose actions nobody knows has none, and says so: it has no no-ops put in their place.
docs/formats.md describes everything to the byte.
"""

import io
import math
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from .actions import ActionSpec, SlotArray
from .config import build
from .episodes_spec import check_key
from .errors import FormatError
from .files import (
    failpoint,
    file_sha256,
    read_json,
    storage_errors,
    to_json,
    write_atomic,
    write_bytes,
    write_json,
)
from .npy import npy_bytes
from .specs import CodeSpec, TokenizerSpec

CodeArray = npt.NDArray[np.unsignedinteger[Any]]

SHARDS_SCHEMA = "worldloom.token-shards/1"
HALF_LABELLED_SHARDS_SCHEMA = "worldloom.token-shards/2"
"""Of a folder with unlabelled episodes; nothing else differs."""
SPLITS = ("train", "validation")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEpisode:
    """One episode as tokens: what goes into a shard."""

    key: str
    codes_thw: CodeArray
    """(t, h, w), or (t, h, w, Q) with residual levels; values in [0, V)."""
    slots_TA: SlotArray | None
    """(T - 1, A): the encoded action that leads from each pixel frame to the next; None where
    nobody knows them."""
    num_frames: int
    """Pixel frames T that the codes decode to; the last latent frame may cover more."""
    split: str
    """"train" or "validation"."""
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeRecord:
    """Where one episode lies: a row of the manifest."""

    key: str
    shard: int
    split: str
    num_frames: int
    latent_frames: int
    codes_offset: int
    """Byte in the tar where the npy of the codes begins."""
    codes_bytes: int
    actions_offset: int
    actions_bytes: int
    labelled: bool = True
    """Whether its actions are known; where not, their npy has no rows."""

    @property
    def num_steps(self) -> int:
        """Steps whose action is known."""
        return self.num_frames - 1 if self.labelled else 0

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; `labelled` only where it is not, as schema 1 has no such."""
        plain = asdict(self)
        if self.labelled:
            del plain["labelled"]
        return plain

    def span(self, name: str, /) -> tuple[int, int]:
        """Return (offset, size) of the npy of the "codes" or the "actions"."""
        if name == "codes":
            return self.codes_offset, self.codes_bytes
        return self.actions_offset, self.actions_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRecord:
    """One finished shard: its name, size and hash, and the episodes inside."""

    file: str
    size_bytes: int
    sha256: str
    episodes: tuple[EpisodeRecord, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)
    """Keys of the episodes that were to lie here but are damaged, and what is wrong with each."""
    measured: Mapping[str, float] = field(default_factory=dict)
    """What was measured while the shard was made: sums, to be added up over shards."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self) | {"episodes": [row.to_dict() for row in self.episodes]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], /, *, where: str) -> Self:
        """Rebuild from JSON values."""
        return build(cls, data, where=where, error=FormatError)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFile:
    """A row of the manifest's list of shards."""

    file: str
    size_bytes: int
    sha256: str
    num_episodes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CodebookFile:
    """The manifest's word on the codebook."""

    file: str
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """manifest.json, field by field."""

    schema: str
    tokenizer: Mapping[str, Any]
    actions: Mapping[str, Any]
    fps: float
    frame_skip: int
    codebook: CodebookFile
    shards: tuple[ShardFile, ...]
    episodes: tuple[EpisodeRecord, ...]
    metrics: Mapping[str, Any]
    source: Mapping[str, Any]


def shard_name(index: int, /) -> str:
    """Return the file name of the index-th shard."""
    return f"shard-{index:06d}.tar"


def write_shard(  # noqa: PLR0913 - a marker's parts
    folder: Path,
    index: int,
    episodes: Iterable[TokenEpisode],
    /,
    *,
    codes: CodeSpec,
    actions: ActionSpec,
    skipped: Mapping[str, str] | None = None,
    measured: Mapping[str, float] | None = None,
) -> ShardRecord:
    """Write FOLDER/shard-%06d.tar, then its marker, each whole or not at all.

    Episodes are taken one at a time, so memory holds one. The marker, `shard-%06d.json`, is what
    tells a later run that the shard is finished: see `finished_shard`. It also keeps what is given
    as `skipped` and `measured`: see `ShardRecord`.

    Raises:
        FormatError: if an episode does not fit the specs, or a key stands twice.
        StorageError: if the disk refuses.
    """
    path = folder / shard_name(index)
    rows: list[EpisodeRecord] = []
    keys: set[str] = set()

    def write(file: BinaryIO) -> None:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for episode in episodes:
                if episode.key in keys:
                    raise FormatError(f"{path}: key {episode.key} stands twice")
                keys.add(episode.key)
                members = _members(episode, codes, actions)
                spans = [_add_member(tar, file, *member) for member in members]
                rows.append(_record(episode, index, codes, spans))

    write_atomic(path, write)
    with storage_errors(path):
        size, digest = path.stat().st_size, file_sha256(path)
    record = ShardRecord(
        file=path.name,
        size_bytes=size,
        sha256=digest,
        episodes=tuple(rows),
        skipped=dict(skipped or {}),
        measured=dict(measured or {}),
    )
    failpoint("shard-marker")
    write_json(path.with_suffix(".json"), record.to_dict())
    return record


def shard_bytes(
    episodes: Iterable[tuple[str, int, str, Mapping[str, Any], bool]],
    /,
    *,
    codes: CodeSpec,
    actions: ActionSpec,
) -> int:
    """Return how large the tar of these episodes will be, to the byte, before anything is encoded.

    Args:
        episodes: key, pixel frames, split and metadata of each, and whether it is labelled.
        codes: of the tokenizer.
        actions: of the episodes.
    """
    total = 2 * tarfile.BLOCKSIZE  # what ends a tar
    for key, num_frames, split, metadata, labelled in episodes:
        latent_frames = codes.latent_frames(num_frames)
        steps = num_frames - 1 if labelled else 0
        sizes = (
            _npy_bytes((steps, actions.num_slots), actions.slot_dtype),
            _npy_bytes(codes.codes_shape(latent_frames), codes.dtype),
            len(_about(key, split, num_frames, latent_frames, metadata, labelled=labelled)),
        )
        total += sum(tarfile.BLOCKSIZE + _padded(size, tarfile.BLOCKSIZE) for size in sizes)
    return _padded(total, tarfile.RECORDSIZE)


def _npy_bytes(shape: tuple[int, ...], dtype: npt.DTypeLike) -> int:
    """Return the size of what `npy_bytes` makes of such an array, without one."""
    header = io.BytesIO()
    descr = np.dtype(dtype).newbyteorder("<").str
    layout = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, layout)
    return header.tell() + math.prod(shape) * np.dtype(dtype).itemsize


def _padded(size: int, block: int) -> int:
    """Return a size rounded up to whole blocks."""
    return -(-size // block) * block


def finished_shard(folder: Path, index: int, /, *, check_hash: bool = True) -> ShardRecord | None:
    """Return the record of a shard that an earlier run finished, or None.

    A shard counts as finished if its marker is there and the tar has the size and hash it says.
    Whether it was made of the same episodes by the same tokenizer is for the caller to know.

    Args:
        folder: holds the shard.
        index: its number.
        check_hash: read every byte; without, only the size is compared.
    """
    path = folder / shard_name(index)
    marker = path.with_suffix(".json")
    if not marker.exists() or not path.exists():
        return None
    try:
        data = read_json(marker, what="a shard's marker")
        record = ShardRecord.from_dict(data, where=str(marker))
    except FormatError:
        return None  # the cure for a damaged marker is to write the shard again
    with storage_errors(path):
        same = path.stat().st_size == record.size_bytes and (
            not check_hash or file_sha256(path) == record.sha256
        )
    return record if same and record.file == path.name else None


def write_manifest(  # noqa: PLR0913 - as many as a manifest has parts; no two belong together
    folder: Path,
    shards: Iterable[ShardRecord],
    /,
    *,
    tokenizer: TokenizerSpec,
    actions: ActionSpec,
    codebook_VZ: npt.NDArray[np.float32],
    fps: float,
    frame_skip: int,
    metrics: Mapping[str, Any],
    source: Mapping[str, Any],
) -> Path:
    """Write codebook.safetensors and manifest.json; return the manifest's path.

    The manifest comes last: a folder without one is unfinished. A metric that is not finite (the
    PSNR of equal pictures) becomes null.

    Raises:
        FormatError: if the codebook does not fit the spec, or a key stands in two shards.
        StorageError: if the disk refuses.
        ValueError: if the shards are not all shards, in order.
    """
    shards = list(shards)
    for index, shard in enumerate(shards):
        if shard.file != shard_name(index) or any(row.shard != index for row in shard.episodes):
            raise ValueError(f"{shard.file} is number {index} of the shards, must be in order")
    check_unique((row.key for shard in shards for row in shard.episodes), where=str(folder))
    codebook_path = folder / "codebook.safetensors"
    codebook_VZ = np.ascontiguousarray(codebook_VZ, np.float32)
    check_codebook(codebook_VZ, tokenizer.codes, where=str(codebook_path))
    write_bytes(codebook_path, save({"codebook": codebook_VZ}))
    half = any(not row.labelled for shard in shards for row in shard.episodes)
    manifest = {
        "schema": HALF_LABELLED_SHARDS_SCHEMA if half else SHARDS_SCHEMA,
        "tokenizer": tokenizer.to_dict(),
        "actions": actions.to_dict(),
        "fps": fps,
        "frame_skip": frame_skip,
        "codebook": {"file": codebook_path.name, "sha256": file_sha256(codebook_path)},
        "shards": [
            {
                "file": shard.file,
                "size_bytes": shard.size_bytes,
                "sha256": shard.sha256,
                "num_episodes": len(shard.episodes),
            }
            for shard in shards
        ],
        "episodes": [row.to_dict() for shard in shards for row in shard.episodes],
        "metrics": {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in metrics.items()
        },
        "source": dict(source),
    }
    path = folder / "manifest.json"
    write_json(path, manifest, indent=1)
    return path


def check_unique(keys: Iterable[str], *, where: str) -> None:
    """Refuse a key that stands twice."""
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            raise FormatError(f"{where}: {key!r:.100} stands twice")
        seen.add(key)


def check_codebook(codebook_VZ: npt.NDArray[Any], codes: CodeSpec, *, where: str) -> None:
    """Refuse codebook vectors that do not fit the spec."""
    levels = (codes.num_levels,) if codes.num_levels > 1 else ()
    shape = (*levels, codes.vocab_size, codes.code_dim)
    if codebook_VZ.shape != shape or codebook_VZ.dtype != np.float32:
        raise FormatError(
            f"{where}: {codebook_VZ.dtype} {codebook_VZ.shape}, must be float32 {shape}"
        )
    if not np.isfinite(codebook_VZ).all():
        raise FormatError(f"{where}: holds a number that is not finite")


def _members(
    episode: TokenEpisode, codes: CodeSpec, actions: ActionSpec
) -> list[tuple[str, bytes]]:
    """Return (name, content) of the members of one episode, after checking it."""
    key = check_key(episode.key, where="write_shard")
    if episode.num_frames < 1 or episode.split not in SPLITS:
        raise FormatError(f"{key}: {episode.num_frames} frames, split {episode.split!r:.60}")
    latent_frames = codes.latent_frames(episode.num_frames)
    codes_thw = np.asarray(episode.codes_thw)
    if codes_thw.shape != codes.codes_shape(latent_frames):
        raise FormatError(
            f"{key}: codes {codes_thw.shape} for {episode.num_frames} frames, "
            f"must be {codes.codes_shape(latent_frames)}"
        )
    if not np.issubdtype(codes_thw.dtype, np.integer):
        raise FormatError(f"{key}: codes are {codes_thw.dtype}, must be integers")
    if int(codes_thw.min()) < 0 or int(codes_thw.max()) >= codes.vocab_size:
        raise FormatError(
            f"{key}: codes in [{codes_thw.min()}, {codes_thw.max()}], "
            f"must be in [0, {codes.vocab_size})"
        )
    labelled = episode.slots_TA is not None
    if episode.slots_TA is None:
        if actions.kind == "none":
            raise FormatError(
                f"{key}: slots_TA is None, but there are no actions that could be unknown; "
                "give (T - 1, 0) slots"
            )
        slots_TA = np.zeros((0, actions.num_slots), np.int64)
    else:
        slots_TA = actions.check_slots(episode.slots_TA, where=key)
        if len(slots_TA) != episode.num_frames - 1:
            raise FormatError(f"{key}: {len(slots_TA)} actions for {episode.num_frames} frames")
    about = _about(
        key, episode.split, episode.num_frames, latent_frames, episode.metadata, labelled=labelled
    )
    return [
        (f"{key}.actions.npy", npy_bytes(slots_TA.astype(actions.slot_dtype))),
        (f"{key}.codes.npy", npy_bytes(codes_thw.astype(codes.dtype))),
        (f"{key}.json", about),
    ]


def _about(  # noqa: PLR0913 - as many as a KEY.json has fields
    key: str,
    split: str,
    num_frames: int,
    latent_frames: int,
    metadata: Mapping[str, Any],
    *,
    labelled: bool,
) -> bytes:
    """Return the content of KEY.json."""
    about = {
        "key": key,
        "split": split,
        "num_frames": num_frames,
        "latent_frames": latent_frames,
        "metadata": dict(metadata),
        **({} if labelled else {"labelled": False}),
    }
    return to_json(about).encode()


def _record(
    episode: TokenEpisode, shard: int, codes: CodeSpec, spans: Sequence[tuple[int, int]]
) -> EpisodeRecord:
    """Return the row of an episode whose `_members` lie at `spans`."""
    (actions_offset, actions_bytes), (codes_offset, codes_bytes), _ = spans
    return EpisodeRecord(
        key=episode.key,
        shard=shard,
        split=episode.split,
        num_frames=episode.num_frames,
        latent_frames=codes.latent_frames(episode.num_frames),
        codes_offset=codes_offset,
        codes_bytes=codes_bytes,
        actions_offset=actions_offset,
        actions_bytes=actions_bytes,
        labelled=episode.slots_TA is not None,
    )


def _add_member(tar: tarfile.TarFile, file: BinaryIO, name: str, content: bytes) -> tuple[int, int]:
    """Append one member with fixed metadata; return (offset of its data, its size)."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    info.mtime = 0
    info.mode = 0o644
    tar.addfile(info, io.BytesIO(content))
    return file.tell() - _padded(len(content), tarfile.BLOCKSIZE), len(content)
