"""The dynamics train and generate where no tokenizer, torchvision or PyAV is installed."""

import json
import subprocess
import sys
import tomllib
import venv
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
OURS = ("common", "dynamics")
PROGRAM = """
import importlib, json, sys
from pathlib import Path

refused = []
for name in ("torchvision", "av", "worldloom.tokenizer", "worldloom.pipelines", "PIL"):
    try:
        importlib.import_module(name)
    except ImportError:
        refused.append(name)

import torch
from worldloom.common import TokenShards
from worldloom.dynamics import (
    DynamicsConfig, DynamicsModel, DynamicsTrainingConfig, SamplingConfig, Windows, generate_codes,
    train_dynamics_model,
)

shards = TokenShards(Path(sys.argv[1]))
folder = train_dynamics_model(
    shards,
    Path(sys.argv[2]),
    model=DynamicsConfig(num_layers=1, dim=16, num_heads=2, context_frames=4, num_meta_tokens=2),
    training=DynamicsTrainingConfig(num_steps=3, batch_windows=2, window_frames=4, log_every=1),
    cpu=True,
)
model = DynamicsModel.from_pretrained(folder)
batch = Windows(shards, "train", window_frames=4).batch(0, size=2, seed=0)
codes = generate_codes(
    model, batch.codes_Bthw[:, :2], batch.slots_BTA, seeds=[0, 1], sampling=SamplingConfig()
)
print(json.dumps({
    "refused": refused,
    "prefix": sys.prefix,
    "torch": torch.__file__,
    "codes": list(codes.shape),
    "prompt_untouched": torch.equal(codes[:, :2], batch.codes_Bthw[:, :2]),
    "loaded": sorted({name.partition(".")[0] for name in sys.modules}),
}))
"""


def needs_of(name: str, extras: frozenset[str]) -> list[Requirement]:
    """What an installed distribution needs on this machine, with these extras."""
    needs = [Requirement(line) for line in distribution(name).requires or []]
    return [
        need
        for need in needs
        if need.marker is None
        or any(need.marker.evaluate({"extra": extra}) for extra in extras | {""})
    ]


def everything_needed() -> set[str]:
    """Names of all distributions that our two need, and what those need, and so on."""
    waiting = []
    for package in OURS:
        project = tomllib.loads((ROOT / f"packages/{package}/pyproject.toml").read_text())
        waiting += [Requirement(line) for line in project["project"]["dependencies"]]
    found: set[str] = set()
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        need = waiting.pop()
        name, extras = canonicalize_name(need.name), frozenset(need.extras)
        if name in {f"worldloom-{package}" for package in OURS} or (name, extras) in seen:
            continue
        seen.add((name, extras))
        found.add(name)
        waiting += needs_of(name, extras)
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The Python of a virtual environment with our two packages and what they need.

    The distributions are those of this environment, linked rather than installed: it takes no
    network and no time.
    """
    folder = tmp_path_factory.mktemp("alone") / "venv"
    venv.create(folder, symlinks=True, with_pip=False)
    (packages,) = folder.glob("lib/python*/site-packages")
    for name in everything_needed():
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            pytest.fail(f"{name} is needed but not installed here; run `make setup`")
        tops = {path.parts[0] for path in installed.files or () if path.parts[0] != ".."}
        for top in tops - {"__pycache__"}:
            link = packages / top
            if not link.exists():
                link.symlink_to(installed.locate_file(top))
    # As an editable installation does it.
    lines = [str(ROOT / f"packages/{package}/src") for package in OURS]
    (packages / "worldloom.pth").write_text("\n".join(lines) + "\n")
    return folder / "bin/python"


def test_what_the_dynamics_need_does_not_include_pixels():
    needed = everything_needed()
    assert {"torch", "numpy", "einops", "safetensors", "accelerate"} <= needed
    assert needed.isdisjoint({"torchvision", "av", "pillow", "worldloom-tokenizer", "worldloom"})


@pytest.mark.slow
def test_the_dynamics_train_and_generate_where_no_pixels_can_be_had(alone, write_shards, tmp_path):
    write_shards(tmp_path / "shards")
    done = subprocess.run(
        [alone, "-I", "-c", PROGRAM, tmp_path / "shards", tmp_path / "run"],
        env={"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["refused"] == [
        "torchvision", "av", "worldloom.tokenizer", "worldloom.pipelines", "PIL",
    ]  # fmt: skip
    assert told["prefix"] == str(alone.parents[1]) != sys.prefix
    assert told["torch"].startswith(told["prefix"])
    assert told["codes"] == [2, 4, 2, 3]
    assert told["prompt_untouched"]
    assert set(told["loaded"]).isdisjoint({"torchvision", "av", "PIL", "gymnasium", "matplotlib"})
    assert (tmp_path / "run/model/model.safetensors").exists()
