"""TOML and JSON tables -> frozen dataclasses, and back; unknown keys are refused by name.

    {"dim": 192, ...}  -> build(DynamicsConfig, ...) -> DynamicsConfig(dim=192, ...)

One strict reader for presets, model configs and manifests' rows. Order of precedence: the default
in the dataclass < a preset < a file < a flag. No default stands anywhere else.
"""

import difflib
import tomllib
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .errors import ConfigError, FormatError, WorldloomError
from .files import read_limited

_MAX_TOML_BYTES = 1 << 20

Config = TypeVar("Config")


@lru_cache(maxsize=256)
def _fields(cls: type) -> dict[str, tuple[Any, bool]]:
    """Return name -> (type, is required) of a dataclass."""
    hints = get_type_hints(cls)
    return {
        f.name: (hints[f.name], f.default is MISSING and f.default_factory is MISSING)
        for f in fields(cls)
        if f.init
    }


def nearest(word: str, words: list[str], /) -> str:
    """Return "; did you mean 'x'?" for the nearest of `words`, or a list of them all."""
    # 60: matching is quadratic in the length, and no name of ours is as long.
    close = difflib.get_close_matches(word[:60], words, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(words)}"


def build(
    cls: type[Config],
    data: Any,
    /,
    *,
    where: str,
    error: type[WorldloomError] = ConfigError,
) -> Config:
    """Build a dataclass from a table of plain values, strictly.

    Args:
        cls: the dataclass.
        data: the table; its keys must be fields, and every required field must be there.
        where: the file and table, for errors: "demo.toml [record]".
        error: what to raise; FormatError for files that a program wrote.

    Raises:
        ConfigError: (or `error`) naming the key that is unknown, missing or of the wrong type.
    """
    values = _read_table(cls, data, where, error, whole=True)
    try:
        return cls(**values)
    except (ValueError, WorldloomError) as reason:  # what the dataclass itself refuses
        raise error(f"{where}: {reason}") from reason


def partial(cls: type, data: Any, /, *, where: str) -> dict[str, Any]:
    """Return the fields that a table sets, checked and converted; others may be missing.

    `build(cls, {**partial(cls, preset), **partial(cls, file), **flags})` is how the order of
    precedence is kept.

    Raises:
        ConfigError: naming the key that is unknown or of the wrong type.
    """
    return _read_table(cls, data, where, ConfigError, whole=False)


def _read_table(
    cls: type, data: Any, where: str, error: type[WorldloomError], *, whole: bool
) -> dict[str, Any]:
    """Return the fields that a table sets, as the types they want."""
    if not isinstance(data, Mapping):
        raise error(f"{where}: expected a table, got {type(data).__name__}")
    known = _fields(cls)
    for key in data:
        if key not in known:
            raise error(f"{where}: unknown key {key!r:.60}{nearest(str(key), list(known))}")
    missing = [name for name, (_, required) in known.items() if required and name not in data]
    if whole and missing:
        raise error(f"{where}: key {missing[0]!r} is missing")
    return {
        key: _convert(known[key][0], value, f"{where}: {key}", error) for key, value in data.items()
    }


def _convert(hint: Any, value: Any, where: str, error: type[WorldloomError]) -> Any:
    """Return `value` as the type a field wants, or refuse it."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(args, value, where, error)
    if origin is Literal:
        if not any(value == arg and type(value) is type(arg) for arg in args):
            raise error(f"{where} is {value!r:.60}{nearest(str(value), [str(a) for a in args])}")
        return value
    if origin is tuple:
        if args == (Path, ...) and isinstance(value, str | Path):
            value = [value]  # one path is a list of one: most need no more
        if not isinstance(value, list | tuple):
            raise error(f"{where} must be a list, got {value!r:.60}")
        kinds = [args[0]] * len(value) if args[1:] == (Ellipsis,) else list(args)
        if len(kinds) != len(value):
            raise error(f"{where} must have {len(kinds)} values, got {len(value)}")
        return tuple(_convert(k, v, where, error) for k, v in zip(kinds, value, strict=True))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise error(f"{where} must be a table, got {value!r:.60}")
        return dict(value)
    if is_dataclass(hint) and isinstance(hint, type):
        return value if isinstance(value, hint) else build(hint, value, where=where, error=error)
    if hint is Any:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError as reason:
            raise error(f"{where} must be float, got an integer beyond it") from reason
    if hint is Path and isinstance(value, str):
        return Path(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise error(f"{where} must be {hint.__name__}, got {value!r:.60}")
    return value


def _convert_union(
    hints: tuple[Any, ...], value: Any, where: str, error: type[WorldloomError]
) -> Any:
    """Return `value` as the first of several types that takes it."""
    if value is None and type(None) in hints:
        return None
    hints = tuple(hint for hint in hints if hint is not type(None))
    for hint in hints[:-1]:
        try:
            return _convert(hint, value, where, error)
        except error:
            continue
    return _convert(hints[-1], value, where, error)


def to_plain(value: Any, /) -> Any:
    """Return a config as plain values for TOML or JSON; a field that is None is left out."""
    if is_dataclass(value) and not isinstance(value, type):
        plain = {f.name: to_plain(getattr(value, f.name)) for f in fields(value)}
        return {key: inner for key, inner in plain.items() if inner is not None}
    if isinstance(value, Mapping):
        return {str(key): to_plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


def read_toml(path: Path, /) -> dict[str, Any]:
    """Return the tables of a TOML file.

    Raises:
        ConfigError: if it is missing, larger than a person writes, or not TOML.
    """
    try:
        content = read_limited(path, what="a TOML file", limit_bytes=_MAX_TOML_BYTES)
        return tomllib.loads(content.decode("utf-8"))
    except FormatError as error:
        raise ConfigError(str(error)) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not readable as TOML ({error})") from error


def describe_difference(saved: object, wanted: object, /) -> str:
    """Return the settings in which two tables differ: "dim 192 then, 256 now"."""
    if isinstance(saved, dict) and isinstance(wanted, dict):
        keys = sorted(set(saved) | set(wanted))
        parts = [
            (key, describe_difference(saved.get(key), wanted.get(key)))
            for key in keys
            if saved.get(key) != wanted.get(key)
        ]
        return ", ".join(f"{key} {text}" for key, text in parts)
    return f"{saved!r} then, {wanted!r} now"
