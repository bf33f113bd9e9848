"""The commands there are: name -> module, config class, function, in the order of the data flow.

    "train-tokenizer"  ->  Command  ->  load  ->  (TrainTokenizerConfig, train_tokenizer)

One table for the command line, its help, and the tables that a preset may hold. A command's module
is imported only when that command runs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True, slots=True)
class Command:
    """One command of `worldloom`."""

    name: str
    """As typed; its table in a TOML file has underscores for the dashes."""
    summary: str
    """One line of `worldloom --help`."""
    module: str
    """File beside this one that holds its config class and its function."""
    config: str
    """Frozen dataclass: its fields are the flags and the TOML keys."""
    continues: bool
    """Running it again after a stop goes on from there, rather than from the start."""

    @property
    def table(self) -> str:
        """Its table in a TOML file; also the name of its function."""
        return self.name.replace("-", "_")

    def load(self) -> tuple[type[Any], Callable[[Any], object]]:
        """Return (config class, function): a function takes its config and returns its result."""
        module = import_module(f".{self.module}", __package__)
        return getattr(module, self.config), getattr(module, self.table)


COMMANDS = {
    command.name: command
    for command in (
        Command("record", "play a game, write episodes", "record", "RecordConfig", True),
        Command(
            "ingest", "recordings of yours -> episodes", "ingest", "IngestConfig", True
        ),
        Command(
            "train-tokenizer", "episodes -> a tokenizer: frames to codes and back",
            "train_tokenizer", "TrainTokenizerConfig", True,
        ),
        Command(
            "tokenize", "episodes -> token shards, once, offline",
            "tokenize", "TokenizeConfig", True,
        ),
        Command(
            "shards", "token shards -> others: merged, split, or some of them",
            "shard_tools", "ShardsConfig", True,
        ),
        Command(
            "train-dynamics", "token shards -> a model of what comes next",
            "train_dynamics", "TrainDynamicsConfig", True,
        ),
        Command(
            "generate", "first frames + actions -> video, true next to generated",
            "generate", "GenerateConfig", False,
        ),
        Command(
            "evaluate", "how true a tokenizer or a model is, in numbers",
            "evaluate", "EvaluateConfig", False,
        ),
        Command(
            "play", "walk through a world, in the browser or a terminal",
            "play.command", "PlayConfig", False,
        ),
        Command(
            "replay", "a played session again, checked, as a video",
            "replay", "ReplayConfig", False,
        ),
        Command("demo", "all of the above, small, then a report", "demo", "DemoConfig", True),
        Command("info", "what a file or folder of worldloom's is", "info", "InfoConfig", False),
        Command(
            "doctor", "what this machine has, what it lacks and how to mend it",
            "doctor", "DoctorConfig", False,
        ),
    )
}  # fmt: skip
