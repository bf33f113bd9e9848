"""A folder of videos, each with or without a file of actions beside it -> recordings.

    NAME.mp4, NAME.csv  ->  open_source  ->  Source

Row i of the file of actions leads from frame i to frame i + 1, or led to frame i, as
`--actions.alignment` says. Where no video has one, they are videos without actions; where some have
none, `--actions.missing` says what becomes of those.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from worldloom.common import ActionArray, ActionSpec, FormatError, Frames, progress

from ..ingest_config import ActionFileConfig, IngestConfig
from ..video_files import VIDEO_SUFFIXES, VideoFile
from .action_files import Cells, read_cells
from .action_survey import Survey, actions_between, alignment_sentence
from .folder import files_below, recording_names
from .frame_skip import combine_actions, combining_rule
from .source import Recording

_SIDE_SUFFIXES = (".jsonl", ".csv", ".npz")
_SAME_RATE = 5e-4
"""Rates that differ by less are one: containers round them; 29.97 and 30 differ by twice that."""


def open_source(path: Path, settings: IngestConfig, /) -> "VideosSource":
    """Open a folder of videos, in subfolders too, or a single one.

    Raises:
        FormatError: if there is none, or the first ones cannot be read.
        ConfigError: if there is more than one way to read the files of actions.
    """
    files = files_below(path, VIDEO_SUFFIXES, kind="videos")
    keys, full = recording_names(path, files)
    videos = {
        key: _Video(file, _side_files(file, settings.actions))
        for key, file in zip(keys, files, strict=True)
    }
    spec, fields = _find_actions(list(videos.values()), settings.actions)
    rate_of, fps = _first_rate([video.path for video in videos.values()], settings)
    return VideosSource(
        actions=spec,
        fields=fields,
        fps=fps,
        rate_of=rate_of,
        settings=settings.actions,
        videos=videos,
        recordings=tuple(
            Recording(key=key, origin=name) for key, name in zip(keys, full, strict=True)
        ),
    )


@dataclass(frozen=True, slots=True)
class _Video:
    path: Path
    side_files: tuple[Path, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class VideosSource:
    """A folder of videos; see `Source`."""

    actions: ActionSpec
    fields: tuple[str, ...]
    """Of the files of actions."""
    fps: float
    rate_of: Path | None
    """Whose rate that is; None where the person gave it."""
    settings: ActionFileConfig
    videos: Mapping[str, _Video]
    recordings: tuple[Recording, ...]

    @property
    def alignment(self) -> str:
        """How rows stand beside frames."""
        return alignment_sentence(self.actions, self.settings.alignment, "the file of actions")

    @property
    def combining(self) -> str:
        """What `combine` does, in words."""
        return combining_rule(self.actions)

    def combine(self, raw: ActionArray, frame_skip: int, /) -> ActionArray:
        """Return the actions of the frames kept under a frame skip."""
        return combine_actions(self.actions, raw, frame_skip)

    @property
    def about(self) -> Mapping[str, Any]:
        """What was read and how."""
        about: dict[str, Any] = {"packages": {"av": version("av")}}
        if self.fields:
            about["columns"] = list(self.fields)
        if self.settings.missing != "refuse":
            about["missing"] = self.settings.missing
        if self.rate_of is None:
            about["fps_given"] = self.fps
        return about

    @contextmanager
    def open(self, recording: Recording, /) -> Iterator["_OpenVideo"]:
        """Open one video and read its actions."""
        video = self.videos[recording.key]
        cells = self._cells(video)
        with VideoFile(video.path, fps=self.fps if self.rate_of is None else None) as file:
            if abs(file.fps / self.fps - 1) > _SAME_RATE:
                raise FormatError(
                    f"{video.path}: {file.fps:g} frames per second, but {self.rate_of} has "
                    f"{self.fps:g}; ingest them apart, convert one, or take all as they come: "
                    "--fps says at what rate"
                )
            yield _OpenVideo(self, file, cells)

    def _cells(self, video: _Video) -> Cells | None:
        """Return the actions of a video, if it has any."""
        unlabelled = not video.side_files and self.settings.missing == "unlabelled"
        if unlabelled or self.actions.kind == "none":
            return None
        return read_cells(_only(video), self.fields)


@dataclass(frozen=True, slots=True)
class _OpenVideo:
    source: VideosSource
    file: VideoFile
    cells: Cells | None

    @property
    def metadata(self) -> Mapping[str, Any]:
        return {}

    def frames(self) -> Iterator[Frames]:
        return self.file.frames()

    def actions(self, num_frames: int, /) -> ActionArray | None:
        alignment = self.source.settings.alignment
        return actions_between(self.cells, self.source.actions, num_frames, alignment=alignment)

    def rewards(self, num_frames: int, /) -> None:
        return None


def _side_files(video: Path, settings: ActionFileConfig) -> tuple[Path, ...]:
    """Return the files of actions beside a video: one, if all is well."""
    if settings.format == "none":
        return ()
    suffixes = _SIDE_SUFFIXES if settings.format == "any" else (f".{settings.format}",)
    beside = [video.with_suffix(suffix) for suffix in suffixes]
    return tuple(path for path in beside if os.path.lexists(path))


def _only(video: _Video) -> Path:
    """Return the one file of actions of a video."""
    if not video.side_files:
        wanted = ", ".join(video.path.with_suffix(suffix).name for suffix in _SIDE_SUFFIXES)
        raise FormatError(
            f"{video.path}: has no file of actions beside it ({wanted}), but other videos have; "
            "--actions.missing unlabelled takes it as one whose actions nobody knows, "
            "--actions.format none takes all without"
        )
    if len(video.side_files) > 1:
        names = " and ".join(path.name for path in video.side_files)
        raise FormatError(f"{video.path}: {names} both lie beside it; choose with --actions.format")
    return video.side_files[0]


def _find_actions(
    videos: Sequence[_Video], settings: ActionFileConfig
) -> tuple[ActionSpec, tuple[str, ...]]:
    """Return the spec of all files of actions, and which of their columns they are in."""
    beside = [video for video in videos if video.side_files]
    if not beside:
        return ActionSpec.none(), ()
    survey, refused = Survey(settings), []
    for video in progress(beside, "looking at actions"):
        try:
            survey.look(read_cells(_only(video), settings.columns or survey.fields))
        except FormatError as error:
            refused.append(error)  # named when its turn comes
        if survey.complete:
            break
    if not survey.fields and refused:
        raise refused[0]
    return survey.spec(), survey.fields


def _first_rate(videos: Sequence[Path], settings: IngestConfig) -> tuple[Path | None, float]:
    """Return a video and its rate, which all others must have; or the rate that was given."""
    if settings.fps is not None:
        return None, settings.fps
    refused = []
    for path in videos[: settings.skip_bad + 1]:
        try:
            with VideoFile(path) as video:
                return path, video.fps
        except FormatError as error:
            refused.append(error)
    raise refused[0]
