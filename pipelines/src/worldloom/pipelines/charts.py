"""Series of numbers -> line charts.

    lines -> chart_svg -> an <svg> for a page, in the page's colours and font, light and dark
    lines -> chart_png -> bytes of a PNG on white, for anywhere else

SVG text stays text: it can be searched, scaled and read aloud.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK, QUIET = "#000001", "#000002"
COLOURS = ("#000011", "#000012", "#000013", "#000014")
"""Placeholders: `chart_svg` replaces them by variables of the page, `chart_png` by real colours."""

_VARIABLES = {
    INK: "var(--ink)",
    QUIET: "var(--line)",
    **{colour: f"var(--series-{number})" for number, colour in enumerate(COLOURS, start=1)},
}
ON_WHITE = dict(
    zip((INK, QUIET, *COLOURS),
        ("#23272e", "#c9ccd1", "#0b7a6f", "#b4491f", "#6b5bb5", "#8a8f98"), strict=True)
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One curve of a chart."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False
    """For bounds and baselines, which are not what the chart is about."""


def chart_svg(
    lines: Sequence[Line], /, *, x_label: str, y_label: str, describe: str, width: float = 5.0
) -> str:
    """Return an <svg> element that takes colours and font from the page around it.

    Args:
        lines: at most four, each with at least one point.
        x_label: with the unit.
        y_label: with the unit.
        describe: what the chart shows, for those who cannot see it; HTML-safe text.
        width: in inches of 72 px, which sets how large the text looks.
    """
    # The salt makes the ids inside unlike those of the page's other charts, and alike in every run.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": describe}):
        file = io.StringIO()
        _figure(lines, x_label, y_label, width, {}).savefig(
            file, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    # Matplotlib names every group; on one page with other charts the names would stand twice.
    referred = set(re.findall(r"#([^\")]+)[\")]", svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in referred else "", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    for placeholder, variable in _VARIABLES.items():
        svg = svg.replace(placeholder, variable)
    return svg.replace("<svg", f'<svg role="img" aria-label="{describe}"', 1)


def chart_png(lines: Sequence[Line], /, *, x_label: str, y_label: str, width: float = 5.0) -> bytes:
    """Return the bytes of a PNG file: the same chart, dark on white."""
    file = io.BytesIO()
    figure = _figure(lines, x_label, y_label, width, ON_WHITE)
    figure.savefig(file, format="png", dpi=144, facecolor="white", metadata={"Software": None})
    return file.getvalue()


def _figure(
    lines: Sequence[Line], x_label: str, y_label: str, width: float, colours: dict[str, str]
) -> Figure:
    """Return the drawn figure; `colours` replaces placeholders where the format cannot later."""
    if not lines or len(lines) > len(COLOURS) or any(len(line.x) == 0 for line in lines):
        raise ValueError(f"a chart takes 1 to {len(COLOURS)} lines, each with a point or more")
    ink, quiet = colours.get(INK, INK), colours.get(QUIET, QUIET)
    figure = Figure(figsize=(width, width * 0.55), layout="constrained")
    axes = figure.add_subplot()
    for line, placeholder in zip(lines, COLOURS, strict=False):
        axes.plot(
            line.x,
            line.y,
            color=colours.get(placeholder, placeholder),
            linestyle=(0, (4, 3)) if line.dashed else "-",
            linewidth=1.4 if line.dashed else 2.0,
            marker="o" if len(line.x) < 3 else "",
            label=line.name,
        )
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(quiet)
    axes.grid(visible=True, axis="y", color=quiet, linewidth=0.6, alpha=0.6)
    axes.tick_params(colors=ink, labelsize=9, length=0, pad=5)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel(x_label, color=ink, fontsize=9.5)
    axes.set_ylabel(y_label, color=ink, fontsize=9.5)
    axes.legend(frameon=False, fontsize=9, labelcolor=ink, ncols=2, loc="lower left",
                bbox_to_anchor=(-0.01, 1.0), borderaxespad=0.2, handlelength=1.8)  # fmt: skip
    return figure
