"""Episodes on disk: exact frames, raw actions, rewards, metadata.

    frames_THWC uint8, T - 1 raw actions  ->  EPISODES/KEY.npz  ->  the same, in pieces

`actions[i]` is chosen on seeing frame i and leads to frame i + 1 (Gymnasium's convention), so an
episode of T frames has T - 1 actions, or none where nobody knows them: an unlabelled episode, which
is no episode of no-ops. A folder of episodes shares one `episodes.json` (what they are of); every
episode is one zip of npy members with frames in pieces of 64, losslessly deflated,
so that a clip is read without its episode. docs/formats.md describes both to the byte.
"""

import hashlib
import math
import os
import zipfile
import zlib
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from .actions import ActionArray, ActionSpec, SlotArray
from .episodes_spec import HALF_LABELLED_EPISODES_SCHEMA, EpisodesSpec, check_key
from .errors import FormatError
from .files import (
    failpoint,
    fsync_folder,
    parse_json,
    storage_errors,
    temporary_path,
    to_json,
)
from .npy import npy_array, npy_bytes
from .specs import check_count

Frames = npt.NDArray[np.uint8]

PIECE_FRAMES = 64
"""Frames per zip member: few enough to read for one clip, enough for deflate to earn its keep."""

_MAX_HEADER_BYTES = 1 << 14
_MAX_ABOUT_BYTES = 1 << 24


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
        actions: ActionArray | None,
        /,
        *,
        rewards: npt.NDArray[np.float32] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the actions of the T - 1 steps and make the file durable under its name.

        Args:
            actions: raw ones; None where nobody knows them.
            rewards: of the steps, if there are any.
            metadata: JSON values, at most 16 MiB.

        Raises:
            FormatError: if there are no frames, not one action fewer than frames, or no actions in
                a folder that is not half-labelled.
            StorageError: if the disk refuses.
        """
        if self._num_frames == 0:
            raise FormatError(f"{self._key}: an episode needs at least one frame")
        spec = self._spec
        if actions is not None:
            _encoded(spec.actions, actions, self._num_frames - 1, where=self._key)
        elif not spec.half_labelled:
            raise FormatError(
                f"{self._key}: has no actions, in a folder whose episodes.json says that every "
                "episode has; give them, or write a folder that is half_labelled"
            )
        if self._waiting:
            self._write_piece()
        none = spec.actions.decode(np.zeros((0, spec.actions.num_slots), np.int64))
        self._write("actions.npy", npy_bytes(np.asarray(none if actions is None else actions)))
        if rewards is not None:
            if rewards.shape != (self._num_frames - 1,):
                raise FormatError(
                    f"{self._key}: {rewards.shape} rewards for {self._num_frames} frames"
                )
            self._write("rewards.npy", npy_bytes(rewards.astype(np.float32)))
        about: dict[str, Any] = {
            "key": self._key,
            "num_frames": self._num_frames,
            "metadata": dict(metadata or {}),
        }
        if actions is None:
            about["labelled"] = False
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
    labelled: bool
    """Whether its actions are known."""

    def __init__(self, path: Path, /, *, spec: EpisodesSpec) -> None:
        self.key = path.stem
        self.spec = spec
        self._path = path
        self._zip = self._open()
        try:
            self.num_frames, self.metadata, self.labelled = self._about()
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

    def _about(self) -> tuple[int, dict[str, Any], bool]:
        where = f"{self._path}: episode.json"
        about = parse_json(self._member("episode.json", _MAX_ABOUT_BYTES), where=where)
        if not isinstance(about, dict) or set(about) - {"labelled"} != {
            "key", "num_frames", "metadata"
        }:  # fmt: skip
            raise FormatError(f"{where}: must be an object with key, num_frames and metadata")
        labelled = about.get("labelled", True)
        if labelled is not True and (labelled is not False or not self.spec.half_labelled):
            raise FormatError(
                f"{where}: labelled is {labelled!r:.60}, which may be false alone, and only where "
                f"episodes.json has schema {HALF_LABELLED_EPISODES_SCHEMA}"
            )
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
        return num_frames, metadata, labelled

    @property
    def actions(self) -> ActionArray | None:
        """The T - 1 raw actions, or None where nobody knows them."""
        return self._steps()[0]

    @property
    def slots_TA(self) -> SlotArray | None:
        """The T - 1 actions as slots, or None where nobody knows them."""
        return self._steps()[1]

    def _steps(self) -> tuple[ActionArray, SlotArray] | tuple[None, None]:
        """Return the raw actions and their slots."""
        limit = 8 * max(1, self.spec.actions.raw_width) * self.num_frames + _MAX_HEADER_BYTES
        raw = npy_array(self._member("actions.npy", limit), where=f"{self._path}: actions.npy")
        if self.labelled:
            steps = self.num_frames - 1
            return raw, _encoded(self.spec.actions, raw, steps, where=str(self._path))
        if len(raw) if raw.ndim else 1:
            raise FormatError(
                f"{self._path}: actions.npy is {raw.shape}, but episode.json says that no action "
                "is known; it must have no rows"
            )
        return None, None

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


def _encoded(spec: ActionSpec, raw: ActionArray, steps: int, /, *, where: str) -> SlotArray:
    """Return the slots of raw actions after checking their number and values."""
    count = len(raw) if np.ndim(raw) else 0
    if count != steps:
        raise FormatError(
            f"{where}: {count} actions for {steps + 1} frames, must be {steps}: "
            "actions[i] leads from frame i to frame i + 1"
        )
    return spec.encode(raw, where=f"{where}: actions")
