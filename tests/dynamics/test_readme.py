"""Promises of the package's README: its example runs as it stands, and generates what it says."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "packages" / "dynamics" / "README.md"


@pytest.mark.slow
def test_the_example_of_the_readme_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    text = README.read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    (printed,) = re.findall(r"```\n\n    (\[\[.*\]\])\n", text)
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    assert capsys.readouterr().out.strip() == printed


def test_every_module_stands_in_the_table_of_the_readme():
    modules = {path.name for path in (README.parent / "src/worldloom/dynamics").glob("*.py")}
    named = set(re.findall(r"`(\w+\.py)`", README.read_text()))
    assert named == modules - {"__init__.py"}
