"""Token shards, read: any stretch of any episode, straight from the memory map of its tar.

    SHARDS/{shard-%06d.tar, manifest.json, codebook.safetensors} -> TokenShards
    (episode, start, stop) -> codes_thw, slots_TA

What the manifest says is checked once, when it is opened; what a tar holds is checked when a member
is first touched; codes are checked against the vocabulary whenever they are read. Nothing is ever
extracted, so names inside a tar are never paths.
"""

import hashlib
import io
import math
import mmap
import tarfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load

from .actions import ActionSpec, SlotArray
from .config import build
from .episodes import check_key
from .errors import FormatError
from .files import file_sha256, plain_name, read_json, read_limited, storage_errors
from .npy import npy_layout
from .shards import SHARDS_SCHEMA, SPLITS, CodeArray, Manifest, check_codebook, check_unique
from .specs import TokenizerSpec, check_count, check_rate

_MAX_MAPS = 128
"""Shards mapped at once: each map holds a file descriptor, and a process may have 1,024."""
_MAX_CODEBOOK_BYTES = 1 << 32


@dataclass(frozen=True, slots=True)
class _MappedShard:
    """A shard's bytes, and the arrays in it that were asked for."""

    content: mmap.mmap
    arrays: dict[tuple[int, str], npt.NDArray[Any]] = field(default_factory=dict)


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
            raise FormatError(
                f"{path}: schema {data.get('schema')!r:.60}, readable is {SHARDS_SCHEMA}"
            )
        where = str(path)
        manifest = build(Manifest, data, where=where, error=FormatError)
        self.folder = folder
        self.manifest = data
        self.tokenizer = TokenizerSpec.from_dict(manifest.tokenizer, where=where)
        self.codes = self.tokenizer.codes
        self.actions = ActionSpec.from_dict(manifest.actions, where=where)
        self.fps = check_rate(where, "fps", manifest.fps)
        check_count(where, "frame_skip", manifest.frame_skip, low=0)
        self.frame_skip = manifest.frame_skip
        self.metrics: dict[str, Any] = dict(manifest.metrics)
        self.source: dict[str, Any] = dict(manifest.source)
        self.episodes = list(manifest.episodes)
        self._files = manifest.shards
        self._codebook = manifest.codebook
        self._check_files(where)
        self._check_index(where)
        self._maps: dict[int, _MappedShard] = {}

    def _check_files(self, where: str) -> None:
        """Refuse names that leave the folder, and files that are not as long as they should be."""
        plain_name(self._codebook.file, where=where)
        for file in self._files:
            path = self.folder / plain_name(file.file, where=where)
            size = path.stat().st_size if path.is_file() else None
            if size != file.size_bytes:
                found = "is missing" if size is None else f"has {size} bytes"
                raise FormatError(
                    f"{path}: {found}, the manifest says {file.size_bytes}; copy it again, "
                    "or run `worldloom tokenize` again"
                )

    def _check_index(self, where: str) -> None:
        """Refuse an index that contradicts itself or the files' sizes."""
        for row in self.episodes:
            check_key(row.key, where=where)
            episode = f"{where}: episode {row.key}"
            if not 0 <= row.shard < len(self._files):
                raise FormatError(f"{episode} lies in shard {row.shard} of {len(self._files)}")
            if row.split not in SPLITS:
                raise FormatError(f"{episode} has split {row.split!r:.60}")
            if row.num_frames < 1 or row.latent_frames != self.codes.latent_frames(row.num_frames):
                raise FormatError(
                    f"{episode} has {row.latent_frames} latent frames for "
                    f"{row.num_frames} frames, which does not fit the tokenizer's stride"
                )
            file = self._files[row.shard]
            for name in ("codes", "actions"):
                offset, size_bytes = row.span(name)
                if offset < 0 or size_bytes <= 0 or offset + size_bytes > file.size_bytes:
                    raise FormatError(f"{episode}: its {name} lie outside {file.file}")
                if offset % tarfile.BLOCKSIZE:
                    raise FormatError(
                        f"{episode}: its {name} begin at byte {offset} of {file.file}, "
                        f"but members of a tar begin at multiples of {tarfile.BLOCKSIZE}"
                    )
        check_unique((row.key for row in self.episodes), where=where)
        counts = Counter(row.shard for row in self.episodes)
        for index, file in enumerate(self._files):
            if counts[index] != file.num_episodes:
                raise FormatError(
                    f"{where}: {file.file} should hold {file.num_episodes} episodes, "
                    f"but {counts[index]} are listed"
                )

    def split(self, name: str, /) -> list[int]:
        """Return the indices into `episodes` of "train" or "validation"."""
        return [index for index, row in enumerate(self.episodes) if row.split == name]

    def codes_thw(self, episode: int, start: int = 0, stop: int | None = None, /) -> CodeArray:
        """Return codes of latent frames [start, stop) of an episode, in the stored dtype.

        A stretch that reaches over the end of the episode is cut there. What is returned lies in
        the map of the file: it is read-only, and looking at it reads the disk.

        Raises:
            FormatError: if the bytes are not what the index says, or a code is not below V.
            ValueError: if `start` is negative, or `stop` before it.
        """
        part_thw = self._part(episode, "codes", start, stop)
        if part_thw.size and int(part_thw.max()) >= self.codes.vocab_size:
            raise FormatError(
                f"{self._where(episode, 'codes')}: code {int(part_thw.max())} in a vocabulary of "
                f"{self.codes.vocab_size}; the shard was not written by this manifest's tokenizer"
            )
        return part_thw

    def slots_TA(self, episode: int, start: int = 0, stop: int | None = None, /) -> SlotArray:
        """Return the encoded actions of pixel steps [start, stop) of an episode, as int64.

        A stretch that reaches over the end of the episode is cut there.

        Raises:
            FormatError: if the bytes are not what the index says, or an action is out of range.
            ValueError: if `start` is negative, or `stop` before it.
        """
        return self._part(episode, "actions", start, stop).astype(np.int64)

    def codebook_VZ(self) -> npt.NDArray[np.float32]:
        """Return the codebook vectors, float32, as the tokenizer's decoder receives them."""
        path = self.folder / self._codebook.file
        content = read_limited(
            path, what="the codebook of token shards", limit_bytes=_MAX_CODEBOOK_BYTES
        )
        if hashlib.sha256(content).hexdigest() != self._codebook.sha256:
            raise FormatError(f"{path}: its bytes are not those of the manifest's hash")
        try:
            codebook_VZ = load(content)["codebook"]
        except (KeyError, ValueError, TypeError, SafetensorError) as error:
            raise FormatError(f"{path}: not a readable codebook ({error})") from error
        check_codebook(codebook_VZ, self.codes, where=str(path))
        return codebook_VZ

    def verify(self) -> None:
        """Hash every shard, compare the index with the tars' own headers, and read every array.

        Raises:
            FormatError: naming the first shard, or the first array, that is not what it should be.
        """
        for file in self._files:
            path = self.folder / file.file
            with storage_errors(path):
                same = file_sha256(path) == file.sha256
            if not same:
                raise FormatError(f"{path}: its bytes are not those of the manifest's hash")
        self._check_members()
        for index in range(len(self.episodes)):
            self.codes_thw(index)
            self.slots_TA(index)
        self.codebook_VZ()

    def _check_members(self) -> None:
        """Refuse tars whose members are not, by name and place, those of the index."""
        wanted: list[dict[str, tuple[int, int]]] = [{} for _ in self._files]
        for row in self.episodes:
            for name in ("codes", "actions"):
                wanted[row.shard][f"{row.key}.{name}.npy"] = row.span(name)
        for file, spans in zip(self._files, wanted, strict=True):
            path = self.folder / file.file
            try:
                with tarfile.open(path, "r:") as tar:
                    there = [(info.name, (info.offset_data, info.size)) for info in tar]
            except (OSError, ValueError, tarfile.TarError) as error:
                raise FormatError(f"{path}: not a readable tar ({error})") from error
            check_unique((name for name, _ in there), where=str(path))
            found = {name: span for name, span in there if name.endswith(".npy")}
            for name in sorted(spans.keys() | found.keys()):
                if spans.get(name) != found.get(name):
                    raise FormatError(
                        f"{path}: {name!r:.100} lies at {found.get(name, 'no place')}, "
                        f"the manifest says {spans.get(name, 'no place')}"
                    )

    def _part(self, episode: int, name: str, start: int, stop: int | None) -> npt.NDArray[Any]:
        """Return [start, stop) of the codes or actions of an episode, as they are stored."""
        row = self.episodes[episode]
        mapped = self._maps.get(row.shard) or self._map(row.shard)
        array = mapped.arrays.get((episode, name))
        if array is None:
            array = mapped.arrays[episode, name] = self._view(episode, name, mapped)
        if start < 0 or (stop is not None and stop < start):
            raise ValueError(f"{row.key}: {name} [{start}, {stop}) of {len(array)}")
        return array[start:stop]

    def _map(self, shard: int) -> _MappedShard:
        """Map a shard, and let go of the one mapped longest ago where there are too many."""
        path = self.folder / self._files[shard].file
        try:
            with path.open("rb") as file:
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise FormatError(f"{path}: cannot be read ({error})") from error
        if len(content) != self._files[shard].size_bytes:
            raise FormatError(f"{path}: has changed since it was opened; copy it again")
        if len(self._maps) >= _MAX_MAPS:
            del self._maps[next(iter(self._maps))]
        self._maps[shard] = _MappedShard(content)
        return self._maps[shard]

    def _view(self, episode: int, name: str, mapped: _MappedShard) -> npt.NDArray[Any]:
        """Return one npy member in place, after checking that it is what the index promises."""
        row = self.episodes[episode]
        where = self._where(episode, name)
        offset, size_bytes = row.span(name)
        head = io.BytesIO(mapped.content[offset : offset + min(size_bytes, 1 << 14)])
        layout = npy_layout(head, size_bytes, where=where)
        if name == "codes":
            dtype, shape = self.codes.dtype, self.codes.codes_shape(row.latent_frames)
        else:
            dtype, shape = self.actions.slot_dtype, (row.num_frames - 1, self.actions.num_slots)
        if layout.dtype != np.dtype(dtype) or layout.shape != shape:
            raise FormatError(f"{where}: {layout.dtype} {layout.shape}, must be {dtype} {shape}")
        if layout.data_offset % layout.dtype.itemsize:
            raise FormatError(
                f"{where}: its numbers begin {layout.data_offset} bytes in, must be a multiple of "
                f"{layout.dtype.itemsize}; unaligned numbers cannot be mapped"
            )
        start = offset + layout.data_offset
        flat = np.frombuffer(mapped.content, layout.dtype, math.prod(shape), start)
        array = flat.reshape(shape)
        if name == "actions":
            self.actions.check_slots(array, where=where)
        return array

    def _where(self, episode: int, name: str) -> str:
        row = self.episodes[episode]
        return f"{self.folder / self._files[row.shard].file}: {row.key}.{name}.npy"

    def __getstate__(self) -> dict[str, Any]:
        """Leave the maps behind: a loader's worker process maps for itself."""
        return {**self.__dict__, "_maps": {}}
