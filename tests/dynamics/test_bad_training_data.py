"""`worldloom train-dynamics` given what it cannot learn from: one sentence, a code, nothing torn.

Data that is damaged ends with 3, settings that mean nothing with 2, a loss that is no number with
1. The sentence names the file, and the episode or the setting; what was not begun leaves nothing
behind, and what was begun keeps its last checkpoint. What is wrong with tars and manifests as such
is tested in tests/pipelines/test_shard_*.py.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from command_server import CommandServer, Ended
from dynamics.toys import ACTIONS, STEER, Mover, code_spec, write_shards
from safetensors.numpy import save
from shard_forging import change_manifest, forge, replaced
from worldloom.common import TokenShards, newest_checkpoint, npy_bytes, read_metrics, shard_name

FLAGS = (
    "--cpu", "--model.num-layers", 1, "--model.dim", 16, "--model.num-heads", 2,
    "--model.context-frames", 4, "--model.num-meta-tokens", 2, "--training.batch-windows", 4,
    "--training.window-frames", 4, "--training.warmup-steps", 2, "--training.log-every", 1,
    "--training.num-steps", 4, "--training.checkpoint-every", 1,
)  # fmt: skip


@pytest.fixture(scope="module")
def commands() -> Iterator[CommandServer]:
    """Starts commands in processes of their own."""
    with CommandServer() as server:
        yield server


@pytest.fixture
def train(commands, tmp_path) -> Callable[..., Ended]:
    """Run train-dynamics on shards into RUN, with further flags."""

    def run(*shards: Path, flags: tuple[object, ...] = ()) -> Ended:
        words = ("train-dynamics", "--shards", *shards, "--output", tmp_path / "run")
        return commands.run(*words, *FLAGS, *flags)

    return run


@pytest.fixture
def shards(tmp_path) -> Path:
    """Four walks of six frames; e3 is held out."""
    return (
        Mover(STEER, height=2, width=3).write(tmp_path / "shards", episodes=4, num_frames=6).folder
    )


def check_refused(ended: Ended, code: int, *parts: object) -> None:
    """It ended so, with one sentence that has all parts, and gave no result."""
    assert ended.code == code, ended.err
    assert ended.out == ""
    (line,) = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert line == ended.err.splitlines()[-1]
    for part in parts:
        assert str(part) in line
    assert "Traceback" not in ended.err


def check_untouched(run: Path) -> None:
    """Nothing was begun."""
    assert not run.exists()


def check_no_model(run: Path) -> None:
    """What was begun is no model, and has nothing half written."""
    assert not (run / "model").exists()
    assert not list(run.rglob("tmp-*"))


def files(folder: Path) -> dict[Path, bytes]:
    """Every file of a folder."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_shards_as_they_are_are_learned_from(train, shards, tmp_path):
    """Or the refusals below would prove nothing."""
    ended = train(shards)
    assert ended.code == 0, ended.err
    assert ended.out == f"{tmp_path / 'run' / 'model'}\n"


# Codebooks


def set_codebook(folder: Path, content: bytes, *, known: bool) -> None:
    (folder / "codebook.safetensors").write_bytes(content)
    if known:
        digest = hashlib.sha256(content).hexdigest()
        change_manifest(folder, lambda data: data["codebook"].update(sha256=digest))


def vectors(*shape: int, dtype: str = "f4", bad: float = 0.0) -> bytes:
    codebook_VZ = np.ones(shape, dtype)
    codebook_VZ[0, 0] += bad
    return save({"codebook": codebook_VZ})


CODEBOOKS = {
    "another one": (vectors(2, 4), False, "not those of the manifest's hash"),
    "nothing": (b"", False, "not those of the manifest's hash"),
    "no safetensors": (b"codebook", True, "not a readable codebook"),
    "another name": (save({"book": np.ones((2, 4), "f4")}), True, "not a readable codebook"),
    "more codes": (vectors(3, 4), True, "(3, 4), must be float32 (2, 4)"),
    "wider vectors": (vectors(2, 5), True, "(2, 5), must be float32 (2, 4)"),
    "levels": (vectors(2, 2, 4), True, "(2, 2, 4), must be float32 (2, 4)"),
    "float64": (vectors(2, 4, dtype="f8"), True, "must be float32 (2, 4)"),
    "a NaN": (vectors(2, 4, bad=math.nan), True, "not finite"),
    "an infinity": (vectors(2, 4, bad=math.inf), True, "not finite"),
}


@pytest.mark.parametrize("what", CODEBOOKS)
def test_a_wrong_codebook_is_refused_before_anything_is_begun(train, shards, tmp_path, what):
    content, known, sentence = CODEBOOKS[what]
    set_codebook(shards, content, known=known)
    check_refused(train(shards), 3, shards / "codebook.safetensors", sentence)
    check_untouched(tmp_path / "run")


# Codes and actions, in tars that fit their manifest

CODES, SLOTS = np.zeros((6, 2, 3), np.uint8), np.zeros((5, 1), np.uint8)
ARRAYS = {
    "a code that the vocabulary lacks": ("e1", "codes", CODES + 2, "code 2 in a vocabulary of 2"),
    "such a code in what is held out": ("e3", "codes", CODES + 2, "code 2 in a vocabulary of 2"),
    "codes of another grid": ("e1", "codes", CODES.reshape(6, 3, 2), "must be uint8 (6, 2, 3)"),
    "an action that there is not": ("e1", "actions", SLOTS + 5, "must be in [0, 5)"),
    "such an action in what is held out": ("e3", "actions", SLOTS + 5, "must be in [0, 5)"),
    "an action more": ("e1", "actions", np.zeros((6, 1), np.uint8), "must be uint8 (5, 1)"),
    "an action less": ("e1", "actions", SLOTS[1:], "must be uint8 (5, 1)"),
    "two actions at once": ("e1", "actions", np.zeros((5, 2), np.uint8), "must be uint8 (5, 1)"),
}  # fmt: skip


@pytest.mark.parametrize("what", ARRAYS)
def test_codes_and_actions_that_cannot_be_end_with_3_and_no_model(train, shards, tmp_path, what):
    key, part, array, sentence = ARRAYS[what]
    name = f"{key}.{part}.npy"
    forge(shards, replaced(shards, {name: npy_bytes(array)}))
    # All windows of all episodes are drawn within a few updates.
    ended = train(shards, flags=("--training.num-steps", 20, "--training.validate-every", 20))
    check_refused(ended, 3, shards / shard_name(0), name, sentence)
    check_no_model(tmp_path / "run")


@pytest.mark.parametrize(
    ("slots", "sentence"),
    [
        ([1, 2, 3, 4], "must be uint8 (5, 3)"),
        ([2, 1, 0], "must be rising keys, then zeros"),
        ([1, 1, 0], "must be rising keys, then zeros"),
        ([0, 1, 0], "must be rising keys, then zeros"),
        ([5, 0, 0], "must be in [0, 5)"),
    ],
)
def test_more_keys_than_there_may_be_or_keys_in_disorder_are_refused(
    train, tmp_path, slots, sentence
):
    keys = np.zeros((5, 3), np.uint8)
    walks = [(np.zeros((6, 3, 4), np.uint8), keys)] * 3
    folder = write_shards(tmp_path / "shards", walks, code_spec(), ACTIONS["keys"]).folder
    bad = np.tile(np.array(slots, np.uint8), (5, 1))
    forge(folder, replaced(folder, {"e0.actions.npy": npy_bytes(bad)}))
    ended = train(folder, flags=("--training.num-steps", 20))
    check_refused(ended, 3, folder / shard_name(0), "e0.actions.npy", sentence)
    check_no_model(tmp_path / "run")


# Nothing to learn from


def test_an_empty_split_is_refused(train, shards, tmp_path):
    def hold_all_out(data):
        for row in data["episodes"]:
            row["split"] = "validation"

    change_manifest(shards, hold_all_out)
    check_refused(train(shards), 3, shards, "the train split has no episode of two latent frames")
    check_untouched(tmp_path / "run")


def test_no_episodes_are_refused(train, tmp_path):
    folder = write_shards(tmp_path / "shards", [], code_spec(), STEER).folder
    check_refused(train(folder), 3, folder, "no episode of two latent frames")
    check_untouched(tmp_path / "run")


def test_episodes_of_one_frame_have_nothing_to_predict(train, tmp_path):
    walks = [(np.zeros((1, 3, 4), np.uint8), np.zeros((0, 1), np.uint8))] * 3
    folder = write_shards(tmp_path / "shards", walks, code_spec(), STEER).folder
    check_refused(train(folder), 3, folder, "no episode of two latent frames")
    check_untouched(tmp_path / "run")


def test_folders_that_do_not_speak_the_same_codes_or_actions_are_refused(train, shards, tmp_path):
    codes = code_spec(height=2, width=3, vocab_size=2)
    walk = (np.zeros((6, 2, 3), np.uint8), np.zeros((5, 3), np.uint8))
    other = write_shards(tmp_path / "other", [walk] * 3, codes, ACTIONS["multi_discrete"]).folder
    check_refused(train(shards, other), 3, shards, other, "actions")
    check_untouched(tmp_path / "run")


# Losses that are no numbers


def test_a_loss_that_is_no_number_stops_before_the_update_and_keeps_the_last_checkpoint(
    train, shards, tmp_path
):
    run = tmp_path / "run"
    ended = train(shards, flags=("--training.learning-rate", 1e30, "--training.num-steps", 50))
    check_refused(ended, 1, run, "the update was not done and the last checkpoint is whole")
    told = json.loads((run / "diverged.json").read_text())
    assert told["step"] == len(read_metrics(run)) + 1 > 1
    assert not math.isfinite(float(told["loss"])) or not math.isfinite(float(told["gradient_norm"]))
    rows = {row.key: row.latent_frames for row in TokenShards(shards).episodes}
    assert len(told["windows"]) == 4
    assert all(window["first_latent_frame"] < rows[window["episode"]] for window in told["windows"])
    checkpoint, remarks = newest_checkpoint(run)
    assert (checkpoint.step, remarks) == (told["step"] - 1, [])
    assert all(tensor.isfinite().all() for tensor in checkpoint.tensors["model"].values())
    check_no_model(run)
    # The same command comes to the same end, and leaves the same behind.
    before = files(run / "checkpoints")
    again = train(shards, flags=("--training.learning-rate", 1e30, "--training.num-steps", 50))
    check_refused(again, 1, run)
    assert files(run / "checkpoints") == before


# Run folders


def test_a_run_folder_that_is_a_file_is_refused_and_stays(train, shards, tmp_path):
    (tmp_path / "run").write_text("mine")
    check_refused(train(shards), 1, tmp_path / "run")
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--training.seed", 7, "seed 0 then, 7 now"),
        ("--training.learning-rate", 0.5, "learning_rate 0.002 then, 0.5 now"),
        ("--training.optimizer", "adamw", "optimizer 'muon' then, 'adamw' now"),
        ("--model.head", "dot", "head 'linear' then, 'dot' now"),
        ("--model.dim", 32, "dim 16 then, 32 now"),
        ("--training.num-steps", 5, "num_steps 4 then, 5 now"),
    ],
)
def test_other_settings_than_those_of_a_run_are_refused_by_name(
    train, shards, tmp_path, flag, value, said
):
    run = tmp_path / "run"
    assert train(shards).code == 0
    before = files(run)
    check_refused(train(shards, flags=(flag, value)), 3, run / "checkpoints", said)
    assert files(run) == before


def test_a_run_of_other_shards_is_refused(train, shards, tmp_path):
    run = tmp_path / "run"
    assert train(shards).code == 0
    before = files(run)
    other = Mover(STEER, height=2, width=3).write(tmp_path / "o", episodes=5, num_frames=6).folder
    check_refused(train(other), 3, run / "checkpoints", "shards")
    assert files(run) == before


def test_a_checkpoint_that_was_edited_is_none_and_is_named(train, shards, tmp_path):
    run = tmp_path / "run"
    assert train(shards).code == 0
    checkpoint, _ = newest_checkpoint(run)
    state = checkpoint.path / "state.json"
    for path in (run / "checkpoints").iterdir():
        if path != checkpoint.path:
            shutil.rmtree(path)
    state.write_text(state.read_text().replace('"settings"', '"sittings"'))
    ended = train(shards)
    # A file that is not what its manifest says is no checkpoint: the run begins anew, and says so.
    assert ended.code == 0, ended.err
    assert str(checkpoint.path) in ended.err
    assert "from update 0" in ended.err


# Settings that mean nothing

SETTINGS = [
    ("--training.learning-rate", -1, "learning_rate is -1.0"),
    ("--training.learning-rate", "nan", "learning_rate is nan"),
    ("--training.learning-rate", "inf", "learning_rate is inf"),
    ("--training.weight-decay", -0.1, "weight_decay is -0.1"),
    ("--training.clip", -1, "clip is -1.0"),
    ("--training.z-loss", -1, "z_loss is -1.0"),
    ("--training.action-weight", -1, "action_weight is -1.0"),
    ("--training.action-dropout", -0.1, "action_dropout is -0.1"),
    ("--training.action-dropout", 1.1, "action_dropout is 1.1"),
    ("--training.corruption", 2, "corruption is 2.0"),
    ("--training.decay-share", -1, "decay_share is -1.0"),
    ("--training.ema-decay", 1, "ema_decay is 1.0"),
    ("--training.warmup-steps", -1, "warmup_steps is -1"),
    ("--training.num-steps", 0, "num_steps is 0"),
    ("--training.batch-windows", 0, "batch_windows is 0"),
    ("--training.window-frames", 1, "window_frames is 1"),
    ("--training.micro-windows", -2, "micro_windows is -2"),
    ("--training.micro-windows", 5, "micro_windows is 5"),
    ("--training.trackers", "notebook", "'notebook', must be of tensorboard, wandb, trackio"),
    ("--model.num-meta-tokens", -1, "num_meta_tokens is -1"),
    ("--model.residual-streams", 0, "residual_streams is 0"),
    ("--model.context-frames", 1, "context_frames is 1"),
    ("--model.num-heads", 3, "dim 16 over 3 heads"),
    ("--weights", (1, 2), "weights"),
    ("--training.learnig-rate", 1, "did you mean --training.learning-rate?"),
]


@pytest.mark.parametrize(("flag", "value", "said"), SETTINGS)
def test_a_setting_that_means_nothing_is_refused_by_name(
    train, shards, tmp_path, flag, value, said
):
    values = value if isinstance(value, tuple) else (value,)
    ended = train(shards, flags=(flag, *values))
    check_refused(ended, 2, said)
    check_untouched(tmp_path / "run")


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--training.optimizer", "sgd"),
        ("--training.schedule", "step"),
        ("--model.order", "column"),
        ("--model.attention", "flash"),
        ("--model.head", "cosine"),
        ("--model.positions", "learned"),
        ("--model.action-input", "cross"),
    ],
)
def test_a_word_that_names_no_choice_is_refused_with_its_flag(train, shards, tmp_path, flag, value):
    ended = train(shards, flags=(flag, value))
    assert (ended.code, ended.out) == (2, "")
    assert flag in ended.err
    assert f"'{value}'" in ended.err
    check_untouched(tmp_path / "run")


def test_cells_that_would_be_fed_nothing_are_refused(train, shards, tmp_path):
    ended = train(shards, flags=("--model.order", "frame", "--model.no-previous-frame"))
    check_refused(ended, 2, "would feed no codes")
    check_untouched(tmp_path / "run")
