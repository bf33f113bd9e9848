"""Token shards: codes and actions of many episodes, in tars that webdataset reads and we map.

    TokenEpisode, ...  -> write_shard, write_manifest ->  SHARDS/shard-%06d.tar, manifest.json, codebook.safetensors
    SHARDS             -> TokenShards                 ->  codes_thw, slots_TA of any stretch of any episode

A shard is a plain tar in webdataset's layout: per episode `KEY.actions.npy`, `KEY.codes.npy` and
`KEY.json`. The manifest holds what a tar cannot: specs, hashes, splits, and the byte offset of
every member, so that a window is one memory-mapped slice. The same episodes give the same bytes.
docs/formats.md describes everything to the byte.
"""

import io
import mmap
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from .actions import ActionSpec, SlotArray
from .config import build
from .episodes import check_key
from .errors import FormatError
from .files import failpoint, file_sha256, read_json, to_json, write_atomic, write_bytes, write_json
from .npy import npy_bytes, npy_layout
from .specs import CodeSpec, TokenizerSpec

CodeArray = npt.NDArray[np.unsignedinteger[Any]]

SHARDS_SCHEMA = "worldloom.token-shards/1"
SPLITS = ("train", "validation")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEpisode:
    """One episode as tokens: what goes into a shard."""

    key: str
    codes_thw: CodeArray
    """(t, h, w), or (t, h, w, Q) with residual levels; values in [0, V)."""
    slots_TA: SlotArray
    """(T - 1, A): the encoded action that leads from each pixel frame to the next."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRecord:
    """One finished shard: its name, size and hash, and the episodes inside."""

    file: str
    size_bytes: int
    sha256: str
    episodes: tuple[EpisodeRecord, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], /, *, where: str) -> Self:
        """Rebuild from JSON values."""
        return build(cls, data, where=where, error=FormatError)


def shard_name(index: int, /) -> str:
    """Return the file name of the index-th shard."""
    return f"shard-{index:06d}.tar"


def write_shard(
    folder: Path,
    index: int,
    episodes: Iterable[TokenEpisode],
    /,
    *,
    codes: CodeSpec,
    actions: ActionSpec,
) -> ShardRecord:
    """Write FOLDER/shard-%06d.tar, then its marker, each whole or not at all.

    Episodes are taken one at a time, so memory holds one. The marker, `shard-%06d.json`, is what
    tells a later run that the shard is finished: see `finished_shard`.

    Raises:
        FormatError: if an episode does not fit the specs.
        StorageError: if the disk refuses.
    """
    path = folder / shard_name(index)
    rows: list[EpisodeRecord] = []

    def write(file: BinaryIO) -> None:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for episode in episodes:
                rows.append(_add_episode(tar, file, episode, index, codes, actions))

    write_atomic(path, write)
    record = ShardRecord(
        file=path.name,
        size_bytes=path.stat().st_size,
        sha256=file_sha256(path),
        episodes=tuple(rows),
    )
    failpoint("shard-marker")
    write_json(path.with_suffix(".json"), record.to_dict())
    return record


def finished_shard(folder: Path, index: int, /) -> ShardRecord | None:
    """Return the record of a shard that an earlier run finished, or None.

    A shard counts as finished if its marker is there and the tar has the size and hash it says.
    """
    path = folder / shard_name(index)
    marker = path.with_suffix(".json")
    if not marker.exists() or not path.exists():
        return None
    record = ShardRecord.from_dict(read_json(marker, what="a shard's marker"), where=str(marker))
    same = path.stat().st_size == record.size_bytes and file_sha256(path) == record.sha256
    return record if same else None


def write_manifest(
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

    The manifest comes last: a folder without one is unfinished.
    """
    shards = list(shards)
    codebook_path = folder / "codebook.safetensors"
    write_bytes(codebook_path, save({"codebook": np.ascontiguousarray(codebook_VZ, np.float32)}))
    manifest = {
        "schema": SHARDS_SCHEMA,
        "tokenizer": tokenizer.to_dict(),
        "actions": actions.to_dict(),
        "fps": fps,
        "frame_skip": frame_skip,
        "codebook": {"file": codebook_path.name, "sha256": file_sha256(codebook_path)},
        "shards": [
            {"file": s.file, "size_bytes": s.size_bytes, "sha256": s.sha256, "num_episodes": len(s.episodes)}
            for s in shards
        ],
        "episodes": [asdict(row) for shard in shards for row in shard.episodes],
        "metrics": dict(metrics),
        "source": dict(source),
    }  # fmt: skip
    path = folder / "manifest.json"
    write_json(path, manifest, indent=1)
    return path


class TokenShards:
    """A folder of token shards, opened for reading; tars are memory-mapped when first touched."""

    def __init__(self, folder: Path, /) -> None:
        path = folder / "manifest.json"
        if not folder.is_dir():
            raise FormatError(
                f"{folder}: no such folder; write token shards with `worldloom tokenize`"
            )
        if not path.exists():
            raise FormatError(
                f"{folder}: has no manifest.json, so its shards are unfinished; "
                "run `worldloom tokenize` again, it continues where it stopped"
            )
        data = read_json(path, what="a manifest of token shards")
        if data.get("schema") != SHARDS_SCHEMA:
            raise FormatError(f"{path}: schema {data.get('schema')!r}, readable is {SHARDS_SCHEMA}")
        self.folder = folder
        self.manifest = data
        where = str(path)
        try:
            self.tokenizer = TokenizerSpec.from_dict(data["tokenizer"], where=where)
            self.actions = ActionSpec.from_dict(data["actions"], where=where)
            self.fps, self.frame_skip = float(data["fps"]), int(data["frame_skip"])
            self.metrics: dict[str, Any] = dict(data["metrics"])
            self.source: dict[str, Any] = dict(data["source"])
            self._files = [
                build(_ShardFile, row, where=where, error=FormatError) for row in data["shards"]
            ]
            self.episodes = [
                build(EpisodeRecord, row, where=where, error=FormatError)
                for row in data["episodes"]
            ]
            self._codebook: dict[str, str] = dict(data["codebook"])
            self._codebook_path = folder / _plain_name(self._codebook["file"], where)
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{path}: field {error} is missing or has the wrong type") from error
        self.codes = self.tokenizer.codes
        self._check_index(where)
        self._maps: dict[int, mmap.mmap] = {}

    def _check_index(self, where: str) -> None:
        """Refuse an index that contradicts itself or the files' sizes."""
        seen: set[str] = set()
        for row in self.episodes:
            check_key(row.key, where=where)
            if row.key in seen:
                raise FormatError(f"{where}: key {row.key} stands twice")
            seen.add(row.key)
            if not 0 <= row.shard < len(self._files):
                raise FormatError(
                    f"{where}: episode {row.key} lies in shard {row.shard} of {len(self._files)}"
                )
            if row.split not in SPLITS:
                raise FormatError(f"{where}: episode {row.key} has split {row.split!r}")
            if row.num_frames < 1 or row.latent_frames != self.codes.latent_frames(row.num_frames):
                raise FormatError(
                    f"{where}: episode {row.key} has {row.latent_frames} latent frames for "
                    f"{row.num_frames} frames, which does not fit the tokenizer's stride"
                )
            end = max(row.codes_offset + row.codes_bytes, row.actions_offset + row.actions_bytes)
            if min(
                row.codes_offset, row.actions_offset, row.codes_bytes, row.actions_bytes
            ) < 0 or (end > self._files[row.shard].size_bytes):
                raise FormatError(
                    f"{where}: episode {row.key} lies outside {self._files[row.shard].file}"
                )
        for index, file in enumerate(self._files):
            path = self.folder / _plain_name(file.file, where)
            size = path.stat().st_size if path.is_file() else None
            if size != file.size_bytes:
                found = "is missing" if size is None else f"has {size} bytes"
                raise FormatError(
                    f"{path}: {found}, the manifest says {file.size_bytes}; copy it again, "
                    "or run `worldloom tokenize` again"
                )
            if sum(row.shard == index for row in self.episodes) != file.num_episodes:
                raise FormatError(f"{where}: {file.file} should hold {file.num_episodes} episodes")

    def split(self, name: str, /) -> list[int]:
        """Return the indices into `episodes` of "train" or "validation"."""
        return [index for index, row in enumerate(self.episodes) if row.split == name]

    def codes_thw(self, episode: int, start: int = 0, stop: int | None = None, /) -> CodeArray:
        """Return codes of latent frames [start, stop) of an episode, in the stored dtype.

        Raises:
            FormatError: if the bytes are not what the index says, or a code is not below V.
        """
        row = self.episodes[episode]
        where = f"{self.folder / self._files[row.shard].file}: {row.key}.codes.npy"
        shape = self.codes.codes_shape(row.latent_frames)
        array = self._array(
            row.shard, row.codes_offset, row.codes_bytes, self.codes.dtype, shape, where
        )
        part = array[start : row.latent_frames if stop is None else stop]
        if part.size and int(part.max()) >= self.codes.vocab_size:
            raise FormatError(
                f"{where}: code {int(part.max())} in a vocabulary of {self.codes.vocab_size}; "
                "the shard was not written by this manifest's tokenizer"
            )
        return part

    def slots_TA(self, episode: int, start: int = 0, stop: int | None = None, /) -> SlotArray:
        """Return the encoded actions of pixel steps [start, stop) of an episode, as int64.

        Raises:
            FormatError: if the bytes are not what the index says, or an action is out of range.
        """
        row = self.episodes[episode]
        where = f"{self.folder / self._files[row.shard].file}: {row.key}.actions.npy"
        shape = (row.num_frames - 1, self.actions.num_slots)
        array = self._array(
            row.shard, row.actions_offset, row.actions_bytes, self.actions.slot_dtype, shape, where
        )
        return self.actions.check_slots(array[start:stop], where=where)

    def codebook_VZ(self) -> npt.NDArray[np.float32]:
        """Return the codebook vectors, float32, as the tokenizer's decoder receives them."""
        path = self._codebook_path
        try:
            if file_sha256(path) != self._codebook["sha256"]:
                raise FormatError(f"{path}: its bytes are not those of the manifest's hash")
            codebook = load(path.read_bytes())["codebook"]
        except (OSError, KeyError, SafetensorError) as error:
            raise FormatError(f"{path}: not a readable codebook ({error})") from error
        levels = (self.codes.num_levels,) if self.codes.num_levels > 1 else ()
        shape = (*levels, self.codes.vocab_size, self.codes.code_dim)
        if codebook.shape != shape or codebook.dtype != np.float32:
            raise FormatError(f"{path}: {codebook.dtype} {codebook.shape}, must be float32 {shape}")
        return codebook

    def verify(self) -> None:
        """Hash every shard and read every array.

        Raises:
            FormatError: naming the first shard, or the first array, that is not what it should be.
        """
        for file in self._files:
            if file_sha256(self.folder / file.file) != file.sha256:
                raise FormatError(
                    f"{self.folder / file.file}: its bytes are not those of the manifest's hash"
                )
        for index in range(len(self.episodes)):
            self.codes_thw(index)
            self.slots_TA(index)
        self.codebook_VZ()

    def _array(
        self,
        shard: int,
        offset: int,
        size_bytes: int,
        dtype: str,
        shape: tuple[int, ...],
        where: str,
    ) -> npt.NDArray[Any]:
        """Map one npy member of a shard, after checking that it is the array the index promises."""
        if shard not in self._maps:
            with (self.folder / self._files[shard].file).open("rb") as file:
                self._maps[shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        mapped = self._maps[shard]
        head = io.BytesIO(mapped[offset : offset + min(size_bytes, 1 << 14)])
        layout = npy_layout(head, size_bytes, where=where)
        if layout.dtype != np.dtype(dtype) or layout.shape != shape:
            raise FormatError(f"{where}: {layout.dtype} {layout.shape}, must be {dtype} {shape}")
        count = int(np.prod(shape))
        flat = np.frombuffer(mapped, layout.dtype, count, offset + layout.data_offset)
        return flat.reshape(shape)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the maps behind: a loader's worker process maps for itself."""
        return {**self.__dict__, "_maps": {}}


@dataclass(frozen=True, slots=True, kw_only=True)
class _ShardFile:
    file: str
    size_bytes: int
    sha256: str
    num_episodes: int


def _plain_name(name: object, where: str) -> str:
    """Return a file name that stays inside its folder."""
    if not isinstance(name, str) or name != Path(name).name or name in ("", ".", ".."):
        raise FormatError(
            f"{where}: file name {name!r:.60} must be a plain name in the same folder"
        )
    return name


def _add_episode(
    tar: tarfile.TarFile,
    file: BinaryIO,
    episode: TokenEpisode,
    shard: int,
    codes: CodeSpec,
    actions: ActionSpec,
) -> EpisodeRecord:
    """Append the three members of one episode; return where they lie."""
    key = check_key(episode.key, where="write_shard")
    latent_frames = codes.latent_frames(episode.num_frames)
    array = np.asarray(episode.codes_thw)
    if array.shape != codes.codes_shape(latent_frames):
        raise FormatError(
            f"{key}: codes {array.shape} for {episode.num_frames} frames, "
            f"must be {codes.codes_shape(latent_frames)}"
        )
    if int(array.min()) < 0 or int(array.max()) >= codes.vocab_size:
        raise FormatError(
            f"{key}: codes in [{array.min()}, {array.max()}], must be in [0, {codes.vocab_size})"
        )
    slots_TA = actions.check_slots(episode.slots_TA, where=key)
    if len(slots_TA) != episode.num_frames - 1:
        raise FormatError(f"{key}: {len(slots_TA)} actions for {episode.num_frames} frames")
    about = {
        "key": key,
        "split": episode.split,
        "num_frames": episode.num_frames,
        "latent_frames": latent_frames,
        "metadata": dict(episode.metadata),
    }
    spans = {
        suffix: _add_member(tar, file, f"{key}.{suffix}", content)
        for suffix, content in (
            ("actions.npy", npy_bytes(slots_TA.astype(actions.slot_dtype))),
            ("codes.npy", npy_bytes(array.astype(codes.dtype))),
            ("json", to_json(about).encode()),
        )
    }
    return EpisodeRecord(
        key=key,
        shard=shard,
        split=episode.split,
        num_frames=episode.num_frames,
        latent_frames=latent_frames,
        codes_offset=spans["codes.npy"][0],
        codes_bytes=spans["codes.npy"][1],
        actions_offset=spans["actions.npy"][0],
        actions_bytes=spans["actions.npy"][1],
    )


def _add_member(tar: tarfile.TarFile, file: BinaryIO, name: str, content: bytes) -> tuple[int, int]:
    """Append one member with fixed metadata; return (offset of its data, its size)."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    info.mtime = 0
    info.mode = 0o644
    tar.addfile(info, io.BytesIO(content))
    padded = -(-len(content) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return file.tell() - padded, len(content)
