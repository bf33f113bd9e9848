"""Promises of training.py: it learns, resumes to the last bit, stops well, and survives a kill."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import tokenizer as recorded
from PIL import Image
from tokenizer.toys import TRAINING, train
from worldloom.common import (
    Episodes,
    FormatError,
    MismatchError,
    TrainingError,
    load_checkpoint,
    newest_checkpoint,
    read_metrics,
)
from worldloom.tokenizer import Clips, load_tokenizer

HERE = Path(__file__).parent


def numbers(run: Path) -> list[dict[str, float]]:
    """The metrics of a run without what the clock says."""
    rows = read_metrics(run)
    return [{k: v for k, v in row.items() if k != "seconds_per_step"} for row in rows]


def assert_equal_runs(one: Path, other: Path) -> None:
    """Weights, optimizer, numbers and the tokenizer itself, to the last bit."""
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
def finished(tmp_path_factory, toy_episodes) -> Path:
    """A run of six updates with checkpoints after the third and the sixth; do not change it."""
    torch.set_num_threads(1)  # a module's fixture comes before the one that does this for tests
    run = tmp_path_factory.mktemp("finished") / "run"
    train(toy_episodes.folder, run)
    return run


def read_picture(run: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(run / "samples" / "step-00000006.png")))


def rewind(finished: Path, run: Path) -> Path:
    """Copy a finished run as it was after its checkpoint of update 3."""
    shutil.copytree(finished, run)
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    shutil.rmtree(run / "model")
    return run


def test_a_run_holds_what_the_docstring_says(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "config.toml", "env.json", "metrics.jsonl", "log.txt", "samples", "checkpoints", "model",
        "LATEST",
    }  # fmt: skip
    assert [row["step"] for row in read_metrics(finished)] == [1, 2, 3, 3, 4, 5, 6, 6]
    held_out = read_metrics(finished)[-1]
    assert set(held_out) == {"step", "validation_psnr_db", "validation_moving_psnr_db"}
    picture = read_picture(finished)
    # Six clips of four frames, true above reconstructed, a line of one pixel around each.
    assert picture.shape == (12 * (16 + 1) + 1, 4 * (24 + 1) + 1, 3)
    card = (finished / "model" / "README.md").read_text()
    assert load_tokenizer(finished / "model").spec.fingerprint[:16] in card


def test_the_picture_shows_held_out_frames_above_their_reconstruction(finished, toy_episodes):
    clips = Clips(
        toy_episodes, toy_episodes.split("validation"), clip_frames=4, size=(16, 24), resize="exact"
    )
    true = clips.batch(0, size=6, seed=TRAINING.seed)
    tokenizer = load_tokenizer(finished / "model")
    recon = tokenizer.decode(tokenizer.encode(true), num_frames=4)
    picture = read_picture(finished)
    assert torch.equal(picture[1:17, 26:50], true[0, 1])
    assert torch.equal(picture[18:34, 26:50], recon[0, 1])


def test_resuming_changes_nothing_to_the_last_bit(finished, toy_episodes, tmp_path):
    run = rewind(finished, tmp_path / "run")
    train(toy_episodes.folder, run)
    assert "from update 3" in (run / "log.txt").read_text()
    assert_equal_runs(run, finished)


def test_resuming_passes_over_a_damaged_checkpoint_and_says_so(finished, toy_episodes, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "model")
    path = run / "checkpoints" / "step-00000006" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    train(toy_episodes.folder, run)
    assert "skipped a damaged checkpoint" in (run / "log.txt").read_text()
    assert_equal_runs(run, finished)


def test_a_finished_run_is_left_as_it_is(finished, toy_episodes, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = (run / "model" / "config.json").stat().st_mtime_ns
    assert train(toy_episodes.folder, run) == run / "model"
    assert (run / "model" / "config.json").stat().st_mtime_ns == before
    assert_equal_runs(run, finished)


def test_how_often_it_logs_and_draws_changes_no_weight(finished, toy_episodes, tmp_path):
    train(toy_episodes.folder, tmp_path / "run", log_every=4, sample_every=1, checkpoint_every=6)
    weights = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    assert weights == (finished / "model" / "model.safetensors").read_bytes()


def test_a_run_of_other_settings_is_refused_and_stays_as_it_is(finished, toy_episodes, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = (run / "config.toml").read_bytes()
    with pytest.raises(MismatchError, match=r"training learning_rate 0\.002 then, 0\.001 now"):
        train(toy_episodes.folder, run, learning_rate=1e-3)
    assert (run / "config.toml").read_bytes() == before


def test_a_run_on_other_episodes_is_refused(finished, toy_episodes, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    shutil.copytree(toy_episodes.folder, tmp_path / "episodes")
    (tmp_path / "episodes" / "episode-2.npz").unlink()
    with pytest.raises(MismatchError, match=r"other settings \(episodes '"):
        train(tmp_path / "episodes", tmp_path / "run")


def test_episodes_too_short_for_a_clip_are_refused_before_anything_is_written(
    toy_episodes, tmp_path
):
    with pytest.raises(FormatError, match="no episode has 40 frames"):
        train(toy_episodes.folder, tmp_path / "run", clip_frames=40)
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_before_the_update(toy_episodes, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(TrainingError, match=r"the update was not done .* Lower --training"):
        train(toy_episodes.folder, run, learning_rate=1e18, checkpoint_every=1, num_steps=50)
    checkpoint, skipped = newest_checkpoint(run)
    assert skipped == []
    for group in checkpoint.tensors.values():
        assert all(torch.isfinite(tensor).all() for tensor in group.values())
    diverged = json.loads((run / "diverged.json").read_text())
    assert diverged["step"] == checkpoint.step + 1
    assert not all(math.isfinite(float(diverged[name])) for name in ("loss", "gradient_norm"))
    clips = Clips(
        toy_episodes, toy_episodes.split("train"), clip_frames=4, size=(16, 24), resize="exact"
    )
    origins = clips.origins(checkpoint.step, size=TRAINING.batch_clips, seed=TRAINING.seed)
    assert [(clip["episode"], clip["first_frame"]) for clip in diverged["clips"]] == origins
    assert not (run / "model").exists()


def test_training_in_bfloat16_keeps_the_weights_and_the_quantizer_in_float32(
    toy_episodes, tmp_path
):
    train(toy_episodes.folder, tmp_path / "run", bf16=True, num_steps=2)
    checkpoint, _ = newest_checkpoint(tmp_path / "run")
    dtypes = {tensor.dtype for tensor in checkpoint.tensors["model"].values()}
    assert dtypes == {torch.float32, torch.bool}


def test_toy_training_reproduces_its_recorded_losses():
    """To accept new numbers: python tests/golden/record.py, and a line in CHANGELOG.md."""
    golden = json.loads((HERE.parent / "golden" / "tokenizer.json").read_text())
    found = recorded.record()
    assert found.keys() == golden.keys()
    for name, values in golden.items():
        assert found[name] == pytest.approx(values, rel=1e-4), name


def test_it_learns_a_bouncing_square_and_not_only_its_background(toy_episodes, tmp_path):
    """Untrained: loss 0.58. The mean colour of a clip everywhere: 5 dB where the square is."""
    train(toy_episodes.folder, tmp_path, learning_rate=1e-2, num_steps=100, log_every=100)
    update, held_out = read_metrics(tmp_path)[-2:]
    assert update["loss"] < 0.13
    assert held_out["validation_moving_psnr_db"] > 16
    assert update["codes_used"] > 0.5


@pytest.mark.slow
def test_a_kill_at_any_step_of_writing_loses_nothing(toy_episodes, tmp_path):
    """The sweep is a process of its own: it forks, which this one may be too large for."""
    done = subprocess.run(
        [sys.executable, HERE / "kill_sweep.py", toy_episodes.folder, tmp_path],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(HERE.parent), "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == "equal"


@pytest.mark.slow
def test_sigterm_and_ctrl_c_save_and_exit_so_that_the_same_command_continues(
    toy_episodes, tmp_path
):
    run = tmp_path / "run"
    steps = [0]
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        process = start_endless(toy_episodes, run)
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


def start_endless(episodes: Episodes, run: Path) -> subprocess.Popen[bytes]:
    """Train in a process that only a signal ends."""
    return subprocess.Popen(
        [sys.executable, HERE / "toys.py", episodes.folder, run, "1000000"],
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(HERE.parent)},
    )


def last_step(run: Path) -> int:
    return read_metrics(run)[-1]["step"] if (run / "metrics.jsonl").exists() else 0


def wait_for(reached, process: subprocess.Popen[bytes], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not reached():
        assert process.poll() is None, f"ended by itself with {process.returncode}"
        assert time.monotonic() < deadline, "took too long"
        time.sleep(0.05)
