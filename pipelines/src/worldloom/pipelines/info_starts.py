"""What generate wrote of several starts -> a description: how many, how fast, from where.

    GENERATED/{starts.json, start-000/...}  ->  describe_starts  ->  {"num_starts": ..., ...}

Needs no torch.
"""

from math import isfinite
from pathlib import Path
from typing import Any

from worldloom.common import FormatError, read_json

from .generate import STARTS_SCHEMA

_LISTED = 16
"""Starts that are listed, the first ones."""


def describe_starts(folder: Path, /) -> tuple[dict[str, Any], list[Path]]:
    """Return a description, and the folder of every start.

    Raises:
        FormatError: if starts.json is not what generate writes.
    """
    path = folder / "starts.json"
    content = read_json(path, what=f"a file of schema {STARTS_SCHEMA}")
    if content.get("schema") != STARTS_SCHEMA:
        raise FormatError(
            f"{path}: expected schema {STARTS_SCHEMA}, found {content.get('schema')!r:.60}; it is "
            "another version's, or not of worldloom"
        )
    try:
        rows = [(str(row["folder"]), str(row["start"])) for row in content["starts"]]
        frames = sum(int(row["num_frames"]) for row in content["starts"])
        samples = int(content["num_samples"])
        about = {
            "num_starts": len(rows),
            "num_samples": samples,
            "generated_frames": frames * samples,
            "seconds": _finite(content["seconds"]),
            "frames_per_s": _finite(content["frames_per_s"]),
            "forwards_per_frame": _finite(content["forwards_per_frame"]),
            "starts": [start for _, start in rows[:_LISTED]],
        }
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        raise FormatError(
            f"{path}: is not what `worldloom generate` writes ({error!r}); generate it again"
        ) from error
    inside = [folder / name for name, _ in rows]
    for one in inside:
        stray = one.parent != folder or one.name == ".."
        if stray or not (one / "session.json").is_file():
            raise FormatError(f"{path}: names {one.name!r:.60}, which is not there; generate again")
    return about, inside


def _finite(number: Any) -> float:
    """Return a number that is one: JSON knows 1e999."""
    if not isfinite(number):
        raise ValueError(f"{number} where a number was expected")
    return float(number)
