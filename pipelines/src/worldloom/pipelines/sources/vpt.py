"""OpenAI's Minecraft recordings (VPT) and the like -> recordings: NAME.mp4 and NAME.jsonl.

    a folder  ->  open_source  ->  Source

Line i of the jsonl is what was done on seeing frame i, so it leads to frame i + 1, as ours do; the
last line leads nowhere. An action is one 0 or 1 for each of 23 keys and buttons, then one bin of
camera each for pitch and yaw, all of them slots of one multi-discrete action. Where the jsonl and
the video differ in length, the shorter counts.

Source: github.com/openai/Video-Pre-Training. Its camera has 11 bins by mu-law too, with mu = 10
where ours is 255: ours are finer near the middle (docs/data.md has both tables).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from worldloom.common import ActionArray, ActionSpec, ConfigError, FormatError, Frames

from ..ingest_config import IngestConfig, VptConfig
from ..video_files import VideoFile
from .folder import files_below
from .keys import unique_keys
from .source import Recording
from .vpt_lines import KEYS, Lines, read_lines

_FPS = 20.0
_SAME_RATE = 0.01
"""Containers round; a recorder of another rate is off by more."""
_MIN_CUT_FRAMES = 20
"""A second: what is shorter between two menus teaches little, and there is much of it."""
_ALIGNMENT = (
    "Line i of NAME.jsonl is what was done on seeing frame i of NAME.mp4 and leads to frame i + 1, "
    "as ours do; the last line, which leads nowhere, is left out."
)


def open_source(path: Path, settings: IngestConfig, /) -> "VptSource":
    """Open a folder of NAME.mp4 and NAME.jsonl, in subfolders too.

    Raises:
        FormatError: if there is no such folder, or no recording in it.
        ConfigError: if the camera's bins make no sense.
    """
    vpt = settings.vpt
    if vpt.camera_bins < 3 or vpt.camera_bins % 2 == 0:
        raise ConfigError(
            f"--vpt.camera-bins {vpt.camera_bins}: must be odd and at least 3, so that one bin "
            "means that the camera stands still"
        )
    if not 0 < vpt.camera_degrees <= 180:
        raise ConfigError(f"--vpt.camera-degrees {vpt.camera_degrees}: must be within 0 and 180")
    files = files_below(path, (".mp4", ".jsonl"), kind="recordings, NAME.mp4 beside NAME.jsonl")
    base = path if path.is_dir() else path.parent
    # Both endings: a video without its lines, or lines without a video, is named as what it is.
    stems = list(dict.fromkeys(f.relative_to(base).with_suffix("").as_posix() for f in files))
    camera = _camera_spec(vpt)
    return VptSource(
        actions=ActionSpec.multi_discrete(
            [2] * len(KEYS) + list(camera.sizes), names=[*KEYS, *camera.names]
        ),
        fps=settings.fps or _FPS,
        any_rate=settings.fps is not None,
        settings=vpt,
        folder=base,
        pieces=_pieces(base, stems, cut=vpt.menus == "cut"),
    )


def _camera_spec(settings: VptConfig) -> ActionSpec:
    """Return the two axes of the camera, in degrees a frame, whose bins are two of our slots."""
    limit = settings.camera_degrees
    return ActionSpec.continuous(
        (-limit, -limit),
        (limit, limit),
        names=("camera_pitch", "camera_yaw"),
        bins=settings.camera_bins,
        mu_law=(True, True),
    )


@dataclass(frozen=True, slots=True)
class _Piece:
    """Frames of a video that become one episode."""

    path: Path
    """Of the video; its jsonl lies beside it."""
    start: int = 0
    stop: int | None = None

    @property
    def part(self) -> str:
        """Which frames these are, for people; nothing if they are all."""
        return "" if self.stop is None else f": frames {self.start} to {self.stop - 1}"


def _pieces(folder: Path, stems: Sequence[str], *, cut: bool) -> dict[str, _Piece]:
    """Return the key and the piece of every recording-to-be, in order."""
    pieces: dict[str, _Piece] = {}
    for stem in stems:
        # Not with_suffix: names of recordings have dots in them.
        path = folder / f"{stem}.mp4"
        runs = _runs_without_menu(path) if cut else None
        if runs is None:
            pieces[stem] = _Piece(path)
        else:
            # No path has "//" in it, so no other name is like it.
            pieces |= {f"{stem}//{run[0]:06d}": _Piece(path, *run) for run in runs}
    return dict(zip(unique_keys(list(pieces)), pieces.values(), strict=True))


def _runs_without_menu(path: Path) -> list[tuple[int, int]] | None:
    """Return where no menu is open, or None for a file that cannot be read: opening it says why."""
    try:
        menu = read_lines(path.with_suffix(".jsonl")).menu
    except FormatError:
        return None
    edges = np.flatnonzero(np.diff(menu, prepend=True, append=True)).tolist()
    return [
        (start, stop)
        for start, stop in zip(edges[::2], edges[1::2], strict=True)
        if stop - start >= _MIN_CUT_FRAMES
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class VptSource:
    """A folder of recordings, opened; what a Source says of itself."""

    actions: ActionSpec
    fps: float
    any_rate: bool
    """Whether the videos' own frame rates do not count."""
    settings: VptConfig
    folder: Path
    pieces: Mapping[str, _Piece]

    @property
    def alignment(self) -> str:
        """Which action stands beside which frame."""
        return _ALIGNMENT

    @property
    def combining(self) -> str:
        """What `combine` does, in words."""
        return (
            "a key is down if it was down in any of the steps; the camera's degrees add up, "
            f"clipped to {self.settings.camera_degrees:g}"
        )

    def combine(self, raw: ActionArray, frame_skip: int, /) -> ActionArray:
        """Return the actions of the frames kept under a frame skip.

        Args:
            raw: 0 or 1 for each key, then degrees of pitch and yaw, a row a step.
            frame_skip: steps that become one.
        """
        steps, limit = len(raw) // frame_skip, self.settings.camera_degrees
        grouped = raw[: steps * frame_skip].reshape(steps, frame_skip, raw.shape[1])
        keys = grouped[..., : len(KEYS)].max(1).astype(np.int64)
        # Summed before they are binned: a bin forgets up to half of a slow turn.
        degrees = np.clip(grouped[..., len(KEYS) :].sum(1), -limit, limit)
        return np.concatenate([keys, _camera_spec(self.settings).encode(degrees)], axis=1)

    @property
    def about(self) -> Mapping[str, Any]:
        """What was read and how."""
        return {
            "packages": {"av": version("av")},
            "camera_bins": self.settings.camera_bins,
            "camera_degrees": self.settings.camera_degrees,
            "menus": self.settings.menus,
        }

    @property
    def recordings(self) -> Sequence[Recording]:
        """All recordings, or stretches between menus, by name and place."""
        return [
            Recording(key=key, origin=piece.path.relative_to(self.folder).as_posix() + piece.part)
            for key, piece in self.pieces.items()
        ]

    @contextmanager
    def open(self, recording: Recording, /) -> Iterator["VptRecording"]:
        """Open one recording.

        Raises:
            FormatError: naming the file, and the line of the jsonl that is malformed.
        """
        piece = self.pieces[recording.key]
        lines = read_lines(piece.path.with_suffix(".jsonl"))
        with VideoFile(piece.path, fps=self.fps if self.any_rate else None) as video:
            if not self.any_rate and abs(video.fps / _FPS - 1) > _SAME_RATE:
                raise FormatError(
                    f"{piece.path}: {video.fps:g} frames a second, but VPT records {_FPS:g}; give "
                    "--fps if the recordings have another rate"
                )
            yield VptRecording(piece, lines, video, steady=not self.any_rate)


class VptRecording:
    """One recording, or a stretch of it, that is being read."""

    def __init__(self, piece: _Piece, lines: Lines, video: VideoFile, /, *, steady: bool) -> None:
        self._piece = piece
        self._lines = lines
        self._video = video
        self._steady = steady
        self._stop = len(lines) if piece.stop is None else piece.stop

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What the episode's metadata gets."""
        here = slice(self._piece.start, self._stop)
        return {
            "num_lines": len(self._lines),
            "first_frame": self._piece.start,
            "menu_frames": int(self._lines.menu[here].sum()),
            "attack_was_stuck": self._lines.attack_was_stuck,
        }

    def frames(self) -> Iterator[Frames]:
        """Yield frame_HWC, as many as there are lines and frames of both."""
        start = self._piece.start
        if not self._steady:  # times say nothing of which frame it is: count from the first
            return islice(self._video.frames(), start, self._stop)
        return islice(self._video.frames(start_s=start / _FPS), self._stop - start)

    def actions(self, num_frames: int, /) -> ActionArray:
        """Return keys and degrees of the num_frames - 1 steps, as `combine` takes them."""
        here = slice(self._piece.start, self._piece.start + num_frames - 1)
        return np.concatenate([self._lines.keys[here], self._lines.camera[here]], axis=1)

    def rewards(self, num_frames: int, /) -> None:
        """Return None: nobody was paid."""
