"""Every benchmark runs, prints tables, and says on what; a new file joins by being there."""

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = sorted(
    path
    for path in (Path(__file__).parent.parent / "benchmarks").glob("*.py")
    if path.stem not in ("report", "turns", "rooms", "races", "updates")  # what they share
)


def run(path: Path, *words: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(path), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_help_says_what_is_measured_and_how_to_get_the_numbers(path):
    done = run(path, "--help")
    assert done.returncode == 0, done.stderr
    assert path.name in done.stdout
    for flag in ("--json", "--quick"):
        assert flag in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)  # others may be busy with the machine
@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_a_quick_run_prints_the_tables_that_it_writes(path, tmp_path):
    done = run(path, "--quick", "--json", tmp_path / "numbers.json")
    if "no Chromium could be started" in done.stderr:
        pytest.skip("PLAY WAS NOT MEASURED: no Chromium could be started")
    assert done.returncode == 0, done.stderr
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert (numbers["benchmark"], numbers["quick"]) == (path.stem, True)
    assert numbers["tables"]
    for name, table in numbers["tables"].items():
        assert f"## {name}" in done.stdout
        assert {"seed", "seeds"} & table["settings"].keys()
        for row in table["rows"]:
            for column, value in row.items():
                assert f" {column} " in done.stdout
                assert not isinstance(value, str) or f" {value} " in done.stdout
    machine = numbers["machine"]
    assert machine["cpu"] in done.stdout
    assert f"{machine['cores']} cores" in done.stdout
    assert f"torch {machine['versions']['torch']}" in done.stdout
    # Of whom it was measured by nobody needs to know.
    assert not re.search(rf"\b{re.escape(platform.node())}\b", done.stdout + json.dumps(numbers))


def skip_without_index(done: subprocess.CompletedProcess[str]) -> None:
    """Skip if pip could not fetch genie2-pytorch; every other failure stays one."""
    if done.returncode and "'pip', 'install'" in done.stderr:
        for words in ("No matching distribution", "TimeoutError", "Connection broken",
                      "Connection aborted", "ConnectionError", "ProtocolError",
                      "Max retries exceeded", "Temporary failure in name resolution"):  # fmt: skip
            if words in done.stderr:
                pytest.skip(f"genie2-pytorch cannot be had here: no package index answers: {words}")


@pytest.mark.slow
@pytest.mark.timeout(1800)  # it fetches a package first
def test_a_training_step_is_timed_beside_genie2_pytorch(tmp_path):
    path = next(path for path in BENCHMARKS if path.stem == "train_step")
    done = run(path, "--quick", "--only", "genie2", "--json", tmp_path / "numbers.json")
    skip_without_index(done)
    assert done.returncode == 0, done.stderr
    (table,) = json.loads((tmp_path / "numbers.json").read_text())["tables"].values()
    first, *ours = table["rows"]
    assert "genie2-pytorch 0.0.21" in first.values()
    assert len(ours) == 3


@pytest.mark.slow
@pytest.mark.timeout(1800)  # it fetches a package first
def test_frames_are_generated_beside_genie2_pytorch(tmp_path):
    path = next(path for path in BENCHMARKS if path.stem == "generate")
    only = ("genie2", "genie2-guided")
    done = run(path, "--quick", "--only", *only, "--json", tmp_path / "numbers.json")
    skip_without_index(done)
    assert done.returncode == 0, done.stderr
    for table in json.loads((tmp_path / "numbers.json").read_text())["tables"].values():
        first, *ours = table["rows"]
        assert "genie2-pytorch 0.0.21" in first.values()
        assert ours
