"""Promises of training.py: it resumes to the last bit, stops well, and survives a kill."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from dynamics.toys import (
    KEYS,
    STEER,
    TRAINING,
    Dice,
    Mover,
    random_codes,
    random_slots,
    tiny,
    train,
)
from golden import dynamics as recorded
from worldloom.common import (
    FormatError,
    MismatchError,
    TrainingError,
    load_checkpoint,
    newest_checkpoint,
    read_metrics,
)
from worldloom.dynamics import DynamicsModel, Windows

HERE = Path(__file__).parent
ENVIRONMENT = {
    **os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""
}  # fmt: skip


def numbers(run: Path) -> list[dict[str, float]]:
    """The metrics of a run without what the clock says."""
    return [
        {k: v for k, v in row.items() if k not in ("tokens_per_s", "data_wait_share")}
        for row in read_metrics(run)
    ]


def assert_equal_runs(one: Path, other: Path) -> None:
    """Weights, optimizer, numbers and the model itself, to the last bit."""
    first, _ = newest_checkpoint(one)
    second, _ = newest_checkpoint(other)
    assert (first.step, first.state) == (second.step, second.state)
    for group, tensors in first.tensors.items():
        assert tensors.keys() == second.tensors[group].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, second.tensors[group][name]), f"{group} {name}"
    assert numbers(one) == numbers(other)
    for file in ("config.json", "model.safetensors", "README.md"):
        assert (one / "model" / file).read_bytes() == (other / "model" / file).read_bytes()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, mover_shards) -> Path:
    """A run of six updates with checkpoints after the third and the sixth; do not change it."""
    torch.set_num_threads(1)  # a module's fixture comes before the one that does this for tests
    run = tmp_path_factory.mktemp("finished") / "run"
    train(mover_shards.folder, run)
    return run


def rewind(finished: Path, run: Path) -> Path:
    """Copy a finished run as it was after its checkpoint of update 3."""
    shutil.copytree(finished, run)
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    shutil.rmtree(run / "model")
    return run


def test_a_run_holds_what_the_docstring_says(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "config.toml", "env.json", "metrics.jsonl", "log.txt", "checkpoints", "LATEST", "model"
    }  # fmt: skip
    rows = read_metrics(finished)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "validation_loss" in row] == [3, 6]
    last = rows[-1]
    assert {"validation_accuracy", "free_running_accuracy", "copy_accuracy"} <= last.keys()


def test_resuming_changes_nothing_to_the_last_bit(finished, mover_shards, tmp_path):
    run = rewind(finished, tmp_path / "run")
    train(mover_shards.folder, run)
    assert "from update 3" in (run / "log.txt").read_text()
    assert_equal_runs(finished, run)


def test_resuming_with_levels_changes_nothing_to_the_last_bit(tmp_path):
    shards = Dice().write(tmp_path / "shards", episodes=6, num_frames=9)
    train(shards.folder, tmp_path / "finished")
    run = rewind(tmp_path / "finished", tmp_path / "run")
    train(shards.folder, run)
    assert "from update 3" in (run / "log.txt").read_text()
    assert_equal_runs(tmp_path / "finished", run)
    weights = newest_checkpoint(run)[0].tensors["model"]
    assert any(name.startswith("level_head.") for name in weights)
    levels = [name for name in read_metrics(run)[-1] if name.endswith("_1")]
    assert levels == ["validation_loss_1", "validation_accuracy_1"]


def test_resuming_passes_over_a_damaged_checkpoint_and_says_so(finished, mover_shards, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    weights = run / "checkpoints" / "step-00000006" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    shutil.rmtree(run / "model")
    train(mover_shards.folder, run)
    assert "skipped a damaged checkpoint" in (run / "log.txt").read_text()
    assert_equal_runs(finished, run)


def test_a_finished_run_is_left_as_it_is(finished, mover_shards, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = (run / "model" / "model.safetensors").stat().st_mtime_ns
    assert train(mover_shards.folder, run) == run / "model"
    assert (run / "model" / "model.safetensors").stat().st_mtime_ns == before
    assert_equal_runs(finished, run)
    shutil.rmtree(run / "model")  # a kill came between the last checkpoint and the model
    train(mover_shards.folder, run)
    assert_equal_runs(finished, run)


def test_how_often_it_logs_validates_and_saves_changes_no_weight(finished, mover_shards, tmp_path):
    seen = []
    train(
        mover_shards.folder,
        tmp_path / "run",
        log_every=4,
        validate_every=1,
        checkpoint_every=5,
        on_validation=lambda model, step: seen.append((step, model.training)),
    )
    assert seen == [(step, False) for step in range(1, 7)]
    name = "model/model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes()


def test_a_run_of_other_settings_is_refused_and_stays_as_it_is(finished, mover_shards, tmp_path):
    run = rewind(finished, tmp_path / "run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(MismatchError, match=r"training learning_rate 0\.003 then, 0\.5 now"):
        train(mover_shards.folder, run, learning_rate=0.5)
    with pytest.raises(MismatchError, match="model dim 32 then, 64 now"):
        train(mover_shards.folder, run, model=tiny(dim=64))
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_on_other_shards_is_refused(finished, tmp_path):
    run = rewind(finished, tmp_path / "run")
    other = Mover(STEER).write(tmp_path / "shards", episodes=6, num_frames=13)
    with pytest.raises(MismatchError, match=r"shards '\w+' then, '\w+' now"):
        train(other.folder, run)


def test_the_same_shards_elsewhere_are_the_same(finished, mover_shards, tmp_path):
    run = rewind(finished, tmp_path / "run")
    shutil.copytree(mover_shards.folder, tmp_path / "elsewhere")
    train(tmp_path / "elsewhere", run)
    assert_equal_runs(finished, run)


def test_a_codebook_that_is_not_the_manifests_is_refused(mover_shards, tmp_path):
    shutil.copytree(mover_shards.folder, tmp_path / "shards")
    path = tmp_path / "shards" / "codebook.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(FormatError, match="codebook"):
        train(tmp_path / "shards", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_code_beyond_the_vocabulary_is_refused(mover_shards, tmp_path):
    shutil.copytree(mover_shards.folder, tmp_path / "shards")
    tar = tmp_path / "shards" / "shard-000000.tar"
    content = bytearray(tar.read_bytes())
    for row in mover_shards.episodes:
        if row.shard == 0:
            offset, size = row.span("codes")
            content[offset + size - 10 * 16 : offset + size] = b"\x02" * 160
    tar.write_bytes(content)
    with pytest.raises(FormatError, match="code 2 in a vocabulary of 2"):
        train(tmp_path / "shards", tmp_path / "run", num_steps=50)


def test_a_split_with_nothing_to_predict_is_refused_before_anything_is_written(tmp_path):
    shards = Mover(STEER).write(tmp_path / "shards", episodes=3, num_frames=1)
    with pytest.raises(FormatError, match="train split has no episode of two latent frames"):
        train(shards.folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_before_the_update(mover_shards, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(TrainingError, match=r"the update was not done .* Lower --training"):
        train(mover_shards.folder, run, learning_rate=1e18, checkpoint_every=1, num_steps=50)
    checkpoint, skipped = newest_checkpoint(run)
    assert skipped == []
    for group in checkpoint.tensors.values():
        assert all(torch.isfinite(tensor).all() for tensor in group.values())
    diverged = json.loads((run / "diverged.json").read_text())
    assert diverged["step"] == checkpoint.step + 1
    assert not all(math.isfinite(float(diverged[name])) for name in ("loss", "gradient_norm"))
    windows = Windows(mover_shards, "train", window_frames=TRAINING.window_frames)
    origins = windows.origins(checkpoint.step, size=TRAINING.batch_windows, seed=TRAINING.seed)
    named = [(window["episode"], window["first_latent_frame"]) for window in diverged["windows"]]
    assert named == origins
    assert not (run / "model").exists()


def test_training_in_bfloat16_keeps_weights_and_loss_in_float32_and_the_model_as_it_was(
    mover_shards, tmp_path
):
    forwards = []

    def on_validation(model, step):
        logits_BfSV = model(random_codes(model, 3), random_slots(model, 3))
        forwards.append((logits_BfSV.dtype, "forward" in vars(model)))

    train(
        mover_shards.folder,
        tmp_path / "run",
        num_steps=3,
        bf16=True,
        on_validation=on_validation,
    )
    # Accelerate's own mixed precision would leave a bf16 forward behind.
    assert forwards == [(torch.float32, False)]
    checkpoint, _ = newest_checkpoint(tmp_path / "run")
    assert {tensor.dtype for tensor in checkpoint.tensors["model"].values()} == {torch.float32}


def test_bfloat16_learns_what_float32_learns(mover_shards, tmp_path):
    losses = {}
    for bf16 in (False, True):
        train(mover_shards.folder, tmp_path / str(bf16), bf16=bf16, num_steps=6)
        losses[bf16] = [r["loss"] for r in read_metrics(tmp_path / str(bf16)) if "loss" in r]
    assert losses[True] != losses[False]  # or it is not bf16
    assert losses[True] == pytest.approx(losses[False], rel=0.02)


def test_toy_training_reproduces_its_recorded_losses():
    """To accept new numbers: python tests/golden/record.py, and a line in CHANGELOG.md."""
    golden = json.loads((HERE.parent / "golden" / "dynamics.json").read_text())
    found = recorded.record()
    assert found.keys() == golden.keys()
    for name, values in golden.items():
        assert found[name] == pytest.approx(values, rel=1e-4), name


@pytest.mark.parametrize("num_levels", [1, 2])
def test_the_example_of_the_model_card_runs_as_it_stands(
    finished, num_levels, tmp_path, monkeypatch
):
    run, shape, said = finished, (1, 5, 4, 4), "cells of 2 codes."
    if num_levels == 2:
        shards = Dice().write(tmp_path / "shards", episodes=4, num_frames=8)
        run = train(shards.folder, tmp_path / "run", num_steps=1).parent
        shape, said = (1, 5, 2, 3, 2), "cells of 6 codes in each of 2 levels."
    card = (run / "model" / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    model = DynamicsModel.from_pretrained(run / "model")
    names = {
        "prompt": random_codes(model, 2, batch=1), "actions": random_slots(model, 5, batch=1)
    }  # fmt: skip
    monkeypatch.chdir(run)
    exec(example.replace("this folder", "model"), names)
    assert names["codes"].shape == shape
    assert "discrete: stay, up, down, left, right" in card
    assert said in card
    assert f"(B, p, {', '.join(map(str, shape[2:]))}) codes" in card


def test_every_kind_of_actions_trains(tmp_path):
    shards = Mover(KEYS).write(tmp_path / "keys", episodes=4, num_frames=8)
    model = DynamicsModel.from_pretrained(train(shards.folder, tmp_path / "run", num_steps=2))
    assert model.spec.actions == KEYS


@pytest.mark.slow
def test_a_kill_at_any_step_of_writing_loses_nothing(mover_shards, tmp_path):
    """The sweep is a process of its own: it forks, which this one may be too large for."""
    done = subprocess.run(
        [sys.executable, HERE / "kill_sweep.py", mover_shards.folder, tmp_path],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == "equal"


@pytest.mark.slow
def test_sigterm_and_ctrl_c_save_and_exit_so_that_the_same_command_continues(
    mover_shards, tmp_path
):
    run = tmp_path / "run"
    steps = [0]
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        process = subprocess.Popen(
            [sys.executable, HERE / "toys.py", mover_shards.folder, run, "1000000"],
            stderr=subprocess.DEVNULL,
            env=ENVIRONMENT,
        )
        try:
            wait_for(lambda: last_step(run) > steps[-1] + 1, process)
            process.send_signal(number)
            assert process.wait(timeout=60) == code
        finally:
            process.kill()
        checkpoint, skipped = newest_checkpoint(run)
        assert skipped == []
        assert checkpoint.step == last_step(run) > steps[-1]
        assert f"stopped at update {checkpoint.step}" in (run / "log.txt").read_text()
        steps.append(checkpoint.step)
    assert f"from update {steps[1]}" in (run / "log.txt").read_text()
    updates = [row["step"] for row in read_metrics(run) if "loss" in row]
    assert updates == list(range(1, steps[-1] + 1))
    loaded = load_checkpoint(run / (run / "LATEST").read_text().strip())
    assert loaded.step == steps[-1]


def last_step(run: Path) -> int:
    steps = [r["step"] for r in read_metrics(run)] if (run / "metrics.jsonl").exists() else []
    return steps[-1] if steps else 0


def wait_for(reached, process: subprocess.Popen[bytes], timeout_s: float = 300) -> None:
    deadline = time.monotonic() + timeout_s
    while not reached():
        assert process.poll() is None, f"ended by itself with {process.returncode}"
        assert time.monotonic() < deadline, "took too long"
        time.sleep(0.05)
