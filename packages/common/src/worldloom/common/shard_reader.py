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
from array import array
from collections import Counter
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load

from .actions import ActionSpec, SlotArray
from .config import build
from .episodes_spec import check_key
from .errors import FormatError
from .files import file_sha256, plain_name, read_json, read_limited, storage_errors
from .npy import NpyLayout, npy_layout
from .shard_members import Spans, episode_metadata, tar_spans
from .shards import (
    HALF_LABELLED_SHARDS_SCHEMA,
    SHARDS_SCHEMA,
    SPLITS,
    CodeArray,
    Manifest,
    check_codebook,
    check_unique,
)
from .specs import TokenizerSpec, check_count, check_rate

_MAX_MAPS = 128
"""Shards mapped at once: each map holds a file descriptor, and a process may have 1,024."""
_MAX_CODEBOOK_BYTES = 1 << 32
_MAPPING = Lock()
"""Held while a shard is mapped: one thread may read ahead while another validates."""


class TokenShards:
    """A folder of token shards, opened for reading; tars are memory-mapped when first touched."""

    def __init__(self, folder: Path, /, *, tars_elsewhere: bool = False) -> None:
        """Read the manifest and check what it says.

        Args:
            folder: manifest, codebook and tars.
            tars_elsewhere: do not ask for the tars: they will come in a stream (shard_stream.py).

        Raises:
            FormatError: if the folder is no finished folder of token shards, or contradicts itself.
        """
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
        readable = (SHARDS_SCHEMA, HALF_LABELLED_SHARDS_SCHEMA)
        if data.get("schema") not in readable:
            raise FormatError(
                f"{path}: schema {data.get('schema')!r:.60}, readable are {' and '.join(readable)}"
            )
        where = str(path)
        manifest = build(Manifest, data, where=where, error=FormatError)
        self.folder = folder
        self.manifest = data
        self.tokenizer = TokenizerSpec.from_dict(manifest.tokenizer, where=where)
        self.codes = self.tokenizer.codes
        self.actions = ActionSpec.from_dict(manifest.actions, where=where)
        self._stored = {
            name: (np.dtype(dtype), shape, math.prod(shape))
            for name, dtype, shape in (
                ("codes", self.codes.dtype, self.codes.codes_shape(1)[1:]),
                ("actions", self.actions.slot_dtype, (self.actions.num_slots,)),
            )
        }
        """What codes and actions are stored as: type, shape and numbers of one frame or step."""
        self.fps = check_rate(where, "fps", manifest.fps)
        check_count(where, "frame_skip", manifest.frame_skip, low=0)
        self.frame_skip = manifest.frame_skip
        self.metrics: dict[str, Any] = dict(manifest.metrics)
        self.source: dict[str, Any] = dict(manifest.source)
        self.episodes = list(manifest.episodes)
        self.files = manifest.shards
        """Name, size, hash and number of episodes of every tar."""
        self._codebook = manifest.codebook
        self._check_files(where, tars_elsewhere=tars_elsewhere)
        self._check_index(where)
        self._maps: dict[int, mmap.mmap] = {}
        # Where the numbers of each episode's codes and actions begin in its tar, once their headers
        # were checked: 16 bytes an episode, whereas an array kept for each would be a kilobyte.
        self._begins = array("q", bytes(16 * len(self.episodes)))
        self._in_shard: list[list[int]] | None = None
        self._spans: dict[int, Spans] = {}

    def _check_files(self, where: str, *, tars_elsewhere: bool) -> None:
        """Refuse names that leave the folder, and files that are not as long as they should be."""
        plain_name(self._codebook.file, where=where)
        for shard, file in enumerate(self.files):
            plain_name(file.file, where=where)
            if not tars_elsewhere:
                self._check_size(shard)

    def _check_size(self, shard: int) -> None:
        """Refuse a tar that is not there, or not as long as it should be."""
        file = self.files[shard]
        path = self.folder / file.file
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
            if not 0 <= row.shard < len(self.files):
                raise FormatError(f"{episode} lies in shard {row.shard} of {len(self.files)}")
            if row.split not in SPLITS:
                raise FormatError(f"{episode} has split {row.split!r:.60}")
            if row.num_frames < 1 or row.latent_frames != self.codes.latent_frames(row.num_frames):
                raise FormatError(
                    f"{episode} has {row.latent_frames} latent frames for "
                    f"{row.num_frames} frames, which does not fit the tokenizer's stride"
                )
            if not row.labelled and (
                self.manifest["schema"] == SHARDS_SCHEMA or self.actions.kind == "none"
            ):
                raise FormatError(
                    f"{episode} is not labelled, which a folder of schema {SHARDS_SCHEMA}, or one "
                    "whose actions are of kind none, has no place for"
                )
            file = self.files[row.shard]
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
        for index, file in enumerate(self.files):
            if counts[index] != file.num_episodes:
                raise FormatError(
                    f"{where}: {file.file} should hold {file.num_episodes} episodes, "
                    f"but {counts[index]} are listed"
                )

    def split(self, name: str, /) -> list[int]:
        """Return the indices into `episodes` of "train" or "validation"."""
        return [index for index, row in enumerate(self.episodes) if row.split == name]

    def in_shard(self, shard: int, /) -> list[int]:
        """Return the indices into `episodes` of those in a shard, in the order of their bytes."""
        if self._in_shard is None:
            rows = sorted(range(len(self.episodes)), key=lambda i: self.episodes[i].codes_offset)
            self._in_shard = [[] for _ in self.files]
            for index in rows:
                self._in_shard[self.episodes[index].shard].append(index)
        return self._in_shard[shard]

    def codes_thw(self, episode: int, start: int = 0, stop: int | None = None, /) -> CodeArray:
        """Return codes of latent frames [start, stop) of an episode, in the stored dtype.

        A stretch that reaches over the end of the episode is cut there. What is returned lies in
        the map of the file: it is read-only, and looking at it reads the disk.

        Raises:
            FormatError: if the bytes are not what the index says, or a code is not below V.
            ValueError: if `start` is negative, or `stop` before it.
        """
        part_thw = self.stored_codes_thw(episode, start, stop)
        if part_thw.size and int(part_thw.max()) >= self.codes.vocab_size:
            raise FormatError(self._beyond(self._where(episode, "codes"), part_thw))
        return part_thw

    def slots_TA(self, episode: int, start: int = 0, stop: int | None = None, /) -> SlotArray:
        """Return the encoded actions of pixel steps [start, stop) of an episode, as int64.

        A stretch that reaches over the end of the episode is cut there. Of an episode that is not
        `labelled` there are none: no rows, whatever the stretch.

        Raises:
            FormatError: if the bytes are not what the index says, or an action is out of range.
            ValueError: if `start` is negative, or `stop` before it.
        """
        return self.stored_slots_TA(episode, start, stop).astype(np.int64)

    def stored_codes_thw(
        self, episode: int, start: int = 0, stop: int | None = None, /
    ) -> CodeArray:
        """Return what `codes_thw` returns, but not compared with the vocabulary."""
        return self._part(episode, "codes", start, stop)

    def stored_slots_TA(
        self, episode: int, start: int = 0, stop: int | None = None, /
    ) -> npt.NDArray[Any]:
        """Return what `slots_TA` returns, in the type in which it is stored."""
        return self._part(episode, "actions", start, stop)

    def metadata(self, episode: int, /) -> dict[str, Any]:
        """Return what was noted with an episode: the metadata of its KEY.json.

        Raises:
            FormatError: if the tar is damaged, or KEY.json contradicts the manifest.
        """
        row = self.episodes[episode]
        path = self.folder / self.files[row.shard].file
        if row.shard not in self._spans:
            self._spans = {row.shard: tar_spans(path)}  # one tar's: they are read in order
        return episode_metadata(path, self._spans[row.shard], row)

    def check_hash(self, shard: int, /) -> None:
        """Read every byte of a shard and compare it with the manifest's hash.

        Raises:
            FormatError: naming the shard, if it is another.
        """
        self._check_size(shard)
        path = self.folder / self.files[shard].file
        with storage_errors(path):
            same = file_sha256(path) == self.files[shard].sha256
        if not same:
            raise FormatError(f"{path}: its bytes are not those of the manifest's hash")

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
        """Hash every shard, compare the index with the tars' own members, and read every array.

        Raises:
            FormatError: naming the first shard, or the first array, that is not what it should be.
        """
        for shard in range(len(self.files)):
            self.check_hash(shard)
        self._check_members()
        for index in range(len(self.episodes)):
            self.codes_thw(index)
            self.slots_TA(index)
        self.codebook_VZ()

    def _check_members(self) -> None:
        """Refuse tars whose members are not, by name and place, those of the index."""
        for shard, file in enumerate(self.files):
            path = self.folder / file.file
            rows = [self.episodes[index] for index in self.in_shard(shard)]
            there = tar_spans(path)
            wanted = {
                f"{row.key}.{name}.npy": row.span(name)
                for row in rows
                for name in ("codes", "actions")
            }
            about = {f"{row.key}.json" for row in rows}
            for name in sorted(wanted.keys() | there.keys()):
                if name not in about and wanted.get(name) != there.get(name):
                    raise FormatError(
                        f"{path}: {name!r:.100} lies at {there.get(name, 'no place')}, "
                        f"the manifest says {wanted.get(name, 'no place')}"
                    )
            for row in rows:
                episode_metadata(path, there, row)

    def _part(self, episode: int, name: str, start: int, stop: int | None) -> npt.NDArray[Any]:
        """Return [start, stop) of the codes or actions of an episode, as they are stored."""
        row = self.episodes[episode]
        content = self._maps.get(row.shard)
        if content is None:
            with _MAPPING:
                content = self._maps.get(row.shard) or self._map(row.shard)
        codes = name == "codes"
        begin = self._begins[2 * episode + codes] or self._begin(episode, name, content)
        length = row.latent_frames if codes else row.num_steps
        if start < 0 or (stop is not None and stop < start):
            raise ValueError(f"{row.key}: {name} [{start}, {stop}) of {length}")
        stop = length if stop is None else min(stop, length)
        dtype, shape, count = self._stored[name]
        length = max(0, stop - start)
        offset = begin + min(start, stop) * count * dtype.itemsize
        return np.frombuffer(content, dtype, length * count, offset).reshape(length, *shape)

    def _map(self, shard: int) -> mmap.mmap:
        """Map a shard, and let go of the one mapped longest ago where there are too many."""
        path = self.folder / self.files[shard].file
        try:
            with path.open("rb") as file:
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise FormatError(f"{path}: cannot be read ({error})") from error
        if len(content) != self.files[shard].size_bytes:
            raise FormatError(f"{path}: has changed since it was opened; copy it again")
        if len(self._maps) >= _MAX_MAPS:
            oldest = next(iter(self._maps))
            del self._maps[oldest]
            for episode in self.in_shard(oldest):  # what is mapped again is checked again
                self._begins[2 * episode] = self._begins[2 * episode + 1] = 0
        self._maps[shard] = content
        return content

    def _begin(self, episode: int, name: str, content: mmap.mmap) -> int:
        """Return where the numbers of an npy member begin, if it is what the index promises."""
        where = self._where(episode, name)
        offset, size_bytes = self.episodes[episode].span(name)
        head = content[offset : offset + min(size_bytes, 1 << 14)]
        layout = self._layout(episode, name, head, where=where)
        if layout.data_offset % layout.dtype.itemsize:
            raise FormatError(
                f"{where}: its numbers begin {layout.data_offset} bytes in, must be a multiple of "
                f"{layout.dtype.itemsize}; unaligned numbers cannot be mapped"
            )
        begin = offset + layout.data_offset
        if name == "actions":
            count = math.prod(layout.shape)
            slots_TA = np.frombuffer(content, layout.dtype, count, begin).reshape(layout.shape)
            self.actions.check_slots(slots_TA, where=where)
        self._begins[2 * episode + (name == "codes")] = begin
        return begin

    def member(self, episode: int, name: str, content: bytes, /, *, where: str) -> npt.NDArray[Any]:
        """Return the "codes" or "actions" of an episode from the bytes of its member, checked.

        Raises:
            FormatError: if the bytes are not what the index says, or a number is out of range.
        """
        where = f"{where}: {self.episodes[episode].key}.{name}.npy"
        layout = self._layout(episode, name, content, where=where)
        flat = np.frombuffer(content, layout.dtype, offset=layout.data_offset)
        if name == "actions":
            self.actions.check_slots(flat.reshape(layout.shape), where=where)
        elif int(flat.max()) >= self.codes.vocab_size:
            raise FormatError(self._beyond(where, flat))
        return flat.reshape(layout.shape)

    def _layout(self, episode: int, name: str, head: bytes, /, *, where: str) -> NpyLayout:
        """Return the layout of an npy member that begins with `head`, if it is as promised."""
        row = self.episodes[episode]
        layout = npy_layout(io.BytesIO(head), row.span(name)[1], where=where)
        dtype, shape, _ = self._stored[name]
        shape = (row.latent_frames if name == "codes" else row.num_steps, *shape)
        if layout.dtype != dtype or layout.shape != shape:
            raise FormatError(f"{where}: {layout.dtype} {layout.shape}, must be {dtype} {shape}")
        return layout

    def _beyond(self, where: str, codes: npt.NDArray[Any]) -> str:
        """Return what is to be said about a code that the vocabulary does not have."""
        return (
            f"{where}: code {int(codes.max())} in a vocabulary of {self.codes.vocab_size}; "
            "the shard was not written by this manifest's tokenizer"
        )

    def _where(self, episode: int, name: str) -> str:
        row = self.episodes[episode]
        return f"{self.folder / self.files[row.shard].file}: {row.key}.{name}.npy"

    def __getstate__(self) -> dict[str, Any]:
        """Leave the maps behind: a loader's worker process maps for itself."""
        begins = array("q", bytes(16 * len(self.episodes)))
        return {**self.__dict__, "_maps": {}, "_begins": begins, "_spans": {}}
