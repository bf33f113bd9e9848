"""What a person names -> a tokenizer of any kind, ours or theirs.

    FOLDER                   ->  its config.json says "name": "image"  ->  that entry point's class
    patch                    ->  the class of the entry point "patch", made with no arguments
    mine.codec:Codec         ->  the class Codec of the module mine.codec, made with no arguments
    mine.codec:Codec=FOLDER  ->  Codec.from_pretrained(FOLDER)

A distribution announces a tokenizer in its pyproject.toml:

    [project.entry-points."worldloom.tokenizers"]
    mine = "mine.codec:Codec"

The class implements `VideoTokenizer`. To load from directories it has
`from_pretrained(folder, /, *, device)`; those found by the name in their config.json are written by
`worldloom.common.save_model` with kind "tokenizer" and "name" in the config. A file can only choose
among installed names; a module is imported only because a person typed its name.
"""

import importlib
import inspect
import os
import re
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from torch import nn
from worldloom.common import ConfigError, FormatError, MismatchError, nearest, read_json

from .protocol import VideoTokenizer

GROUP = "worldloom.tokenizers"

_CLASS = re.compile(r"(?P<module>[A-Za-z_][\w.]*):(?P<name>[A-Za-z_]\w*)(?:=(?P<folder>.+))?")


def load_tokenizer(source: Path | str, /, *, device: str = "cpu") -> VideoTokenizer:
    """Return a tokenizer, whatever its kind, ready to encode and decode.

    Args:
        source: a model directory; or, as a str, anything that the module's docstring lists. A
            folder that is there wins over a name.
        device: where it computes. One made with no arguments goes there if it is a torch module.

    Raises:
        FormatError: if the directory is missing or damaged.
        MismatchError: if it is another kind of model, or a tokenizer that is not installed.
        ConfigError: if two installed packages claim the name, or a class cannot be imported, made,
            or is no tokenizer.
    """
    if isinstance(source, Path) or Path(source).exists():
        return _from_folder(Path(source), device)
    typed = _CLASS.fullmatch(source)
    if typed is not None:
        cls = _import(typed["module"], typed["name"], where=source)
        return _construct(cls, typed["folder"], device, where=source)
    if re.search(r"[./\\]", source):
        return _from_folder(Path(source), device)  # a path, which will say what it misses
    names = sorted({entry.name for entry in entry_points(group=GROUP)})
    if source not in names:
        raise FormatError(
            f"{source}: no such folder, and no tokenizer of that name is installed"
            f"{nearest(source, names) if names else ''}. A class of yours is module:Class"
        )
    return _construct(_load(_entry_point(source, where=source), source), None, device, where=source)


def _from_folder(folder: Path, device: str) -> VideoTokenizer:
    """Load a model directory by the name in its config."""
    path = folder / "config.json"
    if not path.exists() and (folder / "model" / path.name).exists():
        raise FormatError(
            f"{folder}: a run directory; the tokenizer is its folder model: {folder / 'model'}"
        )
    content = read_json(path, what="the config of a tokenizer model directory")
    if content.get("kind") != "tokenizer":
        raise MismatchError(
            f"{folder}: holds a {content.get('kind')!r:.60} model, but a tokenizer is needed"
        )
    config = content.get("config")
    name = config.get("name") if isinstance(config, dict) else None
    cls = _load(_entry_point(name, where=str(path)), str(path))
    return _construct(cls, str(folder), device, where=str(folder))


def _entry_point(name: object, *, where: str) -> EntryPoint:
    """Return the one installed entry point of this name."""
    installed = entry_points(group=GROUP)
    found = {entry.value: entry for entry in installed if entry.name == name}
    if not found:
        raise MismatchError(
            f"{where}: a tokenizer of kind {name!r:.60}, but installed are "
            f"{', '.join(sorted({entry.name for entry in installed})) or 'none'}; "
            "install the package that brings it"
        )
    if len(found) > 1:
        raise ConfigError(
            f"{where}: two packages bring a tokenizer named {name!r:.60} "
            f"({', '.join(sorted(found))}); uninstall one"
        )
    return next(iter(found.values()))


def _load(entry: EntryPoint, where: str) -> Any:
    """Return the class of an installed entry point."""
    try:
        return entry.load()
    except Exception as error:  # their module may fail with anything
        raise ConfigError(
            f"{where}: the tokenizer {entry.name!r} is installed as {entry.value}, which cannot be "
            f"imported ({type(error).__name__}: {error}); install its package again"
        ) from error


def _import(module: str, name: str, *, where: str) -> Any:
    """Return the class that a person named."""
    # Their file lies where they stand; a console script looks only where it is installed itself.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # their module may fail with anything
        raise ConfigError(
            f"{where}: cannot be imported ({type(error).__name__}: {error})"
        ) from error


def _construct(cls: Any, folder: str | None, device: str, *, where: str) -> VideoTokenizer:
    """Return the tokenizer of a class, from a folder or with no arguments."""
    if folder is None:
        _require_no_arguments(cls, where)
        tokenizer = cls()
        if isinstance(tokenizer, nn.Module):
            tokenizer.eval().requires_grad_(requires_grad=False).to(device)
    elif not hasattr(cls, "from_pretrained"):
        raise ConfigError(
            f"{where}: {getattr(cls, '__name__', cls)} has no from_pretrained, so it cannot be "
            "loaded from a folder; give it one, or leave the folder out"
        )
    else:
        tokenizer = cls.from_pretrained(Path(folder), device=device)
    missing = [name for name in members() if not hasattr(tokenizer, name)]
    if missing:
        raise ConfigError(
            f"{where}: {type(tokenizer).__name__} lacks {', '.join(missing)}, which a tokenizer "
            "has; see docs/tokenizers.md"
        )
    found: VideoTokenizer = tokenizer
    return found


def _require_no_arguments(cls: Any, where: str) -> None:
    """Refuse what is no class, and a class that cannot be made with no arguments."""
    if not isinstance(cls, type):
        raise ConfigError(f"{where}: is {type(cls).__name__}, must be a class")
    try:
        inspect.signature(cls).bind()
    except TypeError as error:
        raise ConfigError(
            f"{where}: {cls.__name__} cannot be made with no arguments ({error}), so it must come "
            "from a folder: give its model directory, or module:Class=FOLDER"
        ) from error


def members() -> list[str]:
    """Return the names of what every tokenizer has."""
    return sorted(name for name in vars(VideoTokenizer) if not name.startswith("_"))
