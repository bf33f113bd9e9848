"""The kinds of sources there are: kind -> module, loaded only when that kind is used.

    open_source("videos", folder, settings)  ->  Source

A new kind is one module with `open_source(path, settings) -> Source`, and one line here.
"""

from importlib import import_module
from pathlib import Path

from ..ingest_config import IngestConfig, SourceKind
from .source import OpenRecording as OpenRecording
from .source import Recording as Recording
from .source import Source as Source

_MODULES: dict[SourceKind, str] = {
    "videos": "videos",
    "vpt": "vpt",
    "lerobot": "lerobot",
    "minari": "minari",
    "npz": "npz",
}


def open_source(kind: SourceKind, path: Path, settings: IngestConfig, /) -> Source:
    """Open a source of one kind.

    Args:
        kind: one of the table; a name out of a file never gets here.
        path: its folder.
        settings: of the command.

    Raises:
        FormatError: if it is not a source of that kind.
        ConfigError: if it cannot be read so, or a library is missing.
    """
    module = import_module(f".{_MODULES[kind]}", __package__)
    source: Source = module.open_source(path, settings)
    return source
