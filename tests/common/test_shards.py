"""Promises of shards.py and shard_reader.py: what is read is what was written, byte for byte."""

import gc
import hashlib
import io
import json
import os
import resource
import shutil
import signal
import tarfile
import time
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from worldloom.common import (
    ActionSpec,
    CodeSpec,
    FormatError,
    StorageError,
    TokenShards,
    finished_shard,
    npy_bytes,
    read_json,
    remove_leftovers,
    shard_bytes,
    shard_name,
    write_json,
    write_manifest,
    write_shard,
)
from worldloom.common.shard_reader import _MAX_MAPS


def hashes(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def change_manifest(folder, change):
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def open_and_verify(folder):
    TokenShards(folder).verify()


def read_and_verify(folder):
    """Read as training does, then verify."""
    shards = TokenShards(folder)
    for index in range(len(shards.episodes)):
        shards.codes_thw(index)
        shards.slots_TA(index)
    shards.verify()


# What is written is what is read


@pytest.mark.parametrize("vocab_size", [256, 300, 70_000])
@pytest.mark.parametrize(("stride", "levels"), [(1, 1), (4, 1), (2, 3)])
def test_codes_and_actions_come_back_in_any_stretch(
    tmp_path, write_shards, tokenizer_spec, vocab_size, stride, levels
):
    codes = CodeSpec(
        vocab_size=vocab_size, grid_height=2, grid_width=3, code_dim=4,
        frames_per_latent=stride, num_levels=levels,
    )  # fmt: skip
    spec = replace(tokenizer_spec, codes=codes)
    episodes = write_shards(tmp_path, tokenizer=spec)
    shards = TokenShards(tmp_path)
    assert shards.tokenizer == spec
    assert len(shards.episodes) == len(episodes)
    for index, episode in enumerate(episodes):
        row = shards.episodes[index]
        assert (row.key, row.split, row.num_frames) == (
            episode.key, episode.split, episode.num_frames
        )  # fmt: skip
        t = row.latent_frames
        assert t == codes.latent_frames(row.num_frames)
        for start in range(t):
            for stop in (start, start + 1, t, t + 5, None):
                part = shards.codes_thw(index, start, stop)
                assert part.dtype == codes.dtype
                assert np.array_equal(part, episode.codes_thw[start:stop])
        for start in range(row.num_frames):
            for stop in (start, row.num_frames - 1, None):
                if stop is None or start <= stop:
                    part = shards.slots_TA(index, start, stop)
                    assert part.dtype == np.int64
                    assert np.array_equal(part, episode.slots_TA[start:stop])
    shards.verify()


def test_actions_of_every_kind_come_back(tmp_path, write_shards, any_actions):
    episodes = write_shards(tmp_path, actions=any_actions)
    shards = TokenShards(tmp_path)
    assert shards.actions == any_actions
    for index, episode in enumerate(episodes):
        assert np.array_equal(shards.slots_TA(index), episode.slots_TA)
    shards.verify()


def test_the_rest_of_the_manifest_comes_back(tmp_path, write_shards, tokenizer_spec, action_spec):
    write_shards(tmp_path)
    shards = TokenShards(tmp_path)
    assert (shards.tokenizer, shards.codes) == (tokenizer_spec, tokenizer_spec.codes)
    assert shards.actions == action_spec
    assert (shards.fps, shards.frame_skip) == (8.75, 4)
    assert shards.metrics == {"psnr_db": 31.5}
    assert shards.source == {"episodes": "test"}
    assert shards.split("train") == [0, 1, 3, 4]
    assert shards.split("validation") == [2]
    codebook = shards.codebook_VZ()
    assert codebook.tobytes() == load_file(tmp_path / "codebook.safetensors")["codebook"].tobytes()


def test_nothing_counts_from_the_end_and_nothing_can_be_written(tmp_path, write_shards):
    write_shards(tmp_path)
    shards = TokenShards(tmp_path)
    for read in (shards.codes_thw, shards.slots_TA):
        for start, stop in ((-1, 3), (3, 2), (0, -1)):
            with pytest.raises(ValueError, match="episode-0000: "):
                read(0, start, stop)
    with pytest.raises(ValueError, match="read-only"):
        shards.codes_thw(0)[0] = 1


def test_the_same_episodes_give_the_same_bytes(tmp_path, write_shards):
    write_shards(tmp_path / "one")
    write_shards(tmp_path / "two")
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    write_shards(tmp_path / "other", lengths=((5, 1, 9), (4, 8)))
    differ = {
        name
        for name, digest in hashes(tmp_path / "one").items()
        if hashes(tmp_path / "other")[name] != digest
    }
    assert differ == {"shard-000001.tar", "shard-000001.json", "manifest.json"}


def test_codes_of_any_integer_type_give_the_same_bytes(
    tmp_path, token_episodes, code_spec, action_spec
):
    (episode,) = token_episodes(code_spec, action_spec, [5])
    for name, dtype in (("a", np.int64), ("b", np.uint16), ("c", ">u4")):
        other = replace(
            episode,
            codes_thw=np.asfortranarray(episode.codes_thw.astype(dtype)),
            slots_TA=episode.slots_TA.astype(np.int32),
        )
        write_shard(tmp_path / name, 0, [other], codes=code_spec, actions=action_spec)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b") == hashes(tmp_path / "c")


# What does not fit is refused when it is written


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"codes_thw": np.full((5, 2, 3), 300)}, r"codes in \[300, 300\], must be in \[0, 300\)"),
        ({"codes_thw": np.full((5, 2, 3), -1)}, r"codes in \[-1, -1\]"),
        ({"codes_thw": np.zeros((5, 2, 3))}, "float64, must be integers"),
        ({"codes_thw": np.zeros((4, 2, 3), np.int64)}, r"must be \(5, 2, 3\)"),
        ({"codes_thw": np.zeros((5, 3, 2), np.int64)}, r"must be \(5, 2, 3\)"),
        ({"slots_TA": np.zeros((5, 1), np.int64)}, "5 actions for 5 frames"),
        ({"slots_TA": np.zeros((3, 1), np.int64)}, "3 actions for 5 frames"),
        ({"slots_TA": np.full((4, 1), 3)}, r"must be in \[0, 3\)"),
        ({"slots_TA": np.full((4, 1), -1)}, r"must be in \[0, 3\)"),
        ({"slots_TA": np.zeros((4, 2), np.int64)}, "shape"),
        ({"slots_TA": np.zeros((4, 1))}, "float64"),
        ({"num_frames": 0}, "0 frames"),
        ({"split": "test"}, "split 'test'"),
        ({"key": "../../x"}, "key '../../x'"),
        ({"key": "a.b"}, "key 'a.b'"),
        ({"key": "tmp-a"}, "key 'tmp-a'"),
    ],
)
def test_an_episode_that_does_not_fit_is_refused_and_no_shard_appears(
    tmp_path, token_episodes, code_spec, action_spec, changes, reason
):
    good, bad = token_episodes(code_spec, action_spec, [5, 5])
    with pytest.raises(FormatError, match=reason):
        write_shard(
            tmp_path, 0, [good, replace(bad, **changes)], codes=code_spec, actions=action_spec
        )
    assert list(tmp_path.iterdir()) == []


def test_a_key_of_the_longest_length_fits_a_tar_and_a_longer_one_is_refused(
    tmp_path, token_episodes, code_spec, action_spec
):
    (episode,) = token_episodes(code_spec, action_spec, [2])
    write_shard(tmp_path, 0, [replace(episode, key="k" * 80)], codes=code_spec, actions=action_spec)
    with tarfile.open(tmp_path / shard_name(0), "r:") as tar:
        assert f"{'k' * 80}.actions.npy" in tar.getnames()
    with pytest.raises(FormatError, match="key"):
        write_shard(
            tmp_path, 1, [replace(episode, key="k" * 81)], codes=code_spec, actions=action_spec
        )


def test_a_key_that_stands_twice_is_refused_in_a_shard_and_over_shards(
    tmp_path, token_episodes, tokenizer_spec, action_spec
):
    codes = tokenizer_spec.codes
    (episode,) = token_episodes(codes, action_spec, [2])
    with pytest.raises(FormatError, match="episode-0000 stands twice"):
        write_shard(tmp_path, 0, [episode, episode], codes=codes, actions=action_spec)
    records = [
        write_shard(tmp_path, index, [episode], codes=codes, actions=action_spec)
        for index in (0, 1)
    ]
    rest = {
        "tokenizer": tokenizer_spec, "actions": action_spec, "fps": 1.0, "frame_skip": 1,
        "codebook_VZ": np.zeros((300, 4), np.float32), "metrics": {}, "source": {},
    }  # fmt: skip
    with pytest.raises(FormatError, match="'episode-0000' stands twice"):
        write_manifest(tmp_path, records, **rest)
    with pytest.raises(ValueError, match="must be in order"):
        write_manifest(tmp_path, records[1:], **rest)
    for shape in ((299, 4), (300, 5), (1, 300, 4)):
        with pytest.raises(FormatError, match=r"must be float32 \(300, 4\)"):
            write_manifest(
                tmp_path, records[:1], **{**rest, "codebook_VZ": np.zeros(shape, np.float32)}
            )
    with pytest.raises(FormatError, match="not finite"):
        write_manifest(tmp_path, records[:1], **{**rest, "codebook_VZ": np.full((300, 4), np.nan)})
    assert not (tmp_path / "manifest.json").exists()
    write_manifest(tmp_path, records[:1], **{**rest, "metrics": {"psnr_db": float("inf")}})
    assert TokenShards(tmp_path).metrics == {"psnr_db": None}


def test_a_full_disk_is_a_storage_error_and_no_shard_appears(
    tmp_path, token_episodes, code_spec, action_spec
):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(StorageError, match=r"shard-000000\.tar: File too large"):
            write_shard(
                tmp_path, 0, token_episodes(code_spec, action_spec, [99, 99]),
                codes=code_spec, actions=action_spec,
            )  # fmt: skip
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


# A kill, and the run after it


def write_all(folder, write_shards, token_episodes, tokenizer, actions):
    """A small pipeline: finished shards are kept, the others written, then the manifest."""
    remove_leftovers(folder)
    lengths = [[5, 1, 9], [4, 7], [3]]
    records, first = [], 0
    for index, part in enumerate(lengths):
        record = finished_shard(folder, index)
        if record is None:
            episodes = token_episodes(tokenizer.codes, actions, part, first=first)
            record = write_shard(folder, index, episodes, codes=tokenizer.codes, actions=actions)
        records.append(record)
        first += len(part)
    write_manifest(
        folder, records, tokenizer=tokenizer, actions=actions, fps=8.75, frame_skip=4,
        codebook_VZ=np.ones((300, 4), np.float32), metrics={}, source={},
    )  # fmt: skip


@pytest.fixture
def pipeline(write_shards, token_episodes, tokenizer_spec, action_spec):
    return lambda folder: write_all(
        folder, write_shards, token_episodes, tokenizer_spec, action_spec
    )


def only_whole_files(folder):
    for path in folder.iterdir():
        if path.suffix == ".tar" and not path.name.startswith("tmp-"):
            with tarfile.open(path, "r:") as tar:
                assert len(tar.getnames()) % 3 == 0
        elif not path.name.startswith("tmp-") and path.suffix == ".json":
            json.loads(path.read_text())


@pytest.mark.parametrize(
    "failpoint",
    [f"{name}:{n}" for name in ("write", "fsync", "rename") for n in range(1, 9)]
    + [f"shard-marker:{n}" for n in (1, 2, 3)],
)
def test_a_kill_anywhere_while_writing_shards_changes_no_byte_of_the_next_run(
    tmp_path, pipeline, killed_at, failpoint
):
    (tmp_path / "killed").mkdir()
    (tmp_path / "whole").mkdir()
    pipeline(tmp_path / "whole")
    assert killed_at(failpoint, lambda: pipeline(tmp_path / "killed"))
    only_whole_files(tmp_path / "killed")
    finished = {
        path.name: path.stat().st_mtime_ns
        for index in range(3)
        if finished_shard(tmp_path / "killed", index)
        for path in [tmp_path / "killed" / shard_name(index)]
    }
    pipeline(tmp_path / "killed")
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "whole")
    for name, mtime in finished.items():  # and what was finished was not written again
        assert (tmp_path / "killed" / name).stat().st_mtime_ns == mtime


def test_kills_at_20_random_times_change_no_byte_of_the_next_run(tmp_path, pipeline):
    (tmp_path / "whole").mkdir()
    pipeline(tmp_path / "whole")
    expected = hashes(tmp_path / "whole")
    rng = np.random.default_rng(0)
    for number in range(20):
        folder = tmp_path / str(number)
        folder.mkdir()
        pid = os.fork()
        if pid == 0:
            try:
                pipeline(folder)
            finally:
                os._exit(0)
        time.sleep(float(rng.uniform(0, 0.02)))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        only_whole_files(folder)
        pipeline(folder)
        assert hashes(folder) == expected


def test_a_shard_counts_as_finished_only_with_its_marker_size_and_hash(
    tmp_path, token_episodes, code_spec, action_spec
):
    assert finished_shard(tmp_path, 0) is None
    record = write_shard(
        tmp_path, 0, token_episodes(code_spec, action_spec, [5]), codes=code_spec,
        actions=action_spec,
    )  # fmt: skip
    assert finished_shard(tmp_path, 0) == record
    tar, marker = tmp_path / shard_name(0), tmp_path / "shard-000000.json"
    content, note = tar.read_bytes(), marker.read_bytes()
    for damaged in (content[:-1], content[:600] + b"!" + content[601:]):
        tar.write_bytes(damaged)
        assert finished_shard(tmp_path, 0) is None
    tar.write_bytes(content)
    for damaged in (b"", b"{}", note[: len(note) // 2]):
        marker.write_bytes(damaged)
        assert finished_shard(tmp_path, 0) is None
    marker.unlink()
    assert finished_shard(tmp_path, 0) is None


def test_a_marker_keeps_what_was_skipped_and_measured_to_the_last_bit(
    tmp_path, token_episodes, code_spec, action_spec
):
    record = write_shard(
        tmp_path, 0, token_episodes(code_spec, action_spec, [5]), codes=code_spec,
        actions=action_spec, skipped={"b": "b.npz: cut short"}, measured={"error": 0.1 + 0.2},
    )  # fmt: skip
    found = finished_shard(tmp_path, 0)
    assert found == record
    assert found.skipped == {"b": "b.npz: cut short"}
    assert found.measured == {"error": 0.30000000000000004}


def test_without_its_hash_only_the_size_of_a_finished_shard_is_compared(
    tmp_path, token_episodes, code_spec, action_spec
):
    write_shard(
        tmp_path, 0, token_episodes(code_spec, action_spec, [5]), codes=code_spec,
        actions=action_spec,
    )  # fmt: skip
    tar = tmp_path / shard_name(0)
    content = tar.read_bytes()
    tar.write_bytes(content[:-1] + b"!")
    assert finished_shard(tmp_path, 0) is None
    assert finished_shard(tmp_path, 0, check_hash=False) is not None
    tar.write_bytes(content[:-1])
    assert finished_shard(tmp_path, 0, check_hash=False) is None


@pytest.mark.parametrize(("stride", "levels", "vocab_size"), [(1, 1, 256), (4, 3, 70_000)])
@pytest.mark.parametrize("lengths", [[], [1], [5, 1, 9], [200] * 40, list(range(1, 100))])
def test_the_size_of_a_shard_is_known_to_the_byte_before_it_is_written(
    tmp_path, token_episodes, any_actions, stride, levels, vocab_size, lengths
):
    codes = CodeSpec(
        vocab_size=vocab_size, grid_height=2, grid_width=3, code_dim=4,
        frames_per_latent=stride, num_levels=levels,
    )  # fmt: skip
    episodes = [
        replace(episode, metadata={"name": "é" * number})
        for number, episode in enumerate(token_episodes(codes, any_actions, lengths))
    ]
    if any_actions.kind != "none":  # every fourth has no known actions
        episodes[3::4] = [replace(episode, slots_TA=None) for episode in episodes[3::4]]
    rows = [(e.key, e.num_frames, e.split, e.metadata, e.slots_TA is not None) for e in episodes]
    record = write_shard(tmp_path, 0, episodes, codes=codes, actions=any_actions)
    assert record.size_bytes == shard_bytes(rows, codes=codes, actions=any_actions)


# Damage and forgery are found


def test_a_folder_without_a_manifest_is_unfinished(tmp_path, write_shards):
    with pytest.raises(FormatError, match="no such folder; write token shards"):
        TokenShards(tmp_path / "missing")
    write_shards(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(FormatError, match=r"no manifest\.json, so its shards are unfinished"):
        TokenShards(tmp_path)


@pytest.mark.parametrize("keep", [0, 512, 1536, 5000, -512, -1])
def test_a_shard_cut_at_a_member_or_elsewhere_is_found_when_it_is_opened(
    tmp_path, write_shards, keep
):
    write_shards(tmp_path)
    path = tmp_path / shard_name(1)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FormatError, match=r"shard-000001\.tar: has \d+ bytes, the manifest says"):
        TokenShards(tmp_path)
    path.unlink()
    with pytest.raises(FormatError, match=r"shard-000001\.tar: is missing"):
        TokenShards(tmp_path)


def test_every_flipped_bit_of_shard_or_codebook_is_found_by_verify(tmp_path, write_shards):
    write_shards(tmp_path)
    rng = np.random.default_rng(0)
    for name in (shard_name(0), "codebook.safetensors"):
        path = tmp_path / name
        content = path.read_bytes()
        for position in [0, len(content) - 1, *rng.integers(0, len(content), 30)]:
            flipped = bytearray(content)
            flipped[position] ^= 1 << int(rng.integers(8))
            path.unlink()
            path.write_bytes(flipped)
            with pytest.raises(FormatError, match=name):
                open_and_verify(tmp_path)
        path.write_bytes(content)
    open_and_verify(tmp_path)


def row(data, index=0):
    return data["episodes"][index]


FORGERIES = [
    (lambda d: d.update(schema="worldloom.token-shards/3"), "schema"),
    (lambda d: row(d).update(labelled=False), "is not labelled, which a folder of schema"),
    (lambda d: row(d).update(labelled=0), "labelled must be bool"),
    (lambda d: d.update(extra=1), "unknown key 'extra'"),
    (lambda d: d.pop("actions"), "key 'actions' is missing"),
    (lambda d: d.update(fps="35"), "fps must be"),
    (lambda d: d.update(fps=10**400), "fps must be"),
    (lambda d: d.update(frame_skip=-1), "frame_skip must be"),
    (lambda d: d.update(episodes={}), "episodes must be a list"),
    (lambda d: d["shards"][0].update(file="../../x"), r"file name '\.\./\.\./x'"),
    (lambda d: d["shards"][0].update(file="/abs"), "file name '/abs'"),
    (lambda d: d["shards"][0].update(file=".."), r"file name '\.\.'"),
    (lambda d: d["shards"][0].update(file="x" * 10_000), "file name"),
    (lambda d: d["codebook"].update(file="../codebook.safetensors"), "file name"),
    (lambda d: d["shards"][0].update(num_episodes=2), "should hold 2 episodes, but 3 are listed"),
    (lambda d: d["shards"][0].update(size_bytes=1), "the manifest says 1"),
    (lambda d: row(d).update(key="../../x"), r"key '\.\./\.\./x'"),
    (lambda d: row(d).update(key="episode-0001"), "'episode-0001' stands twice"),
    (lambda d: row(d).update(shard=2), "lies in shard 2 of 2"),
    (lambda d: row(d).update(shard=-1), "lies in shard -1 of 2"),
    (lambda d: row(d).update(split="test"), "split 'test'"),
    (lambda d: row(d).update(num_frames=6), "does not fit the tokenizer's stride"),
    (lambda d: row(d).update(latent_frames=6), "does not fit the tokenizer's stride"),
    (lambda d: row(d).update(codes_offset=1 << 40), "codes lie outside shard-000000.tar"),
    (lambda d: row(d).update(actions_offset=-512), "actions lie outside"),
    (lambda d: row(d).update(actions_bytes=0), "actions lie outside"),
    (lambda d: row(d).update(codes_offset=row(d)["codes_offset"] + 1), "multiples of 512"),
    (lambda d: row(d).update(codes_offset=row(d, 1)["codes_offset"]), r"codes\.npy: the header"),
    (lambda d: row(d).update(codes_bytes=row(d)["codes_bytes"] + 6), "the header asks for"),
    (lambda d: d["tokenizer"]["codes"].update(grid_height=3, grid_width=2), r"must be uint16"),
    (lambda d: d["tokenizer"]["codes"].update(vocab_size=256), "must be uint8"),
    (lambda d: d["tokenizer"]["codes"].update(vocab_size=257), "in a vocabulary of 257"),
    (lambda d: d["tokenizer"]["codes"].update(num_levels=2), r"must be uint16"),
    (lambda d: d["tokenizer"]["codes"].update(code_dim=5), r"must be float32 \(300, 5\)"),
    (lambda d: d["actions"].update(names=["a", "b"], sizes=[2]), "must be in"),
    (lambda d: d["actions"].update(sizes=[4]), "3 names, must be 4"),
    (lambda d: d["codebook"].update(sha256="0" * 64), "not those of the manifest's hash"),
    (lambda d: d["shards"][1].update(sha256="0" * 64), "not those of the manifest's hash"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "reason"), FORGERIES)
def test_a_manifest_that_does_not_tell_the_truth_is_refused(tmp_path, write_shards, change, reason):
    write_shards(tmp_path)
    change_manifest(tmp_path, change)
    with pytest.raises(FormatError, match=reason) as caught:
        read_and_verify(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))


def forge_tar(folder, members):
    """Replace shard 0 by a tar of any members, hash and size mended in the manifest."""
    path = folder / shard_name(0)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    content = path.read_bytes()

    def mend(data):
        data["shards"][0].update(
            size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest()
        )

    change_manifest(folder, mend)


def members_of(path):
    with tarfile.open(path, "r:") as tar:
        return [(info, tar.extractfile(info).read()) for info in tar]


@pytest.mark.parametrize("name", ["../../evil.npy", "/abs/evil.npy", "a\nb.npy", "e" * 99])
def test_hostile_member_names_reach_no_file_because_nothing_is_extracted(
    tmp_path, write_shards, name
):
    folder = tmp_path / "a" / "b"
    episodes = write_shards(folder)
    members = [*members_of(folder / shard_name(0)), (tarfile.TarInfo(name), b"evil")]
    link = tarfile.TarInfo("link")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    forge_tar(folder, [*members, (link, b"")])
    before = sorted(tmp_path.rglob("*"))
    shards = TokenShards(folder)
    for index, episode in enumerate(episodes):
        assert np.array_equal(shards.codes_thw(index), episode.codes_thw)
    if name.endswith(".npy"):
        with pytest.raises(FormatError, match="'link' is no plain file"):
            shards.verify()
    assert sorted(tmp_path.rglob("*")) == before


def test_members_that_are_swapped_doubled_or_missing_are_named_by_verify(tmp_path, write_shards):
    write_shards(tmp_path, lengths=((5, 5),))
    good = members_of(tmp_path / shard_name(0))
    names = [info.name for info, _ in good]
    swap = {names[1]: names[4], names[4]: names[1]}

    def renamed(info):
        other = tarfile.TarInfo(swap.get(info.name, info.name))
        return other

    forge_tar(tmp_path, [(renamed(info), content) for info, content in good])
    with pytest.raises(FormatError, match=r"episode-0000\.codes\.npy' lies at"):
        open_and_verify(tmp_path)
    forge_tar(tmp_path, [*good, good[1]])
    with pytest.raises(FormatError, match=r"episode-0000\.codes\.npy' stands twice"):
        open_and_verify(tmp_path)
    forge_tar(tmp_path, [*good[:4], (tarfile.TarInfo("other.npy"), good[4][1]), good[5]])
    with pytest.raises(FormatError, match=r"episode-0001\.codes\.npy' lies at no place"):
        open_and_verify(tmp_path)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((5, 2, 3), np.int64), "must be uint16"),
        (np.zeros((5, 2, 3), ">u2"), None),  # npy_bytes turns it; the same bytes as "<u2"
        (np.zeros((5, 3, 2), np.uint16), r"must be uint16 \(5, 2, 3\)"),
        (np.full((5, 2, 3), 300, np.uint16), "code 300 in a vocabulary of 300"),
        (np.zeros((5, 2, 3), np.float16), "must be uint16"),
    ],
)
def test_arrays_of_another_type_shape_or_range_are_refused_before_use(
    tmp_path, write_shards, array, reason
):
    write_shards(tmp_path, lengths=((5,),))
    members = [
        (info, npy_bytes(array) if info.name.endswith("codes.npy") else content)
        for info, content in members_of(tmp_path / shard_name(0))
    ]
    forge_tar(tmp_path, members)
    change_manifest(tmp_path, lambda d: row(d).update(codes_bytes=len(npy_bytes(array))))
    if reason is None:
        TokenShards(tmp_path).codes_thw(0)
    else:
        with pytest.raises(FormatError, match=reason):
            TokenShards(tmp_path).codes_thw(0)


def test_numbers_that_are_not_aligned_are_refused(tmp_path, write_shards):
    """numpy would map them, slowly; torch and other readers would not."""
    write_shards(tmp_path, lengths=((5,),))
    header = b"{'descr': '<u2', 'fortran_order': False, 'shape': (5, 2, 3), }\n"
    header += b" " * (len(header) % 2 == 0)
    odd = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(60)
    assert (10 + len(header)) % 2 == 1
    members = [
        (info, odd if info.name.endswith("codes.npy") else content)
        for info, content in members_of(tmp_path / shard_name(0))
    ]
    forge_tar(tmp_path, members)
    change_manifest(tmp_path, lambda d: row(d).update(codes_bytes=len(odd)))
    with pytest.raises(FormatError, match="must be a multiple of 2; unaligned"):
        TokenShards(tmp_path).codes_thw(0)


def test_a_shard_that_changes_after_it_was_opened_is_refused_not_read_past_its_end(
    tmp_path, write_shards
):
    write_shards(tmp_path)
    shards = TokenShards(tmp_path)
    (tmp_path / shard_name(0)).write_bytes(b"")
    (tmp_path / shard_name(1)).write_bytes(bytes(1024))
    for episode in (0, 3):
        with pytest.raises(FormatError, match=r"cannot be read|has changed"):
            shards.codes_thw(episode)


@pytest.mark.slow
@settings(max_examples=200)
@given(seed=st.integers(0, 2**32))
def test_10000_changed_manifests_are_read_or_refused_with_the_folders_name(
    tmp_path, write_shards, mutations, may_refuse, seed
):
    path = tmp_path / "manifest.json"
    original = tmp_path / "original.json"
    if not original.exists():
        write_shards(tmp_path, lengths=((5, 1), (4,)))
        shutil.copy(path, original)
    for data in mutations(json.loads(original.read_text()), seed=seed, count=50):
        path.unlink(missing_ok=True)  # rewriting in place makes the file system flush every time
        path.write_text(json.dumps(data))
        began = time.process_time()  # others may be busy with the machine
        with may_refuse(FormatError, str(tmp_path)):
            open_and_verify(tmp_path)
        assert time.process_time() - began < 5


# Cheap to read, cheap to send


def test_a_copy_sent_to_a_worker_carries_no_maps_and_reads_the_same(tmp_path, write_shards):
    episodes = write_shards(tmp_path)
    shards = TokenShards(tmp_path)
    fresh = len(bytes(ForkingPickler.dumps(TokenShards(tmp_path))))
    for index in range(len(episodes)):
        shards.codes_thw(index), shards.slots_TA(index)
    sent = bytes(ForkingPickler.dumps(shards))
    assert len(sent) == fresh
    copy = ForkingPickler.loads(sent)
    for index, episode in enumerate(episodes):
        assert np.array_equal(copy.codes_thw(index), episode.codes_thw)
        assert np.array_equal(copy.slots_TA(index), episode.slots_TA)


def test_thousands_of_shards_do_not_run_out_of_file_descriptors(tmp_path, write_shards):
    (episode,) = write_shards(tmp_path, lengths=((5,),))
    count = _MAX_MAPS * 2 + 5
    shards = TokenShards(many_shards(tmp_path, count))
    open_before = len(list(Path("/proc/self/fd").iterdir()))
    for index in [*range(count), 0, count - 1]:
        assert np.array_equal(shards.codes_thw(index), episode.codes_thw)
        assert np.array_equal(shards.slots_TA(index), episode.slots_TA)
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) - open_before <= _MAX_MAPS


def many_shards(folder, num_shards):
    """A folder whose index has many shards; all are the same small file."""
    data = read_json(folder / "manifest.json", what="a manifest")
    template, file = data["episodes"], data["shards"][0]
    data["shards"] = [file] * num_shards
    data["episodes"] = [
        {**row, "key": f"s{shard}-{row['key']}", "shard": shard}
        for shard in range(num_shards)
        for row in template
    ]
    other = folder / f"many-{num_shards}"
    other.mkdir(exist_ok=True)
    for name in (shard_name(0), "codebook.safetensors"):
        shutil.copy(folder / name, other / name)
    write_json(other / "manifest.json", data)
    return other


def seconds_to_open(folder):
    began = time.process_time()
    TokenShards(folder)
    return time.process_time() - began


def test_opening_takes_time_in_proportion_to_the_episodes(tmp_path, write_shards):
    write_shards(tmp_path, lengths=((1, 1, 1, 1),))
    folders = [many_shards(tmp_path, count) for count in (150, 1500)]
    small, large = (min(seconds_to_open(folder) for _ in range(3)) for folder in folders)
    assert large < 40 * small  # 10 times as many; a quadratic index takes 100 times as long


def test_windows_lie_in_the_map_of_their_file_and_are_not_copied(tmp_path, write_shards):
    write_shards(tmp_path, lengths=((100,), (100,)))
    shards = TokenShards(tmp_path)
    first = shards.codes_thw(0, 0, 16)
    assert np.shares_memory(first, shards.codes_thw(0, 8, 24))
    assert not np.shares_memory(first, shards.codes_thw(0, 16, 32))
    assert not np.shares_memory(first, shards.codes_thw(1, 0, 16))


def test_reading_a_window_costs_microseconds(tmp_path, write_shards):
    """Measured 2 to 8 with its actions, and 90 where every read parses the headers again."""
    write_shards(tmp_path, lengths=((100,), (100,)))
    shards = TokenShards(tmp_path)
    best = float("inf")
    for _ in range(20):
        began = time.process_time()
        for start in range(50):
            shards.codes_thw(start % 2, start, start + 16)
            shards.slots_TA(start % 2, start, start + 15)
        best = min(best, (time.process_time() - began) / 50)
    assert best < 60e-6


def test_an_empty_shard_and_no_actions_at_all_can_be_read(tmp_path, write_shards):
    write_shards(tmp_path, lengths=((), (3,)), actions=ActionSpec.none())
    shards = TokenShards(tmp_path)
    assert shards.slots_TA(0).shape == (2, 0)
    shards.verify()
