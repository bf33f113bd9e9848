"""plan.json: what a folder of shards was begun as, so that only the same work is continued there.

    a plan  ->  keep_plan  ->  SHARDS/plan.json, or a refusal that names the fields that differ

Both `worldloom tokenize` and `worldloom shards` begin a folder with it, and finish it with the
manifest.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from worldloom.common import (
    ConfigError,
    FormatError,
    MismatchError,
    TokenShards,
    describe_difference,
    is_leftover,
    read_json,
    remove_leftovers,
    say,
    write_json,
)


def keep_plan(output: Path, plan: Mapping[str, Any], /) -> None:
    """Write the plan, or check that it is the one an earlier run, or another rank, began with.

    Raises:
        MismatchError: if it is another, naming the fields that differ.
        ConfigError: if the folder is one of something else.
    """
    path = output / "plan.json"
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output}: is a file; --output is a folder")
    # A temporary file may be a plan that was killed while it was written.
    strangers = [p.name for p in output.glob("*") if not is_leftover(p.name)]
    if strangers and not path.exists():
        raise ConfigError(
            f"{output}: has {', '.join(sorted(strangers)[:3])} but no plan.json, so it is no "
            "folder of token shards; nothing was touched. Choose another --output"
        )
    if not path.exists():
        write_json(path, dict(plan))
    # Also after writing: another rank may have had another plan in that moment. A worker compares
    # once more before it writes a shard.
    require_plan(read_plan(output), plan, output=output)
    remove_leftovers(output, of={path.name}, shared=True)


def read_plan(output: Path, /) -> dict[str, Any]:
    """Return the plan that a folder of shards was begun with."""
    return read_json(output / "plan.json", what="the plan of a folder of token shards")


def require_plan(before: Mapping[str, Any], here: Mapping[str, Any], /, *, output: Path) -> None:
    """Refuse to go on with another plan than a folder of shards was begun with.

    Raises:
        MismatchError: naming every field that differs.
    """
    if dict(before) != dict(here):
        raise MismatchError(
            f"{output}: was begun with another plan "
            f"({describe_difference(dict(before), dict(here))}); its shards would not belong "
            "together. Go on with the same one, or choose another --output"
        )


def is_finished(folder: Path, /) -> bool:
    """Whether everything the manifest speaks of is there; asks for sizes, not for every byte."""
    if not (folder / "manifest.json").exists():
        return False
    try:
        TokenShards(folder).codebook_VZ()
    except FormatError as error:
        say(f"{error}; doing that now")
        return False
    return True
