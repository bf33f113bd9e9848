"""The settings of `worldloom ingest`: what all kinds of sources share, and what only some need.

    flags, TOML  ->  IngestConfig, with one table for every kind that has settings of its own

Apart from the command, so that the readers of sources/ know them without knowing it.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg
from worldloom.common import ResizeRule

SourceKind = Literal["videos", "vpt", "lerobot", "minari", "npz"]
FileActions = Literal["discrete", "keys", "multi_discrete", "continuous"]
ActionRows = Literal["next", "previous"]
SideFormat = Literal["any", "jsonl", "csv", "npz", "none"]
MissingActions = Literal["refuse", "unlabelled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionFileConfig:
    """Kinds videos and npz: which actions stand in the files, and beside which frame."""

    alignment: ActionRows = "next"
    """Row i of a file is chosen on seeing frame i and leads to the next one (next), or it is the
    one that led to frame i (previous)."""
    missing: MissingActions = "refuse"
    """What becomes of a recording without actions beside others that have some: a bad recording
    (refuse), or an episode whose actions nobody knows (unlabelled), of which a model learns how the
    world looks but not what an action does."""
    format: SideFormat = "any"
    """videos: which file of actions lies beside each video, as NAME.csv beside NAME.mp4; any takes
    the one there is, none takes the videos alone."""
    columns: tuple[str, ...] = ()
    """Columns of a csv, fields of a jsonl, or the one array of an npz that hold the actions, in
    this order; found, and said, if there is only one way to read them."""
    kind: Annotated[
        FileActions | None, arg(metavar="{discrete,keys,multi_discrete,continuous}")
    ] = None
    """What one action is: discrete, keys (several at once), multi_discrete or continuous; found if
    the values leave no doubt."""
    names: tuple[str, ...] = ()
    """What the values (discrete), the keys or the axes are called; numbers or columns if not
    given."""
    sizes: tuple[int, ...] = ()
    """multi_discrete: number of values of each axis; from the largest found if not given."""
    low: tuple[float, ...] = ()
    """continuous: smallest value of each axis, or one for all."""
    high: tuple[float, ...] = ()
    """continuous: largest value of each axis, or one for all."""
    bins: int = 11
    """continuous: bins of each axis."""
    mu_law: bool = False
    """continuous: bins are finer near the middle, as cameras want it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NpzConfig:
    """Kind npz: which arrays to read."""

    frames: str = "frames"
    """Array of frames, uint8 [T, H, W, 3]."""
    actions: str = "actions"
    """Array of actions, if there is one."""
    rewards: str = "rewards"
    """Array of rewards, if there is one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VptConfig:
    """Kind vpt: how the mouse is read, and what becomes of menus."""

    camera_bins: int = 11
    """Bins of each camera axis, mu-law; odd, so that one of them is standing still."""
    camera_degrees: float = 10.0
    """Fastest turn of the camera, in degrees a kept frame; faster ones are clipped."""
    menus: Literal["keep", "cut"] = "keep"
    """What becomes of frames under an open menu: keep them, or cut the recording there (every jsonl
    is then read once more, at the start; stretches under a second are left out)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LerobotConfig:
    """Kind lerobot: which camera is taken, and how far the actions go."""

    camera: str = ""
    """Feature of the frames, as observation.images.top; needed where there are several."""
    action: str = "action"
    """Feature of the actions; empty takes the frames alone."""
    bins: int = 11
    """Floats: bins of each axis."""
    low: tuple[float, ...] = ()
    """Floats: smallest value of each axis, or one for all; from the data set's statistics if not
    given."""
    high: tuple[float, ...] = ()
    """Floats: largest value of each axis, or one for all."""
    sizes: tuple[int, ...] = ()
    """Integers: number of values of each axis; from the data set's statistics if not given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MinariConfig:
    """Kind minari: which observation is the frame, and how far the actions go."""

    image_key: str = ""
    """Entry of a dictionary of observations that is the frame, as camera/left; needed where there
    are several."""
    bins: int = 11
    """Continuous actions: bins of each axis."""
    low: tuple[float, ...] = ()
    """Continuous actions: smallest value of each axis, or one for all; the data set's own if not
    given."""
    high: tuple[float, ...] = ()
    """Continuous actions: largest value of each axis, or one for all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IngestConfig:
    """Turn recordings of yours into episodes: frames, actions and what the actions are called.

        worldloom ingest videos recordings --output runs/mine/episodes --resize crop

    Kinds: videos (mp4, mkv, webm, gif, with or without a file of actions beside each), vpt,
    lerobot, minari, npz (arrays). docs/data.md says how each is read.
    """

    kind: Positional[SourceKind]
    """What the source is."""
    path: Positional[Path]
    """Its folder."""
    output: Path
    """Folder for the episodes; the same command again continues where it stopped."""
    height: int = 64
    """Height of the episodes' frames."""
    width: int = 64
    """Width of the episodes' frames."""
    resize: ResizeRule = "exact"
    """How the source's frames become that size: exact refuses another one; stretch scales each
    axis by itself; crop scales until both axes cover, and cuts; pad until both fit, and adds
    black."""
    frame_skip: int = 1
    """Keep every so many-th frame; the actions between two kept ones become one: keys pressed in
    any of them, the mean or sum of axes, the last choice."""
    fps: Annotated[float | None, arg(metavar="FLOAT")] = None
    """Frames per second of the source, before the frame skip, where its files do not agree, do
    not say, or vary: frames are then taken as they come. The files' own if not given."""
    max_frames: int = 0
    """Cut longer recordings into episodes of at most so many frames; 0 never cuts."""
    num_recordings: int = 0
    """Take so many recordings, the first ones of the source; 0 takes all. More later adds them."""
    skip_bad: int = 0
    """Recordings that may be left out because they cannot be read; each is named, with why."""
    workers: int = 1
    """Processes that read at the same time; the files do not depend on it."""
    actions: ActionFileConfig = field(default_factory=ActionFileConfig)
    npz: NpzConfig = field(default_factory=NpzConfig)
    vpt: VptConfig = field(default_factory=VptConfig)
    lerobot: LerobotConfig = field(default_factory=LerobotConfig)
    minari: MinariConfig = field(default_factory=MinariConfig)
