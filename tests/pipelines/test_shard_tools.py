"""shard_tools.py, shard_copy.py: what is merged, split or chosen keeps every byte it had."""

import io
import json
import math
import re
import shutil
import signal
import tarfile
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from chain_worlds import DYNAMICS_FLAGS, hashes, identities
from worldloom.common import (
    ActionSpec,
    ConfigError,
    FormatError,
    MismatchError,
    TokenEpisode,
    TokenShards,
    file_sha256,
    shard_name,
    write_manifest,
    write_shard,
)
from worldloom.dynamics import Windows
from worldloom.pipelines.settings import parse
from worldloom.pipelines.shard_copy import combined_metrics
from worldloom.pipelines.shard_tools import ShardsConfig, shards


@pytest.fixture
def folder_of(token_episodes, tokenizer_spec, action_spec):
    """Write token shards whose episodes are numbered from `first`; return the folder."""

    def write(folder, lengths, *, first=0, seed=7, metrics=None, **changes):
        tokenizer = changes.pop("tokenizer", tokenizer_spec)
        actions = changes.pop("actions", action_spec)
        records = []
        for index, part in enumerate(lengths):
            episodes = token_episodes(tokenizer.codes, actions, list(part), first=first)
            records.append(
                write_shard(folder, index, episodes, codes=tokenizer.codes, actions=actions)
            )
            first += len(part)
        codes = tokenizer.codes
        write_manifest(
            folder, records, tokenizer=tokenizer, actions=actions,
            codebook_VZ=np.random.default_rng(seed).normal(size=(codes.vocab_size, codes.code_dim)),
            **{"fps": 8.75, "frame_skip": 4, **changes}, metrics=metrics or {},
            source={"episodes": {"game": folder.name}},
        )  # fmt: skip
        return folder

    return write


@pytest.fixture
def two(tmp_path, folder_of):
    """Two folders of five episodes each, in two and three shards."""
    return (
        folder_of(tmp_path / "a", [[5, 1, 9], [4, 7]]),
        folder_of(tmp_path / "b", [[3, 8], [2], [6, 5]], first=5),
    )


def run(action, *folders, output, **settings):
    return shards(ShardsConfig(action=action, folders=folders, output=output, **settings))


def members(folder):
    """The bytes of every member of every tar, by name."""
    found = {}
    for path in sorted(folder.glob("shard-*.tar")):
        with tarfile.open(path, "r:") as tar:
            found |= {info.name: tar.extractfile(info).read() for info in tar}
    return found


def tars(folder):
    return [file_sha256(path) for path in sorted(folder.glob("shard-*.tar"))]


def test_merged_shards_have_every_episode_of_each_with_the_bytes_that_it_had(tmp_path, two):
    a, b = two
    assert run("merge", a, b, output=tmp_path / "c") == tmp_path / "c"
    merged = TokenShards(tmp_path / "c")
    merged.verify()
    rows = [*TokenShards(a).episodes, *TokenShards(b).episodes]
    assert [(row.key, row.split) for row in merged.episodes] == [(r.key, r.split) for r in rows]
    assert members(tmp_path / "c") == members(a) | members(b)
    assert (tmp_path / "c" / "codebook.safetensors").read_bytes() == (
        a / "codebook.safetensors"
    ).read_bytes()


def test_the_provenance_of_every_source_is_kept(tmp_path, two):
    run("merge", *two, output=tmp_path / "c", prefix=("a-", ""))
    source = TokenShards(tmp_path / "c").source
    assert source["made_by"] == "worldloom shards merge"
    assert [part["source"] for part in source["sources"]] == [
        {"episodes": {"game": "a"}}, {"episodes": {"game": "b"}},
    ]  # fmt: skip
    assert [part["manifest"] for part in source["sources"]] == [
        file_sha256(folder / "manifest.json") for folder in two
    ]
    assert [part["prefix"] for part in source["sources"]] == ["a-", ""]
    assert str(tmp_path) not in (tmp_path / "c" / "manifest.json").read_text()


def test_the_table_of_the_formats_page_has_the_fields_that_are_written(tmp_path, two):
    """Of docs/formats.md: what `worldloom shards` writes."""
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
    section = page.partition("### What `worldloom shards` writes")[2].partition("\n### ")[0]
    run("merge", *two, output=tmp_path / "c", shard_episodes=4)
    source = TokenShards(tmp_path / "c").source
    assert set(source) == {"made_by", "sources", "prefix", "shard_episodes"}
    told = set(re.findall(r"`(\w+)`", section))
    assert {"made_by", "sources"} | set(source["sources"][0]) <= told
    plan = json.loads((tmp_path / "c" / "plan.json").read_text())
    assert set(plan) - set(source) == {"num_episodes", "num_shards"} <= told
    run("split", two[0], output=tmp_path / "parts", parts=2)
    plan = json.loads((tmp_path / "parts" / "plan.json").read_text())
    assert set(plan) - {"made_by"} == {"parts"} <= told
    assert plan["parts"] == ["part-000", "part-001"]


def test_splitting_what_was_merged_gives_the_tars_of_before_and_the_other_way_round(tmp_path, two):
    a, b = two
    run("merge", a, b, output=tmp_path / "c")
    assert tars(tmp_path / "c") == tars(a) + tars(b)
    run("split", tmp_path / "c", output=tmp_path / "parts", parts=2)
    for folder, part in zip(two, ("part-000", "part-001"), strict=True):
        assert tars(tmp_path / "parts" / part) == tars(folder)
        again, before = TokenShards(tmp_path / "parts" / part), TokenShards(folder)
        assert again.manifest["shards"] == before.manifest["shards"]
        assert again.manifest["episodes"] == before.manifest["episodes"]
    parts = sorted(p for p in (tmp_path / "parts").iterdir() if p.is_dir())
    run("merge", *parts, output=tmp_path / "again")
    assert tars(tmp_path / "again") == tars(tmp_path / "c")


def test_the_same_command_gives_the_same_bytes_wherever_the_folders_are(tmp_path, two):
    shutil.copytree(two[0], tmp_path / "moved")
    run("merge", *two, output=tmp_path / "c")
    run("merge", tmp_path / "moved", two[1], output=tmp_path / "d")
    assert hashes(tmp_path / "c") == hashes(tmp_path / "d")


def test_every_part_of_a_split_is_a_folder_that_can_be_trained_on_and_none_is_lost(
    tmp_path, folder_of, commands
):
    whole = folder_of(tmp_path / "whole", [[5, 6], [4, 7, 9], [3], [8, 5], [2, 2]])
    run("split", whole, output=tmp_path / "parts", parts=3)
    folders = sorted(p for p in (tmp_path / "parts").iterdir() if p.is_dir())
    assert [folder.name for folder in folders] == ["part-000", "part-001", "part-002"]
    keys = []
    for folder in folders:
        part = TokenShards(folder)
        part.verify()
        keys += [row.key for row in part.episodes]
        assert len(Windows(part, "train", window_frames=3)) > 0
    assert keys == [row.key for row in TokenShards(whole).episodes]
    assert members(whole) == {k: v for folder in folders for k, v in members(folder).items()}
    ended = commands.run("train-dynamics", "--shards", folders[0], "--output", tmp_path / "run",
                         *DYNAMICS_FLAGS, "--training.num-steps", 1)  # fmt: skip
    assert ended.code == 0, ended.err


def test_parts_have_whole_shards_and_come_nearest_to_even(tmp_path, folder_of):
    whole = folder_of(tmp_path / "whole", [[2], [2], [2], [2, 2, 2], [2], [2]])
    run("split", whole, output=tmp_path / "parts", parts=2)
    sizes = [len(TokenShards(tmp_path / "parts" / f"part-00{n}").episodes) for n in (0, 1)]
    assert sizes == [3, 5]
    with pytest.raises(ConfigError, match=r"--parts 7: .* has 6 shards"):
        run("split", whole, output=tmp_path / "more", parts=7)
    assert not (tmp_path / "more").exists()
    run("split", whole, output=tmp_path / "more", parts=7, shard_episodes=1)
    sizes = [
        len(TokenShards(path.parent).episodes) for path in (tmp_path / "more").glob("*/plan.json")
    ]
    assert sorted(sizes) == [1, 1, 1, 1, 1, 1, 2]


def test_a_split_by_split_parts_what_is_trained_on_from_what_is_held_out(tmp_path, two):
    run("split", two[0], output=tmp_path / "parts", by_split=True)
    for name in ("train", "validation"):
        part = TokenShards(tmp_path / "parts" / name)
        part.verify()
        wanted = [row.key for row in TokenShards(two[0]).episodes if row.split == name]
        assert [(row.key, row.split) for row in part.episodes] == [(key, name) for key in wanted]


def test_a_subset_has_the_episodes_that_were_asked_for_and_no_other(tmp_path, two):
    b = two[1]
    every = [row.key for row in TokenShards(b).episodes]
    (tmp_path / "keys.txt").write_text(f"{every[3]}\n\n  {every[0]}\n")

    def chosen(**settings):
        output = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        part = TokenShards(run("subset", b, output=output, **settings))
        part.verify()
        assert members(output).items() <= members(b).items()
        return [row.key for row in part.episodes]

    assert chosen(keys=tmp_path / "keys.txt") == [every[0], every[3]]
    assert chosen(split="validation") == [every[0], every[3]]
    drawn = {seed: chosen(num_episodes=3, seed=seed) for seed in range(6)}
    assert drawn[0] == chosen(num_episodes=3)
    assert all(len(set(keys)) == 3 and keys == sorted(keys) for keys in drawn.values())
    assert len(set(map(tuple, drawn.values()))) > 1
    assert len(chosen(split="train", num_episodes=2)) == 2
    assert chosen(shard_episodes=2) == every


@pytest.mark.parametrize("action", ["merge", "subset"])
def test_shards_can_be_cut_anew(tmp_path, two, action):
    folders = two if action == "merge" else two[:1]
    run(action, *folders, output=tmp_path / "c", shard_episodes=4)
    sizes = [shard["num_episodes"] for shard in TokenShards(tmp_path / "c").manifest["shards"]]
    assert sizes == ([4, 4, 2] if action == "merge" else [4, 1])
    wanted = members(two[0]) | (members(two[1]) if action == "merge" else {})
    assert members(tmp_path / "c") == wanted


CHANGES = {
    "tokenizer.fingerprint": lambda t, a: {"tokenizer": replace(t, fingerprint="ab" * 32)},
    "tokenizer.codes.vocab_size": lambda t, a: {
        "tokenizer": replace(t, codes=replace(t.codes, vocab_size=299))
    },
    "tokenizer.resize": lambda t, a: {"tokenizer": replace(t, resize="crop")},
    "actions.names": lambda t, a: {"actions": ActionSpec.discrete(["noop", "left", "jump"])},
    "actions.kind": lambda t, a: {"actions": ActionSpec.none()},
    "fps": lambda t, a: {"fps": 9.0},
    "frame_skip": lambda t, a: {"frame_skip": 5},
    "codebook": lambda t, a: {"seed": 8},
}


@pytest.mark.parametrize("field", CHANGES)
def test_shards_that_mean_something_else_are_not_merged_and_the_field_is_named(
    tmp_path, folder_of, tokenizer_spec, action_spec, field
):
    a = folder_of(tmp_path / "a", [[5]])
    b = folder_of(tmp_path / "b", [[5]], first=1, **CHANGES[field](tokenizer_spec, action_spec))
    with pytest.raises(MismatchError, match=f"differ in .*{field} ") as caught:
        run("merge", a, b, output=tmp_path / "c")
    assert str(caught.value).startswith(f"{b}: does not belong with {a}")
    assert not (tmp_path / "c").exists()


def test_keys_that_collide_are_named_or_renamed_and_nothing_but_the_key_changes(
    tmp_path, folder_of
):
    a, b = folder_of(tmp_path / "a", [[5, 2], [4]]), folder_of(tmp_path / "b", [[5, 3]])
    with pytest.raises(MismatchError, match=f"{a}, {b}: .* episode-0000, episode-0001, and in"):
        run("merge", a, b, output=tmp_path / "c")
    assert not (tmp_path / "c").exists()
    run("merge", a, b, output=tmp_path / "c", prefix=("one_", "two-"))
    found = members(tmp_path / "c")
    for folder, prefix in ((a, "one_"), (b, "two-")):
        for name, content in members(folder).items():
            if name.endswith(".json"):
                about = json.loads(content) | {"key": prefix + name.removesuffix(".json")}
                assert json.loads(found.pop(prefix + name)) == about
            else:
                assert found.pop(prefix + name) == content
    assert not found
    TokenShards(tmp_path / "c").verify()
    with pytest.raises(FormatError, match="after --prefix: key 'x/episode-0000'"):
        run("merge", a, b, output=tmp_path / "d", prefix=("x/", ""))
    with pytest.raises(FormatError, match="after --prefix: key"):
        run("merge", a, b, output=tmp_path / "d", prefix=("x" * 70, ""))


# Measurements


def test_a_psnr_of_several_is_that_of_their_pooled_errors_and_what_is_unknown_is_none(
    tmp_path, folder_of
):
    about = {"split": "validation", "moving_psnr_db": 20.0, "other": 3}
    a = folder_of(tmp_path / "a", [[5, 1, 9]], metrics={"psnr_db": 30.0, **about})
    b = folder_of(tmp_path / "b", [[2, 2, 21]], first=3, metrics={"psnr_db": 20.0, **about})
    run("merge", a, b, output=tmp_path / "c")
    metrics = TokenShards(tmp_path / "c").metrics
    pooled = (9 * 10**-3.0 + 21 * 10**-2.0) / 30
    assert metrics.pop("psnr_db") == pytest.approx(-10 * math.log10(pooled))
    assert metrics == {"split": "validation", "moving_psnr_db": None, "other": None}


def test_measurements_hold_where_all_measured_episodes_are_kept_and_only_there(tmp_path, folder_of):
    metrics = {"split": "validation", "psnr_db": 30.0, "moving_psnr_db": 20.0}
    shards = TokenShards(folder_of(tmp_path / "a", [[5, 1, 9, 4, 3, 6]], metrics=metrics))
    assert shards.split("validation") == [2, 5]
    assert combined_metrics([(shards, {0, 2, 5})]) == metrics
    assert combined_metrics([(shards, {0, 2, 3})]) == dict.fromkeys(metrics)
    assert combined_metrics([(shards, {0, 1})]) == dict.fromkeys(metrics)
    for strange in (None, "no", True, 10**400, -1e308, [1]):
        shards.metrics["psnr_db"] = strange
        assert combined_metrics([(shards, {2, 5})] * 2)["psnr_db"] is None
        shards.metrics["split"] = strange
        combined_metrics([(shards, {2, 5})] * 2)
        shards.metrics["split"] = "validation"


# Damage, and what stops it


@pytest.mark.parametrize("where", ["codes", "header", "cut"])
def test_a_damaged_source_shard_is_named_and_what_was_finished_is_kept(
    tmp_path, two, commands, where
):
    b, output = two[1], tmp_path / "c"
    path = b / shard_name(1)
    content = path.read_bytes()
    damaged = bytearray(content)
    row = TokenShards(b).episodes[2]
    # A lower code is a code too: only the hash tells.
    damaged[row.codes_offset + row.codes_bytes - 2 if where == "codes" else 0] ^= 1
    path.write_bytes(content[:-512] if where == "cut" else damaged)
    ended = commands.run("shards", "merge", *two, "--output", output)
    assert ended.code == 3
    assert str(path) in ended.err
    assert where == "cut" or "--skip-bad 1" in ended.err
    assert ended.out == ""
    if where != "cut":  # which is found before anything is written
        assert [p.name for p in sorted(output.glob("*.tar"))] == [shard_name(n) for n in range(3)]
    assert not (output / "manifest.json").exists()
    path.write_bytes(content)
    before = identities(output) if output.exists() else {}
    assert commands.run("shards", "merge", *two, "--output", output).code == 0
    run("merge", *two, output=tmp_path / "d")
    assert hashes(output) == hashes(tmp_path / "d")
    after = identities(output)
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_episodes_of_a_damaged_shard_are_left_out_named_and_counted_up_to_a_bound(
    tmp_path, two, commands, damage
):
    b, output = two[1], tmp_path / "c"
    rows = TokenShards(b).episodes
    lost = [row.key for row in rows if row.shard == 0]
    there = members(two[0]) | members(b)
    path = b / shard_name(0)
    content = bytearray(path.read_bytes())
    content[rows[0].codes_offset + rows[0].codes_bytes - 2] ^= 1
    path.unlink()
    if damage != "gone":
        path.write_bytes(content[: -512 if damage == "cut" else None])
    refused = commands.run("shards", "merge", *two, "--output", output, "--skip-bad", 1)
    assert refused.code == 3
    assert f"{lost[1]} is one too many (1 were left out before)" in refused.err
    assert not (output / "manifest.json").exists()
    ended = commands.run("shards", "merge", *two, "--output", output, "--skip-bad", 2)
    assert ended.code == 0, ended.err
    assert all(f"skipped {key}: " in ended.err for key in lost)
    copied = TokenShards(output)
    copied.verify()
    whole = [row.key for folder in two for row in TokenShards(folder, tars_elsewhere=True).episodes]
    assert [row.key for row in copied.episodes] == [key for key in whole if key not in lost]
    assert copied.source["skipped"].keys() == set(lost)
    assert str(tmp_path) not in (output / "manifest.json").read_text()
    assert members(output) == {
        name: content for name, content in there.items() if name.partition(".")[0] not in lost
    }


@pytest.mark.parametrize(
    "change",
    [
        {"split": "train"}, {"num_frames": 4}, {"key": "other"}, {"metadata": []}, {"more": 1},
        {"num_frames": True},
    ],
)  # fmt: skip
def test_a_json_that_contradicts_the_manifest_is_refused(tmp_path, folder_of, change):
    folder = folder_of(tmp_path / "a", [[1, 5, 9]])
    path = folder / shard_name(0)
    key = "episode-0000" if change == {"num_frames": True} else "episode-0002"
    with tarfile.open(path, "r:") as tar:
        there = [(info, tar.extractfile(info).read()) for info in tar]
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for info, content in there:
            if info.name == f"{key}.json":
                content = json.dumps(json.loads(content) | change).encode()
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0].update(size_bytes=path.stat().st_size, sha256=file_sha256(path))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for work in (
        lambda: run("subset", folder, output=tmp_path / "c", shard_episodes=1),
        lambda: TokenShards(folder).verify(),
    ):
        with pytest.raises(FormatError, match=rf"{path}: {key}\.json"):
            work()


WORDS = ("--shard-episodes", 3)
WRITTEN = range(1, 12)
"""Plan, four shards and their markers, codebook, manifest: eleven files are written."""


@pytest.fixture
def undisturbed(tmp_path, two):
    return hashes(run("merge", *two, output=tmp_path / "undisturbed", shard_episodes=3))


def check_continues(commands, two, output, wanted):
    """Running it again ends as if nothing had happened, and redoes no finished shard."""
    for name, digest in hashes(output).items():
        assert name.startswith("tmp-") or digest == wanted[name]
    finished = {
        name
        for name in hashes(output)
        if name.startswith("shard-") and (output / name).with_suffix(".json").exists()
    }
    before = identities(output)
    ended = commands.run("shards", "merge", *two, "--output", output, *WORDS)
    assert ended.code == 0, ended.err
    assert hashes(output) == wanted
    after = identities(output)
    assert {n: after[n] for n in finished} == {n: before[n] for n in finished}
    return finished


@pytest.mark.slow
@pytest.mark.parametrize(
    ("failpoint", "passes"),
    [("write", WRITTEN[::2]), ("fsync", WRITTEN[1::2]), ("rename", WRITTEN),
     ("shard-marker", range(1, 5))],
)  # fmt: skip
def test_killed_at_any_step_and_run_again_it_leaves_the_files_of_an_undisturbed_run(
    tmp_path, two, commands, undisturbed, failpoint, passes
):
    kept = []
    for nth in passes:
        output = tmp_path / f"at-{nth}"
        killed = commands.run(
            "shards", "merge", *two, "--output", output, *WORDS, failpoint=f"{failpoint}:{nth}"
        )
        assert killed.code == -signal.SIGKILL, killed.err
        kept.append(len(check_continues(commands, two, output, undisturbed)))
    assert max(kept) > 0  # or nothing was ever finished, and nothing could have been kept
    survivor = commands.run(
        "shards", "merge", *two, "--output", tmp_path / "more", *WORDS,
        failpoint=f"{failpoint}:{WRITTEN.stop}",
    )  # fmt: skip
    assert survivor.code == 0  # or there are steps that were not tried


def test_a_split_that_is_killed_between_its_parts_is_continued(tmp_path, two, commands):
    words = ("shards", "split", two[1], "--parts", 3, "--output")
    assert commands.run(*words, tmp_path / "whole").code == 0
    wanted = hashes(tmp_path / "whole")
    assert len(wanted) == 1 + 3 * 3 + 3 * 2  # 3 plans, codebooks, manifests; 3 shards, markers
    for nth in (1, 2, 6, 7, 11, 16):
        output = tmp_path / str(nth)
        killed = commands.run(*words, output, failpoint=f"rename:{nth}")
        assert killed.code == -signal.SIGKILL
        ended = commands.run(*words, output)
        assert ended.code == 0, ended.err
        assert hashes(output) == wanted


def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(
    tmp_path, two, commands, undisturbed
):
    limit = max(p.stat().st_size for p in (tmp_path / "undisturbed").glob("*.tar")) - 1
    output = tmp_path / "c"
    ended = commands.run(
        "shards", "merge", *two, "--output", output, *WORDS, largest_file_bytes=limit
    )
    assert ended.code == 1
    assert len(ended.err.strip().splitlines()) == 1
    assert ".tar: File too large; nothing was left half written. Make room" in ended.err
    assert not list(output.glob("tmp-*"))
    check_continues(commands, two, output, undisturbed)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_it_and_leaves_nothing_half_written(
    tmp_path, two, commands, undisturbed, number, code
):
    for attempt in range(10):
        output = tmp_path / f"attempt-{attempt}"
        running = commands.start("shards", "merge", *two, "--output", output, *WORDS)
        while not (output / "plan.json").exists() and running.is_running():
            time.sleep(0.0005)
        running.send(number)
        ended = running.wait()
        if ended.code != 0:
            break
    assert ended.code == code, ended.err
    assert "run the same command again, and it continues" in ended.err or number != signal.SIGINT
    assert not list(output.glob("tmp-*"))
    check_continues(commands, two, output, undisturbed)


def test_what_was_finished_before_is_left_as_it_is(tmp_path, two, commands):
    words = ("shards", "merge", *two, "--output", tmp_path / "c")
    first = commands.run(*words)
    assert first.code == 0, first.err
    assert first.out == f"{tmp_path / 'c'}\n"
    assert f"next: worldloom info {tmp_path / 'c'} --verify" in first.err
    before = identities(tmp_path / "c")
    again = commands.run(*words)
    assert (again.code, again.out) == (0, f"{tmp_path / 'c'}\n")
    assert "finished before" in again.err
    assert identities(tmp_path / "c") == before


# What is refused before anything is written


def test_an_output_that_is_not_ours_or_was_begun_as_something_else_is_not_touched(
    tmp_path, two, folder_of
):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    (tmp_path / "file").write_text("keep me")
    before = hashes(tmp_path)
    for output, reason in (
        ("mine", r"has notes.txt but no plan.json"), ("file", "is a file"),
        ("a", "is read from"), ("b", "is read from"), ("b/../a", "is read from"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=reason):
            run("merge", *two, output=tmp_path / output)
    with pytest.raises(ConfigError, match=r"has .* but no plan\.json"):
        run("split", two[0], output=two[1], parts=2)
    assert hashes(tmp_path) == before
    run("merge", *two, output=tmp_path / "c")
    before = hashes(tmp_path / "c")
    with pytest.raises(
        MismatchError, match=r"begun with another plan \(.*shard_episodes 0 then, 3"
    ):
        run("merge", *two, output=tmp_path / "c", shard_episodes=3)
    folder_of(two[1], [[3, 8], [2], [6, 4]], first=5)
    with pytest.raises(MismatchError, match=r"another plan \(sources"):
        run("merge", *two, output=tmp_path / "c")
    assert hashes(tmp_path / "c") == before


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("merge a --output c", "shards merge takes two or more folders, got 1"),
        ("merge --output c", "folders"),
        ("split a b --parts 2 --output c", "shards split takes one folder, got 2"),
        ("split a --output c", "either --parts N or --by-split"),
        ("split a --parts 2 --by-split --output c", "either --parts N or --by-split"),
        ("split a --parts -1 --output c", "--parts must be at least 0, got -1"),
        ("merge a b --parts 2 --output c", "--parts is a flag of `shards split`, not of merge"),
        ("merge a b --split train --output c", "--split is a flag of `shards subset`"),
        ("subset a --prefix x --output c", "--prefix is a flag of `shards merge`"),
        ("merge a b --prefix x --output c", "one for each of the 2 folders"),
        ("subset a --output c", "say which episodes"),
        ("subset a --num-episodes 99 --output c", "there are 5 to draw from"),
        ("subset a --num-episode 9 --output c", "did you mean --num-episodes"),
        ("subset a --split test --output c", "train"),
        ("join a b --output c", "merge"),
    ],
)
def test_wrong_settings_end_with_2_naming_the_flag_and_write_nothing(
    tmp_path, two, commands, words, reason
):
    words = [str(tmp_path / word) if word in ("a", "b", "c") else word for word in words.split()]
    ended = commands.run("shards", *words)
    assert ended.code == 2, ended.err
    assert reason in " ".join(ended.err.replace("│", " ").split())
    assert not (tmp_path / "c").exists()


def test_missing_keys_and_empty_folders_end_with_3_within_5_seconds(
    tmp_path, two, commands, folder_of
):
    (tmp_path / "keys.txt").write_text("episode-0001\nnone-such\nnor-this\n")
    (tmp_path / "empty.txt").write_text("")
    folder_of(tmp_path / "none", [])
    folder_of(tmp_path / "no-held-out", [[4, 5]])
    assert commands.run("--version").code == 0  # the server that starts them is ready
    for words, reason in (
        (("subset", two[0], "--keys", tmp_path / "keys.txt"), "line 2: .* none-such, nor-this"),
        (("subset", two[0], "--keys", tmp_path / "empty.txt"), "nothing to write"),
        (("subset", two[0], "--keys", tmp_path / "absent.txt"), "absent.txt: not found"),
        (("subset", tmp_path / "no-held-out", "--split", "validation"), "nothing to write"),
        (("split", tmp_path / "none", "--by-split"), "nothing to write"),
        (("merge", two[0], tmp_path / "nowhere"), "nowhere: no such folder"),
    ):
        began = time.monotonic()
        ended = commands.run("shards", *words, "--output", tmp_path / "c")
        assert ended.cpu_s < 5
        assert time.monotonic() - began < 30  # others may be busy with the machine
        assert ended.code == 3, ended.err
        assert re.search(reason, ended.err), ended.err
        assert len(ended.err.strip().splitlines()) == 1
        assert not (tmp_path / "c").exists()


def test_the_words_may_stand_in_any_sensible_order_and_in_a_file(tmp_path):
    flags = ["--output", "c"]
    wanted = parse(ShardsConfig, ["merge", "a", "b", *flags], command="shards")
    for words in (["merge", *flags, "a", "b"], [*flags, "merge", "a", "b"]):
        assert parse(ShardsConfig, words, command="shards") == wanted
    (tmp_path / "mine.toml").write_text('[shards]\nshard_episodes = 9\noutput = "d"\n')
    filled = parse(
        ShardsConfig, ["split", "a", "--by-split", "--config", str(tmp_path / "mine.toml")],
        command="shards",
    )  # fmt: skip
    assert (filled.shard_episodes, str(filled.output), filled.by_split) == (9, "d", True)


def test_memory_does_not_grow_with_the_number_of_episodes(tmp_path, tokenizer_spec):
    codes = replace(tokenizer_spec.codes, grid_height=32, grid_width=32)
    tokenizer = replace(tokenizer_spec, codes=codes)
    actions = ActionSpec.none()
    episode_bytes = 200 * codes.cells * 2

    def peak(count):
        folder = tmp_path / f"of-{count}"
        episodes = (
            TokenEpisode(
                key=f"e{number}", codes_thw=np.zeros((200, 32, 32), np.uint16), num_frames=200,
                slots_TA=np.zeros((199, 0), np.int64), split="train",
            )
            for number in range(count)
        )  # fmt: skip
        record = write_shard(folder, 0, episodes, codes=codes, actions=actions)
        write_manifest(
            folder, [record], tokenizer=tokenizer, actions=actions, fps=1.0, frame_skip=1,
            codebook_VZ=np.zeros((300, 4), np.float32), metrics={}, source={},
        )  # fmt: skip
        tracemalloc.start()
        run("subset", folder, output=folder / "copy", shard_episodes=count)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(2)
    few, many = peak(4), peak(40)
    assert few > episode_bytes  # or numpy's arrays were not counted
    assert many < few + episode_bytes
