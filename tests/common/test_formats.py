"""Promises of docs/formats.md and the package's README: examples are what the code writes."""

import hashlib
import io
import json
import re
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
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


def read_by_the_page_alone(folder):
    """Yield (key, split, codes, actions) of shards: json, tarfile and numpy, no code of ours."""
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["schema"] == "worldloom.token-shards/1"
    spec, sizes = manifest["tokenizer"]["codes"], manifest["actions"]["sizes"]
    smallest = {1 << 8: "u1", 1 << 16: "<u2", 1 << 32: "<u4"}
    code_type = next(smallest[n] for n in sorted(smallest) if spec["vocab_size"] <= n)
    levels = [spec["num_levels"]] if spec["num_levels"] > 1 else []
    for row in manifest["episodes"]:
        shard = manifest["shards"][row["shard"]]
        t = 1 + -(-(row["num_frames"] - 1) // spec["frames_per_latent"])
        shapes = {
            "codes": (code_type, [t, spec["grid_height"], spec["grid_width"], *levels]),
            "actions": ("u1" if max(sizes, default=0) <= 256 else "<u2",
                        [row["num_frames"] - 1, len(sizes)]),
        }  # fmt: skip
        arrays = {}
        with tarfile.open(folder / shard["file"], "r:") as tar:
            about = json.load(tar.extractfile(f"{row['key']}.json"))
            for name, (dtype, shape) in shapes.items():
                member = tar.getmember(f"{row['key']}.{name}.npy")
                place = (row[f"{name}_offset"], row[f"{name}_bytes"])
                assert (member.offset_data, member.size) == place
                array = np.load(io.BytesIO(tar.extractfile(member).read()), allow_pickle=False)
                assert (array.dtype.str.lstrip("|"), list(array.shape)) == (dtype, shape)
                arrays[name] = array
        assert about.pop("metadata") is not None
        assert about == {name: row[name] for name in about}
        assert t == row["latent_frames"]
        assert (arrays["codes"] < spec["vocab_size"]).all()
        assert (arrays["actions"] < np.asarray(sizes, int)).all()
        yield row["key"], row["split"], arrays["codes"], arrays["actions"]


@pytest.mark.parametrize("vocab_size", [256, 300, 70_000])
@pytest.mark.parametrize(("stride", "levels"), [(1, 1), (2, 1), (2, 3)])
def test_a_reader_made_of_this_page_reads_what_was_written_and_so_do_ours_and_webdataset(
    tmp_path, write_shards, tokenizer_spec, any_actions, vocab_size, stride, levels
):
    codes = replace(
        tokenizer_spec.codes, vocab_size=vocab_size, frames_per_latent=stride, num_levels=levels
    )
    spec = replace(tokenizer_spec, codes=codes)
    written = write_shards(
        tmp_path, tokenizer=spec, actions=any_actions, lengths=((5, 1, 9), (4,), (8, 2))
    )
    read = list(read_by_the_page_alone(tmp_path))
    assert [(key, split) for key, split, _, _ in read] == [(e.key, e.split) for e in written]
    shards = TokenShards(tmp_path)
    urls = sorted(str(path) for path in tmp_path.glob("shard-*.tar"))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [e.key for e in written]
    for index, (episode, (_, _, codes_thw, slots_TA)) in enumerate(zip(written, read, strict=True)):
        for other in (
            episode.codes_thw,
            shards.codes_thw(index),
            np.load(io.BytesIO(samples[index]["codes.npy"]), allow_pickle=False),
        ):
            assert np.array_equal(codes_thw, other)  # fmt: skip
        for other in (
            episode.slots_TA,
            shards.slots_TA(index),
            np.load(io.BytesIO(samples[index]["actions.npy"]), allow_pickle=False),
        ):
            assert np.array_equal(slots_TA, other)  # fmt: skip
        assert json.loads(samples[index]["json"])["num_frames"] == episode.num_frames


@pytest.fixture
def sizes_of():
    """The page's own formula."""
    (program,) = re.findall(r"<!-- run: size -->\n```python\n(.*?)```", PAGE, re.DOTALL)
    variables: dict[str, object] = {}
    exec(program, variables)
    return variables["shard_bytes"]


@pytest.mark.parametrize("lengths", [(), (1,), (5, 1, 9), (100,) * 7, (1000, 3)])
def test_a_shard_has_exactly_the_size_that_the_page_says(
    tmp_path, write_shards, tokenizer_spec, any_actions, sizes_of, lengths
):
    for stride, levels, vocab_size in ((1, 1, 256), (2, 3, 70_000)):
        codes = replace(
            tokenizer_spec.codes, vocab_size=vocab_size, frames_per_latent=stride, num_levels=levels
        )
        folder = tmp_path / str(stride)
        episodes = write_shards(
            folder, tokenizer=replace(tokenizer_spec, codes=codes), actions=any_actions,
            lengths=(lengths,),
        )  # fmt: skip
        with tarfile.open(folder / shard_name(0), "r:") as tar:
            about = [info.size for info in tar if info.name.endswith(".json")]
        rows = [
            (episode.codes_thw.nbytes, episode.slots_TA.astype(any_actions.slot_dtype).nbytes, size)
            for episode, size in zip(episodes, about, strict=True)
        ]
        assert (folder / shard_name(0)).stat().st_size == sizes_of(rows)


@pytest.mark.parametrize(("vocab_size", "at_least"), [(256, 0.04), (1024, 0.02)])
def test_a_token_takes_within_5_percent_of_the_smallest_type_that_holds_it(
    tmp_path, write_shards, tokenizer_spec, vocab_size, at_least
):
    """64 episodes of 1,000 frames of 64 codes and one action a step."""
    codes = replace(tokenizer_spec.codes, vocab_size=vocab_size, grid_height=8, grid_width=8)
    write_shards(tmp_path, tokenizer=replace(tokenizer_spec, codes=codes), lengths=((1000,) * 64,))
    smallest = 64 * (1000 * 64 * np.dtype(codes.dtype).itemsize + 999)
    size = (tmp_path / shard_name(0)).stat().st_size
    assert smallest < size < 1.05 * smallest
    assert 0 < (size - smallest) / size - at_least < 0.01


def test_what_an_episode_and_a_shard_cost_lies_within_what_the_page_says(sizes_of):
    (low, high, shard) = (
        int(n.replace(",", ""))
        for n in re.search(
            r"costs ([\d,]+) to ([\d,]+) bytes more .*?a shard at most ([\d,]+)\.", PAGE, re.DOTALL
        ).groups()
    )
    blocks = [
        512 * (3 + -(-(128 + codes) // 512) + -(-(128 + actions) // 512) + 1) - codes - actions
        for codes in range(384, 897)
        for actions in (384, 385)
    ]
    assert (min(blocks), max(blocks)) == (low, high)
    rest = [sizes_of([(384 + 512 * n, 384, 512)]) - 512 * (6 + n) for n in range(60)]
    assert max(rest) == shard


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
