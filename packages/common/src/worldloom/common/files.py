"""Files that appear whole or not at all.

    bytes -> tmp-* -> fsync -> rename -> fsync of the folder

Every artifact of ours is written through this file, so there is one place that can tear and one
place that the fault tests break: `failpoint`.
"""

import hashlib
import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from .errors import FormatError, StorageError

_passes: Counter[str] = Counter()


def failpoint(name: str) -> None:
    """Die here by SIGKILL if WORLDLOOM_FAILPOINT=name[:n] and this is the n-th pass.

    Only the fault tests set the variable; without it this is one look into the environment.
    """
    wanted = os.environ.get("WORLDLOOM_FAILPOINT")
    if not wanted:
        return
    target, _, nth = wanted.partition(":")
    if target == name:
        _passes[name] += 1
        if _passes[name] == int(nth or 1):
            os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an operating-system error inside the block into a sentence that names the path."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{path}: {error.strerror or error}; nothing was left half written. "
            "Make room or mend the rights, then run the same command again to continue."
        ) from error


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Call `write` on a temporary file beside `path`, then move it there whole.

    Raises:
        StorageError: if the disk refuses; the temporary file is removed, an older file at `path`
            stays as it was.
    """
    temporary = path.with_name(f"tmp-{os.getpid()}-{path.name}")
    with storage_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                write(file)
                failpoint("write")
                file.flush()
                os.fsync(file.fileno())
            failpoint("fsync")
            os.replace(temporary, path)
            failpoint("rename")
            fsync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    write_atomic(path, lambda file: file.write(content) and None)


def to_json(content: object, *, indent: int | None = 2) -> str:
    """Return canonical JSON: sorted keys, no NaN, a newline at the end."""
    return json.dumps(content, indent=indent, sort_keys=True, allow_nan=False) + "\n"


def write_json(path: Path, content: object, *, indent: int | None = 2) -> None:
    """Write canonical JSON whole or not at all."""
    write_bytes(path, to_json(content, indent=indent).encode())


def read_json(path: Path, *, what: str, limit_bytes: int = 1 << 30) -> dict[str, Any]:
    """Return the JSON object in `path`.

    Args:
        path: the file.
        what: what the file is, for the error: "a manifest of token shards".
        limit_bytes: refuse larger files; a stranger's file must not fill the memory.

    Raises:
        FormatError: if the file is missing, too large, not JSON or not an object.
    """
    try:
        size = path.stat().st_size
        if size > limit_bytes:
            raise FormatError(f"{path}: {size} bytes is too large for {what}")
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise FormatError(f"{path}: not found; expected {what}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{path}: cannot be read as {what} ({error})") from error
    if not isinstance(content, dict):
        raise FormatError(f"{path}: expected {what}, a JSON object, got {type(content).__name__}")
    return content


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `folder` when the block ends well.

    An existing `folder` is replaced. Every file inside is fsynced first.
    """
    temporary = folder.with_name(f"tmp-{os.getpid()}-{folder.name}")
    old = folder.with_name(f"tmp-old-{os.getpid()}-{folder.name}")
    with storage_errors(folder):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary
            for file in sorted(temporary.rglob("*")):
                if file.is_file():
                    with file.open("rb") as opened:
                        os.fsync(opened.fileno())
            fsync_folder(temporary)
            failpoint("folder-fsync")
            if folder.exists():
                os.replace(folder, old)
            os.replace(temporary, folder)
            failpoint("folder-rename")
            fsync_folder(folder.parent)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed process left in a folder: everything named tmp-*."""
    for leftover in folder.glob("tmp-*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
