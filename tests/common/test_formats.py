"""Promises of docs/formats.md and the package's README: examples are what the code writes."""

import hashlib
import json
import re
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from worldloom.common import (
    Episodes,
    TokenShards,
    environment,
    save_checkpoint,
    save_model,
    shard_name,
    to_json,
)

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "formats.md").read_text()
EXAMPLES = {
    name: json.loads(text)
    for name, text in re.findall(r"<!-- example: (.+?) -->\n```json\n(.*?)```", PAGE, re.DOTALL)
}


@pytest.fixture
def written(tmp_path, write_episode, episodes_spec, write_shards):
    """name -> the JSON that the code writes, from the same things that the examples tell of."""
    write_episode(tmp_path / "episodes", "a", spec=episodes_spec, num_frames=150)
    write_shards(tmp_path / "shards")
    group = {"x": torch.zeros(3)}
    checkpoint = save_checkpoint(tmp_path / "run", 7, {"model": group, "optimizer": group}, {})
    save_model(tmp_path / "model", kind="tokenizer", config={"dim": 8}, weights=group, card="")
    with zipfile.ZipFile(tmp_path / "episodes" / "a.npz") as file:
        episode = json.loads(file.read("episode.json"))
    with tarfile.open(tmp_path / "shards" / shard_name(0), "r:") as tar:
        member = json.load(tar.extractfile("episode-0000.json"))

    def read(path):
        return json.loads((tmp_path / path).read_text())

    return {
        "actions": read("episodes/episodes.json")["actions"],
        "episodes.json": read("episodes/episodes.json"),
        "episode.json": episode,
        "KEY.json": member,
        "manifest.json": read("shards/manifest.json"),
        "marker": read("shards/shard-000000.json"),
        "checkpoint manifest": json.loads((checkpoint / "manifest.json").read_text()),
        "config.json": read("model/config.json"),
        "env.json": environment(),
    }


def fields(value, *, free=("versions",)):
    """The names and types of a JSON value, throughout; of a list, those of its first item."""
    if isinstance(value, dict):
        return {k: "free" if k in free else fields(v, free=free) for k, v in value.items()}
    if isinstance(value, list):
        return [fields(item, free=free) for item in value[:1]]
    return type(value).__name__


def without_sizes(value):
    """The same values but for hashes and sizes, which the page leaves open."""
    if isinstance(value, dict):
        return {
            k: None if k in ("sha256", "size_bytes") else without_sizes(v) for k, v in value.items()
        }
    return [without_sizes(item) for item in value[:1]] if isinstance(value, list) else value


def test_every_example_of_the_page_is_tested():
    assert PAGE.count("```json") == len(EXAMPLES) == 9


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_an_example_has_the_fields_and_types_that_the_code_writes(written, name):
    assert fields(EXAMPLES[name]) == fields(written[name])


@pytest.mark.parametrize("name", sorted(set(EXAMPLES) - {"env.json"}))
def test_an_example_has_the_values_that_the_code_writes(written, name):
    assert without_sizes(EXAMPLES[name]) == without_sizes(written[name])


def test_the_pages_own_reader_reads_what_we_write(tmp_path, write_shards, monkeypatch):
    (program,) = re.findall(r"<!-- run: reader -->\n```python\n(.*?)```", PAGE, re.DOTALL)
    episodes = write_shards(tmp_path / "SHARDS")
    monkeypatch.chdir(tmp_path)
    variables: dict[str, object] = {}
    exec(program, variables)
    assert np.array_equal(variables["codes"], episodes[-1].codes_thw)
    assert variables["row"]["key"] == TokenShards(tmp_path / "SHARDS").episodes[-1].key


def test_a_seal_is_the_hash_that_the_page_says(written):
    for name in ("checkpoint manifest", "config.json"):
        content = dict(written[name])
        seal = content.pop("sha256")
        text = json.dumps(content, indent=2, sort_keys=True) + "\n"
        assert text == to_json(content)
        assert hashlib.sha256(text.encode()).hexdigest() == seal


def test_members_of_an_episode_are_those_of_the_page_in_that_order(tmp_path, written):
    with zipfile.ZipFile(tmp_path / "episodes" / "a.npz") as file:
        infos = file.infolist()
    assert [info.filename for info in infos] == [
        "frames/000000.npy", "frames/000001.npy", "frames/000002.npy", "actions.npy",
        "rewards.npy", "episode.json",
    ]  # fmt: skip
    assert {info.date_time for info in infos} == {(1980, 1, 1, 0, 0, 0)}


def test_headers_of_a_shard_are_those_of_the_page(tmp_path, written):
    path = tmp_path / "shards" / shard_name(0)
    with tarfile.open(path, "r:") as tar:
        infos = tar.getmembers()
    assert [info.name for info in infos[:3]] == [
        "episode-0000.actions.npy", "episode-0000.codes.npy", "episode-0000.json",
    ]  # fmt: skip
    for info in infos:
        assert (info.mode, info.uid, info.gid, info.uname, info.gname, info.mtime) == (
            0o644, 0, 0, "", "", 0,
        )  # fmt: skip
        assert info.offset_data % 512 == 0
    content = path.read_bytes()
    assert content[257:265] == b"ustar\x0000"
    assert len(content) % 10_240 == 0


def test_the_readmes_example_runs_and_prints_what_it_says(tmp_path, monkeypatch, capsys):
    readme = (ROOT / "packages" / "common" / "README.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```\n", readme, re.DOTALL)
    (output,) = re.findall(r"```\n\n    (\[70.*)\n", readme)
    monkeypatch.chdir(tmp_path)
    exec(program, {})
    assert capsys.readouterr().out == output + "\n"
    assert Episodes(tmp_path / "episodes").keys == ["first"]


def test_the_readme_names_every_module():
    readme = (ROOT / "packages" / "common" / "README.md").read_text()
    source = ROOT / "packages" / "common" / "src" / "worldloom" / "common"
    for path in source.glob("*.py"):
        if path.stem not in ("__init__", "lazy", "errors"):
            assert f"`{path.name}`" in readme
