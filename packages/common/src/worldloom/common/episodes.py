"""Episodes on disk: exact frames, raw actions, rewards, metadata.

    frames_THWC uint8, T - 1 raw actions  ->  EPISODES/KEY.npz  ->  the same, in pieces

`actions[i]` is chosen on seeing frame i and leads to frame i + 1 (Gymnasium's convention), so an
episode of T frames has T - 1 actions. A folder of episodes shares one `episodes.json` (what they
are of); every episode is one zip of npy members with frames in pieces of 64, losslessly deflated,
so that a clip is read without its episode. docs/formats.md describes both to the byte.
"""

import json
import os
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from .actions import ActionArray, ActionSpec
from .errors import FormatError
from .files import failpoint, fsync_folder, read_json, storage_errors, to_json, write_json
from .npy import npy_array, npy_bytes

Frames = npt.NDArray[np.uint8]

EPISODES_SCHEMA = "worldloom.episodes/1"
PIECE_FRAMES = 64
"""Frames per zip member: few enough to read for one clip, enough for deflate to earn its keep."""

_KEY = re.compile(r"[A-Za-z0-9_-]{1,128}")
_MAX_MEMBER_BYTES = 1 << 31


def check_key(key: str, /, *, where: str) -> str:
    """Return the key if it is safe as a file name and as a webdataset key (no dot, no slash)."""
    if not _KEY.fullmatch(key):
        raise FormatError(f"{where}: key {key!r:.60} must be letters, digits, '_' and '-' only")
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
        try:
            spec = cls(
                actions=ActionSpec.from_dict(data["actions"], where=str(path)),
                height=int(data["height"]),
                width=int(data["width"]),
                fps=float(data["fps"]),
                frame_skip=int(data["frame_skip"]),
                source=dict(data["source"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{path}: field {error} is missing or has the wrong type") from error
        if not (0 < spec.height < 1 << 16 and 0 < spec.width < 1 << 16 and spec.fps > 0):
            raise FormatError(f"{path}: height, width and fps must be positive")
        return spec

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
        self._temporary = folder / f"tmp-{key}.npz"
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
        """Add the next frame, uint8 of the spec's height and width, RGB."""
        shape = (self._spec.height, self._spec.width, 3)
        if frame_HWC.shape != shape or frame_HWC.dtype != np.uint8:
            raise FormatError(
                f"{self._key}: frame {self._num_frames} is {frame_HWC.dtype} {frame_HWC.shape}, "
                f"must be uint8 {shape}"
            )
        self._waiting.append(frame_HWC)
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
            try:
                self._zip.close()
                self._file.close()
            except OSError:
                pass  # the disk that refused the data refuses the closing too; the file goes anyway
            self._temporary.unlink(missing_ok=True)

    def _write_piece(self) -> None:
        index = (self._num_frames - 1) // PIECE_FRAMES
        self._write(f"frames/{index:06d}.npy", npy_bytes(np.stack(self._waiting)))
        self._waiting = []

    def _write(self, name: str, content: bytes) -> None:
        with storage_errors(self._path):
            self._zip.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED, 1)


class Episode:
    """One recorded episode, read from its file; frames are read when asked for."""

    def __init__(self, path: Path, /, *, spec: EpisodesSpec) -> None:
        self.key = path.stem
        self.spec = spec
        self._path = path
        self._zip = self._open()
        about = self._about()
        self.num_frames: int = about["num_frames"]
        """Frames T of the episode."""
        self.metadata: dict[str, Any] = about["metadata"]

    def _open(self) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(self._path)
        except FileNotFoundError as error:
            raise FormatError(f"{self._path}: not found; expected an episode") from error
        except (OSError, zipfile.BadZipFile, ValueError) as error:
            raise FormatError(f"{self._path}: not an episode, or cut short ({error})") from error

    def _about(self) -> dict[str, Any]:
        try:
            about = json.loads(self._member("episode.json"))
            num_frames, metadata = about["num_frames"], about["metadata"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise FormatError(f"{self._path}: episode.json is not readable ({error})") from error
        if not isinstance(num_frames, int) or num_frames < 1 or not isinstance(metadata, dict):
            raise FormatError(f"{self._path}: episode.json says {num_frames!r} frames")
        return {"num_frames": num_frames, "metadata": metadata}

    @property
    def actions(self) -> ActionArray:
        """The T - 1 raw actions; `spec.actions.encode` turns them into slots."""
        raw = npy_array(self._member("actions.npy"), where=f"{self._path}: actions.npy")
        return _check_actions(self.spec.actions, raw, self.num_frames, where=str(self._path))

    @property
    def rewards(self) -> npt.NDArray[np.float32] | None:
        """The T - 1 rewards, if they were recorded."""
        if "rewards.npy" not in self._zip.namelist():
            return None
        rewards = npy_array(self._member("rewards.npy"), where=f"{self._path}: rewards.npy")
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
        where = f"{self._path}: frames/{index:06d}.npy"
        frames = npy_array(self._member(f"frames/{index:06d}.npy"), where=where)
        count = min(PIECE_FRAMES, self.num_frames - index * PIECE_FRAMES)
        shape = (count, self.spec.height, self.spec.width, 3)
        if frames.shape != shape or frames.dtype != np.uint8:
            raise FormatError(f"{where}: {frames.dtype} {frames.shape}, must be uint8 {shape}")
        return frames

    def _member(self, name: str) -> bytes:
        try:
            if self._zip.getinfo(name).file_size > _MAX_MEMBER_BYTES:
                raise FormatError(
                    f"{self._path}: {name} claims more than {_MAX_MEMBER_BYTES} bytes"
                )
            return self._zip.read(name)
        except KeyError as error:
            raise FormatError(f"{self._path}: {name} is missing") from error
        except (OSError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError,
                RuntimeError) as error:  # fmt: skip
            raise FormatError(f"{self._path}: {name} is damaged ({error})") from error

    def close(self) -> None:
        """Close the file."""
        self._zip.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Episodes:
    """A folder of episodes: its spec, the keys in order, and which of them are held out."""

    def __init__(self, folder: Path, /) -> None:
        if not folder.is_dir():
            raise FormatError(
                f"{folder}: no such folder; record episodes with `worldloom record --output {folder}`"
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
        return [key for i, key in enumerate(self.keys) if split_of(i, len(self.keys)) == name]


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
    if len(raw) != num_frames - 1:
        raise FormatError(
            f"{where}: {len(raw)} actions for {num_frames} frames, must be {num_frames - 1}: "
            "actions[i] leads from frame i to frame i + 1"
        )
    spec.encode(raw, where=f"{where}: actions")
    return raw
