"""Promises of the front door: two equal lists, a pinned list of names, and no torch."""

import ast
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import worldloom.common

SOURCE = ast.parse(Path(worldloom.common.__file__).read_text())

PUBLIC = {
    "ActionArray", "ActionSpec", "Checkpoint", "CodeArray", "CodeSpec", "ConfigError", "Episode",
    "EpisodeRecord", "EpisodeWriter", "Episodes", "EpisodesSpec", "FormatError", "Frames",
    "Interrupt", "MismatchError",
    "Muon", "ResizeRule", "RunLog", "ShapeError", "ShardRecord", "SlotArray",
    "StorageError", "TokenEpisode", "TokenShards", "TokenizerSpec", "TrainingError",
    "WeightAverage", "WorldloomError", "atomic_folder", "bind_shape", "build", "check_key",
    "decay_groups", "derive_seed",
    "describe_difference", "environment", "failpoint", "file_sha256", "fingerprint",
    "finished_shard", "format_metrics", "is_leftover",
    "lazy_exports", "library_seed", "load_checkpoint",
    "load_model", "load_optimizer", "load_weights", "nearest", "newest_checkpoint", "npy_array",
    "npy_bytes", "numpy_stream", "optimizer_tensors", "parse_json", "partial", "progress",
    "read_json", "read_limited",
    "read_metrics", "read_toml", "remove_leftovers", "save_checkpoint", "save_model", "say",
    "set_learning_rate",
    "shard_bytes", "shard_name", "storage_errors", "stream", "stream_episodes", "to_json",
    "to_plain", "warmup_cosine", "warmup_stable_decay", "write_atomic", "write_bytes",
    "write_json",
    "write_manifest", "write_shard",
}  # fmt: skip


def for_type_checkers() -> set[tuple[str, str]]:
    """(module, name) of every re-export, under TYPE_CHECKING or above it."""
    block = next(node for node in SOURCE.body if isinstance(node, ast.If))
    assert isinstance(block.test, ast.Name)
    assert block.test.id == "TYPE_CHECKING"
    assert all(isinstance(node, ast.ImportFrom) for node in block.body)
    imports = [n for n in (*SOURCE.body, *block.body) if isinstance(n, ast.ImportFrom) and n.level]
    for node in imports:
        assert all(alias.asname == alias.name for alias in node.names)
    return {(node.module or "", alias.name) for node in imports for alias in node.names}


def in_the_table() -> set[tuple[str, str]]:
    """(module, name) of every entry of the table given to lazy_exports."""
    call = next(
        node.value
        for node in SOURCE.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
    )
    table = ast.literal_eval(call.args[1])
    return {(module, name) for module, names in table.items() for name in names}


def test_what_type_checkers_see_is_what_the_table_exports():
    assert for_type_checkers() == in_the_table()


def test_every_change_of_the_public_names_is_deliberate():
    assert dir(worldloom.common) == sorted(PUBLIC)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_is_there(name):
    assert getattr(worldloom.common, name) is not None


def test_no_public_name_is_hidden_by_a_module_of_the_same_name():
    for _, name in in_the_table():
        assert find_spec(f"worldloom.common.{name}") is None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        _ = worldloom.common.Trainer


def test_specs_config_and_shards_need_no_torch():
    program = (
        "import sys, worldloom.common as c\n"
        "c.ActionSpec, c.CodeSpec, c.build, c.Episodes, c.TokenShards, c.write_shard, c.RunLog\n"
        "c.derive_seed(0, 'x'); c.numpy_stream(0, 'x')\n"
        "sys.exit(', '.join({'torch', 'av', 'webdataset'} & sys.modules.keys()) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
