"""train_tokenizer.py and train_dynamics.py: killed, stopped or refused, and the dry run."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from chain_worlds import (
    DYNAMICS_FLAGS,
    PUSHES,
    TOKENIZER_FLAGS,
    hashes,
    save_tokenizer,
    write_pushed_squares,
)
from worldloom.common import read_metrics
from worldloom.dynamics import DynamicsModel
from worldloom.pipelines.tokenize import TokenizeConfig, tokenize
from worldloom.tokenizer import load_tokenizer

STEPS = ("--training.num-steps", 5, "--training.checkpoint-every", 2)
"""Checkpoints after updates 2, 4 and 5."""
COMMANDS = ("train-tokenizer", "train-dynamics")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Episodes, a tokenizer and their shards."""
    folder = tmp_path_factory.mktemp("inputs")
    write_pushed_squares(folder / "episodes", (20, 9, 14, 12))
    save_tokenizer(folder / "tokenizer")
    tokenize(
        TokenizeConfig(
            episodes=folder / "episodes",
            tokenizer=str(folder / "tokenizer"),
            output=folder / "shards",
            device="cpu",
        )
    )
    return folder


@pytest.fixture(scope="module")
def lines(inputs):
    """The command lines of the two trainings but for --output."""
    tokenizer = ("train-tokenizer", "--episodes", inputs / "episodes", *TOKENIZER_FLAGS, *STEPS)
    dynamics = (
        "train-dynamics", "--shards", inputs / "shards", "--tokenizer", inputs / "tokenizer",
        *DYNAMICS_FLAGS, *STEPS, "--training.validate-every", 5,
    )  # fmt: skip
    return {"train-tokenizer": tokenizer, "train-dynamics": dynamics}


@pytest.fixture(scope="module")
def undisturbed(commands, lines, tmp_path_factory):
    """Both runs as nobody disturbed them: their folders and how the commands ended."""
    runs = {}
    for name, words in lines.items():
        output = tmp_path_factory.mktemp("undisturbed") / name
        runs[name] = (output, commands.run(*words, "--output", output))
        assert runs[name][1].code == 0, runs[name][1].err
    return runs


def check_same_run(output, wanted):
    """The model, the last checkpoint and every number are those of an undisturbed run."""
    assert hashes(output / "model") == hashes(wanted / "model")
    last = (wanted / "LATEST").read_text().strip()
    assert hashes(output / last) == hashes(wanted / last)
    # A kill just before LATEST is written, in the last checkpoint, leaves the one before it there.
    assert (output / (output / "LATEST").read_text().strip() / "manifest.json").exists()
    assert numbers(output) == numbers(wanted)
    assert not list(output.rglob("tmp-*"))


def numbers(run):
    """The metrics that do not depend on the clock, each row once.

    The held-out numbers at the end stand twice if a kill came between them and the model's saving.
    """
    rows = [
        {key: value for key, value in row.items() if not re.search(r"second|per_s|wait", key)}
        for row in read_metrics(run)
    ]
    return [row for place, row in enumerate(rows) if row not in rows[:place]]


@pytest.mark.parametrize("name", COMMANDS)
def test_stdout_gets_the_model_and_stderr_what_to_do_next(undisturbed, name):
    output, ended = undisturbed[name]
    assert ended.out == f"{output / 'model'}\n"
    following = {"train-tokenizer": "tokenize", "train-dynamics": "generate"}[name]
    assert f"next: worldloom {following} " in ended.err
    assert {path.name for path in output.iterdir()} == {
        "config.toml", "env.json", "metrics.jsonl", "log.txt", "samples", "checkpoints", "LATEST",
        "model",
    }  # fmt: skip
    assert [row["step"] for row in read_metrics(output)][:5] == [1, 2, 3, 4, 5]
    assert list((output / "samples").glob("*.png"))


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    "failpoint",
    [
        # Three files a checkpoint: the first of all, one within the second, that of the model.
        "checkpoint-file:1", "checkpoint-file:5", "checkpoint-file:10", "folder-fsync:2",
        "folder-fsync:4", "folder-rename:1", "folder-rename:4", "checkpoint-latest:1",
        "checkpoint-latest:3", "write:1",
    ],
)  # fmt: skip
def test_killed_anywhere_and_run_again_it_ends_with_the_weights_of_an_undisturbed_run(
    commands, lines, undisturbed, tmp_path, name, failpoint
):
    words = (*lines[name], "--output", tmp_path / "run")
    killed = commands.run(*words, failpoint=failpoint)
    assert killed.code == -signal.SIGKILL, killed.err
    ended = commands.run(*words)
    assert ended.code == 0, ended.err
    check_same_run(tmp_path / "run", undisturbed[name][0])


@pytest.mark.parametrize(
    ("name", "number", "code"),
    [
        ("train-tokenizer", signal.SIGTERM, 143),
        ("train-dynamics", signal.SIGTERM, 143),
        ("train-dynamics", signal.SIGINT, 130),
    ],
)
def test_stopped_by_a_signal_it_saves_says_so_and_continues(
    commands, lines, tmp_path, name, number, code
):
    words = (*lines[name], "--training.num-steps", 60, "--training.checkpoint-every", 1000,
             "--training.validate-every" if name == "train-dynamics" else "--training.sample-every",
             1000)  # fmt: skip
    assert commands.run(*words, "--output", tmp_path / "whole").code == 0
    for attempt in range(5):  # on a busy machine the signal may come too late
        output = tmp_path / str(attempt)
        running = commands.start(*words, "--output", output)
        while not (output / "metrics.jsonl").exists() and running.is_running():
            time.sleep(0.001)
        running.send(number)
        ended = running.wait()
        if ended.code != 0:
            break
    assert ended.code == code, ended.err
    (step,) = re.findall(r"stopped at update (\d+); the same command continues", ended.err)
    assert 0 < int(step) < 60
    ended = commands.run(*words, "--output", output)
    assert ended.code == 0, ended.err
    assert f"from update {step}" in ended.err
    check_same_run(output, tmp_path / "whole")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_finished_run_is_not_trained_again_and_stays_what_it_is(
    commands, lines, undisturbed, tmp_path, name
):
    shutil.copytree(undisturbed[name][0], tmp_path / "run")
    ended = commands.run(*lines[name], "--output", tmp_path / "run")
    assert ended.code == 0, ended.err
    assert "update 5 of 5" not in ended.err
    check_same_run(tmp_path / "run", undisturbed[name][0])


@pytest.mark.parametrize("name", COMMANDS)
def test_other_settings_on_a_run_that_was_begun_are_refused_by_name(
    commands, lines, undisturbed, tmp_path, name
):
    run = tmp_path / "run"
    shutil.copytree(undisturbed[name][0], run)
    ended = commands.run(*lines[name], "--training.seed", 7, "--output", run)
    assert ended.code == 3
    assert "seed 0 then, 7 now" in ended.err
    assert hashes(run / "model") == hashes(undisturbed[name][0] / "model")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_ends_a_training_with_one_sentence_and_an_older_checkpoint_stays(
    commands, lines, undisturbed, tmp_path, name
):
    run = tmp_path / "run"
    words = (*lines[name], "--output", run)
    assert commands.run(*words, failpoint="checkpoint-latest:2").code == -signal.SIGKILL
    before = hashes(run / "checkpoints/step-00000002")
    largest = max(p.stat().st_size for p in (undisturbed[name][0] / "checkpoints").rglob("*"))
    ended = commands.run(*words, largest_file_bytes=largest - 1)
    assert ended.code == 1
    assert "error: " in ended.err.splitlines()[-1]
    assert "bytes to write" in ended.err.splitlines()[-1]
    assert hashes(run / "checkpoints/step-00000002") == before
    assert not list(run.rglob("tmp-*"))
    assert commands.run(*words).code == 0
    check_same_run(run, undisturbed[name][0])


@pytest.mark.parametrize("name", COMMANDS)
def test_a_dry_run_tells_the_numbers_and_writes_nothing(
    commands, lines, undisturbed, tmp_path, name
):
    output = tmp_path / "run"
    ended = commands.run(*lines[name], "--output", output, "--dry-run")
    assert ended.code == 0, ended.err
    assert not output.exists()
    told = dict(line.split() for line in ended.out.splitlines())
    run = undisturbed[name][0]
    load = {"train-tokenizer": load_tokenizer, "train-dynamics": DynamicsModel.from_pretrained}
    model = load[name](run / "model")
    assert int(told["parameters"]) == sum(p.numel() for p in model.parameters())
    latest = run / (run / "LATEST").read_text().strip()
    real = sum(path.stat().st_size for path in latest.glob("*.safetensors"))
    # A checkpoint also has headers with the tensors' names.
    assert 0.5 * real < int(told["checkpoint_bytes"]) <= real
    per_update = {"train-tokenizer": 2 * 3, "train-dynamics": 4 * 3 * 16}[name]
    assert int(told["items_per_update"]) == per_update
    assert int(told["memory_bytes"]) > int(told["state_bytes"]) > int(told["parameters"]) * 12


@pytest.mark.parametrize("name", COMMANDS)
def test_a_dry_run_with_twice_the_batch_keeps_twice_the_activations(
    commands, lines, tmp_path, name
):
    flag, samples = {
        "train-tokenizer": ("--training.batch-clips", (4, 8)),
        "train-dynamics": ("--training.batch-windows", (4, 8)),
    }[name]
    kept = []
    for count in samples:
        ended = commands.run(*lines[name], "--output", tmp_path, "--dry-run", flag, count)
        kept.append(int(re.search(r"activation_bytes (\d+)", ended.out)[1]))
    assert kept[1] == 2 * kept[0] > 0


EVERYTHING = (
    "--training.ema-decay", 0.9, "--training.discriminator-weight", 0.1,
    "--training.discriminator-start", 0, "--training.accumulate", 2,
)  # fmt: skip


def test_a_dry_run_counts_the_average_the_discriminator_and_the_parts_of_a_batch(
    commands, lines, tmp_path
):
    run = tmp_path / "run"
    words = (*lines["train-tokenizer"], *EVERYTHING)
    ended = commands.run(*words, "--output", run, "--dry-run")
    assert ended.code == 0, ended.err
    told = dict(line.split() for line in ended.out.splitlines())
    assert not run.exists()
    assert commands.run(*words, "--output", run).code == 0
    latest = run / (run / "LATEST").read_text().strip()
    real = sum(path.stat().st_size for path in latest.glob("*.safetensors"))
    headers = 20_000
    assert real - headers < int(told["checkpoint_bytes"]) <= real
    (whole, part) = (
        int(
            re.search(
                r"activation_bytes (\d+)",
                commands.run(
                    *lines["train-tokenizer"], "--output", run, "--dry-run",
                    "--training.accumulate", parts, "--training.batch-clips", 8,
                ).out,
            )[1]
        )
        for parts in (1, 4)
    )  # fmt: skip
    assert whole == 4 * part


def test_clips_that_do_not_fill_latent_frames_are_refused_before_anything_is_read(
    commands, lines, tmp_path
):
    ended = commands.run(
        *lines["train-tokenizer"], "--model.architecture", "video", "--model.temporal-stride", 4,
        "--training.clip-frames", 8, "--episodes", tmp_path / "no", "--output", tmp_path / "run",
    )  # fmt: skip
    assert ended.code == 2
    assert "the nearest that fit are 5 and 9" in ended.err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_same_command_under_torchrun_trains_in_two_processes(lines, tmp_path):
    words = (*lines["train-tokenizer"], *EVERYTHING[:-2], "--output", tmp_path / "run")
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
            "-m", "worldloom.pipelines", *map(str, words), "--device", "auto",
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 process(es) on cpu" in (tmp_path / "run" / "log.txt").read_text()
    assert [row["step"] for row in read_metrics(tmp_path / "run")][:5] == [1, 2, 3, 4, 5]
    assert load_tokenizer(tmp_path / "run" / "model").spec.height == 16


@pytest.mark.slow
def test_of_two_processes_that_train_the_dynamics_one_draws_and_says_so(lines, inputs, tmp_path):
    words = (*lines["train-dynamics"], "--tokenizer", inputs / "tokenizer", "--output", tmp_path)
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
            "-m", "worldloom.pipelines", *map(str, words),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 process(es) on cpu" in (tmp_path / "log.txt").read_text()
    assert done.stdout.splitlines() == [str(tmp_path / "model")]
    assert done.stderr.count("wrote ") == 1
    assert list((tmp_path / "samples").iterdir())


def test_another_tokenizer_draws_no_pictures_of_these_shards(commands, lines, tmp_path):
    other = save_tokenizer(tmp_path / "other", seed=5)
    words = (*lines["train-dynamics"], "--tokenizer", other, "--output", tmp_path / "run")
    ended = commands.run(*words)
    assert ended.code == 3
    assert "fingerprint" in ended.err
    assert load_tokenizer(other).spec.fingerprint[:16] in ended.err
    assert not (tmp_path / "run").exists()


def test_the_dynamics_know_what_the_shards_know_and_nothing_else(undisturbed, inputs):
    model = DynamicsModel.from_pretrained(undisturbed["train-dynamics"][0] / "model")
    assert model.spec.tokenizer == load_tokenizer(inputs / "tokenizer").spec
    assert model.spec.actions == PUSHES
    assert model.spec.fps == 8.75
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_missing_empty_or_unfinished_input_ends_with_3_and_writes_nothing(
    commands, lines, inputs, tmp_path
):
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(inputs / "episodes/episodes.json", empty)
    unfinished = tmp_path / "unfinished"
    shutil.copytree(inputs / "shards", unfinished)
    (unfinished / "manifest.json").unlink()
    for name, flag, folder, said in (
        ("train-tokenizer", "--episodes", tmp_path / "no", "no such folder"),
        ("train-tokenizer", "--episodes", empty, "has no episodes"),
        ("train-dynamics", "--shards", tmp_path / "no", "no such folder"),
        ("train-dynamics", "--shards", unfinished, "unfinished"),
    ):
        began = time.monotonic()
        ended = commands.run(*lines[name], flag, folder, "--output", tmp_path / "run")
        assert ended.code == 3
        assert ended.cpu_s < 5
        assert time.monotonic() - began < 30  # others may be busy with the machine
        assert str(folder) in ended.err
        assert said in ended.err
        assert len(ended.err.splitlines()) == 1
        assert not (tmp_path / "run").exists()


def test_episodes_shorter_than_a_clip_end_with_3_and_the_longest_is_named(
    commands, lines, tmp_path
):
    words = (*lines["train-tokenizer"], "--training.clip-frames", 30, "--output", tmp_path / "run")
    ended = commands.run(*words)
    assert ended.code == 3
    assert "20" in ended.err
    assert not (tmp_path / "run").exists()


def test_frames_of_another_size_are_refused_where_the_rule_is_exact(commands, lines, tmp_path):
    words = (*lines["train-tokenizer"], "--model.resize", "exact", "--model.height", 32)
    ended = commands.run(*words, "--output", tmp_path / "run")
    assert ended.code == 2
    assert "16x16" in ended.err
    assert "--model.height" in ended.err
    assert not (tmp_path / "run").exists()


def test_a_flag_that_does_not_exist_is_refused_with_the_nearest(commands, lines, tmp_path):
    for name, flag, meant in (
        ("train-tokenizer", "--model.hieght", "--model.height"),
        ("train-dynamics", "--training.num-step", "--training.num-steps"),
    ):
        ended = commands.run(*lines[name], flag, 3, "--output", tmp_path / "run")
        assert ended.code == 2
        assert f"did you mean {meant}?" in ended.err
    assert json.dumps(sorted(p.name for p in tmp_path.iterdir())) == "[]"
