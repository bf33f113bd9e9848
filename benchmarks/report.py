"""What every benchmark prints: tables on stdout, the same as JSON in a file, and who measured.

rows of numbers  ->  Report  ->  stdout, FILE.json
"""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


def machine(packages: Sequence[str] = ()) -> dict[str, Any]:
    """Return what the numbers depend on besides the code; nothing that names a person or host."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", *packages)}
    found = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": versions,
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _cpu_model() -> str:
    """Return the processor's name, as far as the system tells."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def arguments(description: str) -> argparse.ArgumentParser:
    """Return a parser with what every benchmark takes."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="so small that it ends within a minute: shows that it runs, its numbers mean nothing",
    )
    return parser


class Report:
    """Tables, printed as they come and written together."""

    def __init__(self, name: str, *, quick: bool, packages: Sequence[str] = ()) -> None:
        self._data: dict[str, Any] = {
            "benchmark": name,
            "quick": quick,
            "machine": machine(packages),
            "tables": {},
        }
        here = self._data["machine"]
        versions = ", ".join(f"{name} {version}" for name, version in here["versions"].items())
        gpu = f", {here['gpu']}" if "gpu" in here else ""
        self._print(f"# {name}" + (" (quick: the numbers mean nothing)" if quick else ""))
        self._print(f"{here['cpu']}, {here['cores']} cores, {here['threads']} threads{gpu}")
        self._print(f"{here['system']}, Python {here['python']}, {versions}")

    def table(
        self, name: str, rows: Sequence[Mapping[str, Any]], /, *, settings: Mapping[str, Any]
    ) -> None:
        """Print rows of the same columns as a Markdown table, under what they were made with."""
        self.keep(name, rows, settings=settings)
        self._print(f"\n## {name}")
        self._print(", ".join(f"{key} {_text(value)}" for key, value in settings.items()) + "\n")
        columns = list(rows[0])
        cells = [columns, *[[_text(row[column]) for column in columns] for row in rows]]
        widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
        for number, line in enumerate(cells):
            self._print("| " + " | ".join(map(str.ljust, line, widths)) + " |")
            if number == 0:
                self._print("|" + "|".join("-" * (width + 2) for width in widths) + "|")

    def keep(
        self, name: str, rows: Sequence[Mapping[str, Any]], /, *, settings: Mapping[str, Any]
    ) -> None:
        """Keep a table for the file without printing it: what there is of it so far."""
        self._data["tables"][name] = {
            "settings": dict(settings),
            "rows": [dict(row) for row in rows],
        }

    def write(self, path: Path | None) -> None:
        """Write everything as JSON, if a file was asked for."""
        if path is not None:
            path.write_text(json.dumps(self._data, indent=1) + "\n")

    def _print(self, line: str) -> None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


def _text(value: Any) -> str:
    """Return a cell: three significant digits, and of several values the middle and the range."""
    if isinstance(value, Mapping):
        return f"{_text(value['median'])} ({_text(value['min'])} to {_text(value['max'])})"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return "[" + " ".join(map(_text, value)) + "]"
    return "-" if value is None else str(value)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, least and greatest of runs."""
    ranked = sorted(values)
    middle = len(ranked) // 2
    median = ranked[middle] if len(ranked) % 2 else (ranked[middle - 1] + ranked[middle]) / 2
    return {"median": median, "min": ranked[0], "max": ranked[-1]}
