"""Presets, files and flags -> one config: default < preset < file < flag, and nothing unknown.

    a config class, ["--preset", "demo", "--model.dim", "192"]  ->  parse  ->  the config

A preset (presets/NAME.toml, packaged) and a file of the person's own hold one table per command,
named as the command with underscores: [record], [train_tokenizer], [train_tokenizer.model]. Every
table, key and flag that does not exist is refused with the nearest one that does.
"""

import argparse
import ast
import difflib
import inspect
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, make_dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, TypeVar, get_type_hints

import tyro
from worldloom.common import ConfigError, build, nearest, partial, read_toml

from .commands import COMMANDS

Config = TypeVar("Config")
Table = tuple[Mapping[str, Any], str]
"""A table of a TOML file, and where it stands: "presets/demo.toml [record]"."""

PRESETS = Path(__file__).parent / "presets"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sources:
    preset: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Settings that come along with worldloom: demo, smoke, base or large, for the whole chain; to
    train dynamics, a size, too: 2m, 10m, 30m, 100m, 300m or 1b."""
    config: Annotated[Path | None, tyro.conf.arg(metavar="FILE.toml")] = None
    """Settings of yours: a TOML file with one table a command, as [train_dynamics]. It wins over
    the preset, and a flag wins over both."""


def preset_path(name: str, /) -> Path:
    """Return the file of a packaged preset.

    Raises:
        ConfigError: if there is none of that name.
    """
    known = sorted(path.stem for path in PRESETS.glob("*.toml"))
    if name not in known:
        raise ConfigError(f"--preset {name}: no such preset{nearest(name, known)}")
    return PRESETS / f"{name}.toml"


def read_settings(path: Path, /) -> dict[str, Table]:
    """Return the tables of a preset or a person's file by name, each with where it stands.

    Raises:
        ConfigError: if the file is missing, not TOML, or has a table of no command.
    """
    shown = f"presets/{path.name}" if path.parent == PRESETS else str(path)
    known = [command.table for command in COMMANDS.values()]
    tables = {}
    for name, table in read_toml(path).items():
        if name not in known:
            raise ConfigError(f"{shown}: unknown table [{name}]{nearest(name, known)}")
        tables[name] = (table, f"{shown} [{name}]")
    return tables


def parse(cls: Any, argv: Sequence[str], /, *, command: str) -> Any:
    """Return the config that a command line asks for; `--help` prints and exits.

    Args:
        cls: the command's config class. One with a field `preset` or `config` (as that of `demo`,
            which reads the tables of several commands) means those flags for itself.
        argv: what stands after the command.
        command: its name.

    Raises:
        ConfigError: naming the file, table, key or flag that is not as it should be.
        SystemExit: with 2, if a value is missing or of the wrong type; tyro has said which.
    """
    own_sources = {"preset", "config"} & {field.name for field in fields(cls)}
    parts = [(cls, "command")] + ([] if own_sources else [(_Sources, "sources")])
    tables = [] if own_sources else _tables(argv, COMMANDS[command].table)
    _refuse_unknown_flags([part for part, _ in parts], argv)
    for part, _ in parts:
        _join_help(part)
    wrapper: Any = make_dataclass(
        cls.__name__,
        # The empty name lifts both parts' fields to the top: --episodes, not --command.episodes.
        [(name, Annotated[part, tyro.conf.arg(name="")]) for part, name in parts],
    )
    defaults = [_unfinished(cls, _merge(cls, tables)), _Sources()][: len(parts)]
    filled = tyro.cli(
        wrapper,
        prog=f"worldloom {command}",
        # tyro gives an indented line (a command) a line of its own, whatever stands before it.
        description=inspect.cleandoc(cls.__doc__ or "").replace("\n\n ", "\n "),
        args=list(argv),
        default=wrapper(*defaults),
    )
    return filled.command


def stage_config(
    cls: type[Config], table: Mapping[str, Any], /, *, where: str, **overrides: Any
) -> Config:
    """Return the config of one stage, from its table and the fields that the caller fills in.

    Args:
        cls: the stage's config class.
        table: its table, and
        where: where that stands, as `read_settings` gives them.
        overrides: fields, already of their types; they win over the table.

    Raises:
        ConfigError: naming the key that is unknown, missing or of the wrong type.
    """
    values = _present(_merge(cls, [(table, where)]))
    return build(cls, {**values, **overrides}, where=where)


def _tables(argv: Sequence[str], name: str) -> list[Table]:
    """Return a command's tables of the preset and the file that the command line names."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    # A value that is missing is left for tyro to complain about, as it does for every flag.
    parser.add_argument("--preset", nargs="?")
    parser.add_argument("--config", nargs="?", type=Path)
    asked, _ = parser.parse_known_args(argv)
    paths = [preset_path(asked.preset)] if asked.preset else []
    paths += [asked.config] if asked.config else []
    tables = []
    for path in paths:
        held = read_settings(path)
        if name not in held:
            raise ConfigError(
                f"{path.name}: has no table [{name}], so it sets nothing for this command; "
                f"it has {', '.join(f'[{other}]' for other in held) or 'none'}"
            )
        tables.append(held[name])
    return tables


def _merge(cls: type, tables: Sequence[Table], base: object = None) -> dict[str, Any]:
    """Return each field's value: `base` or its default, then each table's; MISSING if none has it.

    The value of a nested config is such a dictionary again, so that a table may set one key of it.
    """
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for field in fields(cls):
        value = field.default
        if field.default_factory is not MISSING:
            value = field.default_factory()
        values[field.name] = value if base is None else getattr(base, field.name)
    nested = {name for name, hint in hints.items() if name in values and is_dataclass(hint)}
    for table, where in tables:
        flat = table
        if isinstance(table, Mapping):
            flat = {key: value for key, value in table.items() if key not in nested}
        values |= partial(cls, flat, where=where)
    for name in nested:
        inner = [(table[name], _inside(where, name)) for table, where in tables if name in table]
        held = values[name]
        values[name] = _merge(hints[name], inner, None if held is MISSING else held)
    return values


def _inside(where: str, name: str) -> str:
    """Return where a nested table stands: "demo.toml [record]" -> "demo.toml [record.model]"."""
    return f"{where.removesuffix(']')}.{name}]"


def _unfinished(cls: type, values: Mapping[str, Any]) -> Any:
    """Return an unchecked instance for tyro's defaults: flags have yet to fill in or change it."""
    hints = get_type_hints(cls)
    config: Any = object.__new__(cls)
    for name, value in values.items():
        if isinstance(value, dict) and is_dataclass(hints[name]):
            value = _unfinished(hints[name], value)
        object.__setattr__(config, name, tyro.MISSING if value is MISSING else value)
    return config


def _present(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return merged values without those that nothing has set."""
    return {
        name: _present(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if value is not MISSING
    }


def _refuse_unknown_flags(classes: Sequence[type], argv: Sequence[str]) -> None:
    """Refuse a flag that no field has, with the nearest: tyro names none if others are missing."""
    known = ["--help"] + [flag for cls in classes for flag in _flags(cls, "")]
    for word in argv:
        flag = word.partition("=")[0]
        if flag.startswith("--") and flag.replace("_", "-") not in known:
            close = difflib.get_close_matches(flag, known, n=1)
            meant = f"; did you mean {close[0]}?" if close else "; --help lists those there are"
            raise ConfigError(f"{flag}: no such flag{meant}")


def _join_help(cls: type) -> None:
    """Give the help of each field in one paragraph, for tyro to wrap to the terminal.

    tyro 1.0 keeps the line breaks of an attribute docstring whose later lines are indented, as
    they always are; the metadata's "help" comes before the docstring. Remove when it does not.
    """
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    helps = {}
    for field, after in pairwise(tree.body):  # type: ignore[attr-defined]
        match field, after:
            case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                helps[name] = " ".join(text.split())
    for field in fields(cls):
        field.metadata = MappingProxyType({**field.metadata, "help": helps.get(field.name)})
        if is_dataclass(get_type_hints(cls)[field.name]):
            _join_help(get_type_hints(cls)[field.name])


def _flags(cls: type, prefix: str) -> list[str]:
    """Return the flags of a config class and of those inside: --seed, --no-resume, --model.dim."""
    flags = []
    for name, hint in get_type_hints(cls).items():
        dashed = prefix + name.replace("_", "-")
        if is_dataclass(hint):
            flags += _flags(hint, f"{dashed}.")  # type: ignore[arg-type]
        else:
            no = f"--{prefix}no-{name.replace('_', '-')}"
            flags += [f"--{dashed}", no] if hint is bool else [f"--{dashed}"]
    return flags
