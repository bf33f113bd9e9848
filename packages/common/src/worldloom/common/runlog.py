"""What a run says: metrics.jsonl, log.txt, one line or one bar on the terminal.

    RunLog.metrics(step, loss=...)  ->  RUN/metrics.jsonl, one JSON object a line
    RunLog.say("...")               ->  RUN/log.txt and stderr
    progress(items, "encoding")     ->  a bar on a terminal, plain lines otherwise, always on stderr

stdout belongs to the command's result, so that it can be piped.
"""

import json
import math
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .config import to_plain
from .errors import ConfigError, FormatError
from .files import (
    is_leftover,
    parse_json,
    read_limited,
    remove_leftovers,
    storage_errors,
    write_bytes,
    write_json,
)

Item = TypeVar("Item")

_PACKAGES = (
    "worldloom", "worldloom-common", "worldloom-tokenizer", "worldloom-dynamics", "torch", "numpy",
    "accelerate", "x-transformers", "vector-quantize-pytorch", "webdataset", "torchvision", "av",
    "gymnasium",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """Return Python, platform and the versions of what we build on: what a result depends on."""
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "versions": versions,
    }


class RunLog:
    """The written memory of one run directory; a later run of the same command appends."""

    def __init__(self, run: Path, /, *, config: Any) -> None:
        self.run = run
        with storage_errors(run):
            _check_run(run)
            run.mkdir(parents=True, exist_ok=True)
        # A killed training may have left a whole model behind under a temporary name.
        for folder in (run, run / "samples"):
            remove_leftovers(folder)
        # First of all: the file by which a later run of the same command knows its folder.
        write_json(run / "env.json", environment())
        write_bytes(run / "config.toml", tomli_w.dumps(to_plain(config)).encode())
        self._drop_torn_line()

    def say(self, text: str, /) -> None:
        """Say one line to the person and to log.txt."""
        stamp = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S")
        with storage_errors(self.run), (self.run / "log.txt").open("a") as file:
            file.write(f"{stamp} {text}\n")
        say(text)

    def metrics(self, step: int, /, **values: float) -> None:
        """Append one line of numbers to metrics.jsonl; a value that is not finite becomes null."""
        row: dict[str, float | None] = {"step": step}
        for name, value in values.items():
            plain = value if isinstance(value, int) else float(value)  # numpy's are not JSON's
            row[name] = plain if math.isfinite(plain) else None
        with storage_errors(self.run), (self.run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def forget_after(self, step: int, /) -> None:
        """Drop the metrics of steps after `step`: a resumed run will write them again."""
        path = self.run / "metrics.jsonl"
        if path.exists():
            rows = [row for row in read_metrics(self.run) if row["step"] <= step]
            write_bytes(path, "".join(json.dumps(row) + "\n" for row in rows).encode())

    def _drop_torn_line(self) -> None:
        """Cut off a last line that a kill tore, or the next one would be glued to it."""
        path = self.run / "metrics.jsonl"
        with storage_errors(path):
            content = path.read_bytes() if path.exists() else b""
            if content and not content.endswith(b"\n"):
                write_bytes(path, content[: content.rfind(b"\n") + 1])


def _check_run(run: Path) -> None:
    """Refuse a folder that holds something else than a run, before anything in it is touched."""
    strangers = sorted(p.name for p in run.glob("*") if not is_leftover(p.name))
    if strangers and "env.json" not in strangers:
        raise ConfigError(
            f"{run}: has {strangers[0]!r:.60} but no env.json, so it is no run directory; nothing "
            "in it was touched. Choose another --output"
        )


def read_metrics(run: Path, /) -> list[dict[str, Any]]:
    """Return the rows of RUN/metrics.jsonl; a torn last line (a killed run) is left out.

    Raises:
        FormatError: if there is no such file, or another line than the last is not a row.
    """
    path = run / "metrics.jsonl"
    content = read_limited(path, what="the metrics of a run", limit_bytes=1 << 30)
    *lines, _torn = content.split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        row = parse_json(line, where=f"{path}: line {number}")
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise FormatError(f"{path}: line {number} has no step")
        rows.append(row)
    return rows


def say(text: str, /) -> None:
    """Say one line to the person, on stderr."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)


def format_metrics(values: Mapping[str, float], /) -> str:
    """Return "loss 0.1234  psnr 27.10": what a progress line shows."""
    return "  ".join(f"{key} {value:.4g}" for key, value in values.items())


def progress(
    items: Iterable[Item], /, what: str, *, total: int | None = None, done: int = 0
) -> Iterator[Item]:
    """Yield the items while showing how many are through: a bar on a terminal, else a line a while.

    Args:
        items: what to go through.
        what: what happens to each, as in "encoding".
        total: how many there are in all; needed where `items` has no length.
        done: how many of them were done before (by an earlier run).
    """
    count = total if total is not None else len(items) + done  # type: ignore[arg-type]
    if sys.stderr.isatty():
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(what, total=count, completed=done)
            for item in items:
                yield item
                bar.advance(task)
        return
    last = time.monotonic()
    for number, item in enumerate(items, start=done + 1):
        yield item
        if time.monotonic() - last > 15 or number == count:
            last = time.monotonic()
            say(f"{what}: {number} of {count}")
