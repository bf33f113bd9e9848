"""Pieces of a page that opens from disk: everything it shows is inside it.

    pieces (charts, pictures, bars, cards) -> page -> an HTML document that loads nothing

Text that comes from files is escaped by whoever hands it in, unless a docstring says otherwise.
"""

import base64
import html
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from worldloom.common import FormatError, storage_errors

from .charts import Line, chart_svg


def page(title: str, body: Iterable[str]) -> str:
    """Return the whole document."""
    style = files(__package__).joinpath("report.css").read_text("utf-8")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{html.escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<main>
{"".join(body)}
</main>
</body>
</html>
"""


def chart(
    rows: Sequence[Mapping[str, Any]],
    curves: Sequence[tuple[str, str]],
    y_label: str,
    describe: str,
) -> str:
    """Return a chart of metrics over updates, or nothing where no row has one of them."""
    lines = []
    for key, name in curves:
        points = [(row["step"], row[key]) for row in rows if _is_number(row.get(key))]
        if points:
            lines.append(Line(name=name, x=[x for x, _ in points], y=[y for _, y in points]))
    if not lines:
        return ""
    svg = chart_svg(lines, x_label="update", y_label=y_label, describe=describe)
    return f'<figure class="chart">{svg}</figure>'


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def moving(folder: Path, picture: Mapping[str, str], *, alt: str) -> str:
    """Return a GIF; who asked for less motion gets the sheet of the same frames."""
    still = _data_uri(read(folder / picture["png"]), "png")
    animated = _data_uri(read(folder / picture["gif"]), "gif")
    return (
        f'<picture><source media="(prefers-reduced-motion: reduce)" srcset="{still}">'
        f'<img src="{animated}" alt="{alt}"></picture>'
    )


def sheet(png: bytes, alt: str, caption: str) -> str:
    """Return a wide picture that scrolls sideways by itself on a narrow screen."""
    text = f"<figcaption>{caption}</figcaption>" if caption else ""
    return (
        f'<figure><div class="scroll" tabindex="0" role="region" aria-label="{alt}">'
        f'<img src="{_data_uri(png, "png")}" alt="{alt}"></div>{text}</figure>\n'
    )


def card(name: str, value: str, unit: str, aside: str) -> str:
    """Return one number to remember."""
    return (
        f'<div class="card"><dt>{name}</dt><dd>{value} <small>{unit}</small></dd>'
        f'<dd class="aside">{aside}</dd></div>\n'
    )


def bars(rows: Sequence[tuple[str, float, str]]) -> str:
    """Return horizontal bars: (name, part of the whole, text at the end)."""
    largest = max((part for _, part, _ in rows), default=0) or 1.0
    return (
        '<dl class="bars">'
        + "".join(
            f'<dt>{html.escape(name)}</dt><dd class="track" aria-hidden="true">'
            f'<span style="width:{100 * part / largest:.1f}%"></span></dd>'
            f"<dd>{text} <small>({100 * part:.0f}%)</small></dd>"
            for name, part, text in rows
        )
        + "</dl>"
    )


def read(path: Path) -> bytes:
    """Return a picture's bytes."""
    if not path.is_file():
        raise FormatError(f"{path}: not found; run `worldloom demo` again to remake it")
    with storage_errors(path):
        return path.read_bytes()


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def percent(fraction: float) -> str:
    """Return "61.5%"."""
    return f"{100 * fraction:.1f}%"


def duration(seconds: float) -> str:
    """Return "48 s" or "7 min 03 s", in HTML."""
    whole = round(seconds)
    if seconds < 90:
        return f"{seconds:.1f}&nbsp;s" if seconds < 10 else f"{whole}&nbsp;s"
    return f"{whole // 60}&nbsp;min {whole % 60:02d}&nbsp;s"
