"""Rows of numbers, words or sets of keys -> an ActionSpec, and raw actions of it.

    Cells of every file  ->  Survey.look, .spec  ->  ActionSpec
    Cells, ActionSpec    ->  to_raw              ->  raw actions, a row each
    raw actions          ->  align_rows          ->  the T - 1 between the frames

What the actions are is guessed only where the values leave no doubt; otherwise the refusal says
which flag decides.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from worldloom.common import ActionArray, ActionSpec, ConfigError, FormatError

from ..ingest_config import ActionFileConfig, ActionRows, FileActions
from .action_files import Cell, Cells

_MAX_NAMES = 4096


class Survey:
    """What all files of a folder have in common: it looks at each, and then decides the spec."""

    def __init__(self, settings: ActionFileConfig) -> None:
        self._settings = settings
        self._first: Cells | None = None
        self._types: set[type] = set()
        self._words: set[str] = set()
        self._low: list[float] = []
        self._high: list[float] = []

    @property
    def fields(self) -> tuple[str, ...]:
        """What to read of every file: what was read of the first."""
        return self._first.fields if self._first is not None else ()

    @property
    def complete(self) -> bool:
        """Whether the flags and the first file are enough, so that no other file matters."""
        given = self._settings
        enough = {
            "discrete": bool(given.names),
            "keys": bool(given.names),
            "multi_discrete": bool(given.sizes),
            "continuous": bool(given.low and given.high),
        }
        return self._first is not None and given.kind is not None and enough[given.kind]

    def look(self, cells: Cells) -> None:
        """Take one more file into account; one without rows says nothing."""
        if not cells.rows:
            return
        if self._first is None:
            self._first = replace(cells, rows=[])
        elif len(cells.columns) != len(self._first.columns):
            return  # it is refused, and named, when it is read
        for values in zip(*cells.rows, strict=True):
            self._types |= set(map(type, values))
        for row in cells.rows:
            for cell in row:
                if isinstance(cell, str):
                    self._words.add(cell)
                elif isinstance(cell, tuple):
                    self._words.update(cell)
        if self._types <= {bool, int, float}:
            columns: list[Any] = list(zip(*cells.rows, strict=True))
            low, high = [min(c) for c in columns], [max(c) for c in columns]
            self._low = list(map(min, self._low, low)) if self._low else low
            self._high = list(map(max, self._high, high)) if self._high else high

    def spec(self) -> ActionSpec:
        """Return the spec of all the files.

        Raises:
            ConfigError: if the values leave open what they are, naming the flag that says it.
            FormatError: if there was no file that could be read.
        """
        if self._first is None:
            raise FormatError("no file of actions has a row; remove them, or --actions.format none")
        given, columns = self._settings, self._first.columns
        try:
            match given.kind or self._kind():
                case "discrete":
                    return ActionSpec.discrete(given.names or self._value_names())
                case "keys":
                    return ActionSpec.keys(given.names or self._key_names())
                case "multi_discrete":
                    sizes = given.sizes or [int(value) + 1 for value in self._high]
                    return ActionSpec.multi_discrete(sizes, names=given.names or columns)
                case "continuous":
                    return self._continuous(given, columns)
        except FormatError as error:
            raise ConfigError(
                f"{self._first.where}: columns {', '.join(columns)} make no actions: {error}"
            ) from error

    def _kind(self) -> FileActions:
        """Return the only kind that the values can be."""
        assert self._first is not None
        columns, where = self._first.columns, self._first.where
        if self._settings.low or self._settings.high or float in self._types:
            return "continuous"
        if self._settings.sizes:
            return "multi_discrete"
        if self._types <= {bool} or self._types == {tuple}:
            return "keys"
        if len(columns) == 1:
            return "discrete"
        raise ConfigError(
            f"{where}: columns {', '.join(columns)} hold integers, which may be keys or choices; "
            "say --actions.kind keys, or --actions.kind multi_discrete"
        )

    def _value_names(self) -> list[str]:
        """Return the names of the values of a discrete action."""
        if str in self._types:
            return self._bounded(sorted(self._words))
        top = int(self._high[0]) if self._high else 0
        return self._bounded([str(value) for value in range(min(top, _MAX_NAMES) + 1)])

    def _key_names(self) -> Sequence[str]:
        assert self._first is not None
        if self._types & {tuple, str}:
            keys = {key for word in self._words for key in word.split("+")} - {"", "none"}
            return self._bounded(sorted(keys))
        return self._first.columns

    def _bounded(self, names: list[str]) -> list[str]:
        if len(names) > _MAX_NAMES:
            raise FormatError(
                f"more than {_MAX_NAMES} different ones; choose other --actions.columns, or give "
                "--actions.names"
            )
        return names

    def _continuous(self, given: ActionFileConfig, columns: Sequence[str]) -> ActionSpec:
        assert self._first is not None
        count = len(columns)
        for flag, values in (("low", given.low), ("high", given.high)):
            if len(values) not in (1, count):
                found = ", ".join(
                    f"{name} {low:g} to {high:g}"
                    for name, low, high in zip(columns, self._low, self._high, strict=False)
                )
                raise ConfigError(
                    f"{self._first.where}: its actions are numbers, so say between which bounds "
                    f"their bins lie: --actions.low and --actions.high, with 1 or {count} values "
                    f"each (--actions.{flag} has {len(values)}); found are {found or 'none'}"
                )
        low, high = (list(v) * (count if len(v) == 1 else 1) for v in (given.low, given.high))
        return ActionSpec.continuous(
            low,
            high,
            names=given.names or columns,
            bins=given.bins,
            mu_law=[given.mu_law] * count,
        )


def to_raw(cells: Cells, spec: ActionSpec, /) -> ActionArray:
    """Return the raw actions of every row.

    Raises:
        FormatError: naming the row that is none of the spec's actions.
    """
    where, rows = cells.where, cells.rows
    width = max(1, spec.raw_width)
    if spec.kind == "keys" and len(cells.columns) == 1 and not _all_numbers(rows):
        raw: ActionArray = np.zeros((len(rows), width), np.int64)
        number = {name: i for i, name in enumerate(spec.names)}
        for index, (cell,) in enumerate(rows):
            for key in _pressed(cell):
                if key not in number:
                    raise FormatError(
                        f"{where}: row {index} presses {key!r:.60}, which is none of "
                        f"{', '.join(spec.names[:20])}"
                    )
                raw[index, number[key]] = 1
    elif len(cells.columns) != width:
        raise FormatError(
            f"{where}: {len(cells.columns)} columns of actions, must be {width} as in the others"
        )
    elif spec.kind == "discrete":
        raw = np.asarray([_value(row[0], spec, where, i) for i, row in enumerate(rows)], np.int64)
    else:
        whole = spec.kind != "continuous"
        if not _all_numbers(rows) or (whole and any(isinstance(c, float) for r in rows for c in r)):
            wanted = "integers" if whole else "numbers"
            raise FormatError(
                f"{where}: {spec.kind} actions are {wanted}, and not all of these are"
            )
        raw = np.asarray(rows, np.int64 if whole else np.float32).reshape(len(rows), width)
    spec.encode(raw, where=where)
    return raw


def _all_numbers(rows: list[tuple[Cell, ...]]) -> bool:
    return all(isinstance(cell, bool | int | float) for row in rows for cell in row)


def _pressed(cell: Cell) -> Iterator[str]:
    """Yield the keys that a cell names: a list of them, or words joined by "+"."""
    keys = cell if isinstance(cell, tuple) else str(cell).split("+")
    return (key for key in keys if key not in ("", "none"))


def _value(cell: Cell, spec: ActionSpec, where: str, index: int) -> int:
    """Return the number of a discrete action, which may be written by its name."""
    if isinstance(cell, str):
        if cell in spec.names:
            return spec.names.index(cell)
    elif isinstance(cell, int):
        return cell
    raise FormatError(
        f"{where}: row {index} has {cell!r:.60}, which is none of {', '.join(spec.names[:20])}"
    )


def align_rows(
    rows: ActionArray, num_frames: int, alignment: ActionRows, /, *, where: str
) -> ActionArray:
    """Return the T - 1 rows that lead from frame to frame, of the T or T - 1 that there are.

    Where row i leads on from frame i, the T-th leads nowhere; where row i led to frame i, the
    first led to the first frame, which nothing precedes. Without that row there are T - 1.

    Raises:
        FormatError: if there is another number of rows.
    """
    if len(rows) == num_frames - 1:
        return rows
    if len(rows) == num_frames:
        return rows[:-1] if alignment == "next" else rows[1:]
    which = "last" if alignment == "next" else "first"
    raise FormatError(
        f"{where}: {len(rows)} rows for {num_frames} frames, must be {num_frames - 1} or "
        f"{num_frames}: one a frame, with or without the {which}"
    )


def actions_between(
    cells: Cells | None, spec: ActionSpec, num_frames: int, /, *, alignment: ActionRows
) -> ActionArray | None:
    """Return the T - 1 raw actions between the frames; None where nobody knows them.

    Args:
        cells: what stands in the recording's file of actions; None where there is none.
        spec: of the actions of all recordings.
        num_frames: T.
        alignment: beside which frame a row stands.

    Raises:
        FormatError: if there is another number of rows, or a value is not one of the spec's.
    """
    if cells is None:
        return np.zeros((num_frames - 1, 0), np.int64) if spec.kind == "none" else None
    return align_rows(to_raw(cells, spec), num_frames, alignment, where=cells.where)


def alignment_sentence(spec: ActionSpec, alignment: ActionRows, what: str, /) -> str:
    """Return in words how rows stand beside frames, and how that becomes our alignment."""
    if spec.kind == "none":
        return "there are no actions"
    if alignment == "next":
        return (
            f"row i of {what} leads from frame i to frame i + 1, as ours do; of as many rows as "
            "frames the last one is left out"
        )
    return (
        f"row i of {what} led to frame i, so it becomes action i - 1; of as many rows as frames "
        "the first one is left out"
    )
