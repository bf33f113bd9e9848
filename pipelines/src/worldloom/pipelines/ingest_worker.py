"""One reading process: the key of a recording -> its episodes, which depend on nothing else.

    IngestJob -> open_reader -> Reader.answer("clip-7") -> clip-7.npz, IngestReport

A recording that cannot be read is answered with a SkippedRecording, and leaves nothing behind. One
that is longer than `max_frames` becomes KEY-000000, KEY-000001, ...: the parts appear from the last
to the first, so that where the first one stands, all of them do.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from worldloom.common import (
    ActionArray,
    Episode,
    EpisodesSpec,
    EpisodeWriter,
    FormatError,
    Frames,
    ResizeRule,
    failpoint,
    storage_errors,
)
from worldloom.common.files import fsync_folder, temporary_path

from .sources import OpenRecording, Recording, Source

_BATCH_BYTES = 1 << 25
_BATCH_FRAMES = 64

_Steps = tuple[ActionArray | None, npt.NDArray[np.float32] | None]
"""Actions and rewards between the frames, where they are known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IngestJob:
    """What every reading process needs to know."""

    folder: Path
    """Where the episodes go, absolute."""
    source: Source
    spec: EpisodesSpec
    resize: ResizeRule
    max_frames: int
    """Of an episode; 0 never cuts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IngestReport:
    """What was written of one recording."""

    key: str
    num_episodes: int
    num_frames: int
    size_bytes: int
    labelled: bool
    """Whether its actions are known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SkippedRecording:
    """A recording that could not be read, and why."""

    key: str
    origin: str
    reason: str


def first_episode(key: str, max_frames: int, /) -> str:
    """Return the key of a recording's first episode; where its file stands, all of them do."""
    return f"{key}-000000" if max_frames else key


def open_reader(job: IngestJob, /) -> "Reader":
    """Return a reader of the job's recordings."""
    return Reader(job)


class Reader:
    """Reads recordings of one source and writes them down as episodes."""

    greeting = None

    def __init__(self, job: IngestJob) -> None:
        self._job = job
        self._recordings = {recording.key: recording for recording in job.source.recordings}

    def answer(self, key: str, /) -> IngestReport | SkippedRecording:
        """Read and write one recording."""
        recording = self._recordings[key]
        try:
            return self._ingest(recording)
        except FormatError as error:
            return SkippedRecording(key=key, origin=recording.origin, reason=str(error))

    def close(self) -> None:
        """Nothing is held."""

    def _ingest(self, recording: Recording) -> IngestReport:
        job, key = self._job, first_episode(recording.key, self._job.max_frames)
        # What may have to be cut is first written whole, where no reader looks.
        whole = temporary_path(job.folder / recording.key) if job.max_frames else job.folder
        with (
            job.source.open(recording) as opened,
            EpisodeWriter(whole, key, spec=job.spec) as writer,
        ):
            stream = _Stream(opened, job, recording)
            for frame_HWC in stream:
                writer.append(frame_HWC)
            actions, rewards = stream.steps()
            metadata = {**opened.metadata, "origin": recording.origin}
            if job.max_frames:
                metadata |= {"part": 0, "parts": -(-stream.num_kept // job.max_frames)}
            writer.finish(actions, rewards=rewards, metadata=metadata)
        names = [f"{key}.npz"]
        if job.max_frames:
            names = self._cut(whole, recording.key)
        return IngestReport(
            key=recording.key,
            num_episodes=len(names),
            num_frames=stream.num_kept,
            size_bytes=sum((job.folder / name).stat().st_size for name in names),
            labelled=actions is not None,
        )

    def _cut(self, whole: Path, key: str) -> list[str]:
        """Write the parts of an episode, the first one last; return the names of their files."""
        job = self._job
        path = whole / f"{key}-000000.npz"
        with Episode(path, spec=job.spec) as episode:
            count = episode.metadata["parts"]
            names = [f"{key}-{part:06d}.npz" for part in range(count)]
            steps = episode.actions, episode.rewards
            for part in reversed(range(count)) if count > 1 else ():
                self._write_part(episode, steps, part, names[part].removesuffix(".npz"))
        if count == 1:
            with storage_errors(job.folder / path.name):
                os.replace(path, job.folder / path.name)
                failpoint("recording-rename")
                fsync_folder(job.folder)
        # What cannot be removed now is a leftover, which the next one to claim the folder removes.
        with suppress(OSError):
            path.unlink(missing_ok=True)
            whole.rmdir()
        return names

    def _write_part(self, episode: Episode, steps: _Steps, part: int, key: str) -> None:
        job, (actions, rewards) = self._job, steps
        start = part * job.max_frames
        stop = min(start + job.max_frames, episode.num_frames)
        with EpisodeWriter(job.folder, key, spec=job.spec) as writer:
            for first in range(start, stop, _BATCH_FRAMES):
                for frame_HWC in episode.frames(first, min(first + _BATCH_FRAMES, stop)):
                    writer.append(frame_HWC)
            writer.finish(
                None if actions is None else actions[start : stop - 1],
                rewards=None if rewards is None else rewards[start : stop - 1],
                metadata={**episode.metadata, "part": part},
            )


class _Stream:
    """A recording's frames as an episode has them; then its actions and rewards."""

    def __init__(self, opened: OpenRecording, job: IngestJob, recording: Recording) -> None:
        self._opened, self._job, self._recording = opened, job, recording
        self._num_read = 0
        self.num_kept = 0

    def __iter__(self) -> Iterator[Frames]:
        """Yield every k-th frame, resized: some at a time, so that a batch is no film."""
        waiting: list[Frames] = []
        for frame_HWC in self._opened.frames():
            if self._num_read % self._job.spec.frame_skip == 0:
                if self.num_kept == 0:
                    self._check_size(frame_HWC)
                    batch = max(1, min(_BATCH_FRAMES, _BATCH_BYTES // max(1, frame_HWC.nbytes)))
                waiting.append(frame_HWC)
                self.num_kept += 1
                if len(waiting) == batch:
                    yield from self._resized(waiting)
                    waiting = []
            self._num_read += 1
        yield from self._resized(waiting)

    def steps(self) -> _Steps:
        """Return the actions and rewards between the kept frames, once all frames were read."""
        if self._num_read == 0:
            raise FormatError(f"{self._recording.origin}: holds no frames")
        skip = self._job.spec.frame_skip
        raw = self._opened.actions(self._num_read)
        rewards = self._opened.rewards(self._num_read)
        steps = (self.num_kept - 1) * skip
        actions = None if raw is None else self._job.source.combine(raw[:steps], skip)
        if rewards is not None:
            rewards = np.asarray(rewards, np.float32)[:steps].reshape(-1, skip)
            rewards = rewards.sum(1, dtype=np.float32)
        return actions, rewards

    def _check_size(self, frame_HWC: Frames) -> None:
        height, width = frame_HWC.shape[:2]
        spec = self._job.spec
        if self._job.resize == "exact" and (height, width) != (spec.height, spec.width):
            like = first_of_size(self._job.source, spec.height, spec.width)
            raise FormatError(
                f"{self._recording.origin}: frames are {height}x{width} (height x width), wanted "
                f"are {spec.height}x{spec.width}{f', as of {like}' if like else ''}; "
                "choose --resize stretch, crop or pad"
            )

    def _resized(self, waiting: list[Frames]) -> Iterator[Frames]:
        spec, rule = self._job.spec, self._job.resize
        if not waiting or waiting[0].shape[:2] == (spec.height, spec.width):
            yield from waiting
            return
        import torch

        # Each process has one thread: two that resize with two threads each wait for one another.
        torch.set_num_threads(1)
        from worldloom.tokenizer import resize_frames

        frames_THWC = np.stack(waiting)
        yield from resize_frames(frames_THWC, height=spec.height, width=spec.width, rule=rule)


def first_frame_size(source: Source, recording: Recording, /) -> tuple[int, int]:
    """Return (height, width) of a recording's first frame.

    Raises:
        FormatError: if it has none that can be read.
    """
    with source.open(recording) as opened:
        for frame_HWC in opened.frames():
            return frame_HWC.shape[0], frame_HWC.shape[1]
    raise FormatError(f"{recording.origin}: holds no frames")


def first_of_size(source: Source, height: int, width: int, /) -> str:
    """Return the origin of one of the first recordings of that size, for an error; or nothing."""
    for recording in source.recordings[:10]:
        with suppress(FormatError):
            if first_frame_size(source, recording) == (height, width):
                return recording.origin
    return ""
