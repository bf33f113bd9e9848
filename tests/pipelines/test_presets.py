"""Promises of the packaged presets: complete, of the size their names say, and in agreement."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from worldloom.common import ActionSpec, CodeSpec, TokenizerSpec
from worldloom.dynamics import DynamicsSpec, training_cost
from worldloom.pipelines.commands import COMMANDS
from worldloom.pipelines.settings import PRESETS, parse, preset_path, read_settings
from worldloom.pipelines.train_dynamics import TrainDynamicsConfig

SIZES = {"2m": 2e6, "10m": 10e6, "30m": 30e6, "100m": 100e6, "300m": 300e6, "1b": 1e9}
NAMES = sorted(path.stem for path in PRESETS.glob("*.toml"))
SPEC = DynamicsSpec(
    tokenizer=TokenizerSpec(
        name="toy",
        codes=CodeSpec(vocab_size=1024, grid_height=16, grid_width=16, code_dim=16),
        height=128,
        width=128,
        resize="exact",
        fps=15.0,
        frame_skip=1,
        compute_dtype="float32",
        fingerprint="0" * 64,
    ),
    actions=ActionSpec.discrete(["stay", "left", "right", "up"]),
    fps=15.0,
    frame_skip=1,
)
"""What docs/training.md counts by: 1,024 codes, 16 x 16 cells, four actions."""


def dynamics(preset: str) -> TrainDynamicsConfig:
    """What `worldloom train-dynamics --preset NAME` reads."""
    words = ["--preset", preset, "--shards", "shards", "--output", "run"]
    config: TrainDynamicsConfig = parse(TrainDynamicsConfig, words, command="train-dynamics")
    return config


@pytest.mark.parametrize("name", SIZES)
def test_a_preset_has_the_parameters_that_its_name_says(name):
    config = dynamics(name)
    cost = training_cost(config.model, SPEC, training=config.training)
    assert cost.parameters == pytest.approx(SIZES[name], rel=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_every_table_of_a_preset_is_one_that_its_command_takes(name):
    given = {
        "record": ["--output", "o"],
        "ingest": ["videos", "recordings", "--output", "o"],
        "train_tokenizer": ["--episodes", "e", "--output", "o"],
        "tokenize": ["--episodes", "e", "--tokenizer", "t", "--output", "o"],
        "train_dynamics": ["--shards", "s", "--output", "o"],
        "evaluate": [
            "--tokenizer",
            "t",
            "--episodes",
            "e",
            "--output",
            "o",
            "--model",
            "m",
            "--shards",
            "s",
        ],
    }
    tables = read_settings(preset_path(name))
    assert "train_dynamics" in tables
    for table in tables:
        command = table.replace("_", "-")
        cls, _ = COMMANDS[command].load()
        parse(cls, ["--preset", name, *given[table]], command=command)


@pytest.mark.parametrize("name", NAMES)
def test_the_commands_above_a_preset_are_commands_that_it_has_tables_for(name):
    """A comment's command names this preset, and settings for it are in the file."""
    text = preset_path(name).read_text()
    head = re.match(r"(#.*\n)+", text)[0]
    joined = re.sub(r"\\\n# *", "", head)
    lines = re.findall(r"^# {5}(?:torchrun .*?-m worldloom.pipelines|worldloom) (.*)", joined, re.M)
    assert lines
    for line in lines:
        command, *words = shlex.split(line)
        if command == "demo":
            continue
        assert f"[{command.replace('-', '_')}" in text
        assert words[words.index("--preset") + 1] == name
        cls, _ = COMMANDS[command].load()
        parse(cls, words, command=command)


@pytest.mark.parametrize(("chain", "size"), [("base", "100m"), ("large", "1b")])
def test_the_dynamics_of_a_whole_chain_are_those_of_the_preset_of_its_size(chain, size):
    assert dynamics(chain) == dynamics(size)


@pytest.mark.parametrize("name", ["base", "large"])
def test_the_tokenizer_of_a_whole_chain_has_the_grid_that_the_sizes_are_counted_by(name):
    cls, _ = COMMANDS["train-tokenizer"].load()
    words = ["--preset", name, "--episodes", "e", "--output", "o"]
    codes = parse(cls, words, command="train-tokenizer").model.code_spec
    assert (codes.grid_height, codes.grid_width) == (16, 16)


@pytest.mark.parametrize("name", SIZES)
def test_warmup_checkpoints_and_batches_of_a_preset_go_together(name):
    training = dynamics(name).training
    assert training.warmup_steps < training.num_steps / 10
    assert training.num_steps % training.checkpoint_every == 0
    assert training.batch_windows % 8 == 0  # eight processes share it alike
    if training.micro_windows > 0:
        assert training.batch_windows // 8 % training.micro_windows == 0
    assert training.window_frames > dynamics(name).model.context_frames


def test_a_larger_preset_learns_more_slowly_from_more_codes():
    trainings = [dynamics(name).training for name in SIZES]
    rates = [training.learning_rate for training in trainings]
    codes = [t.num_steps * t.batch_windows * (t.window_frames - 1) for t in trainings]
    assert rates == sorted(rates, reverse=True)
    assert codes == sorted(codes)
    assert np.diff(codes).min() > 0


DOCUMENTATION = (Path(__file__).parents[2] / "docs" / "training.md").read_text()


@pytest.mark.parametrize("name", [*SIZES, "base", "large"])
def test_the_documentation_lists_every_preset_as_it_is(name):
    (row,) = re.findall(rf"^\| `{name}` \|(.*)\|$", DOCUMENTATION, re.M)
    if name not in SIZES:
        return
    told = [cell.strip() for cell in row.split("|")]
    model, training = dynamics(name).model, dynamics(name).training
    assert told[1] == f"{model.num_layers} x {model.dim}"
    assert told[2] == f"{model.context_frames}, {training.window_frames}"
    assert told[3:5] == [str(training.batch_windows), f"{training.num_steps:,}"]
    assert float(told[5]) == training.learning_rate


def test_the_commands_and_flags_of_the_documentation_are_those_there_are():
    blocks = "".join(re.findall(r"^```bash\n(.*?)^```", DOCUMENTATION, re.S | re.M))
    lines = re.findall(r"^(?:worldloom|torchrun .*?worldloom.pipelines) train-dynamics (.*)$",
                       blocks, re.M)  # fmt: skip
    assert len(lines) == len(blocks.splitlines()) == 3
    for line in lines:
        parse(TrainDynamicsConfig, shlex.split(line), command="train-dynamics")
    config = dynamics("2m")
    for part, name in re.findall(r"--(training|model)\.([\w-]+)", DOCUMENTATION):
        if name != "NAME":
            assert hasattr(getattr(config, part), name.replace("-", "_")), name
