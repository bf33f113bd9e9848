"""Promises of files.py: files appear whole or not at all, and a refusal is a sentence."""

import json
import os
import platform
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from worldloom.common import (
    FormatError,
    StorageError,
    atomic_folder,
    file_sha256,
    files,
    is_leftover,
    read_json,
    remove_leftovers,
    storage_errors,
    to_json,
    write_bytes,
    write_json,
)
from worldloom.common.files import (
    plain_name,
    settle_folder,
    settle_folders,
    temporary_path,
    write_atomic,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def small_disk() -> Iterator[None]:
    """Let files grow to 4,096 bytes only, as on a disk that is full.

    A context and not a fixture: pytest reports while fixtures stand, perhaps into a longer file.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_bytes_written_are_the_bytes_read_and_nothing_else_stays(tmp_path):
    write_bytes(tmp_path / "deep" / "file", b"\0\xff")
    assert (tmp_path / "deep" / "file").read_bytes() == b"\0\xff"
    assert names(tmp_path / "deep") == ["file"]


def test_an_error_inside_the_writing_leaves_the_old_file_and_no_temporary(tmp_path):
    write_bytes(tmp_path / "file", b"old")

    def fail(file):
        file.write(b"new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "file", fail)
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_full_disk_is_one_sentence_and_the_old_file_stays(tmp_path):
    write_bytes(tmp_path / "file", b"old")
    with pytest.raises(StorageError) as caught, small_disk():
        write_bytes(tmp_path / "file", bytes(100_000))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'file'}: File too large; ")
    assert "Make room (100000 bytes to write, " in message
    assert "bytes free" in message
    assert "\n" not in message
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_full_disk_leaves_the_old_folder_and_no_temporary(tmp_path):
    with atomic_folder(tmp_path / "model") as temporary:
        (temporary / "a").write_bytes(b"old")
    with (
        pytest.raises(StorageError, match="model"),
        small_disk(),
        atomic_folder(tmp_path / "model") as temporary,
    ):
        (temporary / "a").write_bytes(bytes(100_000))
    assert names(tmp_path) == ["model"]
    assert (tmp_path / "model" / "a").read_bytes() == b"old"


def test_a_file_where_a_folder_should_be_is_a_storage_error(tmp_path):
    write_bytes(tmp_path / "file", b"")
    with pytest.raises(StorageError, match="file"):
        write_bytes(tmp_path / "file" / "inner", b"")


def test_errors_of_the_disk_name_the_path_and_others_pass_through(tmp_path):
    with pytest.raises(StorageError, match=r"x: No such file"), storage_errors(tmp_path / "x"):
        (tmp_path / "missing").read_bytes()
    with pytest.raises(KeyError), storage_errors(tmp_path / "x"):
        raise KeyError


def test_a_folder_is_replaced_whole(tmp_path):
    for content in (b"old", b"new"):
        with atomic_folder(tmp_path / "model") as temporary:
            (temporary / "inner").mkdir()
            (temporary / "inner" / content.decode()).write_bytes(content)
    assert names(tmp_path) == ["model"]
    assert names(tmp_path / "model" / "inner") == ["new"]


def test_an_error_inside_the_block_leaves_the_old_folder(tmp_path):
    with atomic_folder(tmp_path / "model") as temporary:
        (temporary / "a").write_bytes(b"old")
    with pytest.raises(ValueError, match="b"), atomic_folder(tmp_path / "model") as temporary:
        _ = [(temporary / name).write_bytes(b"new") for name in ("a", "b\0")]
    assert names(tmp_path) == ["model"]
    assert (tmp_path / "model" / "a").read_bytes() == b"old"


def test_the_remains_of_a_killed_process_with_our_number_do_not_stop_us(tmp_path):
    """In a container every run has the same small process number."""
    ours = temporary_path(tmp_path / "model")
    for folder in (ours, tmp_path / ours.name.replace("tmp-", "tmp-old-")):
        write_bytes(folder / "stale", b"stale")
    write_bytes(tmp_path / "model" / "a", b"old")
    with atomic_folder(tmp_path / "model") as temporary:
        (temporary / "a").write_bytes(b"new")
    assert names(tmp_path) == ["model"]
    assert names(tmp_path / "model") == ["a"]
    assert (tmp_path / "model" / "a").read_bytes() == b"new"


def cut_in_two(tmp_path: Path) -> Path:
    """A folder killed between its two renames: the old and the new one, both aside."""
    write_bytes(tmp_path / "tmp-old-7-step-0001" / "a", b"old")
    write_bytes(tmp_path / "tmp-7-step-0001" / "a", b"new")
    return tmp_path / "step-0001"


@pytest.mark.parametrize(
    "mend", [settle_folder, lambda folder: settle_folders(folder.parent)], ids=["one", "all"]
)
def test_a_folder_cut_in_two_by_a_kill_is_settled_to_the_new_one(tmp_path, mend):
    folder = cut_in_two(tmp_path)
    mend(folder)
    assert (folder / "a").read_bytes() == b"new"


def test_removing_leftovers_never_removes_the_only_copy(tmp_path):
    folder = cut_in_two(tmp_path)
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["step-0001"]
    assert (folder / "a").read_bytes() == b"new"


def test_a_folder_that_a_person_removed_does_not_come_back(tmp_path):
    """A kill after the second rename leaves the old one only; it was replaced, so it is gone."""
    write_bytes(tmp_path / "tmp-old-7-model" / "a", b"old")
    settle_folder(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_leftovers_are_removed_and_nothing_else(tmp_path):
    write_bytes(tmp_path / "keep", b"")
    write_bytes(tmp_path / "tmp-1-x", b"")
    write_bytes(tmp_path / "tmp-2-folder" / "inner", b"")
    (tmp_path / "outside").mkdir()
    (tmp_path / "tmp-3-link").symlink_to(tmp_path / "outside")
    # Names a person could have given: only what `temporary_path` makes is ours to delete.
    write_bytes(tmp_path / "tmp-thesis" / "chapter", b"")
    write_bytes(tmp_path / "tmp-", b"")
    write_bytes(tmp_path / "tmp-12", b"")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["keep", "outside", "tmp-", "tmp-12", "tmp-thesis"]


def test_two_processes_that_share_a_disk_never_write_the_same_temporary_file(tmp_path, monkeypatch):
    """On two machines, or in two containers, processes may have the same number and name."""
    ours = temporary_path(tmp_path / "x").name
    assert is_leftover(ours)
    pid = os.fork()
    if pid == 0:
        (tmp_path / "child").write_text(temporary_path(tmp_path / "x").name)
        os._exit(0)
    os.waitpid(pid, 0)
    names_of = {ours, (tmp_path / "child").read_text()}
    files._machine_number.cache_clear()
    monkeypatch.setattr(platform, "node", lambda: "another machine")
    names_of.add(temporary_path(tmp_path / "x").name)
    files._machine_number.cache_clear()
    assert len(names_of) == 3
    assert all(map(is_leftover, names_of))


def test_leftovers_of_one_file_are_removed_and_those_of_others_stay(tmp_path):
    for name in ("tmp-1-a", "tmp-2-a", "tmp-1-b", "tmp-1-aa", "tmp-1-c-a", "a"):
        write_bytes(tmp_path / name, b"")
    remove_leftovers(tmp_path, of={"a"})
    assert names(tmp_path) == ["a", "tmp-1-aa", "tmp-1-b", "tmp-1-c-a"]


def test_what_others_may_be_writing_is_removed_only_when_its_process_is_gone(tmp_path, monkeypatch):
    pid = os.fork()
    if pid == 0:
        temporary_path(tmp_path / "x").write_bytes(b"killed")
        os._exit(0)
    os.waitpid(pid, 0)
    temporary_path(tmp_path / "x").write_bytes(b"alive")
    # Process 1 lives for ever; of what another machine runs we know nothing.
    number = temporary_path(tmp_path / "x").name.removeprefix("tmp-").removesuffix("-x")
    (tmp_path / f"tmp-{number[:-7]}0000001-x").write_bytes(b"another user's")
    files._machine_number.cache_clear()
    monkeypatch.setattr(platform, "node", lambda: "another machine")
    (tmp_path / temporary_path(tmp_path / "x").name.replace(number[-7:], "4194303")).touch()
    monkeypatch.undo()
    files._machine_number.cache_clear()
    before = names(tmp_path)
    assert len(before) == 4
    remove_leftovers(tmp_path, of={"x"}, shared=True)
    gone = set(before) - set(names(tmp_path))
    assert gone == {f"tmp-{number[:-7]}{pid:07d}-x"}


def test_json_is_canonical_and_round_trips(tmp_path):
    content = {"b": [1, 2.5, None, "é"], "a": {"y": True, "x": ""}}
    write_json(tmp_path / "x.json", content)
    assert read_json(tmp_path / "x.json", what="a test") == content
    assert to_json(content) == to_json(dict(reversed(content.items())))
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json({"a": float("nan")})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cannot be read as JSON"),
        (b"{", "cannot be read as JSON"),
        (b"\xff\xfe{}", "cannot be read as JSON"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "Infinity"),
        (b'{"a": ' + b"9" * 5000 + b"}", "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b"[]", "a JSON object, got list"),
        (b" " * 2000, "too large for a test"),
    ],
)
def test_a_bad_json_file_is_a_format_error_that_names_it(tmp_path, content, reason):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    limit = 1000 if content.startswith(b" ") else 1 << 20
    with pytest.raises(FormatError, match=reason) as caught:
        read_json(path, what="a test", limit_bytes=limit)
    assert str(caught.value).startswith(f"{path}: ")


def test_what_is_no_regular_file_is_refused_without_reading_it(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe", tmp_path / "zero", tmp_path):
        with pytest.raises(FormatError, match="not a regular file"):
            read_json(path, what="a test")
    with pytest.raises(FormatError, match="not found; expected a test"):
        read_json(tmp_path / "missing", what="a test")


@pytest.mark.parametrize(
    "name",
    ["../x", "/abs", "a/b", "", ".", "..", ".hidden", "a\nb", "a\0b", "é", "x" * 200, 3, None],
)
def test_a_name_that_could_leave_the_folder_is_refused(name):
    with pytest.raises(FormatError, match="where: file name"):
        plain_name(name, where="where")


def test_the_hash_is_sha256_of_the_bytes(tmp_path):
    write_bytes(tmp_path / "x", b"abc")  # FIPS 180-2, appendix B.1
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_sha256(tmp_path / "x") == expected


@pytest.mark.parametrize("failpoint", ["write", "fsync", "rename"])
def test_a_kill_while_writing_a_file_leaves_the_old_or_the_new_one(tmp_path, killed_at, failpoint):
    path = tmp_path / "x.json"
    write_json(path, {"a": "old"})
    assert killed_at(failpoint, lambda: write_json(path, {"a": "new" * 1000}))
    now = json.loads(path.read_text())
    assert now == ({"a": "new" * 1000} if failpoint == "rename" else {"a": "old"})
    write_json(path, {"a": "new" * 1000})
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["x.json"]
    assert json.loads(path.read_text()) == {"a": "new" * 1000}


@pytest.mark.parametrize("failpoint", ["folder-fsync", "folder-aside", "folder-rename"])
def test_a_kill_while_replacing_a_folder_leaves_the_old_or_the_new_one(
    tmp_path, killed_at, failpoint
):
    folder = tmp_path / "model"

    def replace(content: bytes) -> None:
        with atomic_folder(folder) as temporary:
            (temporary / "a").write_bytes(content)

    replace(b"old")
    assert killed_at(failpoint, lambda: replace(b"new"))
    assert folder.exists() == (failpoint != "folder-aside")
    settle_folder(folder)
    assert (folder / "a").read_bytes() == (b"old" if failpoint == "folder-fsync" else b"new")
    replace(b"newer")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["model"]
    assert (folder / "a").read_bytes() == b"newer"


def test_without_its_variable_a_failpoint_does_nothing(tmp_path, killed_at):
    assert not killed_at("", lambda: write_bytes(tmp_path / "x", b""))
    assert not killed_at("write:2", lambda: write_bytes(tmp_path / "x", b""))
