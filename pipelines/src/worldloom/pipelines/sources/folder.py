"""The files of a folder, whatever lies in it -> those of some endings, in one order.

FOLDER, (".mp4", ...)  ->  files_below  ->  paths, sorted by name
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from worldloom.common import FormatError

from .keys import unique_keys


def files_below(folder: Path, suffixes: Sequence[str], /, *, kind: str) -> list[Path]:
    """Return what has one of the endings, in subfolders and behind links too; hidden names not.

    A file alone counts as a folder that holds it. Pipes and devices are among the paths: who opens
    one names and refuses it.

    Raises:
        FormatError: if there is no such folder, or nothing with such an ending in it.
    """
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise FormatError(f"{folder}: no such folder; expected {kind}")
    found = [path for path in _walk(folder) if path.suffix.lower() in suffixes]
    if not found:
        raise FormatError(f"{folder}: has no {kind} ({', '.join(suffixes)}), nor its subfolders")
    return sorted(found, key=lambda path: os.fsencode(path.relative_to(folder)))


def recording_names(folder: Path, files: Sequence[Path], /) -> tuple[list[str], list[str]]:
    """Return the key of each file's recording, and its path inside the folder.

    A recording is called as its file without the ending; where two differ only in that, with it.
    """
    base = folder if folder.is_dir() else folder.parent
    inside = [file.relative_to(base) for file in files]
    names = [path.with_suffix("").as_posix() for path in inside]
    count = Counter(names)
    full = [path.as_posix() for path in inside]
    plain = [n if count[n] == 1 else f for n, f in zip(names, full, strict=True)]
    return unique_keys(plain), full


def _walk(folder: Path) -> Iterator[Path]:
    # A link may lead back to where it stands: each folder is entered once.
    entered = {os.path.realpath(folder)}
    for where, folders, names in os.walk(folder, followlinks=True, onerror=_refuse):
        folders.sort()
        inner = []
        for name in folders:
            real = os.path.realpath(os.path.join(where, name))
            if not name.startswith(".") and real not in entered:
                entered.add(real)
                inner.append(name)
        folders[:] = inner
        for name in names:
            if not name.startswith("."):
                yield Path(where, name)


def _refuse(error: OSError) -> None:
    raise FormatError(f"{error.filename}: cannot be read ({error.strerror})") from error
