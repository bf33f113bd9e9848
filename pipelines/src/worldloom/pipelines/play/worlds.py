"""The worlds on this disk.

    runs/demo                   -> world_files -> WorldFiles: model, tokenizer, starts, episodes
    a folder                    -> find_worlds -> those of the runs in it, newest first
    WorldFiles, a loaded World  -> gallery     -> StartPoints, unlike each other

Finding worlds needs no torch.
"""

from dataclasses import dataclass
from os.path import isdir, isfile
from pathlib import Path
from typing import TYPE_CHECKING

from worldloom.common import FormatError

from .start_points import StartPoint as StartPoint
from .start_points import moments

if TYPE_CHECKING:
    from ..world import World


@dataclass(frozen=True, slots=True)
class WorldFiles:
    """What a world is on disk."""

    name: str
    """As people say it: "runs/demo"."""
    model: Path
    """Model directory of train-dynamics."""
    tokenizer: str
    """The tokenizer that wrote the model's shards, as `load_tokenizer` takes it."""
    starts: Path | None
    """Token shards or episodes with frames to start from."""
    episodes: Path | None
    """Recorded episodes, whose spec names the real game."""


def find_worlds(folder: Path, /) -> list[WorldFiles]:
    """Return the worlds in a folder, its folders and theirs, newest first.

    A folder that may not be read holds none.
    """
    levels = [[folder]]
    for _ in range(2):
        levels.append([inner for outer in levels[-1] for inner in _folders(outer)])
    found = [
        (_age(there), _files_of_run(there, name=_said(there, folder)))
        for level in levels
        for there in level
        if _is_run(there)
    ]
    return [files for _, files in sorted(found, key=lambda pair: (-pair[0], pair[1].name))]


def world_files(path: Path, /) -> WorldFiles:
    """Return the files of the world in one folder.

    Raises:
        FormatError: if there is none.
    """
    if _is_run(path):
        return _files_of_run(path, name=str(path))
    if not path.exists():
        raise FormatError(
            f"{path}: not found; expected a folder that `worldloom demo` wrote, or one laid out so"
        )
    raise FormatError(
        f"{path}: is no world: it lacks {' and '.join(_lacking(path))}. Give the folder that "
        "`worldloom demo` wrote, or name its parts with --model, --tokenizer and --start"
    )


_PARTS = (Path("dynamics/model/config.json"), Path("tokenizer/model/config.json"))


def _lacking(folder: Path) -> list[str]:
    # A folder that may not be entered lacks them, too; Path.is_file would raise.
    return [str(part.parent) for part in _PARTS if not isfile(folder / part)]


def _is_run(folder: Path) -> bool:
    return not _lacking(folder)


def _files_of_run(folder: Path, *, name: str) -> WorldFiles:
    """Return the parts of a folder laid out as demo does it."""
    shards, episodes = folder / "shards", folder / "episodes"
    recorded = episodes if isfile(episodes / "episodes.json") else None
    starts = shards if isfile(shards / "manifest.json") else recorded
    return WorldFiles(
        name, folder / "dynamics" / "model", str(folder / "tokenizer" / "model"), starts, recorded
    )


def _folders(folder: Path) -> list[Path]:
    """Return the folders in a folder; none where it may not be read. Hidden ones are not asked."""
    try:
        inside = sorted(folder.iterdir())
    except OSError:
        return []
    return [path for path in inside if not path.name.startswith((".", "tmp-")) and isdir(path)]


def _said(path: Path, folder: Path) -> str:
    """Return the path as a person types it who stands in `folder`."""
    inner = path.relative_to(folder)
    return str(inner) if inner.parts else folder.resolve().name


def _age(folder: Path) -> float:
    return (folder / _PARTS[0]).stat().st_mtime


def gallery(files: WorldFiles, world: "World", /, *, count: int) -> list[StartPoint]:
    """Return at most `count` places to start from, none without `files.starts`; see `moments`."""
    return [] if files.starts is None else moments(files.starts, world, count=count)
