"""Promises of a training in several processes: they train what one trains, and one of them writes.

Under torchrun, on gloo. Walks of 3 to 6 frames in windows of 5: padding is not dealt out evenly,
and of half of the walks nobody knows the actions.
"""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from dynamics.test_training import ENVIRONMENT, last_step, numbers, wait_for
from dynamics.toys import tiny, train
from dynamics.training_options import MODEL, half_labelled_walks
from dynamics.training_options import TRAINING as EVERYTHING
from worldloom.common import ConfigError, newest_checkpoint, read_metrics

SCRIPT = Path(__file__).parent / "training_options.py"
SETTINGS: dict[str, dict[str, dict[str, object]]] = {
    "the defaults": {},
    "AdamW in micro-batches": {"training": {"optimizer": "adamw", "micro_windows": 1}},
    "everything": {"model": MODEL, "training": {**EVERYTHING, "micro_windows": 1}},
    "an action head that learns nothing": {"model": MODEL, "training": {"action_weight": 0.0}},
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return half_labelled_walks(tmp_path_factory.mktemp("half") / "shards")


def torchrun(shards, run: Path, settings: dict[str, dict[str, object]]) -> list[object]:
    """The command of two processes. (accelerate launch --cpu silently runs one.)"""
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
        SCRIPT, shards.folder, run, json.dumps(settings),
    ]  # fmt: skip


def train_in_two(shards, run: Path, settings: dict[str, dict[str, object]]) -> None:
    done = subprocess.run(
        torchrun(shards, run, settings),
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_train_what_one_trains(shards, tmp_path, name):
    """Losses and weights of twenty updates, within 1e-5."""
    model, training = (SETTINGS[name].get(part, {}) for part in ("model", "training"))
    training = {**training, "num_steps": 20, "checkpoint_every": 20, "learning_rate": 1e-3}
    runs = {1: tmp_path / "one", 2: tmp_path / "two"}
    train(shards.folder, runs[1], model=tiny(**model), **training)
    train_in_two(shards, runs[2], {"model": model, "training": training})
    assert "2 process(es) on cpu" in (runs[2] / "log.txt").read_text()
    one, two = (numbers(runs[n]) for n in (1, 2))
    assert len(one) == len(two) == 20 + 7
    for first, second in zip(one, two, strict=True):
        assert first.keys() == second.keys()
        for key in ("loss", "action_loss", "validation_loss", "gradient_norm"):
            if key in first:
                assert second[key] == pytest.approx(first[key], rel=1e-5), (first["step"], key)
    groups = [newest_checkpoint(runs[n])[0].tensors for n in (1, 2)]
    for group in groups[0].keys() - {"optimizer"}:
        for key, tensor in groups[0][group].items():
            assert (tensor - groups[1][group][key]).abs().max() < 1e-5, (group, key)


@pytest.mark.slow
def test_one_process_goes_on_with_what_two_began_and_says_so(shards, tmp_path):
    train_in_two(shards, tmp_path / "run", {"training": {"num_steps": 6}})
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    shutil.rmtree(tmp_path / "run" / "model")
    train(shards.folder, tmp_path / "run", num_steps=6)
    said = (tmp_path / "run" / "log.txt").read_text()
    assert "1 process(es) go on with what 2 began" in said
    train(shards.folder, tmp_path / "one", num_steps=6)
    for first, second in zip(*(numbers(tmp_path / r) for r in ("one", "run")), strict=True):
        assert second["step"] == first["step"]
        if "loss" in first:
            assert second["loss"] == pytest.approx(first["loss"], rel=1e-5)


@pytest.mark.slow
def test_stopping_two_processes_saves_once_and_the_same_command_continues(shards, tmp_path):
    run = tmp_path / "run"
    command = torchrun(
        shards, run, {"model": MODEL, "training": {**EVERYTHING, "num_steps": 100_000}}
    )
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: last_step(run) > 2, process)
        process.send_signal(signal.SIGTERM)  # torchrun hands it on to both
        process.communicate(timeout=60)
    finally:
        process.kill()
    checkpoint, skipped = newest_checkpoint(run)
    assert skipped == []
    assert checkpoint.step == last_step(run)
    assert checkpoint.state["num_processes"] == 2
    assert f"stopped at update {checkpoint.step}" in (run / "log.txt").read_text()
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: last_step(run) > checkpoint.step, process)
    finally:
        process.terminate()
        process.communicate(timeout=60)
    updates = [row["step"] for row in read_metrics(run) if "loss" in row]
    assert updates == list(range(1, updates[-1] + 1))


def test_a_batch_that_cannot_be_dealt_evenly_is_refused_before_anything_is_written(
    shards, tmp_path, monkeypatch
):
    import accelerate

    monkeypatch.setattr(accelerate.Accelerator, "num_processes", 3)
    with pytest.raises(ConfigError, match="a batch of 4 windows cannot be dealt to 3 processes"):
        train(shards.folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()
