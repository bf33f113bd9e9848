"""Promises of training.py and learner.py.

It learns, resumes to the last bit, stops well and survives a kill; a batch in parts or shared by
processes is the whole batch; the average disturbs nothing; the log says how the codebook is used.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from golden import tokenizer as recorded
from PIL import Image
from safetensors.torch import load_file
from tokenizer.learn_together import NUM_STEPS, QUANTIZERS
from tokenizer.toys import CONFIG, EVERYTHING, TRAINING, train
from worldloom.common import (
    ConfigError,
    Episodes,
    FormatError,
    MismatchError,
    TrainingError,
    load_checkpoint,
    newest_checkpoint,
    read_metrics,
)
from worldloom.tokenizer import Clips, ConvTokenizer, QuantizerConfig, Trained, load_tokenizer
from worldloom.tokenizer.learner import Learner
from worldloom.tokenizer.training_pictures import usage_png

HERE = Path(__file__).parent
ENVIRONMENT = {
    **os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""
}  # fmt: skip


def numbers(run: Path) -> list[dict[str, float]]:
    """The metrics of a run without what the clock says."""
    rows = read_metrics(run)
    return [{k: v for k, v in row.items() if k != "seconds_per_step"} for row in rows]


def assert_equal_runs(one: Path, other: Path) -> None:
    """Weights, optimizer, numbers and the tokenizer itself, to the last bit."""
    first, _ = newest_checkpoint(one)
    second, _ = newest_checkpoint(other)
    assert (first.step, first.state) == (second.step, second.state)
    assert first.tensors.keys() == second.tensors.keys()
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


@pytest.fixture(scope="module")
def finished_with_everything(tmp_path_factory, toy_episodes) -> Path:
    """The same with all that is off by default; do not change it."""
    torch.set_num_threads(1)
    run = tmp_path_factory.mktemp("everything") / "run"
    train(toy_episodes.folder, run, **EVERYTHING)
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
    assert set(held_out) == {
        "step", "validation_psnr_db", "validation_moving_psnr_db", "validation_codes_used",
        "validation_perplexity",
    }  # fmt: skip
    assert {path.name for path in (finished / "samples").iterdir()} == {
        f"step-0000000{step}{end}.png" for step in (3, 6) for end in ("", "-codes")
    }
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


def test_resuming_with_everything_on_changes_nothing_to_the_last_bit(
    finished_with_everything, toy_episodes, tmp_path
):
    """After update 3 the discriminator has learned once; of one that has not there is no moment."""
    run = rewind(finished_with_everything, tmp_path / "run")
    train(toy_episodes.folder, run, **EVERYTHING)
    assert "from update 3" in (run / "log.txt").read_text()
    assert_equal_runs(run, finished_with_everything)
    checkpoint, _ = newest_checkpoint(run)
    assert checkpoint.tensors.keys() == {
        "model", "optimizer", "average", "discriminator", "discriminator_optimizer"
    }  # fmt: skip
    late = {**EVERYTHING, "discriminator_start": 0.7}
    train(toy_episodes.folder, tmp_path / "late", **late)
    again = rewind(tmp_path / "late", tmp_path / "again")
    assert newest_checkpoint(again)[0].tensors["discriminator_optimizer"] == {}
    train(toy_episodes.folder, again, **late)
    assert_equal_runs(again, tmp_path / "late")


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


def test_how_often_it_logs_and_draws_changes_no_weight_and_may_change_on_the_way(
    finished, toy_episodes, tmp_path
):
    train(toy_episodes.folder, tmp_path / "run", log_every=4, sample_every=1, checkpoint_every=6)
    again = rewind(finished, tmp_path / "again")
    train(toy_episodes.folder, again, log_every=4, sample_every=1, checkpoint_every=1)
    assert (again / "checkpoints" / "step-00000005").exists()
    for run in ("run", "again"):
        weights = (tmp_path / run / "model" / "model.safetensors").read_bytes()
        assert weights == (finished / "model" / "model.safetensors").read_bytes()


def test_who_asks_to_stop_has_the_checkpoint_before_anything_is_drawn(
    toy_episodes, tmp_path, monkeypatch
):
    run, seen, true_apply = tmp_path / "run", [], Learner.apply

    def apply(self, *, step):
        if step == 1:
            signal.raise_signal(signal.SIGTERM)
        true_apply(self, step=step)

    def look(_learner, _held_out, _training, _log, step):
        seen.append((step, (run / "checkpoints" / f"step-{step:08d}").exists()))

    monkeypatch.setattr(Learner, "apply", apply)
    monkeypatch.setattr("worldloom.tokenizer.training._look", look)
    with pytest.raises(SystemExit) as ended:
        train(toy_episodes.folder, run, sample_every=1, checkpoint_every=6)
    assert ended.value.code == 143
    assert seen == [(1, False), (2, True)]


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


def test_the_log_names_each_term_from_the_update_on_in_which_it_counts(
    finished_with_everything,
):
    rows = [row for row in read_metrics(finished_with_everything) if "loss" in row]
    for row in rows:
        loss = (
            row["reconstruction"] + row["quantizer"] + 0.2 * row["temporal"]
            + 0.5 * row["gradient"] + 0.5 * row["multiscale"] + 0.1 * row.get("adversarial", 0.0)
        )  # fmt: skip
        assert row["loss"] == pytest.approx(loss, rel=1e-5)
    for name in ("adversarial", "discriminator", "discriminator_gradient_norm"):
        assert [name in row for row in rows] == [False, False, True, True, True, True]


def test_the_average_is_what_is_judged_and_saved_and_training_goes_on_without_it(
    finished, toy_episodes, tmp_path
):
    run = tmp_path / "run"
    train(toy_episodes.folder, run, ema_decay=0.9)
    tensors, plain = newest_checkpoint(run)[0].tensors, newest_checkpoint(finished)[0].tensors
    for group in ("model", "optimizer"):
        for name, tensor in plain[group].items():
            assert torch.equal(tensor, tensors[group][name]), f"{group} {name}"
    saved = load_file(run / "model" / "model.safetensors")
    assert saved.keys() == tensors["model"].keys()
    assert 0 < len(tensors["average"]) < len(saved)
    for name, tensor in saved.items():
        source = tensors["average" if name in tensors["average"] else "model"]
        assert torch.equal(tensor, source[name]), name
    assert any(not torch.equal(t, tensors["model"][n]) for n, t in tensors["average"].items())
    judged, before = (read_metrics(r)[-1]["validation_psnr_db"] for r in (run, finished))
    assert judged != before


def fresh_learner(config, **settings) -> Learner:
    """A learner with the toy's weights, in this process."""
    tokenizer = ConvTokenizer(config, trained=Trained(fps=1, frame_skip=1), seed=3)
    training = replace(TRAINING, batch_clips=5, **settings)
    return Learner(tokenizer, None, training=training, accelerator=Accelerator(cpu=True))


def gradients_of(learner: Learner, frames: torch.Tensor, *, step: int) -> torch.Tensor:
    learner.tokenizer.zero_grad()
    learner.gradients(frames, step=step)
    return torch.cat([p.grad.flatten() for p in learner.tokenizer.parameters()])


@pytest.mark.parametrize("accumulate", [2, 3, 5])
@pytest.mark.parametrize("kind", ["fsq", "vq", "residual"])
def test_the_gradients_of_a_batch_in_parts_are_those_of_the_whole(toy_episodes, kind, accumulate):
    """With a codebook at rest and no hard pixels, which are of a part, as learner.py says.

    5 clips make parts of unequal size; the discriminator takes part.
    """
    at_rest = {"decay": 1.0, "dead_code_threshold": 0.0}
    config = replace(CONFIG, quantizer=replace(QUANTIZERS[kind], **at_rest))
    clips = Clips(
        toy_episodes, toy_episodes.split("train"), clip_frames=4, size=(16, 24), resize="exact"
    )
    first, frames = (clips.batch(index, size=5, seed=0) for index in (0, 1))
    settings = {
        **EVERYTHING, "ema_decay": 0.0, "discriminator_start": 0.0, "hard_pixel_power": 0.0
    }  # fmt: skip
    whole = fresh_learner(config, **{**settings, "accumulate": 1})
    gradients_of(whole, first, step=0)  # k-means
    parts = fresh_learner(config, **{**settings, "accumulate": accumulate})
    gradients_of(parts, first, step=0)
    parts.tokenizer.load_state_dict(whole.tokenizer.state_dict())
    expected, found = (gradients_of(learner, frames, step=1) for learner in (whole, parts))
    assert expected.norm() > 0.1
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_the_discriminator_learns_to_tell_frames_apart_and_only_from_its_own_loss(toy_episodes):
    clips = Clips(
        toy_episodes, toy_episodes.split("train"), clip_frames=4, size=(16, 24), resize="exact"
    )
    frames = clips.batch(0, size=5, seed=0)
    settings = {"discriminator_start": 0.0, "num_steps": 30}
    learners = [
        fresh_learner(CONFIG, **settings, discriminator_weight=weight) for weight in (0.01, 10.0)
    ]
    fresh = learners[0].tensors()["discriminator"]
    before = {name: tensor.clone() for name, tensor in fresh.items()}
    for learner in learners:
        untaught = learner.gradients(frames, step=0).losses["discriminator"].item()
        learner.apply(step=0)
    assert untaught > 0.8  # to know nothing is 1
    first, second = (learner.tensors() for learner in learners)
    # However much the tokenizer wants its frames to be taken for true.
    for name, tensor in first["discriminator"].items():
        assert torch.equal(tensor, second["discriminator"][name]), name
        assert not torch.equal(tensor, before[name]), name
    assert any(not torch.equal(t, second["model"][n]) for n, t in first["model"].items())
    for step in range(1, 10):
        taught = learners[0].gradients(frames, step=step).losses["discriminator"].item()
        learners[0].apply(step=step)
    assert taught < 0.4


def test_clips_that_do_not_fill_latent_frames_are_refused_naming_the_nearest(
    toy_episodes, tmp_path
):
    video = replace(CONFIG, architecture="video", temporal_stride=4)
    with pytest.raises(ConfigError, match=r"clip_frames is 8, .* nearest that fit are 5 and 9"):
        train(toy_episodes.folder, tmp_path / "run", config=video, clip_frames=8)
    assert not (tmp_path / "run").exists()
    train(toy_episodes.folder, tmp_path / "run", config=video, clip_frames=5, num_steps=1)


def test_a_codebook_that_collapses_is_said_to_and_what_to_change(toy_episodes, tmp_path):
    """Nothing replaces dead codes, and the latents run away from the rest: a real collapse."""
    quantizer = QuantizerConfig(vocab_size=256, code_dim=4, dead_code_threshold=0.0)
    settings = {"num_steps": 12, "sample_every": 4, "learning_rate": 3e-2}
    for name, config in (
        ("bad", replace(CONFIG, quantizer=quantizer)),
        ("good", replace(CONFIG, quantizer=QuantizerConfig(kind="fsq", fsq_levels=(3, 2)))),
    ):
        train(toy_episodes.folder, tmp_path / name, config=config, **settings)
    log = (tmp_path / "bad" / "log.txt").read_text()
    assert "warning: at update 4" not in log  # a young codebook is not yet in use
    assert "warning: at update 12 the codebook has collapsed: " in log
    assert "of 256 codes occur in 6144 held-out cells" in log
    assert "raise --model.quantizer.dead-code-threshold above 0" in log
    row = read_metrics(tmp_path / "bad")[-1]
    assert row["validation_codes_used"] < 0.2
    assert "warning" not in (tmp_path / "good" / "log.txt").read_text()


def test_every_level_of_residual_codes_is_in_the_log(toy_episodes, tmp_path):
    config = replace(CONFIG, quantizer=QUANTIZERS["residual"])
    train(toy_episodes.folder, tmp_path / "run", config=config, num_steps=3)
    row = read_metrics(tmp_path / "run")[-1]
    for name in ("codes_used", "perplexity"):
        levels = [row[f"validation_{name}_level_{level}"] for level in (1, 2)]
        assert row[f"validation_{name}"] == pytest.approx(sum(levels) / 2)


def test_the_histogram_is_of_the_codes_of_the_held_out_clips(finished, toy_episodes):
    clips = Clips(
        toy_episodes, toy_episodes.split("validation"), clip_frames=4, size=(16, 24), resize="exact"
    )
    true = torch.cat([clips.batch(index, size=16, seed=TRAINING.seed) for index in range(4)])
    codes_Bthw = load_tokenizer(finished / "model").encode(true)
    counts_QV = torch.bincount(codes_Bthw.flatten(), minlength=32)[None]
    assert (finished / "samples" / "step-00000006-codes.png").read_bytes() == usage_png(counts_QV)


def test_toy_training_reproduces_its_recorded_losses():
    """To accept new numbers: python tests/golden/record.py, and a line in CHANGELOG.md."""
    golden = json.loads((HERE.parent / "golden" / "tokenizer.json").read_text())
    found = recorded.record()
    assert found.keys() == golden.keys()
    for name, values in golden.items():
        assert found[name] == pytest.approx(values, rel=1e-4), name


def test_it_learns_a_bouncing_square_and_not_only_its_background(toy_episodes, tmp_path):
    """Untrained: loss 0.70. The mean colour of a clip everywhere: 5 dB where the square is."""
    train(toy_episodes.folder, tmp_path, num_steps=100, log_every=100)
    update, held_out = read_metrics(tmp_path)[-2:]
    assert update["loss"] < 0.2
    assert held_out["validation_moving_psnr_db"] > 16
    assert update["codes_used"] > 0.5


@pytest.mark.slow
def test_a_kill_at_any_step_of_writing_loses_nothing(toy_episodes, tmp_path):
    """The sweep is a process of its own: it forks, which this one may be too large for."""
    done = subprocess.run(
        [sys.executable, HERE / "kill_sweep.py", toy_episodes.folder, tmp_path],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
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
        env=ENVIRONMENT,
    )


def last_step(run: Path) -> int:
    steps = [r["step"] for r in read_metrics(run)] if (run / "metrics.jsonl").exists() else []
    return steps[-1] if steps else 0


def wait_for(reached, process: subprocess.Popen[bytes], timeout_s: float = 300) -> None:
    deadline = time.monotonic() + timeout_s
    while not reached():
        assert process.poll() is None, f"ended by itself with {process.returncode}"
        assert time.monotonic() < deadline, "took too long"
        time.sleep(0.05)


def torchrun(*words: object) -> None:
    """Run a script of this folder in two processes."""
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
            *map(str, words),
        ],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_two_processes_stay_one_tokenizer_and_learn_what_one_process_learns(toy_episodes, tmp_path):
    """Every quantizer with everything on; 5 clips are not dealt out evenly.

    On both ranks every tensor is the same to the last bit, codebooks included. With fsq and adamw,
    where nothing is drawn and everything is a sum, so is what one process computes but for the
    order of the sums: losses within 1e-5, weights within 5e-5, since Adam divides by what is nearly
    0 and so enlarges a rounding. Learned codebooks begin with k-means from other draws, and lfq's
    entropy weighs processes alike though one has a clip more: there only the losses are near.
    """
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    script = HERE / "learn_together.py"
    torchrun(script, toy_episodes.folder, two)
    subprocess.run([sys.executable, script, toy_episodes.folder, one], env=ENVIRONMENT, check=True)
    for kind in QUANTIZERS:
        first, second = (load_file(two / f"{kind}-{rank}.safetensors") for rank in (0, 1))
        alone = load_file(one / f"{kind}-0.safetensors")
        assert first.keys() == second.keys() == alone.keys()
        for name, tensor in first.items():
            assert torch.equal(tensor, second[name]), f"{kind} {name}"
            if kind == "fsq" and name != "losses":
                torch.testing.assert_close(tensor, alone[name], rtol=0, atol=5e-5)
        assert len(first["losses"]) == NUM_STEPS
        within = {"fsq": 1e-5, "lfq": 0.1}.get(kind, 0.01)
        torch.testing.assert_close(
            first["losses"][:, 0], alone["losses"][:, 0], rtol=within, atol=0
        )


@pytest.mark.slow
def test_of_two_processes_one_writes_and_one_process_can_go_on(toy_episodes, tmp_path):
    run = tmp_path / "run"
    torchrun(HERE / "toys.py", toy_episodes.folder, run, 4)
    log = (run / "log.txt").read_text()
    assert "2 process(es) on cpu" in log
    assert log.count("update 4 of 4") == 1
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3, 3, 4, 4]
    tokenizer = load_tokenizer(run / "model")
    assert tokenizer.spec.fingerprint[:16] in (run / "model" / "README.md").read_text()
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    train(toy_episodes.folder, run, num_steps=4)
    assert "1 process(es) go on with what 2 began: the same clips" in (run / "log.txt").read_text()
    assert newest_checkpoint(run)[0].step == 4


@pytest.mark.slow
def test_more_processes_than_clips_are_refused(toy_episodes, tmp_path):
    with pytest.raises(AssertionError, match="batch_clips is 1, but 2 processes with 1 part"):
        torchrun(HERE / "toys.py", toy_episodes.folder, tmp_path / "run", 4, 1)
    assert not (tmp_path / "run").exists()
