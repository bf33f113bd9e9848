"""Model directories -> tokenizers of any kind, found by name among what is installed.

    FOLDER, whose config.json says "name": "image"  ->  the entry point "image"  ->  its class

A distribution announces a tokenizer in its pyproject.toml:

    [project.entry-points."worldloom.tokenizers"]
    mine = "my_package.tokenizer:MyTokenizer"

The class implements `VideoTokenizer` and has `from_pretrained(folder, /, *, device)`; its
directories are written by `worldloom.common.save_model` with kind "tokenizer" and "name" in the
config. A file can only choose among installed names; no class named inside a file is imported.
"""

from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from worldloom.common import ConfigError, FormatError, MismatchError, read_json

from .protocol import VideoTokenizer

GROUP = "worldloom.tokenizers"


def load_tokenizer(folder: Path, /, *, device: str = "cpu") -> VideoTokenizer:
    """Load the tokenizer of a model directory, whatever its kind, ready to encode and decode.

    Raises:
        FormatError: if it is missing or damaged.
        MismatchError: if it is another kind of model, or a tokenizer that is not installed.
        ConfigError: if two installed packages claim the name.
    """
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
    tokenizer: VideoTokenizer = (
        _entry_point(name, where=str(path)).load().from_pretrained(folder, device=device)
    )
    return tokenizer


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
