"""Files and arrays of actions, in whatever columns -> rows of numbers, words or sets of keys.

    NAME.jsonl, NAME.csv, NAME.npz  ->  read_cells   ->  Cells
    an array [N] or [N, axes]       ->  array_cells  ->  Cells

Which columns hold the actions is guessed only where there is one way to read the file; otherwise
the refusal lists what there is and the flag that decides. action_survey.py says what they mean.
"""

import csv
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from worldloom.common import ActionArray, ConfigError, FormatError

from ..checks import require_file
from .arrays import open_npz, read_member
from .text_lines import bounded_lines

Cell = bool | int | float | str | tuple[str, ...]

_MAX_ROWS = 1 << 22
"""19 hours at 60 a second; a file of one digit a line must not fill the memory."""
_MAX_LINE = 1 << 16
_MAX_WORD = 100
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
# Columns that say when, not what; and what came of it.
_NOT_ACTIONS = {
    "", "frame", "index", "step", "t", "time", "timestamp", "tick", "episode", "reward", "rewards",
    "done", "terminated", "truncated",
}  # fmt: skip
_ACTIONS = ("action", "actions", "keys", "buttons")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cells:
    """What one file says: named columns, one row a step."""

    where: str
    fields: tuple[str, ...]
    """What was read: columns, fields or arrays, as `--actions.columns` names them."""
    columns: tuple[str, ...]
    """What came out: a field that holds a list, or an array [N, axes], is several."""
    rows: list[tuple[Cell, ...]]


def read_cells(path: Path, columns: Sequence[str], /) -> Cells:
    """Return the columns of a file that hold its actions; found, if none are given.

    Raises:
        FormatError: naming the file and the line that cannot be read.
        ConfigError: if the columns are not given and there is more than one way.
    """
    require_file(path, expected="actions")
    reader = {".jsonl": _read_jsonl, ".csv": _read_csv, ".npz": _read_npz}[path.suffix.lower()]
    try:
        return reader(path, tuple(columns))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FormatError(f"{path}: cannot be read as actions ({error})") from error


def array_cells(array: ActionArray, name: str, /, *, where: str) -> Cells:
    """Return the rows of an array of actions, [N] or [N, axes]."""
    if array.ndim not in (1, 2) or len(array) > _MAX_ROWS:
        raise FormatError(f"{where}: shape {array.shape}, must be [N] or [N, axes]")
    table = array.reshape(len(array), -1) if array.size else array.reshape(len(array), 1)
    if table.shape[1] > 256:
        raise FormatError(f"{where}: {table.shape[1]} axes, at most 256")
    single = table.shape[1] == 1
    columns = (name,) if single else tuple(f"{name}{i}" for i in range(table.shape[1]))
    if table.dtype.kind == "f" and not np.isfinite(table).all():
        row = int(np.argwhere(~np.isfinite(table))[0][0])
        raise FormatError(f"{where}: row {row} is not finite")
    rows = [tuple(row) for row in table.tolist()]
    return Cells(where=where, fields=(name,), columns=columns, rows=rows)


def _read_jsonl(path: Path, columns: tuple[str, ...]) -> Cells:
    """Read one JSON value a line: an object with fields, or the action itself."""
    rows: list[tuple[Cell, ...]] = []
    names: tuple[str, ...] = ()
    lines = bounded_lines(path, expected="actions", max_line_bytes=_MAX_LINE)
    for where, line in lines:
        if len(rows) == _MAX_ROWS:
            raise FormatError(f"{where}: more than {_MAX_ROWS} lines")
        if not line.strip():
            if next(lines, None) is not None:
                raise FormatError(f"{where}: is empty")
            break
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{where}: cannot be read as JSON ({error})") from error
        fields = value if isinstance(value, dict) else {"action": value}
        if not rows:
            columns = columns or _found_columns(list(fields), where=str(path))
        missing = [name for name in columns if name not in fields]
        if missing:
            raise _no_column(where, missing[0], list(fields))
        named, row = _spread(columns, [fields[name] for name in columns], where)
        if rows and len(row) != len(names):
            raise FormatError(f"{where}: {len(row)} values, {len(names)} in the lines before")
        names = named if not rows else names
        rows.append(row)
    read = columns or ("action",)
    return Cells(where=str(path), fields=read, columns=names or read, rows=rows)


def _spread(
    columns: tuple[str, ...], values: list[Any], where: str
) -> tuple[tuple[str, ...], tuple[Cell, ...]]:
    """Return names and cells of some fields; a list of numbers is as many columns."""
    if len(values) == 1 and isinstance(values[0], list):
        (inner,) = values
        if all(isinstance(item, str) for item in inner):
            # An empty list is a step without keys.
            return columns, (tuple(sys.intern(_word(item, where)) for item in inner),)
        return tuple(f"{columns[0]}{i}" for i in range(len(inner))), tuple(
            _cell(item, where) for item in inner
        )
    return columns, tuple(_cell(value, where) for value in values)


def _cell(value: Any, where: str) -> Cell:
    """Return a number, a truth or a word."""
    if isinstance(value, str):
        return sys.intern(_word(value, where))
    if isinstance(value, bool):
        return value
    if isinstance(value, int) and abs(value) < 1 << 62:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise FormatError(f"{where}: {value!r:.60} is no number, word or list of keys")


def _word(value: str, where: str) -> str:
    if len(value) > _MAX_WORD:
        raise FormatError(f"{where}: a word of {len(value)} characters, at most {_MAX_WORD}")
    return value


def _read_csv(path: Path, columns: tuple[str, ...]) -> Cells:
    """Read a table whose first line names its columns."""
    rows: list[tuple[Cell, ...]] = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(_short_lines(file, path))
        header = [name.strip() for name in next(reader, [])]
        if not header:
            raise FormatError(f"{path}: is empty; its first line names the columns")
        columns = columns or _found_columns(header, where=str(path))
        for name in columns:
            if header.count(name) != 1:
                raise _no_column(str(path), name, header)
        places = [header.index(name) for name in columns]
        for cells in reader:
            if not cells:
                continue
            where = f"{path}: line {reader.line_num}"
            if len(cells) != len(header) or len(rows) == _MAX_ROWS:
                raise FormatError(
                    f"{where}: {len(cells)} values under {len(header)} columns, or too many lines"
                )
            rows.append(tuple(_parsed(cells[place].strip(), where) for place in places))
    return Cells(where=str(path), fields=columns, columns=columns, rows=rows)


def _short_lines(file: Any, path: Path) -> Iterator[str]:
    while line := file.readline(_MAX_LINE + 1):
        if len(line) > _MAX_LINE:
            raise FormatError(f"{path}: a line of more than {_MAX_LINE} characters")
        yield line


def _parsed(text: str, where: str) -> Cell:
    """Return what a cell of a csv writes."""
    if _INTEGER.fullmatch(text):
        return int(text)
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        number = float(text)
    except ValueError:
        return sys.intern(_word(text, where))
    return _cell(number, where)


def _read_npz(path: Path, columns: tuple[str, ...]) -> Cells:
    """Read one array, [N] or [N, axes], or several of [N]."""
    with open_npz(path) as archive:
        there = [name.removesuffix(".npy") for name in archive.namelist()]
        columns = columns or _found_columns(there, where=str(path))
        for name in columns:
            if there.count(name) != 1:
                raise _no_column(str(path), name, there)
        arrays = [read_member(archive, name, where=f"{path}: {name}") for name in columns]
    if len(columns) == 1:
        return array_cells(arrays[0], columns[0], where=str(path))
    if any(array.shape != (len(arrays[0]),) for array in arrays if array.ndim) or not all(
        array.ndim for array in arrays
    ):
        raise FormatError(f"{path}: {', '.join(columns)} must be [N] each, of the same N")
    parts = [array_cells(a, c, where=str(path)) for a, c in zip(arrays, columns, strict=True)]
    rows = [tuple(cell for (cell,) in row) for row in zip(*(p.rows for p in parts), strict=True)]
    return Cells(where=str(path), fields=columns, columns=columns, rows=rows)


def _found_columns(names: list[str], *, where: str) -> tuple[str, ...]:
    """Return the one column that can hold the actions."""
    for name in _ACTIONS:
        if names.count(name) == 1:
            return (name,)
    left = [name for name in names if name.strip().lower() not in _NOT_ACTIONS]
    if len(left) == 1:
        return (left[0],)
    raise ConfigError(
        f"{where}: which of its columns are the actions? Say --actions.columns; there are "
        f"{', '.join(names[:30]) or 'none'}"
    )


def _no_column(where: str, name: str, names: list[str]) -> FormatError:
    return FormatError(
        f"{where}: column {name!r:.60} stands there {names.count(name)} times, must be once; there "
        f"are {', '.join(names[:30]) or 'none'}"
    )
