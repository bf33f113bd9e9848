"""Minari data sets in HDF5 -> recordings: the episodes of a Gymnasium environment.

    DATASET/data/{metadata.json, main_data.hdf5}  ->  open_source  ->  Source

`episode_i` holds T actions and T + 1 observations, so Minari's alignment is ours and nothing is
dropped. The spaces are read from the metadata as JSON; no environment is made, no class imported.
Frames that Minari packed as JPEG (its default from 32x32 on) are unpacked and not made better.

Source: `minari/dataset/_storages/hdf5_storage.py` of Minari 0.5.4, which writes what is read here.
"""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from PIL import Image
from worldloom.common import (
    ActionArray,
    ActionSpec,
    ConfigError,
    FormatError,
    Frames,
    nearest,
    read_json,
)

from ..action_spaces import ActionMap, map_actions
from ..ingest_config import IngestConfig, MinariConfig
from .frame_skip import combine_actions, combining_rule
from .hdf5 import Numbers, child, child_names, open_hdf5, require_h5py
from .source import Recording
from .space_json import find_images, parse_object, read_space

_MAIN_FILE = "main_data.hdf5"
_MAX_METADATA_BYTES = 1 << 28
"""Minari writes both bounds of every pixel: 1080p is 50 MB."""
_EPISODE = re.compile(r"episode_(0|[1-9][0-9]{0,8})")
_ALIGNMENT = (
    "Minari keeps T actions and T + 1 observations an episode, and actions[i] leads from "
    "observation i to observation i + 1, as ours do; nothing is moved."
)


def open_source(path: Path, settings: IngestConfig, /) -> "MinariSource":
    """Open a Minari data set: its folder, the folder `data` in it, or the HDF5 file.

    Raises:
        FormatError: if it is none, has no episodes, or its metadata is not what Minari writes.
        ConfigError: if --fps or --minari.image-key is needed, or h5py is missing.
    """
    require_h5py()
    folder = _data_folder(path)
    where = str(folder / "metadata.json")
    metadata = read_json(
        Path(where), what="the metadata of a Minari data set", limit_bytes=_MAX_METADATA_BYTES
    )
    if metadata.get("data_format") != "hdf5":
        raise FormatError(
            f"{where}: data_format {metadata.get('data_format')!r:.60}, read is hdf5; write it "
            "with minari.create_dataset_from_buffers(..., data_format='hdf5')"
        )
    if settings.fps is None:
        raise ConfigError(
            f"{path}: a Minari data set does not say how many frames a second its game has; give "
            "--fps (Atari with a frame skip of 4 has 15)"
        )
    images = find_images(
        parse_object(metadata.get("observation_space"), where=f"{where}: observation_space"),
        where=f"{where}: observation_space",
    )
    image_key = _choose(images, settings.minari.image_key, where)
    space = parse_object(metadata.get("action_space"), where=f"{where}: action_space")
    _, actions = _map(space, settings.minari, where=f"{where}: action_space")
    file = folder / _MAIN_FILE
    return MinariSource(
        path=file,
        action_space=space,
        settings=settings.minari,
        actions=actions.spec,
        fps=settings.fps,
        image_key=image_key,
        image_shape=images[image_key],
        about={
            "packages": {"h5py": version("h5py"), "pillow": version("pillow")},
            "image_key": image_key,
            **{
                name: str(metadata[name])[:200]
                for name in ("dataset_id", "minari_version", "algorithm_name")
                if name in metadata
            },
            **_environment(metadata, where),
        },
        recordings=_recordings(file, metadata.get("total_episodes")),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MinariSource:
    """A Minari data set, opened; what a Source says of itself."""

    path: Path
    action_space: Mapping[str, Any]
    settings: MinariConfig
    actions: ActionSpec
    fps: float
    image_key: str
    image_shape: tuple[int, ...]
    about: Mapping[str, Any]
    recordings: Sequence[Recording]

    @property
    def alignment(self) -> str:
        """Which action stands beside which frame."""
        return _ALIGNMENT

    @property
    def combining(self) -> str:
        """What `combine` does, in words."""
        return combining_rule(self.actions)

    def combine(self, raw: ActionArray, frame_skip: int, /) -> ActionArray:
        """Return the actions of the frames kept under a frame skip."""
        return combine_actions(self.actions, raw, frame_skip)

    @contextmanager
    def open(self, recording: Recording, /) -> Iterator["MinariEpisode"]:
        """Open one episode.

        Raises:
            FormatError: naming the part that is missing or damaged.
        """
        with open_hdf5(self.path) as root:
            group = child(root, recording.origin, where=str(self.path))
            where = f"{self.path}: {recording.origin}"
            if isinstance(group, Numbers):
                raise FormatError(f"{where}: numbers, expected an episode, a group")
            yield MinariEpisode(self, group, where=where)


class MinariEpisode:
    """One episode, open in its file."""

    def __init__(self, source: MinariSource, group: Any, /, *, where: str) -> None:
        self._source = source
        self._group = group
        self._where = where
        path = f"observations/{source.image_key}" if source.image_key else "observations"
        self._frames = _numbers(group, path, where)
        self._num_frames = len(self._frames)
        if self._num_frames == 0:
            raise FormatError(f"{self._frames.where}: no observation, so no frame")

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What the episode's metadata gets: how it ended."""
        steps = self._num_frames - 1
        return {
            name: bool(steps and self._steps(flags, steps, ())[-1])
            for name, flags in (("terminated", "terminations"), ("truncated", "truncations"))
        }

    def frames(self) -> Iterator[Frames]:
        """Yield frame_HWC, uint8 RGB."""
        numbers, shape = self._frames, self._source.image_shape
        packed = numbers.is_bytes or len(numbers.shape) == 2
        if not packed and (numbers.shape[1:] != shape or numbers.dtype != np.uint8):
            raise FormatError(
                f"{numbers.where}: {numbers.dtype} {numbers.shape}, but the metadata says frames "
                f"of uint8 {shape}"
            )
        index = 0
        for piece in numbers.pieces():
            for row in piece:
                where = f"{numbers.where}: frame {index}"
                yield _rgb(_unpack(row, shape, where) if packed else row)
                index += 1

    def actions(self, num_frames: int, /) -> ActionArray:
        """Return the raw actions of the num_frames - 1 steps."""
        steps = num_frames - 1
        spec = self._source.actions
        space, actions = _map(self._source.action_space, self._source.settings, where=self._where)
        columns = self._columns(space, "actions", steps)
        raw = [actions.to_raw(_row(columns, i)) for i in range(steps)]
        dtype = np.float32 if spec.kind == "continuous" else np.int64
        shape = (steps,) if spec.kind == "discrete" else (steps, spec.raw_width)
        array: ActionArray = np.asarray(raw, dtype).reshape(shape)
        spec.encode(array, where=f"{self._where}: actions")
        return array

    def rewards(self, num_frames: int, /) -> npt.NDArray[np.float32]:
        """Return the rewards of the num_frames - 1 steps."""
        numbers = self._steps("rewards", num_frames - 1, ())
        rewards = numbers.astype(np.float32)
        if not np.isfinite(rewards).all():
            step = int(np.flatnonzero(~np.isfinite(rewards))[0])
            raise FormatError(f"{self._where}: rewards: step {step} is {rewards[step]}")
        return rewards

    def _columns(self, space: gymnasium.Space[Any], path: str, steps: int) -> Any:
        """Return the steps of an action, in the nested form of its space."""
        if isinstance(space, spaces.Dict):
            return {
                key: self._columns(part, f"{path}/{key}", steps)
                for key, part in space.spaces.items()
            }
        if isinstance(space, spaces.Tuple):
            return tuple(
                self._columns(part, f"{path}/_index_{i}", steps)
                for i, part in enumerate(space.spaces)
            )
        numbers = self._steps(path, steps, tuple(space.shape or ()))
        if isinstance(space, spaces.Box):
            return numbers
        if numbers.dtype.kind not in "biu":
            raise FormatError(f"{self._where}: {path}: {numbers.dtype}, expected integers")
        return numbers.astype(np.int64)

    def _steps(self, path: str, steps: int, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """Return numbers of which there must be one row a step."""
        numbers = _numbers(self._group, path, self._where)
        if numbers.shape != (steps, *shape):
            raise FormatError(
                f"{numbers.where}: shape {numbers.shape}, but {steps + 1} frames need "
                f"{(steps, *shape)}: Minari keeps one observation more than actions"
            )
        return numbers.whole()


def _data_folder(path: Path) -> Path:
    """Return the folder that holds metadata.json."""
    if path.name == _MAIN_FILE:
        return path.parent
    if not path.is_dir():
        raise FormatError(f"{path}: no such folder; expected a Minari data set")
    return path / "data" if (path / "data").is_dir() else path


def _choose(images: Mapping[str, tuple[int, ...]], wanted: str, where: str) -> str:
    """Return the path of the entry that is the frame."""
    if not images:
        raise FormatError(
            f"{where}: no observation of it is a picture (uint8 of height x width, or with 1 or 3 "
            "colours behind), so there are no frames"
        )
    listed = ", ".join(f"{key or '(the whole)'} {shape}" for key, shape in images.items())
    if wanted:
        if wanted not in images:
            raise ConfigError(
                f"--minari.image-key {wanted}: no such picture{nearest(wanted, list(images))}"
            )
        return wanted
    # Of 32 pixels on, as Minari itself tells a picture from a small map.
    large = [key for key, shape in images.items() if min(shape[:2]) >= 32] or list(images)
    if len(large) > 1:
        raise ConfigError(
            f"{where}: several pictures, {listed}; choose one with --minari.image-key"
        )
    return large[0]


def _map(
    data: Mapping[str, Any], settings: MinariConfig, /, *, where: str
) -> tuple[gymnasium.Space[Any], ActionMap]:
    """Return the space of the actions, their spec, and the way from the one to the other."""
    space = read_space(data, where=where)
    if settings.low or settings.high:
        if not isinstance(space, spaces.Box) or len(space.shape) != 1:
            raise ConfigError(f"{where}: {space}: --minari.low and .high are for one row of axes")
        low, high = (
            np.broadcast_to(np.asarray(given, space.dtype), space.shape)
            if len(given) in (1, *space.shape)
            else None
            for given in (settings.low, settings.high)
        )
        if low is None or high is None:
            raise ConfigError(
                f"{where}: {space}: --minari.low and --minari.high want one number for all axes, "
                f"or {space.shape[0]}"
            )
        space = spaces.Box(low, high, space.shape, space.dtype.type)
    elif isinstance(space, spaces.Box) and not space.is_bounded():
        raise ConfigError(
            f"{where}: {space}: an axis without bounds cannot be cut into bins; give --minari.low "
            "and --minari.high"
        )
    return space, map_actions(space, names=None, bins=settings.bins, where=where)


def _environment(metadata: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the id of the environment, if the data set knows it."""
    text = metadata.get("env_spec")
    if not isinstance(text, str):
        return {}
    return {"env": str(parse_object(text, where=f"{where}: env_spec").get("id"))[:200]}


def _recordings(path: Path, total: object) -> tuple[Recording, ...]:
    """Return the episodes of a file, by number."""
    with open_hdf5(path) as root:
        names = child_names(root, where=str(path))
    numbers = sorted(int(match[1]) for match in map(_EPISODE.fullmatch, names) if match)
    if not numbers:
        raise FormatError(f"{path}: has no episodes (groups called episode_0, episode_1, ...)")
    if len(numbers) != total:
        raise FormatError(
            f"{path}: {len(numbers)} episodes, but metadata.json says {total!r:.20}; the file was "
            "cut off or its copy is not complete"
        )
    return tuple(
        Recording(key=f"episode-{number:06d}", origin=f"episode_{number}") for number in numbers
    )


def _numbers(group: Any, path: str, where: str) -> Numbers:
    numbers = child(group, path, where=where)
    if not isinstance(numbers, Numbers):
        raise FormatError(f"{where}: {path:.100} is a group, expected numbers")
    return numbers


def _row(columns: Any, step: int) -> Any:
    """Return one step of what `_columns` returned."""
    if isinstance(columns, dict):
        return {key: _row(part, step) for key, part in columns.items()}
    if isinstance(columns, tuple):
        return tuple(_row(part, step) for part in columns)
    return columns[step]


def _unpack(row: npt.NDArray[np.uint8], shape: tuple[int, ...], where: str) -> Frames:
    """Return the picture that a row of JPEG bytes holds."""
    if row.dtype != np.uint8:
        raise FormatError(f"{where}: {row.dtype}, expected the bytes of a JPEG")
    try:
        with Image.open(io.BytesIO(row.tobytes()), formats=["JPEG"]) as image:
            # Before it is unpacked: a JPEG of a kilobyte may claim 65,535 x 65,535 pixels.
            if image.size != (shape[1], shape[0]):
                raise FormatError(f"{where}: {image.size[1]}x{image.size[0]}, expected {shape}")
            return np.array(image, np.uint8).reshape(shape)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise FormatError(f"{where}: not a JPEG ({error!s:.100})") from error


def _rgb(frame: Frames) -> Frames:
    """Return frame_HWC as an array of its own, its one colour three times where it has but one."""
    frame_HWC = frame[..., None] if frame.ndim == 2 else frame
    return np.array(np.broadcast_to(frame_HWC, (*frame_HWC.shape[:2], 3)))
