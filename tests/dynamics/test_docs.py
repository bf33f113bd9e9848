"""Promises of docs/dynamics.md: its code runs as it stands, and every option is explained."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
from command_server import CommandServer
from dynamics.known_worlds import Walk
from worldloom.dynamics import DynamicsConfig

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "dynamics.md").read_text()
SMALLER = (
    "--cpu --model.num-layers 1 --model.dim 16 --model.num-heads 2 --training.num-steps 2 "
    "--training.batch-windows 2 --training.window-frames 4"
)
SIZES = {"num_layers", "dim", "num_heads", "ff_mult", "order", "context_frames"}
"""What every reader of a transformer knows, or what has a chapter of its own."""


@pytest.fixture
def shards(tmp_path, monkeypatch) -> None:
    """What the reader has: a folder of shards, seen from where they work."""
    Walk(height=3, width=4).write(tmp_path / "runs/mine/shards", episodes=8, latent_frames=(5, 9))
    monkeypatch.chdir(tmp_path)


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.S | re.M)


@pytest.mark.usefixtures("shards")
def test_the_python_of_the_docs_runs_as_it_stands(capsys):
    (example,) = blocks("python")
    exec(example, {})
    assert capsys.readouterr().out == "(1, 4, 12, 2)\n"


@pytest.mark.usefixtures("shards")
def test_the_commands_of_the_docs_run(tmp_path):
    lines = "".join(blocks("bash")).splitlines()
    assert len(lines) == 1
    with CommandServer() as commands:
        for line in lines:
            program, *words = shlex.split(line)
            assert program == "worldloom"
            words = [str(tmp_path / word) if word.startswith("runs/") else word for word in words]
            ended = commands.run(*words, *SMALLER.split())
            assert ended.code == 0, ended.err
    assert (tmp_path / "runs/mine/dynamics/model/config.json").is_file()


def test_there_is_no_other_code_in_the_docs():
    assert set(re.findall(r"^```(\w+)$", TEXT, re.M)) == {"bash", "python"}


def test_every_option_of_the_model_is_explained_by_its_name():
    named = set(re.findall(r"\*\*`(\w+)`\*\*", TEXT))
    assert {field.name for field in fields(DynamicsConfig)} - SIZES <= named
    assert named - {field.name for field in fields(DynamicsConfig)} == {"corruption"}
