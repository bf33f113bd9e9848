"""What the episodes of a folder have in common, and how they are called. Needs no torch.

EpisodesSpec  <->  EPISODES/episodes.json
a name        ->   check_key  ->  the name, if it is safe
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from .actions import ActionSpec
from .errors import FormatError
from .files import read_json, write_json
from .specs import check_count, check_fields, check_rate

EPISODES_SCHEMA = "worldloom.episodes/1"
HALF_LABELLED_EPISODES_SCHEMA = "worldloom.episodes/2"
"""Of a folder in which episodes may be unlabelled; nothing else differs."""

# 80: with ".actions.npy" behind it, a key must fit the 100 bytes of a name in a ustar header.
# tmp-: a file of that name is what a killed process left, so readers pass it by.
_KEY = re.compile(r"(?!tmp-)[A-Za-z0-9_-]{1,80}")


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
    half_labelled: bool = False
    """Whether the actions of some episodes may be unknown."""

    def __post_init__(self) -> None:
        """Refuse to leave out actions of which there are none."""
        if self.half_labelled and self.actions.kind == "none":
            raise ValueError("half_labelled: there are no actions that could be unknown")

    def to_dict(self) -> dict[str, Any]:
        """Return the content of episodes.json."""
        return {
            "schema": HALF_LABELLED_EPISODES_SCHEMA if self.half_labelled else EPISODES_SCHEMA,
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
        readable = (EPISODES_SCHEMA, HALF_LABELLED_EPISODES_SCHEMA)
        schema = data.pop("schema", None)
        if schema not in readable:
            raise FormatError(
                f"{path}: schema {schema!r:.60}, readable are {' and '.join(readable)}"
            )
        if "half_labelled" in data:
            raise FormatError(f"{path}: EpisodesSpec has an unknown field 'half_labelled'")
        data["half_labelled"] = schema == HALF_LABELLED_EPISODES_SCHEMA
        check_fields(cls, data, where=str(path))
        for name in ("height", "width", "frame_skip"):
            check_count(str(path), name, data[name], high=1 << 16)
        fps = check_rate(str(path), "fps", data["fps"])
        if fps == 0 or not isinstance(data["source"], dict):
            raise FormatError(f"{path}: fps must be above 0, and source an object")
        actions = ActionSpec.from_dict(data["actions"], where=str(path))
        if data["half_labelled"] and actions.kind == "none":
            raise FormatError(f"{path}: schema {schema}, but no actions that could be unknown")
        return cls(**{**data, "actions": actions, "fps": fps})

    def write(self, folder: Path, /) -> None:
        """Write FOLDER/episodes.json, whole or not at all."""
        write_json(folder / "episodes.json", self.to_dict())
