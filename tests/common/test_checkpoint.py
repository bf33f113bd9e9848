"""Promises of checkpoint.py: every bit comes back, damage is found, and a kill costs one step."""

import hashlib
import io
import json
import resource

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from worldloom.common import (
    FormatError,
    MismatchError,
    StorageError,
    load_checkpoint,
    load_model,
    load_weights,
    newest_checkpoint,
    save_checkpoint,
    save_model,
    to_json,
)

STATE = {"samples": 640, "seed": 3, "best": 0.125, "names": ["a"], "none": None}


def tensors(step):
    """Two groups with every dtype that training keeps, NaN and -0.0 among the values."""
    generator = torch.Generator().manual_seed(step)
    return {
        "model": {
            "weight": torch.randn(3, 4, generator=generator).t(),  # not contiguous
            "half": torch.randn(5, generator=generator).to(torch.bfloat16),
            "odd": torch.tensor([float("nan"), -0.0, float("inf"), 1e-45]),
            "empty": torch.zeros(0, 3),
        },
        "optimizer": {
            "0.step": torch.tensor(float(step)),
            "count": torch.arange(3),
            "mask": torch.tensor([True, False]),
        },
    }


def bits(tensor):
    flat = tensor.contiguous().reshape(-1)
    return (tensor.dtype, tuple(tensor.shape), flat.view(torch.uint8).tolist() if len(flat) else [])


def same(one, other):
    return {g: {n: bits(t) for n, t in group.items()} for g, group in one.items()} == {
        g: {n: bits(t) for n, t in group.items()} for g, group in other.items()
    }


def save(run, step, *, keep=2):
    return save_checkpoint(run, step, tensors(step), {**STATE, "step": step}, keep=keep)


def steps_in(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_every_bit_of_every_tensor_and_the_state_come_back(tmp_path):
    path = save(tmp_path, 1000)
    assert path == tmp_path / "checkpoints" / "step-00001000"
    loaded = load_checkpoint(path)
    assert (loaded.path, loaded.step) == (path, 1000)
    assert same(loaded.tensors, tensors(1000))
    assert loaded.state == {**STATE, "step": 1000}
    assert (tmp_path / "LATEST").read_text() == "checkpoints/step-00001000\n"


def test_tensors_that_share_memory_come_back(tmp_path):
    shared = torch.arange(6.0)
    group = {"a": shared, "b": shared[2:4], "c": shared}
    save_checkpoint(tmp_path, 1, {"model": group}, {})
    assert same(load_checkpoint(tmp_path / "checkpoints/step-00000001").tensors, {"model": group})


def test_the_same_state_gives_the_same_bytes(tmp_path):
    for run in ("a", "b"):
        save(tmp_path / run, 5)
    for path in (tmp_path / "a").rglob("*"):
        if path.is_file():
            other = tmp_path / "b" / path.relative_to(tmp_path / "a")
            assert path.read_bytes() == other.read_bytes()


def test_the_newest_stay_and_the_older_go(tmp_path):
    for step in (100, 200, 99_999_999, 100_000_000):
        save(tmp_path, step)
    assert steps_in(tmp_path) == ["step-100000000", "step-99999999"]
    newest, skipped = newest_checkpoint(tmp_path)
    assert (newest.step, skipped) == (100_000_000, [])
    save(tmp_path, 100_000_001, keep=1)
    assert steps_in(tmp_path) == ["step-100000001"]


def test_a_run_without_checkpoints_has_none(tmp_path):
    assert newest_checkpoint(tmp_path) == (None, [])
    (tmp_path / "checkpoints" / "step-none").mkdir(parents=True)
    assert newest_checkpoint(tmp_path) == (None, [])


FILES = ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere_is_found_and_the_file_is_named(tmp_path, name):
    folder = save(tmp_path, 7)
    assert sorted(path.name for path in folder.iterdir()) == FILES
    path = folder / name
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for position in [0, len(content) - 1, *rng.integers(0, len(content), 60)]:
        flipped = bytearray(content)
        flipped[position] ^= 1 << int(rng.integers(8))
        path.unlink()
        path.write_bytes(flipped)
        if name == "manifest.json" and same_json(content, flipped):
            continue
        with pytest.raises(FormatError, match=r"\.(json|safetensors): "):
            load_checkpoint(folder)


def same_json(one, other):
    try:
        return json.loads(one) == json.loads(other)
    except ValueError:
        return False


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut", "grown", "missing", "folder"])
def test_a_file_that_is_cut_grown_or_missing_is_found_and_named(tmp_path, name, damage):
    folder = save(tmp_path, 7)
    path = folder / name
    content = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "grown":
        path.write_bytes(content + b"!")
    elif damage == "folder":
        path.mkdir()
    with pytest.raises(FormatError, match=name.replace(".", r"\.")):
        load_checkpoint(folder)


def test_the_newest_valid_one_is_taken_and_the_skipped_ones_are_named(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    model = tmp_path / "checkpoints" / "step-00000003" / "model.safetensors"
    content = bytearray(model.read_bytes())
    content[-1] ^= 1
    model.write_bytes(content)
    (tmp_path / "checkpoints" / "step-00000002" / "state.json").unlink()
    newest, skipped = newest_checkpoint(tmp_path)
    assert newest.step == 1
    assert same(newest.tensors, tensors(1))
    assert len(skipped) == 2
    assert "step-00000003/model.safetensors" in skipped[0]
    assert "step-00000002/state.json" in skipped[1]


def test_a_damaged_later_one_never_costs_the_one_just_written(tmp_path):
    """Resumed at 1 because 3 is damaged, the run saves 2 with keep=1: 2 must stay."""
    for step in (1, 3):
        save(tmp_path, step)
    (tmp_path / "checkpoints" / "step-00000003" / "state.json").write_bytes(b"")
    save(tmp_path, 2, keep=1)
    newest, skipped = newest_checkpoint(tmp_path)
    assert newest.step == 2
    assert len(skipped) == 1
    save(tmp_path, 3, keep=1)
    assert newest_checkpoint(tmp_path)[0].step == 3
    assert steps_in(tmp_path) == ["step-00000003"]


def test_reading_the_newest_does_not_disturb_a_training_that_is_writing(tmp_path):
    save(tmp_path, 1)
    temporary = tmp_path / "checkpoints" / "tmp-999-step-00000002"
    temporary.mkdir()
    assert newest_checkpoint(tmp_path)[0].step == 1
    assert temporary.exists()
    save(tmp_path, 2)
    assert steps_in(tmp_path) == ["step-00000001", "step-00000002"]


def test_a_full_disk_is_a_storage_error_and_the_older_checkpoint_stays(tmp_path):
    save(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(StorageError, match=r"model\.safetensors: .*\(4\d{5} bytes to write"):
            save_checkpoint(tmp_path, 2, {"model": {"big": torch.zeros(100_000)}}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert steps_in(tmp_path) == ["step-00000001"]
    assert newest_checkpoint(tmp_path)[0].step == 1


KILLS = [
    *[f"checkpoint-file:{n}" for n in (1, 2, 3)],
    "folder-fsync",
    "folder-rename",
    "checkpoint-latest",
    "write",
    "fsync",
    "rename",
]


@pytest.mark.parametrize("failpoint", KILLS)
def test_after_a_kill_anywhere_in_a_save_a_valid_one_loads_and_the_rerun_is_identical(
    tmp_path, killed_at, failpoint
):
    for run in ("killed", "whole"):
        save(tmp_path / run, 1)
    assert killed_at(failpoint, lambda: save(tmp_path / "killed", 2))
    newest, skipped = newest_checkpoint(tmp_path / "killed")
    expected = 1 if failpoint.startswith(("checkpoint-file", "folder-fsync")) else 2
    assert (newest.step, skipped) == (expected, [])
    assert same(newest.tensors, tensors(expected))
    for run in ("killed", "whole"):
        save(tmp_path / run, 2)
    for path in (tmp_path / "whole").rglob("*"):
        other = tmp_path / "killed" / path.relative_to(tmp_path / "whole")
        assert other.is_dir() if path.is_dir() else other.read_bytes() == path.read_bytes()
    assert steps_in(tmp_path / "killed") == steps_in(tmp_path / "whole")


@pytest.mark.parametrize("failpoint", ["folder-fsync", "folder-aside", "folder-rename"])
def test_a_kill_while_the_only_checkpoint_is_replaced_leaves_a_valid_one(
    tmp_path, killed_at, failpoint
):
    save(tmp_path, 1, keep=1)
    assert killed_at(failpoint, lambda: save(tmp_path, 1, keep=1))
    newest, skipped = newest_checkpoint(tmp_path)
    assert (newest.step, skipped) == (1, [])
    save(tmp_path, 1, keep=1)
    assert steps_in(tmp_path) == ["step-00000001"]


# Forgery


def reseal(folder, name, change):
    path = folder / name
    data = json.loads(path.read_text())
    del data["sha256"]
    change(data)
    data["sha256"] = hashlib.sha256(to_json(data).encode()).hexdigest()
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: d.update(schema="x"), "schema 'x', readable is worldloom.checkpoint/1"),
        (lambda d: d.update(files=[]), "lacks the table of files"),
        (lambda d: d.update(step="7"), "lacks the table of files"),
        (lambda d: d["files"].pop("state.json"), "lacks the table of files"),
        (lambda d: d["files"].update({"../../x": d["files"]["state.json"]}), "file name"),
        (lambda d: d["files"].update({"/abs": d["files"]["state.json"]}), "file name"),
        (lambda d: d["files"].update({"new.safetensors": {}}), "size and hash are not recorded"),
        (lambda d: d["files"]["state.json"].update(size_bytes=-1), "size_bytes must be"),
        (lambda d: d["files"]["state.json"].update(size_bytes="9"), "size_bytes must be"),
        (lambda d: d["files"]["state.json"].update(sha256=None), "another hash"),
    ],
)
def test_a_manifest_that_does_not_tell_the_truth_is_refused(tmp_path, change, reason):
    folder = save(tmp_path, 7)
    reseal(folder, "manifest.json", change)
    with pytest.raises(FormatError, match=reason):
        load_checkpoint(folder)


class Canary:
    def __reduce__(self):
        return (Canary.sing, ())

    @staticmethod
    def sing():
        raise AssertionError("a pickle was executed")


@pytest.mark.parametrize("name", ["model.safetensors", "state.json"])
def test_a_pickle_in_place_of_a_file_is_refused_and_never_executed(tmp_path, name):
    folder = save(tmp_path, 7)
    buffer = io.BytesIO()
    torch.save(Canary(), buffer)
    content = buffer.getvalue()
    (folder / name).write_bytes(content)
    about = {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    reseal(folder, "manifest.json", lambda d: d["files"].update({name: about}))
    with pytest.raises(FormatError, match=name.replace(".", r"\.")):
        load_checkpoint(folder)


@settings(max_examples=100)
@given(seed=st.integers(0, 2**32))
def test_1000_changed_manifests_are_loaded_or_refused_with_the_folders_name(
    tmp_path, mutations, may_refuse, seed
):
    folder = tmp_path / "checkpoints" / "step-00000007"
    if not folder.exists():
        save(tmp_path, 7)
        (tmp_path / "original").write_bytes((folder / "manifest.json").read_bytes())
    original = json.loads((tmp_path / "original").read_text())
    del original["sha256"]
    for data in mutations(original, seed=seed, count=10):
        path = folder / "manifest.json"
        path.unlink()
        sealed = data
        if isinstance(data, dict):
            digest = hashlib.sha256(to_json(data).encode()).hexdigest()
            sealed = {**data, "sha256": digest}
        path.write_text(json.dumps(sealed))
        with may_refuse(FormatError, str(folder)):
            load_checkpoint(folder)


# Model directories

CONFIG = {"dim": 8, "rates": [0.1, 1e-30], "inner": {"2": "b", "10": "a"}, "none": None}


def save_tiny(folder, *, kind="tokenizer", seed=0):
    save_model(folder, kind=kind, config=CONFIG, weights=tensors(seed)["model"], card="# A model\n")


def test_a_model_directory_comes_back_and_is_replaced_whole(tmp_path):
    for seed in (0, 1):
        save_tiny(tmp_path / "model", seed=seed)
        config, weights = load_model(tmp_path / "model", kind="tokenizer")
        assert config == CONFIG
        assert same({"model": weights}, {"model": tensors(seed)["model"]})
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "README.md", "config.json", "model.safetensors",
    ]  # fmt: skip
    assert (tmp_path / "model" / "README.md").read_text() == "# A model\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_the_wrong_kind_of_model_is_a_mismatch(tmp_path):
    save_tiny(tmp_path / "model", kind="dynamics")
    with pytest.raises(MismatchError, match="holds a dynamics model, but a tokenizer is needed"):
        load_model(tmp_path / "model", kind="tokenizer")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_model_that_was_altered_cut_or_is_missing_a_file_is_refused(tmp_path, name):
    save_tiny(tmp_path / "model")
    path = tmp_path / "model" / name
    content = path.read_bytes()
    middle = len(content) // 2
    altered = content.replace(b'"dim": 8', b'"dim": 9') if name == "config.json" else (
        content[:-1] + bytes([content[-1] ^ 1])
    )  # fmt: skip
    for damaged in (content[:middle], altered, b""):
        assert damaged != content
        path.write_bytes(damaged)
        with pytest.raises(FormatError, match=name.replace(".", r"\.")):
            load_model(tmp_path / "model", kind="tokenizer")
    path.unlink()
    with pytest.raises(FormatError, match="not found"):
        load_model(tmp_path / "model", kind="tokenizer")


def test_the_card_may_be_edited(tmp_path):
    save_tiny(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("better")
    load_model(tmp_path / "model", kind="tokenizer")


def test_a_config_with_numbers_as_keys_is_sealed_as_it_will_be_read(tmp_path):
    save_model(tmp_path / "m", kind="x", config={"a": {2: 1, 10: (1,)}}, weights={}, card="")
    assert load_model(tmp_path / "m", kind="x")[0] == {"a": {"2": 1, "10": [1]}}


def test_a_kill_while_a_model_is_replaced_leaves_the_old_or_the_new_one(tmp_path, killed_at):
    for failpoint in ("checkpoint-file", "folder-fsync", "folder-aside", "folder-rename"):
        save_tiny(tmp_path / "model", seed=0)
        assert killed_at(failpoint, lambda: save_tiny(tmp_path / "model", seed=1))
        _, weights = load_model(tmp_path / "model", kind="tokenizer")
        seed = 0 if failpoint in ("checkpoint-file", "folder-fsync") else 1
        assert same({"model": weights}, {"model": tensors(seed)["model"]})


def test_weights_that_do_not_fit_are_named_in_one_line():
    model = torch.nn.Linear(2, 3)
    good = {"weight": torch.ones(3, 2), "bias": torch.zeros(3)}
    load_weights(model, good, where="x")
    assert torch.equal(model.weight, good["weight"])
    for bad, name in (
        ({"weight": good["weight"]}, "bias"),
        ({**good, "extra": torch.ones(1)}, "extra"),
        ({**good, "weight": torch.ones(2, 3)}, "weight"),
    ):
        with pytest.raises(FormatError, match=f"model: the weights do not fit.*{name}") as caught:
            load_weights(model, bad, where="model")
        assert "\n" not in str(caught.value)
