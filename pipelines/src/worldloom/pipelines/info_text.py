"""A description -> text for people: a title, then aligned lines, tables indented under their names.

    {"kind": "episodes", "path": ..., "num_frames": 1200, ...}  ->  render  ->  text

`worldloom info --json` prints the same description for programs.
"""

from collections.abc import Mapping, Sequence
from typing import Any


def render(about: Mapping[str, Any], /) -> str:
    """Return a description as aligned text, tables indented under their names."""
    title = f"{about['path']}: {_TITLES[about['kind']]}"
    rest = {key: value for key, value in about.items() if key not in ("kind", "path")}
    return "\n".join([title, "", *_lines(rest, "  ")])


_TITLES = {
    "episodes": "a folder of episodes",
    "shards": "token shards",
    "tokenizer": "a tokenizer's model directory",
    "dynamics": "a dynamics model's directory",
    "checkpoint": "a checkpoint",
    "run": "a run directory",
    "demo": "a demo's folder",
    "evaluation": "an evaluation",
    "generated": "generated video",
    "session": "a play session",
    "starts": "video generated from several starts",
}


def _lines(table: Mapping[str, Any], indent: str) -> list[str]:
    """Return one line an entry, values in one column; larger tables follow, further in."""
    flat = {key: text for key, value in table.items() if (text := _value(key, value)) is not None}
    width = max((len(_label(key)) for key, text in flat.items() if text), default=0)
    lines = []
    for key, value in table.items():
        if key == "histogram":
            lines += _histogram(value, table["steps"], indent)
        elif key not in flat:
            lines += [f"{indent}{_label(key)}", *_lines(value, indent + "  ")]
        elif flat[key]:
            lines.append(f"{indent}{_label(key):<{width}}  {flat[key]}")
    return lines


def _label(key: str) -> str:
    for ending in ("_bytes", "_db"):
        key = key.removesuffix(ending)
    return key.removeprefix("num_").replace("_", " ")


def _value(key: str, value: Any) -> str | None:
    """Return a value as a person reads it: empty if it need not be said, None if it needs lines."""
    if key == "histogram":
        return None
    if key == "by_rank":
        return _bars(value)
    if isinstance(value, Mapping):
        if key == "most_frequent":
            return ", ".join(f"{code} {share:.1%}" for code, share in value.items())
        if key == "files":
            return ", ".join(f"{name} {format_bytes(size)}" for name, size in value.items())
        small = len(value) <= 3 and not any(isinstance(v, Mapping | list) for v in value.values())
        inner = [f"{_label(k)} {_value(k, v)}" for k, v in value.items()] if small else []
        return ", ".join(inner) if small else None
    if isinstance(value, list):
        share = key.endswith(("_fraction", "_rate"))
        return ", ".join(
            f"{v:.1%}" if share else f"{v:.4g}" if isinstance(v, float) else str(v) for v in value
        )
    if value is None or isinstance(value, bool):
        return {None: "", False: "no", True: "yes"}[value]
    if isinstance(value, str):
        return value
    if key.endswith("_bytes"):
        return format_bytes(value)
    if key.endswith(("_fraction", "_rate")):
        return f"{value:.1%}"
    if key == "bytes_per_token":
        return f"{value:.4g}"
    if key.endswith("_db"):
        return f"{value:.2f} dB"
    if key == "seed":
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"


def format_bytes(size: float, /) -> str:
    """Return a size as a person reads it: "1.234 MB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.4g} {unit}"
        size /= 1000
    return f"{size:.4g} TB"


def _histogram(counts: Mapping[str, Any], steps: int, indent: str) -> list[str]:
    """Return a bar an action, with its share of the steps, or a row of small bars an axis."""
    width = max((len(name) for name in counts), default=0)
    lines = [f"{indent}histogram"] if counts else []
    most = max([1, *(value for value in counts.values() if isinstance(value, int))])
    for name, value in counts.items():
        if isinstance(value, list):
            lines.append(f"{indent}  {name:<{width}}  {_bars(value)}")
        else:
            bar = "█" * round(24 * value / most)
            lines.append(
                f"{indent}  {name:<{width}}  {value:>9,}  {value / max(1, steps):>6.1%}  {bar}"
            )
    return lines


def _bars(values: Sequence[float]) -> str:
    """Return a row of small bars, the highest for the greatest value."""
    top = max(values, default=0) or 1
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * value / top))] for value in values)
