"""Promises of the front door: two equal lists, a pinned list of names, and no torch."""

import ast
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import worldloom.dynamics

SOURCE = ast.parse(Path(worldloom.dynamics.__file__).read_text())

PUBLIC = {
    "Cost", "measured_times_s", "training_cost",
    "DynamicsConfig", "DynamicsModel", "DynamicsSpec", "DynamicsTrainingConfig", "Mixture", "NULL",
    "Rollout", "SamplingConfig", "Snapshot", "StreamConfig", "WindowBatch", "WindowSource",
    "WindowStream", "Windows", "check_alike", "cross_entropy", "decoders_of", "fit_sampling",
    "generate_codes", "open_held_out", "sample_codes", "train_dynamics_model", "validate",
}  # fmt: skip


def for_type_checkers() -> set[tuple[str, str]]:
    """(module, name) of every import under TYPE_CHECKING."""
    block = next(node for node in SOURCE.body if isinstance(node, ast.If))
    assert isinstance(block.test, ast.Name)
    assert block.test.id == "TYPE_CHECKING"
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    assert len(imports) == len(block.body)
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
    assert dir(worldloom.dynamics) == sorted(PUBLIC)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_is_there(name):
    assert getattr(worldloom.dynamics, name) is not None


def test_no_public_name_is_hidden_by_a_module_of_the_same_name():
    for _, name in in_the_table():
        assert find_spec(f"worldloom.dynamics.{name}") is None


def test_importing_it_its_settings_and_its_spec_needs_no_torch():
    program = (
        "import sys, worldloom.dynamics as d\n"
        "d.DynamicsConfig(), d.DynamicsTrainingConfig(), d.SamplingConfig(), d.DynamicsSpec\n"
        "sys.exit(', '.join({'torch', 'accelerate', 'einops'} & sys.modules.keys()) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_it_needs_no_pixels():
    program = (
        "import sys, worldloom.dynamics as d\n"
        "[getattr(d, name) for name in dir(d)]\n"
        "pixels = {'torchvision', 'av', 'PIL', 'worldloom.tokenizer', 'worldloom.pipelines'}\n"
        "sys.exit(', '.join(pixels & sys.modules.keys()) or 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
