"""train_dynamics.py: several folders by weight, and shards that come as a stream."""

import json
import shutil
from pathlib import Path

import pytest
from chain_worlds import DYNAMICS_FLAGS, hashes, save_tokenizer, write_pushed_squares
from worldloom.common import ConfigError, build, read_metrics
from worldloom.pipelines.settings import parse
from worldloom.pipelines.tokenize import TokenizeConfig, tokenize
from worldloom.pipelines.train_dynamics import TrainDynamicsConfig

STEPS = ("--training.num-steps", 4, "--training.checkpoint-every", 2, "--cpu")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """Two folders of shards by one tokenizer."""
    folder = tmp_path_factory.mktemp("inputs")
    save_tokenizer(folder / "tokenizer")
    for name, lengths in (("walks", (20, 9, 14, 12)), ("fights", (8, 8, 9))):
        write_pushed_squares(folder / f"{name}-episodes", lengths)
        tokenize(
            TokenizeConfig(
                episodes=folder / f"{name}-episodes",
                tokenizer=str(folder / "tokenizer"),
                output=folder / name,
                device="cpu",
            )
        )
    return folder


def parsed(*words: object) -> TrainDynamicsConfig:
    return parse(TrainDynamicsConfig, [str(word) for word in words], command="train-dynamics")


def test_one_folder_is_named_as_it_always_was_on_the_command_line_and_in_toml(tmp_path):
    assert parsed("--shards", "a", "--output", "r").shards == (Path("a"),)
    file = tmp_path / "mine.toml"
    file.write_text('[train_dynamics]\nshards = "a"\noutput = "r"\n')
    assert parsed("--config", file).shards == (Path("a"),)
    assert build(TrainDynamicsConfig, {"shards": Path("a"), "output": "r"}, where="x").shards == (
        Path("a"),
    )


def test_several_folders_and_their_weights_are_named_one_after_the_other(tmp_path):
    config = parsed("--shards", "a", "b", "--weights", "3", "1", "--output", "r")
    assert (config.shards, config.weights) == ((Path("a"), Path("b")), (3.0, 1.0))
    file = tmp_path / "mine.toml"
    file.write_text('[train_dynamics]\nshards = ["a", "b"]\nweights = [3, 1]\noutput = "r"\n')
    assert parsed("--config", file) == config
    with pytest.raises(ConfigError, match="--shards: names no folder"):
        parsed("--shards", "--output", "r")


def test_a_mixture_trains_validates_every_folder_and_draws_pictures(commands, inputs, tmp_path):
    run = tmp_path / "run"
    ended = commands.run(
        "train-dynamics", "--shards", inputs / "walks", inputs / "fights", "--weights", 3, 1,
        "--tokenizer", inputs / "tokenizer", "--output", run, *DYNAMICS_FLAGS, *STEPS,
    )  # fmt: skip
    assert ended.code == 0, ended.err
    rows = read_metrics(run)
    assert {"validation_loss", "validation_loss_set0", "validation_loss_set1"} <= rows[-1].keys()
    assert any("data_wait_share" in row for row in rows)
    assert list((run / "samples").glob("*.png"))
    assert f"--start {inputs / 'walks'} " in ended.err


def test_a_mixture_of_other_codes_is_refused_with_both_folders(commands, inputs, tmp_path):
    shutil.copytree(inputs / "fights", tmp_path / "other")
    path = tmp_path / "other" / "manifest.json"
    data = json.loads(path.read_text())
    data["tokenizer"]["fingerprint"] = "f" * 64
    path.write_text(json.dumps(data))
    for dry in ((), ("--dry-run",)):
        ended = commands.run(
            "train-dynamics", "--shards", inputs / "walks", tmp_path / "other",
            "--output", tmp_path / "run", *DYNAMICS_FLAGS, *STEPS, *dry,
        )  # fmt: skip
        assert ended.code == 3
        assert str(inputs / "walks") in ended.err
        assert str(tmp_path / "other") in ended.err
        assert "fingerprint" in ended.err
    assert not (tmp_path / "run").exists()


def elsewhere(inputs: Path, folder: Path) -> Path:
    """A folder with the manifest and the codebook, and no tars."""
    folder.mkdir()
    for name in ("manifest.json", "codebook.safetensors"):
        shutil.copy(inputs / "walks" / name, folder / name)
    return folder


def test_shards_whose_tars_are_elsewhere_train_from_a_stream_and_a_pipe_is_announced(
    commands, inputs, tmp_path
):
    here = elsewhere(inputs, tmp_path / "here")
    flags = ("--stream-lanes", 2, "--stream-buffer", 8, *DYNAMICS_FLAGS, *STEPS)
    command = f"cat {inputs}/walks/{{file}}"
    urls = {"pipe": f"pipe:{command}", "path": f"{inputs}/walks/{{file}}"}
    for name, url in urls.items():
        ended = commands.run(
            "train-dynamics", "--shards", here, "--stream", url, "--output", tmp_path / name,
            "--tokenizer", inputs / "tokenizer", *flags,
        )  # fmt: skip
        assert ended.code == 0, ended.err
        announced = f"--stream runs a command in your shell for every shard: {command}"
        assert (announced in ended.err) == (name == "pipe")
        assert list((tmp_path / name / "samples").glob("*.png"))
    assert hashes(tmp_path / "pipe" / "model") == hashes(tmp_path / "path" / "model")


@pytest.mark.parametrize(
    ("stream", "code", "message"),
    [
        (None, 3, "shard-000000.tar: is missing"),
        ("pipe:false {file}", 1, "pipe:false shard-000000.tar: broke off (exit 1)"),
        ("pipe:echo {file}", 3, "pipe:echo shard-000000.tar: "),
        ("/nowhere/{file}", 1, "/nowhere/shard-000000.tar: cannot be opened"),
        ("pipe:cat shards", 2, "has no {file}"),
    ],
)
def test_a_stream_that_gives_no_shards_ends_with_a_sentence(
    commands, inputs, tmp_path, stream, code, message
):
    here = elsewhere(inputs, tmp_path / "here")
    asked = () if stream is None else ("--stream", stream)
    ended = commands.run(
        "train-dynamics", "--shards", here, *asked, "--output", tmp_path / "run",
        *DYNAMICS_FLAGS, *STEPS,
    )  # fmt: skip
    assert ended.code == code, ended.err
    assert message in ended.err
