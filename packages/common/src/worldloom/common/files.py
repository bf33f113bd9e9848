"""Files that appear whole or not at all.

    bytes -> tmp-* -> fsync -> rename -> fsync of the folder

Every artifact of ours is written through this file, so there is one place that can tear and one
place that the fault tests break: `failpoint`.
"""

import errno
import hashlib
import json
import os
import platform
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from .errors import FormatError, StorageError

_passes: Counter[str] = Counter()
_LEFTOVER = re.compile(r"tmp-(?:old-)?(?P<number>\d+)-(?P<name>.+)", re.DOTALL)
_PID_DIGITS = 7
"""Linux counts processes up to 4,194,304."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


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


def temporary_path(path: Path, /) -> Path:
    """Return where what shall stand at `path` is written first: tmp-NUMBER-NAME beside it.

    The number is of the machine and the process, so that no two that share a disk have the same.
    """
    return path.with_name(f"tmp-{_process_number()}-{path.name}")


def _process_number() -> str:
    """Return digits that no other process has, here or on another machine."""
    return f"{_machine_number()}{os.getpid():0{_PID_DIGITS}d}"


@cache
def _machine_number() -> int:
    """Return a number of this machine, or container: each counts its processes on its own."""
    parts = [platform.node()]
    with suppress(OSError):  # of Linux; elsewhere the name must do
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        parts.append(str(os.stat("/proc/self/ns/pid").st_ino))
    digest = hashlib.sha256("\n".join(parts).encode()).digest()
    return 1 + int.from_bytes(digest[:6], "big")


def is_leftover(name: str, /) -> bool:
    """Return whether a name is one that `temporary_path` gives, or an old folder stepped aside."""
    return _LEFTOVER.fullmatch(name) is not None


@contextmanager
def storage_errors(path: Path, *, size_bytes: int | None = None) -> Iterator[None]:
    """Turn an operating-system error inside the block into a sentence that names the path.

    Args:
        path: the file or folder that the block writes.
        size_bytes: how much it wants to write, if that is known: the person must make this room.
    """
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{path}: {error.strerror or error}; nothing was left half written. "
            f"{_cure(error, path, size_bytes)}, then run the same command again to continue."
        ) from error


def _cure(error: OSError, path: Path, size_bytes: int | None) -> str:
    """Return what a person does about an operating system's error."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        there = next((p for p in path.absolute().parents if p.is_dir()), Path.cwd())
        wanted = f"{size_bytes} bytes to write, " if size_bytes is not None else ""
        return f"Make room ({wanted}{shutil.disk_usage(there).free} bytes free)"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "Mend the rights, or choose a place where you may write"
    if error.errno in (errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
        return "A file stands where a folder is wanted, or the other way round: choose another path"
    return "See to the path and the disk"


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(
    path: Path, write: Callable[[BinaryIO], object], *, size_bytes: int | None = None
) -> None:
    """Call `write` on a temporary file beside `path`, then move it there whole.

    Args:
        path: where the file shall stand.
        write: writes the content; what it returns does not matter.
        size_bytes: how much it will write, if that is known, for the error.

    Raises:
        StorageError: if the disk refuses; the temporary file is removed, an older file at `path`
            stays as it was.
    """
    temporary = temporary_path(path)
    with storage_errors(path, size_bytes=size_bytes):
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
            with suppress(OSError):  # the error that brought us here is the one to tell
                temporary.unlink()
            raise


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    write_atomic(path, lambda file: file.write(content), size_bytes=len(content))


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
        FormatError: if the file is missing, too large, not JSON (NaN and Infinity are not) or not
            an object.
    """
    content = parse_json(read_limited(path, what=what, limit_bytes=limit_bytes), where=str(path))
    if not isinstance(content, dict):
        raise FormatError(f"{path}: expected {what}, a JSON object, got {type(content).__name__}")
    return content


def read_limited(path: Path, /, *, what: str, limit_bytes: int) -> bytes:
    """Return the bytes of a regular file of at most `limit_bytes`; `what` it is, for the error.

    Raises:
        FormatError: if it is missing, a folder, a pipe or a device, too large or unreadable.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe would hang us, /dev/zero never end
            raise FormatError(f"{path}: not a regular file; expected {what}")
        size = path.stat().st_size
        if size > limit_bytes:
            raise FormatError(f"{path}: {size} bytes is too large for {what}")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise FormatError(f"{path}: not found; expected {what}") from error
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: cannot be read as {what} ({error})") from error


def parse_json(content: bytes, /, *, where: str) -> Any:
    """Return the JSON value that `content` holds.

    Raises:
        FormatError: if it is not JSON; NaN and Infinity are not.
    """
    try:
        return json.loads(content.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: cannot be read as JSON ({error})") from error


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number of JSON")


def plain_name(name: object, /, *, where: str) -> str:
    """Return a file name from a stranger's table if it stays inside its folder.

    Raises:
        FormatError: if it is a path, hidden, longer than 128 or of other than A-Z a-z 0-9 . _ -
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise FormatError(f"{where}: file name {name!r:.60} must be a plain name in this folder")
    return name


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `folder` when the block ends well.

    An existing `folder` is replaced. Every file inside is fsynced first. POSIX cannot exchange two
    folders in one call, so the old one steps aside for a moment; a kill in that moment leaves
    both, whole, under temporary names, and `settle_folder` finishes the exchange.
    """
    temporary = temporary_path(folder)
    old = folder.with_name(f"tmp-old-{_process_number()}-{folder.name}")
    with storage_errors(folder):
        settle_folder(folder)
        try:
            # A killed process may have had our number (containers count from 1 every time).
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary
            _fsync_tree(temporary)
            failpoint("folder-fsync")
            if folder.exists():
                os.replace(folder, old)
                failpoint("folder-aside")
            os.replace(temporary, folder)
            failpoint("folder-rename")
            fsync_folder(folder.parent)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            if old.exists() and not folder.exists():
                os.replace(old, folder)
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _fsync_tree(folder: Path) -> None:
    """Make every file in a folder, and every name, durable."""
    for path in (*sorted(folder.rglob("*")), folder):
        if path.is_dir():
            fsync_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())


def settle_folder(folder: Path, /) -> None:
    """Finish what a kill left between the two renames of `atomic_folder`, if it did.

    The sign of that moment: no `folder`, but the old one and the new one of the same process. The
    new one was durable before the old one stepped aside, so it takes the place.
    """
    if folder.exists() or not folder.parent.is_dir():
        return
    for old in folder.parent.glob("tmp-old-*"):
        number, _, name = old.name.removeprefix("tmp-old-").partition("-")
        new = folder.with_name(f"tmp-{number}-{name}")
        if name == folder.name and new.is_dir():
            with storage_errors(folder):
                os.replace(new, folder)
            return


def settle_folders(parent: Path, /) -> None:
    """Call `settle_folder` for every folder of `parent` that a kill may have cut in two."""
    for old in sorted(parent.glob("tmp-old-*")):
        settle_folder(parent / old.name.removeprefix("tmp-old-").partition("-")[2])


def remove_leftovers(
    folder: Path, /, *, of: Collection[str] | None = None, shared: bool = False
) -> None:
    """Delete what killed processes left in a folder: tmp-NUMBER-NAME, nothing else.

    Args:
        folder: where to look.
        of: only what was to become one of these names. Without, everything goes, and folders that
            a kill cut in two are settled: for the one process that writes there, since what
            another is writing just now would go too.
        shared: others may be writing the same names just now: only what is left of processes of
            this machine that are gone.
    """
    if of is None:
        settle_folders(folder)
    for leftover in folder.glob("tmp-*"):
        parts = _LEFTOVER.fullmatch(leftover.name)
        if parts is None or (of is not None and parts["name"] not in of):
            continue
        if shared and not _is_gone(parts["number"]):
            continue
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            with suppress(OSError):
                leftover.unlink()


def _is_gone(number: str) -> bool:
    """Return whether a temporary's number is of a process of this machine that has ended."""
    machine, pid = number[:-_PID_DIGITS], number[-_PID_DIGITS:]
    if machine != str(_machine_number()):
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:  # it lives, and is another user's
        return False
    return False
