"""Promises of the package's README: its example runs as it stands, and says the shapes it gives."""

import re
import shutil
from pathlib import Path

import torch

README = Path(__file__).parents[2] / "packages" / "tokenizer" / "README.md"


def test_the_example_of_the_readme_runs_as_it_stands(toy_episodes, tmp_path, monkeypatch):
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    shutil.copytree(toy_episodes.folder, tmp_path / "episodes")
    monkeypatch.chdir(tmp_path)
    names: dict[str, torch.Tensor] = {}
    exec(example, names)
    for name in ("codes", "frames"):
        assert str(tuple(names[name].shape)) in re.search(f"\n{name} = .*# (.*)", example)[1]
