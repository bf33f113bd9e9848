"""A folder of arrays, NAME.npz with frames and perhaps actions, or NAME.npy -> recordings.

    NAME.npz: frames [T, H, W, 3], actions, rewards  ->  open_source  ->  Source

Action i leads from frame i to frame i + 1, or led to frame i, as `--actions.alignment` says; the
rewards stand beside the actions. Where no file has actions, they are arrays without; where some
have none, `--actions.missing` says what becomes of those.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from worldloom.common import ActionArray, ActionSpec, ConfigError, FormatError, Frames, progress

from ..ingest_config import IngestConfig
from .action_files import Cells, array_cells
from .action_survey import Survey, actions_between, align_rows, alignment_sentence
from .arrays import FrameArray, open_frames, open_npz, read_member
from .folder import files_below, recording_names
from .frame_skip import combine_actions, combining_rule
from .source import Recording

_SUFFIXES = (".npz", ".npy")


def open_source(path: Path, settings: IngestConfig, /) -> "ArraysSource":
    """Open a folder of npz and npy files, in subfolders too, or a single one.

    Raises:
        FormatError: if there is none, or none that can be read.
        ConfigError: if nobody says the frames per second, or what the actions are.
    """
    files = files_below(path, _SUFFIXES, kind="arrays")
    if settings.fps is None:
        raise ConfigError(f"{path}: arrays do not say their frames per second; give --fps")
    # Episodes are npz too: where they are written into the source, they are none of its arrays.
    output = settings.output.absolute()
    files = [file for file in files if output not in file.parents]
    keys, full = recording_names(path, files)
    return ArraysSource(
        actions=_find_actions(files, settings),
        fps=settings.fps,
        settings=settings,
        files=dict(zip(keys, files, strict=True)),
        recordings=tuple(
            Recording(key=key, origin=name) for key, name in zip(keys, full, strict=True)
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ArraysSource:
    """A folder of arrays; see `Source`."""

    actions: ActionSpec
    fps: float
    settings: IngestConfig
    files: Mapping[str, Path]
    recordings: tuple[Recording, ...]

    @property
    def alignment(self) -> str:
        """How rows stand beside frames."""
        return alignment_sentence(self.actions, self.settings.actions.alignment, "the actions")

    @property
    def combining(self) -> str:
        """What `combine` does, in words."""
        return combining_rule(self.actions)

    def combine(self, raw: ActionArray, frame_skip: int, /) -> ActionArray:
        """Return the actions of the frames kept under a frame skip."""
        return combine_actions(self.actions, raw, frame_skip)

    @property
    def _wants_actions(self) -> bool:
        """Whether a file without actions is a bad one."""
        return self.actions.kind != "none" and self.settings.actions.missing == "refuse"

    @property
    def about(self) -> Mapping[str, Any]:
        """Which arrays were read."""
        names = self.settings.npz
        read = {"frames": names.frames, "actions": names.actions, "rewards": names.rewards}
        missing = self.settings.actions.missing
        return {"arrays": read, **({"missing": missing} if missing != "refuse" else {})}

    @contextmanager
    def open(self, recording: Recording, /) -> Iterator["_OpenArrays"]:
        """Open one file and read its small arrays."""
        path, names = self.files[recording.key], self.settings.npz
        with open_frames(path, names.frames) as frames:
            cells = rewards = None
            if path.suffix.lower() == ".npz":
                cells, rewards = self._steps(path)
            elif self._wants_actions:
                raise FormatError(
                    f"{path}: an npy has frames only, but other files have actions; "
                    "--actions.missing unlabelled takes it as one whose actions nobody knows"
                )
            yield _OpenArrays(self, path, frames, cells, rewards)

    def _steps(self, path: Path) -> tuple[Cells | None, npt.NDArray[Any] | None]:
        """Return the actions and rewards of a file, where there are any."""
        names, cells, rewards = self.settings.npz, None, None
        with open_npz(path) as archive:
            if f"{names.actions}.npy" not in archive.namelist():
                if self._wants_actions:
                    raise FormatError(
                        f"{path}: has no array {names.actions}, but other files have; "
                        "--actions.missing unlabelled takes it as one whose actions nobody knows"
                    )
            elif self.actions.kind != "none":
                where = f"{path}: {names.actions}"
                array = read_member(archive, names.actions, where=where)
                cells = array_cells(array, names.actions, where=where)
            if f"{names.rewards}.npy" in archive.namelist():
                where = f"{path}: {names.rewards}"
                rewards = read_member(archive, names.rewards, where=where)
                if rewards.ndim != 1:
                    raise FormatError(f"{where}: shape {rewards.shape}, must be [N]")
        return cells, rewards


@dataclass(frozen=True, slots=True)
class _OpenArrays:
    source: ArraysSource
    path: Path
    array: FrameArray
    cells: Cells | None
    reward_rows: npt.NDArray[Any] | None

    @property
    def metadata(self) -> Mapping[str, Any]:
        return {}

    def frames(self) -> Iterator[Frames]:
        return self.array.frames()

    def actions(self, num_frames: int, /) -> ActionArray | None:
        alignment = self.source.settings.actions.alignment
        return actions_between(self.cells, self.source.actions, num_frames, alignment=alignment)

    def rewards(self, num_frames: int, /) -> npt.NDArray[np.float32] | None:
        if self.reward_rows is None:
            return None
        alignment = self.source.settings.actions.alignment
        where = f"{self.path}: {self.source.settings.npz.rewards}"
        rows = align_rows(self.reward_rows, num_frames, alignment, where=where)
        return np.asarray(rows, np.float32)


def _find_actions(files: list[Path], settings: IngestConfig) -> ActionSpec:
    """Return the spec of the actions of all files that have some."""
    name = settings.npz.actions
    survey, refused = Survey(replace(settings.actions, columns=())), []
    seen = False
    for path in progress(files, "looking at actions"):
        try:
            if path.suffix.lower() == ".npy":
                seen = True
                continue
            with open_npz(path) as archive:
                if f"{name}.npy" in archive.namelist():
                    where = f"{path}: {name}"
                    survey.look(
                        array_cells(read_member(archive, name, where=where), name, where=where)
                    )
                else:
                    seen = True
        except FormatError as error:
            refused.append(error)  # named when its turn comes
        if survey.complete:
            break
    if survey.fields:
        return survey.spec()
    if not seen:
        raise refused[0]
    return ActionSpec.none()
