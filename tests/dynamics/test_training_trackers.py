"""Promises of trackers.py: the numbers of metrics.jsonl, read back from where else they went."""

import os
import shutil
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from dynamics.test_training import rewind
from dynamics.toys import tiny, train
from worldloom.common import ConfigError, read_metrics
from worldloom.dynamics import DynamicsTrainingConfig
from worldloom.dynamics.training_config import TRACKERS


def curves(run: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard would draw: name -> update -> value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, dict[int, float]] = {}
    (folder,) = (run / "tensorboard").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    for name in events.Tags()["scalars"]:
        steps = [event.step for event in events.Scalars(name)]
        assert steps == sorted(set(steps)), name  # none twice
        found[name] = {event.step: event.value for event in events.Scalars(name)}
    return found


def logged(run: Path) -> dict[str, dict[int, float]]:
    """The same of metrics.jsonl."""
    found: defaultdict[str, dict[int, float]] = defaultdict(dict)
    steps = defaultdict(list)
    for row in read_metrics(run):
        step = row.pop("step")
        steps[frozenset(row)].append(step)
        for name, value in row.items():
            if isinstance(value, float):
                found[name][step] = value
    assert all(each == sorted(set(each)) for each in steps.values())  # none twice
    return found


def test_tensorboard_shows_every_number_of_metrics_jsonl(mover_shards, tmp_path):
    run = tmp_path / "run"
    model = tiny(action_head=True)
    train(mover_shards.folder, run, model=model, trackers=("tensorboard",), num_steps=4)
    shown, written = curves(run), logged(run)
    assert {"loss", "action_loss", "learning_rate", "tokens_per_s", "validation_loss"} <= set(shown)
    assert set(shown["loss"]) == {1, 2, 3, 4}
    assert shown.keys() == written.keys()
    for name, values in written.items():
        assert shown[name] == pytest.approx(values, rel=1e-6), name


def test_a_run_that_resumes_shows_no_update_twice(mover_shards, tmp_path):
    run = tmp_path / "run"
    train(mover_shards.folder, run, trackers=("tensorboard",))
    # As if killed after its sixth update: the checkpoint is that of the third.
    rewound = rewind(run, tmp_path / "rewound")
    train(mover_shards.folder, rewound, trackers=("tensorboard",))
    assert len(list((rewound / "tensorboard").rglob("events*"))) == 2
    shown, written = curves(rewound), logged(rewound)
    assert set(shown["loss"]) == set(range(1, 7))
    assert shown["tokens_per_s"] == pytest.approx(written["tokens_per_s"], rel=1e-6)  # the second
    assert shown["loss"] == pytest.approx(logged(run)["loss"], rel=1e-6)


def test_trackers_change_no_number_and_may_change_on_the_way(mover_shards, tmp_path):
    train(mover_shards.folder, tmp_path / "plain")
    run = rewind(tmp_path / "plain", tmp_path / "run")
    train(mover_shards.folder, run, trackers=("tensorboard",))
    name = "model/model.safetensors"
    assert (run / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert set(curves(run)["loss"]) == {4, 5, 6}
    assert not (tmp_path / "plain" / "tensorboard").exists()


@pytest.mark.parametrize("name", TRACKERS)
def test_a_library_that_is_missing_is_named_before_anything_is_written(
    mover_shards, tmp_path, monkeypatch, name
):
    monkeypatch.setitem(sys.modules, name, None)
    wanted = rf"{name}, but its library is not installed; .* 'worldloom-dynamics\[{name}\]'"
    with pytest.raises(ConfigError, match=wanted):
        train(mover_shards.folder, tmp_path / "run", trackers=(name,))
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_nobody_knows_is_refused():
    with pytest.raises(ConfigError, match="'mlflow', must be of tensorboard, wandb, trackio"):
        DynamicsTrainingConfig(trackers=("mlflow",))


@pytest.mark.slow
def test_wandb_gets_the_numbers_without_a_network(mover_shards, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the extra [wandb] is not installed")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    train(mover_shards.folder, run, trackers=("wandb",), num_steps=3)
    (file,) = run.rglob("run-*.wandb")
    content = file.read_bytes()
    assert b"validation_loss" in content
    assert b"learning_rate" in content
    first = rewind_to_nothing(run, tmp_path / "again")
    train(mover_shards.folder, first, trackers=("wandb",), num_steps=3)
    names = {path.name.rsplit("-", 1)[1] for path in first.rglob("run-*.wandb")}
    assert names == {file.name.rsplit("-", 1)[1]}  # the same run goes on


def rewind_to_nothing(run: Path, other: Path) -> Path:
    shutil.copytree(run, other, symlinks=True)
    shutil.rmtree(other / "checkpoints")
    shutil.rmtree(other / "model")
    return other
