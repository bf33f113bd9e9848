"""The whole chain, small, end to end: from a game to a world you can steer, then a report.

    worldloom demo --output runs/demo

runs record, train-tokenizer, tokenize, train-dynamics and evaluate with the tables of one preset,
each in its folder of RUN, and writes RUN/{stages.json, report.html, report.json}. A finished stage
is kept when the command is run again; an unfinished one continues where it stopped.
"""

import hashlib
import shlex
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg
from worldloom.common import (
    ConfigError,
    Episodes,
    FormatError,
    MismatchError,
    StorageError,
    build,
    describe_difference,
    read_json,
    say,
    to_json,
    to_plain,
    write_json,
)

from .commands import COMMANDS


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """Record a game, learn it, and write a report with moving pictures: minutes on a laptop.

    worldloom demo --output runs/demo

    worldloom demo --preset smoke --output runs/smoke
    """

    output: Path = Path("runs/demo")
    """Folder of the run; finished stages in it are kept."""
    preset: str = "demo"
    """Whose tables are used: demo, or smoke, which only shows within a minute that all works."""
    config: Annotated[Path | None, arg(metavar="FILE.toml")] = None
    """A TOML file of yours with the same tables, instead of a preset."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRecord:
    """What RUN/stages.json says of one stage."""

    seconds: float
    """Spent on it by all runs that got to say so; what `kill -9` cut off is not counted."""
    finished: bool
    chain: str
    """SHA-256 over its settings and those of every stage before it."""
    settings: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Stage:
    """One command with its settings."""

    name: str
    run: Callable[[], object]
    settings: dict[str, Any]
    """Without paths: those follow from the run's folder."""
    chain: str
    product: Path
    """The file that the command writes last."""


STAGES = ("record", "train-tokenizer", "tokenize", "train-dynamics", "evaluate")


def demo(config: DemoConfig) -> Path:
    """Run every stage that is not finished; return the report."""
    stages = _plan(config)
    records = _read_records(config.output)
    for stage in stages:
        _check_unchanged(stage, records, config.output)
    redone = False
    for number, stage in enumerate(stages, start=1):
        title, record = f"[{number}/{len(stages)}] {stage.name}", records.get(stage.name)
        # What is made anew may be made into something else, so the rest is asked again as well.
        if record is not None and record.finished and stage.product.exists() and not redone:
            say(f"{title}: done before in {record.seconds:.0f} s, kept")
            continue
        redone = True
        _run(stage, title, records, config.output)
    return _report(config)


def _plan(config: DemoConfig) -> list[Stage]:
    """Return every stage; a mistake in the last one's table is found before the first begins."""
    from .settings import preset_path, read_settings, stage_config

    source = config.config if config.config is not None else preset_path(config.preset)
    tables = read_settings(source)
    missing = [COMMANDS[name].table for name in STAGES if COMMANDS[name].table not in tables]
    if missing:
        raise ConfigError(f"{source}: has no table [{missing[0]}], which the demo needs")
    stages, chain = [], ""
    for name in STAGES:
        command, paths = COMMANDS[name], _paths(name, config.output)
        cls, function = command.load()
        table, where = tables[command.table]
        for key in paths:
            if key in table:
                raise ConfigError(f"{where}: {key} follows from --output of the demo; remove it")
        filled = stage_config(cls, table, where=where, **paths)
        settings = {key: value for key, value in to_plain(filled).items() if key not in paths}
        chain = hashlib.sha256((chain + name + to_json(settings)).encode()).hexdigest()

        def run(function: Callable[[Any], object] = function, filled: Any = filled) -> object:
            return function(filled)

        stages.append(Stage(name, run, settings, chain, _product(name, config.output)))
    return stages


def _paths(name: str, output: Path) -> dict[str, Any]:
    """Return what a stage reads and writes."""
    episodes, shards = output / "episodes", output / "shards"
    tokenizer, dynamics = output / "tokenizer", output / "dynamics"
    model = str(tokenizer / "model")  # one of the things that name a tokenizer, which is a str
    paths: dict[str, dict[str, Any]] = {
        "record": {"output": episodes},
        "train-tokenizer": {"episodes": episodes, "output": tokenizer},
        "tokenize": {"episodes": episodes, "tokenizer": model, "output": shards},
        "train-dynamics": {
            "shards": shards, "tokenizer": model, "output": dynamics,
        },
        "evaluate": {
            "model": dynamics / "model", "tokenizer": model, "episodes": episodes,
            "shards": shards, "output": output / "evaluation",
        },
    }  # fmt: skip
    return paths[name]


def _product(name: str, output: Path) -> Path:
    """Return the file whose absence says that a finished stage's result was taken away."""
    last = {
        "record": "episodes.json",
        "train-tokenizer": "model/config.json",
        "tokenize": "manifest.json",
        "train-dynamics": "model/config.json",
        "evaluate": "evaluation.json",
    }
    folder: Path = _paths(name, output)["output"]
    return folder / last[name]


def _read_records(output: Path) -> dict[str, StageRecord]:
    """Return what earlier runs noted of each stage."""
    path = output / "stages.json"
    if not path.exists():
        return {}
    data = read_json(path, what="the stages of a demo")
    return {
        name: build(StageRecord, record, where=f"{path}: {name}", error=FormatError)
        for name, record in data.items()
    }


def _check_unchanged(stage: Stage, records: Mapping[str, StageRecord], output: Path) -> None:
    """Refuse to mix a finished stage with other settings than it was made with."""
    record = records.get(stage.name)
    if record is None or not record.finished or record.chain == stage.chain:
        return
    differ = describe_difference(dict(record.settings), stage.settings)
    raise MismatchError(
        f"{output}: its stage {stage.name} was made with other settings ({differ}); go on with the "
        "same ones, choose another --output, or remove the folder"
    )


def _run(stage: Stage, title: str, records: dict[str, StageRecord], output: Path) -> None:
    """Run one stage and note the seconds it took, also if it does not come to its end."""
    before = records[stage.name].seconds if stage.name in records else 0.0
    began = time.monotonic()

    def note(*, finished: bool) -> float:
        seconds = time.monotonic() - began
        records[stage.name] = StageRecord(
            seconds=before + seconds, finished=finished, chain=stage.chain, settings=stage.settings
        )
        write_json(output / "stages.json", to_plain(records))
        return seconds

    say(title)
    try:
        stage.run()
    except BaseException:
        with suppress(StorageError):  # a full disk: the error on its way already says so
            seconds = note(finished=False)
            say(
                f"{title}: stopped after {seconds:.0f} s; the stages before it are finished, and "
                "the same command goes on from here"
            )
        raise
    say(f"{title}: finished in {note(finished=True):.0f} s")


def _report(config: DemoConfig) -> Path:
    """Write the report and say what one can do now."""
    from .report import write_report

    source = Episodes(config.output / "episodes").spec.source
    # A game that somebody's own module registers is called module:id.
    game = str(source.get("env", "a game")).rpartition(":")[2]
    words = ["worldloom", "demo"]
    if config.config is not None:
        words += ["--config", str(config.config)]
    elif config.preset != "demo":
        words += ["--preset", config.preset]
    play = ["worldloom", "play", str(config.output)]
    report = write_report(
        config.output,
        title=f"A world learned from {game}",
        commands=[shlex.join([*words, "--output", str(config.output)])],
        next_steps=f"{shlex.join(play)} opens it in a browser: walk through it with the keyboard.",
    )
    say(f"wrote {report} and {report.with_suffix('.json').name}; open the first in a browser")
    say(f"next: {shlex.join(play)}")
    return report
