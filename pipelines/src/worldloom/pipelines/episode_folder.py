"""A folder of episodes while it is written: held by one command, of one set of settings.

    with claimed(folder, shown, doing="recording"):
        keep_spec(folder, spec, shown, complete=False)

`worldloom record` and `worldloom ingest` both come back to a folder that they began.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from worldloom.common import (
    ConfigError,
    EpisodesSpec,
    is_leftover,
    read_json,
    remove_leftovers,
    storage_errors,
)


@contextmanager
def claimed(folder: Path, name: Path, *, doing: str) -> Iterator[None]:
    """Hold the folder alone, without leftovers; a folder that stays empty goes again.

    Args:
        folder: where the episodes go, absolute.
        name: the same as the person wrote it.
        doing: what the person would call what goes on there: "recording".

    Raises:
        ConfigError: if it is no folder, holds something else, or another process writes there.
        StorageError: if it cannot be made.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{name}: is a file; --output is a folder")
    strangers = sorted(p.name for p in folder.glob("*") if not is_leftover(p.name))
    if strangers and "episodes.json" not in strangers:
        raise ConfigError(
            f"{name}: has {', '.join(strangers[:3])} but no episodes.json, so it is no folder of "
            "episodes; nothing was touched. Choose a new folder"
        )
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with storage_errors(name):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    try:
        # The lock is the kernel's and ends with this process, however it ends.
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        remove_leftovers(folder)
        try:
            yield
        finally:
            remove_leftovers(folder)
            for path in made:
                if any(path.iterdir()):
                    break
                path.rmdir()
    except BlockingIOError as error:
        raise ConfigError(f"{name}: another {doing} is writing there; wait for its end") from error
    finally:
        os.close(handle)


def keep_spec(folder: Path, spec: EpisodesSpec, name: Path, *, complete: bool) -> None:
    """Write episodes.json, or refuse to add to episodes that were written otherwise.

    Args:
        folder: of the episodes.
        spec: of what shall be written.
        name: the folder as the person wrote it.
        complete: nothing is left to write, so that other versions of libraries do not matter.

    Raises:
        ConfigError: naming every setting that differs.
    """
    path = folder / "episodes.json"
    if not path.exists():
        spec.write(folder)
        return
    there = _flat(read_json(path, what="the description of a folder of episodes"))
    here = _flat(json.loads(json.dumps(spec.to_dict())))
    differ = [key for key in sorted(here | there) if here.get(key) != there.get(key)]
    if complete:
        differ = [key for key in differ if not key.startswith("source.packages.")]
    if differ:
        listed = ", ".join(
            f"{key} ({there.get(key)!r:.60} there, {here.get(key)!r:.60} here)" for key in differ
        )
        raise ConfigError(
            f"{name}: was begun with other settings: {listed}. "
            "Choose a new folder, or give the settings it was begun with"
        )


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested tables as one, with keys such as source.env."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        name = f"{prefix}{key}"
        flat.update(_flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value})
    return flat
