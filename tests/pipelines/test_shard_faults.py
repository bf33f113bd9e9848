"""Damaged and forged shards, through every reader: refused, named, and nothing else happens."""

import json
import shutil
import time

import numpy as np
import pytest
from chain_worlds import DYNAMICS_FLAGS
from shard_forging import (
    KEY,
    change_manifest,
    forge,
    members_of,
    mend,
    read_everything,
    replaced,
    stream_everything,
)
from worldloom.common import (
    FormatError,
    MismatchError,
    TokenShards,
    npy_bytes,
    shard_name,
)
from worldloom.pipelines.shard_tools import ShardsConfig, shards


@pytest.fixture
def folder(tmp_path, write_shards):
    """Two shards of an episode each: 5 frames and 6, both to train on."""
    write_shards(tmp_path / "shards", lengths=((5,), (6,)))
    return tmp_path / "shards"


def check_refused(commands, folder, tmp_path):
    """Every reader names the shard, the commands end with 3, in a line; training does not begin."""
    path = str(folder / shard_name(0))
    for read in (read_everything, stream_everything):
        with pytest.raises(FormatError) as caught:
            read(folder)
        assert str(caught.value).startswith(path)
    run = ("train-dynamics", "--shards", folder, "--output", tmp_path / "run", *DYNAMICS_FLAGS,
           "--training.num-steps", 3)  # fmt: skip
    for words in (("info", folder, "--verify"), run):
        began = time.monotonic()
        ended = commands.run(*words)
        assert ended.code == 3, ended.err
        assert path in ended.err.strip().splitlines()[-1]
        assert "Traceback" not in ended.err
        assert time.monotonic() - began < 30
    assert not (tmp_path / "run" / "model").exists()


def test_the_untouched_shards_are_read_by_every_reader_and_trained_on(folder, tmp_path, commands):
    """Or the refusals below would prove nothing."""
    read_everything(folder)
    stream_everything(folder)
    assert commands.run("info", folder, "--verify").code == 0
    ended = commands.run("train-dynamics", "--shards", folder, "--output", tmp_path / "run",
                         *DYNAMICS_FLAGS, "--training.num-steps", 1)  # fmt: skip
    assert ended.code == 0, ended.err


# Truncated or flipped tar

CUTS = {
    "everything": 0, "in a header": 100, "behind a header": 512, "at a member": 1024,
    "in the codes": 1700, "before the zeros at the end": 3072, "in those": 5000,
}  # fmt: skip


@pytest.mark.parametrize("where", CUTS)
def test_a_tar_that_was_cut_is_named_by_every_reader(folder, tmp_path, commands, where):
    path = folder / shard_name(0)
    path.write_bytes(path.read_bytes()[: CUTS[where]])
    check_refused(commands, folder, tmp_path)


@pytest.mark.parametrize("where", [cut for cut in CUTS if cut != "in those"])
def test_a_tar_that_was_cut_before_its_manifest_was_made_is_named_too(
    folder, tmp_path, commands, where
):
    """At a member's border, plain webdataset reads it as a shard with fewer episodes."""
    path = folder / shard_name(0)
    path.write_bytes(path.read_bytes()[: CUTS[where]])
    mend(folder)
    with pytest.raises(FormatError, match=r"shard-000000\.tar"):
        read_everything(folder)
    if CUTS[where] < 3072:  # or every episode is whole, and only what ends a tar is missing
        with pytest.raises(FormatError, match=r"shard-000000\.tar|manifest\.json"):
            stream_everything(folder)
    ended = commands.run("info", folder, "--verify")
    assert ended.code == 3
    assert len(ended.err.strip().splitlines()) == 1


def test_a_flipped_bit_anywhere_is_named_by_verify_and_by_the_stream(folder):
    path = folder / shard_name(0)
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    row = TokenShards(folder).episodes[0]
    spans = [row.span("actions"), row.span("codes")]
    named = [0, 124, 148, 257, len(content) - 1]
    named += [place for start, size in spans for place in (start, start + size - 2)]
    for place in [*named, *rng.integers(0, len(content), 60)]:
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        for read in (stream_everything, lambda f: TokenShards(f).verify()):
            with pytest.raises(FormatError, match=r"shard-000000\.tar"):
                read(folder)


def flip(folder, part, place, value):
    row = TokenShards(folder).episodes[0]
    offset, size_bytes = row.span(part)
    path = folder / shard_name(0)
    content = bytearray(path.read_bytes())
    content[offset + (place if place >= 0 else size_bytes + place)] = value
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("part", "place", "value"),
    [("codes", 0, 0), ("codes", 30, 0x7F), ("codes", -1, 0xFF), ("actions", 1, 0),
     ("actions", -1, 3), ("actions", -1, 255)],
)  # fmt: skip
def test_a_damaged_array_stops_training_before_it_begins(
    folder, tmp_path, commands, part, place, value
):
    """Magic and header of an npy, a code beyond the vocabulary, the actions n and -1."""
    flip(folder, part, place, value)
    check_refused(commands, folder, tmp_path)


# Wrong arrays under a manifest that fits: made so on purpose, or by another program

ARRAYS = {
    "codes of 64 bits": ("codes", np.zeros((5, 2, 3), np.int64)),
    "codes of a smaller type": ("codes", np.zeros((5, 2, 3), np.uint8)),
    "codes that are fractions": ("codes", np.zeros((5, 2, 3), np.float16)),
    "codes of another grid": ("codes", np.zeros((5, 3, 2), np.uint16)),
    "codes of a frame less": ("codes", np.zeros((4, 2, 3), np.uint16)),
    "a code beyond the vocabulary": ("codes", np.full((5, 2, 3), 300, np.uint16)),
    "the code -1": ("codes", np.full((5, 2, 3), -1, np.int16)),
    "an action more": ("actions", np.zeros((5, 1), np.uint8)),
    "an action less": ("actions", np.zeros((3, 1), np.uint8)),
    "an action for each frame": ("actions", np.zeros((6, 1), np.uint8)),
    "another slot": ("actions", np.zeros((4, 2), np.uint8)),
    "the action n": ("actions", np.full((4, 1), 3, np.uint8)),
    "the action -1": ("actions", np.full((4, 1), -1, np.int8)),
    "actions of another type": ("actions", np.zeros((4, 1), np.int64)),
    "actions that are fractions": ("actions", np.zeros((4, 1), np.float32)),
}


@pytest.mark.parametrize("what", ARRAYS)
def test_an_array_that_does_not_fit_is_refused_by_every_reader(folder, tmp_path, commands, what):
    part, array = ARRAYS[what]
    forge(folder, replaced(folder, {f"{KEY}.{part}.npy": npy_bytes(array)}))
    check_refused(commands, folder, tmp_path)


# Missing and doubled keys


@pytest.mark.parametrize("suffix", ["codes.npy", "actions.npy", "json"])
@pytest.mark.parametrize("what", ["missing", "doubled", "renamed", "of another episode"])
def test_a_member_that_is_missing_or_there_twice_is_named(folder, commands, suffix, what):
    name = f"{KEY}.{suffix}"
    members = members_of(folder)
    content, other = dict(members)[name], ""
    if what == "missing":
        members.remove((name, content))
    elif what == "doubled":
        members.append((name, content))
    else:
        other = f"x{name}" if what == "renamed" else name.replace("0000", "0001")
        members = [(other if name == n else n, c) for n, c in members]
    forge(folder, members)
    with pytest.raises(FormatError, match=r"shard-000000\.tar: "):
        stream_everything(folder)
    ended = commands.run("info", folder, "--verify")
    assert ended.code == 3
    assert str(folder / shard_name(0)) in ended.err
    assert name in ended.err or f"{other!r}" in ended.err


@pytest.mark.parametrize("where", ["in one shard", "over shards"])
def test_a_key_that_stands_twice_is_named(folder, commands, where):
    def change(data):
        if where == "in one shard":
            data["episodes"].append(data["episodes"][0])
            data["shards"][0]["num_episodes"] = 2
        else:
            data["episodes"][1]["key"] = KEY

    change_manifest(folder, change)
    for words in (("info", folder), ("train-dynamics", "--shards", folder, "--output", "x")):
        ended = commands.run(*words)
        assert ended.code == 3
        assert f"{KEY!r} stands twice" in ended.err


# Empty


@pytest.mark.parametrize("what", ["no episodes", "no shards", "an empty folder", "no folder"])
def test_nothing_to_train_on_ends_with_3_within_5_seconds(tmp_path, write_shards, commands, what):
    folder = tmp_path / "shards"
    if what in ("no episodes", "no shards"):
        write_shards(folder, lengths=((), ()) if what == "no episodes" else ())
    elif what == "an empty folder":
        folder.mkdir()
    assert commands.run("--version").code == 0  # the server that starts them is ready
    began = time.monotonic()
    ended = commands.run("train-dynamics", "--shards", folder, "--output", tmp_path / "run",
                         *DYNAMICS_FLAGS, "--training.num-steps", 1)  # fmt: skip
    assert ended.cpu_s < 5
    assert time.monotonic() - began < 30  # others may be busy with the machine
    assert ended.code == 3
    assert str(folder) in ended.err
    assert len(ended.err.strip().splitlines()) == 1


# Each field of the manifest


def leaves(value, path=()):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    elif isinstance(value, list) and value and not isinstance(value[0], str):
        for index, inner in enumerate(value[:1]):
            yield from leaves(inner, (*path, index))
    else:
        yield path, value


def reads(folder):
    """Whether nothing in a folder contradicts anything else."""
    try:
        read_everything(folder)
    except FormatError as error:
        return not str(error).startswith(str(folder))
    return True


def another(value):
    if isinstance(value, str):
        return "0" * 64 if len(value) == 64 else value + "x"
    if isinstance(value, list):
        return [*value[:-1], "other"] if value else [0]
    return value + 1


FREE = ("name", "height", "width", "resize", "fps", "frame_skip", "compute_dtype", "fingerprint")
"""What only the tokenizer can tell: another value makes another, consistent manifest."""


def test_each_field_of_a_manifest_that_is_changed_is_refused_or_makes_it_another_ones(
    folder, tmp_path
):
    """Refused by itself, or, where it is consistent, as not belonging to the shards of before."""
    original = json.loads((folder / "manifest.json").read_text())
    shutil.copytree(folder, tmp_path / "before")
    refused, others = [], []
    for path, value in leaves(original):
        data = json.loads(json.dumps(original))
        inner = data
        for step in path[:-1]:
            inner = inner[step]
        inner[path[-1]] = "crop" if path[-1] == "resize" else another(value)
        if path[-1] == "compute_dtype":
            inner[path[-1]] = "bfloat16"
        (folder / "manifest.json").write_text(json.dumps(data))
        if not reads(folder):
            refused.append(path)
            continue
        with pytest.raises(MismatchError) as caught:
            shards(
                ShardsConfig(
                    action="merge", folders=(tmp_path / "before", folder), output=tmp_path / "c"
                )
            )
        if path[0] in ("metrics", "source"):
            assert KEY in str(caught.value)  # they differ in nothing that matters
        else:
            others.append(path)
            assert f"{'.'.join(map(str, path))} (" in str(caught.value)
    assert {path[-1] for path in others} == {*FREE, "names"}
    assert len(refused) > 20
