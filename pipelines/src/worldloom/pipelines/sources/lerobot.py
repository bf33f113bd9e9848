"""LeRobot data sets, v2.0, v2.1 and v3.0 -> recordings: one camera's frames, and the actions.

    DATASET/{meta,data,videos}  ->  open_source  ->  Source

Row i has observation i and the action chosen on seeing it, so it leads to the frame of row i + 1,
as ours do; the last row's action leads nowhere. Frames are a video, or PNG in the rows; rewards
are `next.reward`, where there is such a feature: that of the action beside it.

Source: `src/lerobot/datasets/lerobot_dataset.py` of github.com/huggingface/lerobot.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from worldloom.common import ActionArray, ActionSpec, ConfigError, FormatError, Frames

from ..ingest_config import IngestConfig
from ..video_files import VideoFile
from .frame_skip import combine_actions, combining_rule
from .lerobot_actions import action_spec
from .lerobot_index import EpisodeEntry, Index, read_index
from .parquet import ParquetFile, require_pyarrow
from .source import Recording

_REWARD = "next.reward"
_ALIGNMENT = (
    "Row i of an episode has the action chosen on seeing frame i, which leads to frame i + 1, as "
    "ours do; the last row's, which leads nowhere, is left out."
)


def open_source(path: Path, settings: IngestConfig, /) -> "LerobotSource":
    """Open the folder of a LeRobot data set, the one that has `meta` in it.

    Raises:
        FormatError: if it is none, has no episodes, or its index is not what LeRobot writes.
        ConfigError: if a camera or bounds must be chosen, or pyarrow is missing.
    """
    require_pyarrow()
    if not path.is_dir():
        raise FormatError(f"{path}: no such folder; expected a LeRobot data set")
    if settings.lerobot.bins < 1:
        raise ConfigError(f"--lerobot.bins {settings.lerobot.bins}: must be at least 1")
    index = read_index(path, camera=settings.lerobot.camera)
    return LerobotSource(
        index=index,
        action=settings.lerobot.action,
        actions=action_spec(index, settings.lerobot),
        fps=settings.fps or index.fps,
        recordings=[
            Recording(
                key=f"episode-{episode.number:06d}",
                origin=f"{episode.data}: episode {episode.number}",
            )
            for episode in index.episodes
        ],
    )


@dataclass(frozen=True, kw_only=True)
class LerobotSource:
    """A LeRobot data set, opened; what a Source says of itself."""

    index: Index
    action: str
    """Feature of the actions; empty for frames alone."""
    actions: ActionSpec
    fps: float
    recordings: Sequence[Recording]

    @property
    def alignment(self) -> str:
        """Which action stands beside which frame."""
        return _ALIGNMENT if self.action else "Frames alone, without actions."

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
        return {
            "packages": {name: version(name) for name in ("av", "pillow", "pyarrow")},
            "codebase_version": self.index.version,
            "camera": self.index.camera,
            "action": self.action,
        }

    @cached_property
    def _by_key(self) -> Mapping[str, EpisodeEntry]:
        keys = [recording.key for recording in self.recordings]
        return dict(zip(keys, self.index.episodes, strict=True))

    @contextmanager
    def open(self, recording: Recording, /) -> Iterator["LerobotEpisode"]:
        """Open one episode.

        Raises:
            FormatError: naming the file that is missing, or is not what the index says.
        """
        episode, index = self._by_key[recording.key], self.index
        with ExitStack() as stack:
            data = stack.enter_context(ParquetFile(index.folder / episode.data))
            video = None
            if episode.video is not None:
                path = index.folder / episode.video
                video = stack.enter_context(VideoFile(path))
                # LeRobot calls 29.97 frames a second 30.
                if abs(video.fps - index.fps) > 0.01 * index.fps:
                    raise FormatError(
                        f"{path}: {video.fps:g} frames a second, but {index.fps:g} in {index.info}"
                    )
            yield LerobotEpisode(self, episode, data, video)


class LerobotEpisode:
    """One episode that is being read."""

    def __init__(
        self, source: LerobotSource, episode: EpisodeEntry, data: ParquetFile, video: Any, /
    ) -> None:
        self._source = source
        self._episode = episode
        self._data = data
        self._video: VideoFile | None = video
        self._where = f"{source.index.folder / episode.data}: episode {episode.number}"
        first = episode.first_row or 0
        self._rows = (first, first + episode.length)
        if episode.length == 0:
            raise FormatError(f"{self._where}: has no rows, so no frame")
        if episode.first_row is None and data.num_rows != episode.length:
            raise FormatError(
                f"{self._where}: {data.num_rows} rows, but the index says {episode.length}"
            )
        self._check_rows()

    def _check_rows(self) -> None:
        """Refuse rows of another episode, or not in order: the index does not fit the file."""
        names = [name for name in ("episode_index", "frame_index") if name in self._data.names]
        columns = self._data.numbers(names, *self._rows)
        counted = {
            "episode_index": np.full(self._episode.length, self._episode.number),
            "frame_index": np.arange(self._episode.length),
        }
        for name, values in columns.items():
            if values.reshape(-1).shape != counted[name].shape:
                raise FormatError(f"{self._where}: {name} has shape {values.shape}")
            wrong = np.flatnonzero(values.reshape(-1) != counted[name])
            if len(wrong):
                row = int(wrong[0])
                raise FormatError(
                    f"{self._where}: row {self._rows[0] + row} has {name} {values[row]}, but the "
                    f"index says {counted[name][row]}"
                )

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What the episode's metadata gets."""
        return {"episode_index": self._episode.number, "tasks": list(self._episode.tasks)}

    def frames(self) -> Iterator[Frames]:
        """Yield frame_HWC, uint8 RGB, one a row."""
        episode = self._episode
        if self._video is None:
            height, width = _size(self._source.index)
            yield from self._data.images(
                self._source.index.camera, *self._rows, height=height, width=width
            )
            return
        # A video of its own is read to its end, so that one frame too many is noticed too.
        wanted = None if episode.whole_video else episode.length
        count = 0
        for frame_HWC in self._video.frames(start_s=episode.start_s, num_frames=wanted):
            count += 1
            if count <= episode.length:
                yield frame_HWC
        if count != episode.length:
            raise FormatError(
                f"{self._source.index.folder / str(episode.video)}: {count} frames, but "
                f"{episode.length} rows in {episode.data}: which action leads to which is not known"
            )

    def actions(self, num_frames: int, /) -> ActionArray:
        """Return the actions of all rows but the last."""
        spec, name, steps = self._source.actions, self._source.action, num_frames - 1
        if not name:
            return np.zeros((steps, 0), np.int64)
        raw = self._data.numbers([name], *self._rows)[name][:steps]
        shape = (steps,) if spec.kind == "discrete" else (steps, spec.raw_width)
        if raw.size != np.prod(shape):
            raise FormatError(f"{self._where}: {name} has shape {raw.shape}, must be {shape}")
        raw = raw.reshape(shape)
        raw = raw.astype(np.int64) if raw.dtype == bool else raw
        try:
            spec.encode(raw, where=f"{self._where}: {name}")
        except FormatError as error:
            if spec.kind != "continuous":
                raise
            raise FormatError(
                f"{error}; if the bounds in meta are wrong, give --lerobot.low and --lerobot.high"
            ) from error
        return raw

    def rewards(self, num_frames: int, /) -> npt.NDArray[np.float32] | None:
        """Return the rewards of all rows but the last, where the data set has them."""
        if _REWARD not in self._data.names:
            return None
        rewards = self._data.numbers([_REWARD], *self._rows)[_REWARD].reshape(-1)
        rewards = rewards[: num_frames - 1].astype(np.float32)
        if rewards.shape != (num_frames - 1,) or not np.isfinite(rewards).all():
            raise FormatError(f"{self._where}: {_REWARD} is not one finite number a row")
        return rewards


def _size(index: Index) -> tuple[int, int]:
    """Return height and width of the camera's pictures; both orders of axes are in use."""
    shape = tuple(index.features[index.camera]["shape"])
    if len(shape) == 3 and shape[2] in (1, 3):
        return shape[0], shape[1]
    if len(shape) == 3 and shape[0] in (1, 3):
        return shape[1], shape[2]
    raise FormatError(f"{index.info}: {index.camera} has shape {shape}, expected height and width")
