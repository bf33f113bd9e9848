"""Promises of the training with every option on: it resumes to the last bit, survives kills."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from dynamics.test_training import (
    ENVIRONMENT,
    assert_equal_runs,
    last_step,
    numbers,
    rewind,
    wait_for,
)
from dynamics.toys import TRAINING, tiny, train
from dynamics.training_options import MODEL, half_labelled_walks
from dynamics.training_options import TRAINING as EVERYTHING
from worldloom.common import MismatchError, load_model, newest_checkpoint, read_metrics
from worldloom.dynamics import DynamicsModel, training
from worldloom.dynamics.learner import Learner

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return half_labelled_walks(tmp_path_factory.mktemp("half") / "shards")


def train_with_everything(shards, run: Path, **settings):
    return train(shards.folder, run, model=tiny(**MODEL), **{**EVERYTHING, **settings})


@pytest.fixture(scope="module")
def finished(tmp_path_factory, shards) -> Path:
    """A run of six updates with checkpoints after the third and the sixth; do not change it."""
    torch.set_num_threads(1)  # a module's fixture comes before the one that does this for tests
    run = tmp_path_factory.mktemp("finished") / "run"
    train_with_everything(shards, run)
    return run


def test_resuming_with_every_option_changes_nothing_to_the_last_bit(finished, shards, tmp_path):
    run = rewind(finished, tmp_path / "run")
    train_with_everything(shards, run)
    assert "from update 3" in (run / "log.txt").read_text()
    assert_equal_runs(finished, run)
    groups = newest_checkpoint(run)[0].tensors
    assert groups.keys() == {"model", "optimizer", "average"}
    assert any(name.endswith(".momentum") for name in groups["optimizer"])
    assert any(name.endswith(".exp_avg_sq") for name in groups["optimizer"])
    assert any("action_loss" in row for row in numbers(run))


def test_the_averaged_weights_are_what_is_validated_drawn_and_kept(shards, tmp_path):
    run, seen = tmp_path / "run", []

    def look(model, step):
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
        assert not model.training

    train(shards.folder, run, ema_decay=0.5, on_validation=look)
    groups = newest_checkpoint(run)[0].tensors
    _, kept = load_model(run / "model", kind="dynamics")
    for name, mean in groups["average"].items():
        assert torch.equal(kept[name], mean)
        assert torch.equal(seen[-1][name], mean)
    name = "head.to_logits.weight"
    assert not torch.equal(groups["average"][name], groups["model"][name])
    assert "averaged (0.5)" in (run / "model" / "README.md").read_text()
    # Averaging changes what is kept, never what is learned.
    train(shards.folder, tmp_path / "plain")
    plain = newest_checkpoint(tmp_path / "plain")[0].tensors
    assert all(torch.equal(plain["model"][n], tensor) for n, tensor in groups["model"].items())
    assert "average" not in plain
    scores = [
        [
            row["validation_loss"]
            for row in read_metrics(tmp_path / which)
            if "validation_loss" in row
        ]
        for which in ("run", "plain")
    ]
    assert scores[0] != scores[1]


def test_what_only_says_how_it_is_computed_may_change_on_the_way(finished, shards, tmp_path):
    run = rewind(finished, tmp_path / "run")
    watched = {"log_every": 2, "validate_every": 2, "checkpoint_every": 1}
    train_with_everything(shards, run, micro_windows=0, recompute=False, **watched)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {
        "step-00000005", "step-00000006"
    }  # fmt: skip
    one, other = (
        {n: load_model(r / "model", kind="dynamics")[1][n] for n in ("head.to_logits.weight",)}
        for r in (finished, run)
    )
    for name, tensor in one.items():
        # Adam divides by what is nearly 0, and so enlarges a rounding.
        torch.testing.assert_close(tensor, other[name], atol=5e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optimizer", "adamw"), ("schedule", "cosine"), ("clip", 1.0), ("ema_decay", 0.0),
        ("z_loss", 0.0), ("action_weight", 0.1), ("decay_share", 0.2),
    ],
)  # fmt: skip
def test_a_run_does_not_go_on_with_another(finished, shards, tmp_path, name, value):
    run = rewind(finished, tmp_path / "run")
    with pytest.raises(MismatchError, match=f"training {name} .* then, .* now"):
        train_with_everything(shards, run, **{name: value})


def test_what_was_found_to_fit_is_kept_for_the_rest_of_the_run(finished, shards, tmp_path):
    run = tmp_path / "run"
    train_with_everything(shards, run, micro_windows=-1)
    assert newest_checkpoint(run)[0].state["fits"]["windows"] == TRAINING.batch_windows
    said = (run / "log.txt").read_text()
    assert said.count("4 windows fit into a process at once") == 1
    rewound = rewind(run, tmp_path / "rewound")
    train_with_everything(shards, rewound, micro_windows=-1)
    assert (rewound / "log.txt").read_text().count("windows fit into a process at once") == 1
    assert_equal_runs(run, rewound)


@pytest.mark.parametrize(
    ("before", "found"),
    [({"micro_windows": 0}, False), ({"micro_windows": 3}, False), ({"recompute": False}, True)],
)
def test_what_nobody_found_or_found_for_something_else_is_looked_for(
    shards, tmp_path, before, found
):
    run = tmp_path / "run"
    train_with_everything(shards, run, **{"micro_windows": -1, "recompute": True, **before})
    assert (newest_checkpoint(run)[0].state["fits"] is not None) == found
    train_with_everything(shards, rewind(run, tmp_path / "again"), micro_windows=-1, recompute=True)
    last = (tmp_path / "again" / "log.txt").read_text().split("from update 3")[1]
    assert "4 windows fit into a process at once" in last


def test_what_was_read_of_a_checkpoint_is_let_go_of(finished, shards, tmp_path, monkeypatch):
    kept = []

    def read(run):
        checkpoint, remarks = newest_checkpoint(run)
        kept.extend(weakref.ref(tensor) for tensor in checkpoint.tensors["model"].values())
        return checkpoint, remarks

    def look(_model, _step):
        gc.collect()
        alive.append(sum(reference() is not None for reference in kept))

    alive: list[int] = []
    monkeypatch.setattr(training, "newest_checkpoint", read)
    train_with_everything(shards, rewind(finished, tmp_path / "run"), on_validation=look)
    assert len(kept) > 20
    assert alive == [0]


def test_who_asks_to_stop_has_the_checkpoint_before_a_validation_begins(
    shards, tmp_path, monkeypatch
):
    run, seen, true_apply = tmp_path / "run", [], Learner.apply

    def apply(self):
        if self.step == 1:
            signal.raise_signal(signal.SIGTERM)
        return true_apply(self)

    def look(_model, step):
        steps = [path.name for path in (run / "checkpoints").glob("step-*")]
        seen.append((step, f"step-{step:08d}" in steps))

    monkeypatch.setattr(Learner, "apply", apply)
    with pytest.raises(SystemExit) as ended:
        train(shards.folder, run, validate_every=1, checkpoint_every=6, on_validation=look)
    assert ended.value.code == 143
    assert seen == [(1, False), (2, True)]


def test_who_asks_to_stop_during_a_validation_waits_for_no_further_update(shards, tmp_path):
    def look(_model, _step):
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit):
        train(shards.folder, tmp_path / "run", validate_every=2, on_validation=look)
    assert newest_checkpoint(tmp_path / "run")[0].step == 2


def test_validation_computes_no_more_windows_at_once_than_training(shards, tmp_path, monkeypatch):
    sizes, tokens = set(), DynamicsModel.tokens

    def counted(self, codes_Bthw, *args, **kwargs):
        if not self.training:
            sizes.add(len(codes_Bthw))
        return tokens(self, codes_Bthw, *args, **kwargs)

    monkeypatch.setattr(DynamicsModel, "tokens", counted)
    for micro_windows, most in ((3, 3), (-1, 4), (0, 4)):  # 4 is the batch
        sizes.clear()
        run = tmp_path / str(micro_windows)
        train(shards.folder, run, num_steps=1, micro_windows=micro_windows)
        assert max(sizes) == most


def test_settings_that_do_nothing_here_are_named(shards, tmp_path):
    train(shards.folder, tmp_path / "run", num_steps=1, compile=True, sharded=True)
    said = (tmp_path / "run" / "log.txt").read_text()
    assert "compile: only on CUDA, not on cpu" in said
    assert "sharded: there is one process, which holds all weights" in said
    model = DynamicsModel.from_pretrained(tmp_path / "run" / "model")
    assert model.config == tiny()


def test_windows_that_never_slide_are_warned_of(shards, tmp_path):
    for frames, warned in ((4, True), (5, False)):  # tiny() has a context of 4
        train(shards.folder, tmp_path / str(frames), num_steps=1, window_frames=frames)
        said = (tmp_path / str(frames) / "log.txt").read_text()
        assert ("warning: windows of 4 latent frames never slide" in said) == warned


@pytest.mark.slow
def test_a_kill_at_any_step_of_writing_loses_nothing_with_every_option(shards, tmp_path):
    done = subprocess.run(
        [sys.executable, HERE / "kill_sweep.py", shards.folder, tmp_path, "everything"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == "equal"


@pytest.mark.slow
def test_stopping_twice_with_every_option_is_as_if_nothing_had_been(shards, tmp_path):
    """By SIGTERM, then by Ctrl-C."""
    run, steps = tmp_path / "run", [0]
    words = [sys.executable, HERE / "training_options.py", shards.folder, run]
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        process = subprocess.Popen(
            [*words, settings(num_steps=100_000)], stderr=subprocess.DEVNULL, env=ENVIRONMENT
        )
        try:
            wait_for(lambda: last_step(run) > steps[-1] + 1, process)
            os.kill(process.pid, number)
            assert process.wait(timeout=60) == code
        finally:
            process.kill()
        checkpoint, skipped = newest_checkpoint(run)
        assert skipped == []
        assert checkpoint.step == last_step(run) > steps[-1]
        steps.append(checkpoint.step)
    updates = [row["step"] for row in read_metrics(run) if "loss" in row]
    assert updates == list(range(1, steps[-1] + 1))
    # The same number of updates without a stop.
    whole = tmp_path / "whole"
    shutil.copytree(run, whole)
    shutil.rmtree(whole / "checkpoints")
    (whole / "LATEST").unlink()
    process = subprocess.Popen(
        [*words[:3], whole, settings(num_steps=100_000)], stderr=subprocess.DEVNULL, env=ENVIRONMENT
    )
    try:
        wait_for(lambda: last_step(whole) > steps[-1], process)
    finally:
        process.terminate()
        process.wait(timeout=60)
    assert numbers(whole)[: len(numbers(run))] == numbers(run)


def settings(**training: object) -> str:
    return json.dumps({"model": MODEL, "training": {**EVERYTHING, **training}})
