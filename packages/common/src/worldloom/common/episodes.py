"""Episodes on disk: exact frames, raw actions, rewards, metadata.

    frames_THWC uint8, T - 1 raw actions  ->  EPISODES/KEY.npz  ->  the same, in pieces

`actions[i]` is chosen on seeing frame i and leads to frame i + 1 (Gymnasium's convention), so an
episode of T frames has T - 1 actions. A folder of episodes shares one `episodes.json` (what they
are of); every episode is one zip of npy members with frames in pieces of 64, losslessly deflated,
so that a clip is read without its episode. docs/formats.md describes both to the byte.
"""

import hashlib
import math
import os
import re
import zipfile
import zlib
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from .actions import ActionArray, ActionSpec
from .errors import FormatError
from .files import (
    failpoint,
    fsync_folder,
    parse_json,
    read_json,
    storage_errors,
    temporary_path,
    to_json,
    write_json,
)
from .npy import npy_array, npy_bytes
from .specs import check_count, check_fields, check_rate

Frames = npt.NDArray[np.uint8]

EPISODES_SCHEMA = "worldloom.episodes/1"
PIECE_FRAMES = 64
"""Frames per zip member: few enough to read for one clip, enough for deflate to earn its keep."""

# 80: with ".actions.npy" behind it, a key must fit the 100 bytes of a name in a ustar header.
# tmp-: a file of that name is what a killed process left, so readers pass it by.
_KEY = re.compile(r"(?!tmp-)[A-Za-z0-9_-]{1,80}")
_MAX_HEADER_BYTES = 1 << 14
_MAX_ABOUT_BYTES = 1 << 24


def check_key(key: str, /, *, where: str) -> str:
    """Return the key if it is safe as a file name and as a webdataset key (no dot, no slash)."""
    if not _KEY.fullmatch(key):
        raise FormatError(
            f"{where}: key {key!r:.60} must be 1 to 80 of A-Z a-z 0-9 _ - and not begin with tmp-"
        )
    return key


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodesSpec:
    """What every episode of a folder has in common."""

    actions: ActionSpec
    height: int
    width: int
    fps: float
    """Frames per second at which the recorded frames follow each other."""
    frame_skip: int
    """Game frames per recorded frame; every action was held for as many."""
    source: Mapping[str, Any] = field(default_factory=dict)
    """Where they come from: environment, policy, seed, resize rule. For people and provenance."""

    def to_dict(self) -> dict[str, Any]:
        """Return the content of episodes.json."""
        return {
            "schema": EPISODES_SCHEMA,
            "actions": self.actions.to_dict(),
            "height": self.height,
            "width": self.width,
            "fps": self.fps,
            "frame_skip": self.frame_skip,
            "source": dict(self.source),
        }

    @classmethod
    def read(cls, folder: Path, /) -> Self:
        """Read FOLDER/episodes.json.

        Raises:
            FormatError: if it is missing or not what docs/formats.md says.
        """
        path = folder / "episodes.json"
        data = read_json(path, what="the description of a folder of episodes (`worldloom record`)")
        if data.get("schema") != EPISODES_SCHEMA:
            raise FormatError(
                f"{path}: schema {data.get('schema')!r}, readable is {EPISODES_SCHEMA}"
            )
        del data["schema"]
        check_fields(cls, data, where=str(path))
        for name in ("height", "width", "frame_skip"):
            check_count(str(path), name, data[name], high=1 << 16)
        fps = check_rate(str(path), "fps", data["fps"])
        if fps == 0 or not isinstance(data["source"], dict):
            raise FormatError(f"{path}: fps must be above 0, and source an object")
        actions = ActionSpec.from_dict(data["actions"], where=str(path))
        return cls(**{**data, "actions": actions, "fps": fps})

    def write(self, folder: Path, /) -> None:
        """Write FOLDER/episodes.json, whole or not at all."""
        write_json(folder / "episodes.json", self.to_dict())


class EpisodeWriter:
    """Writes one episode, frame by frame, and shows it under its name only when it is whole.

    Use as a context manager: `append` frames, then `finish` with the actions. Without `finish`, or
    after an exception, nothing stays behind.
    """

    def __init__(self, folder: Path, key: str, /, *, spec: EpisodesSpec) -> None:
        check_key(key, where=str(folder))
        self._path = folder / f"{key}.npz"
        self._temporary = temporary_path(self._path)
        self._spec = spec
        self._key = key
        self._waiting: list[Frames] = []
        self._num_frames = 0
        self._finished = False

    def __enter__(self) -> Self:
        with storage_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Level 1: level 6 saves a tenth of the bytes on game frames for four times the time.
            self._file = self._temporary.open("wb")
            self._zip = zipfile.ZipFile(self._file, "w", zipfile.ZIP_DEFLATED, compresslevel=1)
        return self

    def append(self, frame_HWC: Frames, /) -> None:
        """Add the next frame, uint8 of the spec's height and width, RGB.

        Raises:
            FormatError: if it has another size or dtype.
            StorageError: if the disk refuses.
        """
        shape = (self._spec.height, self._spec.width, 3)
        if frame_HWC.shape != shape or frame_HWC.dtype != np.uint8:
            raise FormatError(
                f"{self._key}: frame {self._num_frames} is {frame_HWC.dtype} {frame_HWC.shape}, "
                f"must be uint8 {shape}"
            )
        # A copy: many environments draw every frame into the same buffer.
        self._waiting.append(frame_HWC.copy())
        self._num_frames += 1
        if len(self._waiting) == PIECE_FRAMES:
            self._write_piece()

    def finish(
        self,
        actions: ActionArray,
        /,
        *,
        rewards: npt.NDArray[np.float32] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the actions of the T - 1 steps and make the file durable under its name.

        Raises:
            FormatError: if there are no frames, or not one action fewer than frames.
            StorageError: if the disk refuses.
        """
        if self._num_frames == 0:
            raise FormatError(f"{self._key}: an episode needs at least one frame")
        _check_actions(self._spec.actions, actions, self._num_frames, where=self._key)
        if self._waiting:
            self._write_piece()
        self._write("actions.npy", npy_bytes(np.asarray(actions)))
        if rewards is not None:
            if rewards.shape != (self._num_frames - 1,):
                raise FormatError(
                    f"{self._key}: {rewards.shape} rewards for {self._num_frames} frames"
                )
            self._write("rewards.npy", npy_bytes(rewards.astype(np.float32)))
        about = {"key": self._key, "num_frames": self._num_frames, "metadata": dict(metadata or {})}
        self._write("episode.json", to_json(about).encode())
        with storage_errors(self._path):
            self._zip.close()
            self._file.flush()
            failpoint("episode-write")
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._temporary, self._path)
            failpoint("episode-rename")
            fsync_folder(self._path.parent)
        self._finished = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._finished:
            # The disk that refused the data refuses the closing too; the file goes anyway.
            for close in (self._zip.close, self._file.close, self._temporary.unlink):
                with suppress(OSError, ValueError):
                    close()

    def _write_piece(self) -> None:
        index = (self._num_frames - 1) // PIECE_FRAMES
        self._write(_piece_name(index), npy_bytes(np.stack(self._waiting)))
        self._waiting = []

    def _write(self, name: str, content: bytes) -> None:
        with storage_errors(self._path):
            self._zip.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED, 1)


class Episode:
    """One recorded episode, read from its file; frames are read when asked for."""

    num_frames: int
    """Frames T of the episode."""
    metadata: dict[str, Any]
    """What the recorder noted: JSON values."""

    def __init__(self, path: Path, /, *, spec: EpisodesSpec) -> None:
        self.key = path.stem
        self.spec = spec
        self._path = path
        self._zip = self._open()
        try:
            self.num_frames, self.metadata = self._about()
        except FormatError:
            self.close()
            raise

    def _open(self) -> zipfile.ZipFile:
        if self._path.exists() and not self._path.is_file():
            raise FormatError(f"{self._path}: not a regular file; expected an episode")
        try:
            return zipfile.ZipFile(self._path)
        except FileNotFoundError as error:
            raise FormatError(f"{self._path}: not found; expected an episode") from error
        except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise FormatError(f"{self._path}: not an episode, or cut short ({error})") from error

    def _about(self) -> tuple[int, dict[str, Any]]:
        where = f"{self._path}: episode.json"
        about = parse_json(self._member("episode.json", _MAX_ABOUT_BYTES), where=where)
        if not isinstance(about, dict) or set(about) != {"key", "num_frames", "metadata"}:
            raise FormatError(f"{where}: must be an object with key, num_frames and metadata")
        num_frames, metadata = about["num_frames"], about["metadata"]
        check_count(where, "num_frames", num_frames)
        # A claim of more frames than there are members for must not decide how much memory is
        # asked for; and a member under another name is a damaged one, not one that is missing.
        names = self._zip.namelist()
        pieces = -(-num_frames // PIECE_FRAMES)
        wanted = chain(["actions.npy"], (_piece_name(index) for index in range(pieces)))
        there = set(names)
        missing = next((name for name in wanted if name not in there), None)
        if missing is not None:
            raise FormatError(f"{self._path}: {missing} is missing from {num_frames} frames")
        count = pieces + 2 + ("rewards.npy" in there)
        if len(names) != count:
            raise FormatError(
                f"{self._path}: {len(names)} members, but {num_frames} frames make {count}"
            )
        if not isinstance(metadata, dict):
            raise FormatError(f"{where}: metadata must be an object")
        if about["key"] != self.key:
            raise FormatError(
                f"{where}: of episode {about['key']!r:.60}; a file is named after its key"
            )
        return num_frames, metadata

    @property
    def actions(self) -> ActionArray:
        """The T - 1 raw actions; `spec.actions.encode` turns them into slots."""
        limit = 8 * max(1, self.spec.actions.raw_width) * self.num_frames + _MAX_HEADER_BYTES
        raw = npy_array(self._member("actions.npy", limit), where=f"{self._path}: actions.npy")
        return _check_actions(self.spec.actions, raw, self.num_frames, where=str(self._path))

    @property
    def rewards(self) -> npt.NDArray[np.float32] | None:
        """The T - 1 rewards, if they were recorded."""
        if "rewards.npy" not in self._zip.namelist():
            return None
        content = self._member("rewards.npy", 4 * self.num_frames + _MAX_HEADER_BYTES)
        rewards = npy_array(content, where=f"{self._path}: rewards.npy")
        if rewards.shape != (self.num_frames - 1,) or rewards.dtype != np.float32:
            raise FormatError(f"{self._path}: rewards.npy is {rewards.dtype} {rewards.shape}")
        return rewards

    def frames(self, start: int = 0, stop: int | None = None, /) -> Frames:
        """Return frames_THWC, uint8, of [start, stop).

        Raises:
            FormatError: if the file is torn or a member is not what it should be.
            ValueError: if the range lies outside the episode.
        """
        stop = self.num_frames if stop is None else stop
        if not 0 <= start < stop <= self.num_frames:
            raise ValueError(f"{self.key}: frames [{start}, {stop}) of {self.num_frames}")
        first, last = start // PIECE_FRAMES, (stop - 1) // PIECE_FRAMES
        pieces = [self._piece(index) for index in range(first, last + 1)]
        offset = first * PIECE_FRAMES
        return np.concatenate(pieces)[start - offset : stop - offset]

    def pieces(self) -> Iterator[Frames]:
        """Yield the frames in order, a piece at a time: memory stays flat."""
        for index in range(-(-self.num_frames // PIECE_FRAMES)):
            yield self._piece(index)

    def _piece(self, index: int) -> Frames:
        name = _piece_name(index)
        where = f"{self._path}: {name}"
        count = min(PIECE_FRAMES, self.num_frames - index * PIECE_FRAMES)
        shape = (count, self.spec.height, self.spec.width, 3)
        frames = npy_array(self._member(name, math.prod(shape) + _MAX_HEADER_BYTES), where=where)
        if frames.shape != shape or frames.dtype != np.uint8:
            raise FormatError(f"{where}: {frames.dtype} {frames.shape}, must be uint8 {shape}")
        return frames

    def _member(self, name: str, limit_bytes: int, /) -> bytes:
        """Return the bytes of a member, which inflates to `limit_bytes` at most."""
        try:
            info = self._zip.getinfo(name)
        except KeyError as error:
            raise FormatError(f"{self._path}: {name} is missing") from error
        if info.file_size > limit_bytes:
            raise FormatError(
                f"{self._path}: {name} claims {info.file_size} bytes, more than the "
                f"{limit_bytes} that it can need"
            )
        # LZMA and bzip2 inflate without a bound, so a small member could fill the memory.
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise FormatError(f"{self._path}: {name} is neither stored nor deflated")
        try:
            with self._zip.open(info) as file:
                # With its size given, zipfile inflates no more than that, whatever is inside.
                return file.read(info.file_size)
        except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error, NotImplementedError,
                RuntimeError) as error:  # fmt: skip
            raise FormatError(f"{self._path}: {name} is damaged ({error})") from error

    def close(self) -> None:
        """Close the file."""
        self._zip.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _piece_name(index: int) -> str:
    return f"frames/{index:06d}.npy"


class Episodes:
    """A folder of episodes: its spec, the keys in order, and which of them are held out."""

    def __init__(self, folder: Path, /) -> None:
        if not folder.is_dir():
            raise FormatError(
                f"{folder}: no such folder; record episodes with "
                f"`worldloom record --output {folder}`"
            )
        self.folder = folder
        self.spec = EpisodesSpec.read(folder)
        self.keys = sorted(
            path.stem for path in folder.glob("*.npz") if not path.name.startswith("tmp-")
        )
        if not self.keys:
            raise FormatError(f"{folder}: has no episodes (*.npz); run `worldloom record` again")
        for key in self.keys:
            check_key(key, where=str(folder))

    def open(self, key: str, /) -> Episode:
        """Open one episode."""
        return Episode(self.folder / f"{key}.npz", spec=self.spec)

    def split(self, name: str, /) -> list[str]:
        """Return the keys of "train" or "validation", in order."""
        return [key for key in self.keys if self.split_of(key) == name]

    def split_of(self, key: str, /) -> str:
        """Return the split of one episode, "train" or "validation"."""
        return split_of(bisect_left(self.keys, key), len(self.keys))

    def fingerprint(self) -> str:
        """Return a SHA-256 of what the folder holds: its description, the keys, the files' sizes.

        It tells a changed folder from the same one without reading terabytes; a byte that changes
        inside an episode is found by that episode's own checksums.
        """
        sizes = {key: (self.folder / f"{key}.npz").stat().st_size for key in self.keys}
        content = to_json({"spec": self.spec.to_dict(), "sizes": sizes})
        return hashlib.sha256(content.encode()).hexdigest()


def split_of(index: int, total: int, /, *, every: int = 10) -> str:
    """Return the split of the index-th of `total` episodes in key order.

    Every tenth is held out (the last, where there are fewer than ten; none where there is one):
    the tokenizer and the dynamics must never train on what the other is judged by.
    """
    held_out = index % every == every - 1 or (1 < total < every and index == total - 1)
    return "validation" if held_out else "train"


def _check_actions(
    spec: ActionSpec, raw: ActionArray, num_frames: int, /, *, where: str
) -> ActionArray:
    """Return raw actions after checking their number and values."""
    count = len(raw) if np.ndim(raw) else 0
    if count != num_frames - 1:
        raise FormatError(
            f"{where}: {count} actions for {num_frames} frames, must be {num_frames - 1}: "
            "actions[i] leads from frame i to frame i + 1"
        )
    spec.encode(raw, where=f"{where}: actions")
    return raw
