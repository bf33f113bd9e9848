"""Promises of episodes.py: every byte comes back, and what is torn or forged is refused by name."""

import io
import json
import os
import resource
import shutil
import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worldloom.common import (
    ActionSpec,
    Episodes,
    EpisodesSpec,
    EpisodeWriter,
    FormatError,
    StorageError,
    npy_bytes,
)
from worldloom.common.episodes import PIECE_FRAMES, split_of
from worldloom.common.episodes_spec import check_key


@pytest.fixture
def episode(tmp_path, write_episode, episodes_spec):
    """(folder, frames, actions) of one episode of 150 frames: two full pieces and a part."""
    frames, actions = write_episode(tmp_path, "a", spec=episodes_spec, num_frames=150)
    return tmp_path, frames, actions


def rewrite(path, change):
    """Rebuild an episode's zip with changed members: `change` maps {name: bytes} to another."""
    with zipfile.ZipFile(path) as old:
        members = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, content in change(members).items():
            new.writestr(name, content)


def black(num_frames):
    return np.zeros((num_frames, 16, 24, 3), np.uint8)


def record(folder, spec, frames, actions):
    with EpisodeWriter(folder, "a", spec=spec) as writer:
        for frame in frames:
            writer.append(frame)
        writer.finish(actions)


def read_everything(folder, key="a"):
    with Episodes(folder).open(key) as opened:
        return opened.frames(), opened.actions, opened.rewards, opened.metadata


@pytest.mark.parametrize("num_frames", [1, 2, PIECE_FRAMES, PIECE_FRAMES + 1, 3 * PIECE_FRAMES])
def test_every_frame_action_and_reward_comes_back(
    tmp_path, write_episode, episodes_spec, num_frames
):
    frames, actions = write_episode(tmp_path, "a", spec=episodes_spec, num_frames=num_frames)
    with Episodes(tmp_path).open("a") as opened:
        assert opened.num_frames == num_frames
        assert np.array_equal(opened.frames(), frames)
        assert np.array_equal(np.concatenate(list(opened.pieces())), frames)
        assert np.array_equal(opened.actions, actions)
        assert opened.rewards.tolist() == list(range(num_frames - 1))


def test_actions_of_every_kind_come_back(tmp_path, write_episode, episodes_spec, any_actions):
    spec = EpisodesSpec(
        actions=any_actions, height=4, width=4, fps=1.0, frame_skip=1, source={"x": [1]}
    )
    _, actions = write_episode(tmp_path, "a", spec=spec, num_frames=9)
    with Episodes(tmp_path).open("a") as opened:
        assert opened.actions.dtype == actions.dtype
        assert np.array_equal(opened.actions, actions)
        assert opened.spec == spec


def test_rewards_are_optional_and_metadata_comes_back(tmp_path, episodes_spec):
    episodes_spec.write(tmp_path)
    with EpisodeWriter(tmp_path, "a", spec=episodes_spec) as writer:
        writer.append(np.zeros((16, 24, 3), np.uint8))
        writer.finish(np.asarray([]), metadata={"seed": 3, "return": 0.5})
    with Episodes(tmp_path).open("a") as opened:
        assert opened.rewards is None
        assert opened.metadata == {"seed": 3, "return": 0.5}
        assert len(opened.actions) == 0


def test_any_stretch_of_frames_is_the_slice_of_all_of_them(episode):
    folder, frames, _ = episode
    with Episodes(folder).open("a") as opened:
        for start in (0, 1, 63, 64, 65, 127, 128, 149):
            for stop in (1, 2, 64, 65, 128, 129, 150):
                if start < stop:
                    assert np.array_equal(opened.frames(start, stop), frames[start:stop])
        for start, stop in ((-1, 5), (5, 5), (6, 5), (0, 151), (150, 151)):
            with pytest.raises(ValueError, match=r"of 150"):
                opened.frames(start, stop)


def test_a_buffer_that_the_environment_draws_into_again_is_not_recorded_twice(
    tmp_path, episodes_spec
):
    episodes_spec.write(tmp_path)
    buffer = np.zeros((16, 24, 3), np.uint8)
    with EpisodeWriter(tmp_path, "a", spec=episodes_spec) as writer:
        for value in (1, 2, 3):
            buffer[:] = value
            writer.append(buffer)
        writer.finish(np.zeros(2, np.int64))
    with Episodes(tmp_path).open("a") as opened:
        assert opened.frames()[:, 0, 0, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("count", [0, 1, 3, 4])
def test_t_frames_take_t_minus_1_actions_and_no_other_number(tmp_path, episodes_spec, count):
    with pytest.raises(FormatError, match=rf"a: {count} actions for 3 frames, must be 2"):
        record(tmp_path, episodes_spec, black(3), np.zeros(count, np.int64))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("actions", "reason"),
    [
        (np.asarray([0, 3]), "must be in"),
        (np.asarray([-1, 0]), "must be in"),
        (np.asarray([0.0, 1.0]), "integers"),
        (np.zeros((2, 1), np.int64), "shape"),
        (np.asarray(0), "0 actions"),
    ],
)
def test_an_action_that_is_not_of_the_spec_is_refused_and_nothing_stays(
    tmp_path, episodes_spec, actions, reason
):
    with pytest.raises(FormatError, match=reason):
        record(tmp_path, episodes_spec, black(3), actions)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "frame",
    [
        np.zeros((24, 16, 3), np.uint8),
        np.zeros((16, 24), np.uint8),
        np.zeros((16, 24, 4), np.uint8),
        np.zeros((16, 24, 3), np.float32),
        np.zeros((16, 24, 3), np.int8),
    ],
)
def test_a_frame_of_another_size_or_type_is_refused_by_number(tmp_path, episodes_spec, frame):
    with EpisodeWriter(tmp_path, "a", spec=episodes_spec) as writer:
        writer.append(np.zeros((16, 24, 3), np.uint8))
        with pytest.raises(FormatError, match=r"a: frame 1 is .* must be uint8 \(16, 24, 3\)"):
            writer.append(frame)
    assert list(tmp_path.iterdir()) == []


def test_without_frames_there_is_no_episode(tmp_path, episodes_spec):
    with pytest.raises(FormatError, match="at least one frame"):
        record(tmp_path, episodes_spec, [], np.zeros(0, np.int64))
    assert list(tmp_path.iterdir()) == []


def test_an_exception_while_recording_leaves_nothing(tmp_path, episodes_spec):
    def frames_of_a_game_that_crashes():
        yield from black(PIECE_FRAMES + 1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        record(tmp_path, episodes_spec, frames_of_a_game_that_crashes(), np.zeros(64, np.int64))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("limit", [100, 20_000, 75_000])
def test_a_full_disk_is_a_storage_error_and_nothing_stays(tmp_path, episodes_spec, limit):
    """At 75,000 bytes the disk fills when the last part is written, in `finish`."""
    frames = np.random.default_rng(0).integers(0, 256, (70, 16, 24, 3), np.uint8)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(StorageError, match=r"a\.npz: File too large"):
            record(tmp_path, episodes_spec, frames, np.zeros(69, np.int64))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failpoint", ["episode-write", "episode-rename"])
def test_a_kill_while_writing_an_episode_never_shows_a_part_of_it(
    tmp_path, write_episode, episodes_spec, killed_at, failpoint
):
    def write(folder):
        write_episode(folder, "a", spec=episodes_spec, num_frames=70)

    episodes_spec.write(tmp_path)
    assert killed_at(failpoint, lambda: write(tmp_path))
    assert (tmp_path / "a.npz").exists() == (failpoint == "episode-rename")
    write(tmp_path)
    write(tmp_path / "uninterrupted")
    again, whole = tmp_path / "a.npz", tmp_path / "uninterrupted" / "a.npz"
    assert again.read_bytes() == whole.read_bytes()
    assert Episodes(tmp_path).keys == ["a"]


def test_a_temporary_file_is_no_episode(episode):
    folder, _, _ = episode
    shutil.copy(folder / "a.npz", folder / "tmp-b.npz")
    assert Episodes(folder).keys == ["a"]


def test_a_file_cut_anywhere_is_a_format_error_that_names_it(episode):
    folder, _, _ = episode
    path = folder / "a.npz"
    content = path.read_bytes()
    for size in (0, 1, 100, len(content) // 2, len(content) - 30, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(FormatError, match=r"a\.npz: "):
            read_everything(folder)


def test_flipped_bytes_are_found_or_change_nothing(
    tmp_path, write_episode, episodes_spec, may_refuse
):
    frames, actions = write_episode(tmp_path, "a", spec=episodes_spec, num_frames=3)
    path = tmp_path / "a.npz"
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    found = 0
    for position in rng.integers(0, len(content), 400):
        flipped = bytearray(content)
        flipped[position] ^= 1 << int(rng.integers(8))
        path.unlink()  # rewriting in place makes the file system flush every time
        path.write_bytes(flipped)
        found += 1
        with may_refuse(FormatError, str(path)):
            got_frames, got_actions, got_rewards, _ = read_everything(tmp_path)
            found -= 1  # a date or an attribute, which mean nothing
            assert np.array_equal(got_frames, frames)
            assert np.array_equal(got_actions, actions)
            assert got_rewards.tolist() == [0.0, 1.0]
    assert found > 350


def forge(name, content):
    return lambda members: {**members, name: content}


def about(**changes):
    return json.dumps({"key": "a", "num_frames": 150, "metadata": {}, **changes}).encode()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: {n: c for n, c in m.items() if n != "actions.npy"}, "actions.npy is missing"),
        (
            lambda m: {n: c for n, c in m.items() if n != "frames/000001.npy"},
            "000001.npy is missing",
        ),
        (lambda m: {n: c for n, c in m.items() if n != "episode.json"}, "episode.json is missing"),
        (forge("episode.json", b"[]"), "must be an object"),
        (forge("episode.json", b"{"), "cannot be read as JSON"),
        (forge("episode.json", about(num_frames=149)), "frames/000002.npy"),
        (forge("episode.json", about(num_frames=64)), "6 members, but 64 frames make 4"),
        (forge("rewards.npz", b""), "7 members, but 150 frames make 6"),
        (
            forge("episode.json", about(num_frames=2**31)),
            "000003.npy is missing from 2147483648 frames",
        ),
        (forge("episode.json", about(num_frames=True)), "num_frames must be an integer"),
        (forge("episode.json", about(metadata=[])), "metadata must be an object"),
        (forge("episode.json", about(key="b")), "named after its key"),
        (forge("actions.npy", npy_bytes(np.zeros(148, np.int64))), "148 actions for 150 frames"),
        (forge("actions.npy", npy_bytes(np.asarray(3))), "0 actions for 150 frames"),
        (forge("actions.npy", npy_bytes(np.full(149, 9))), "must be in"),
        (forge("actions.npy", bytes(100_000)), "claims 100000 bytes"),
        (forge("rewards.npy", npy_bytes(np.zeros(149))), "rewards.npy"),
        (forge("frames/000000.npy", npy_bytes(np.zeros((64, 16, 24, 3)))), "claims"),
        (forge("frames/000000.npy", npy_bytes(np.zeros((64, 24, 16, 3), np.uint8))), "must be"),
        (forge("frames/000002.npy", npy_bytes(np.zeros((64, 16, 24, 3), np.uint8))), "claims"),
    ],
)
def test_a_forged_member_is_a_format_error_that_names_the_file(episode, change, reason):
    folder, _, _ = episode
    rewrite(folder / "a.npz", change)
    with pytest.raises(FormatError, match=reason) as caught:
        read_everything(folder)
    assert str(folder / "a.npz") in str(caught.value)


def test_a_member_that_stands_twice_is_refused(episode):
    folder, _, _ = episode
    rewrite(folder / "a.npz", lambda m: {n: c for n, c in m.items() if n != "rewards.npy"})
    with zipfile.ZipFile(folder / "a.npz", "a") as file, pytest.warns(UserWarning, match="Dup"):
        file.writestr("actions.npy", npy_bytes(np.ones(149, np.int64)))
    with pytest.raises(FormatError, match="6 members, but 150 frames make 5"):
        read_everything(folder)


@pytest.mark.parametrize("name", ["actions.npy", "frames/000000.npy", "episode.json"])
@pytest.mark.parametrize("lies", [False, True], ids=["honest", "lies about its size"])
def test_a_zip_bomb_is_refused_within_64_mb(episode, name, lies):
    folder, _, _ = episode
    path = folder / "a.npz"
    bomb = bytes(96 << 20)
    rewrite(path, forge(name, bomb))
    del bomb
    if lies:
        content = bytearray(path.read_bytes())
        for signature, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
            at = content.find(signature)
            while at >= 0:
                size = int.from_bytes(content[at + offset : at + offset + 4], "little")
                if size == 96 << 20:
                    content[at + offset : at + offset + 4] = (100).to_bytes(4, "little")
                at = content.find(signature, at + 1)
        path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=name.replace(".", r"\.")):
            read_everything(folder)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_compression_that_inflates_without_a_bound_is_refused(episode, method):
    folder, _, _ = episode
    with zipfile.ZipFile(folder / "a.npz") as old:
        members = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(folder / "a.npz", "w", method) as new:
        for name, content in members.items():
            new.writestr(name, content)
    with pytest.raises(FormatError, match="neither stored nor deflated"):
        read_everything(folder)


class Canary:
    def __reduce__(self):
        return (Canary.sing, ())

    @staticmethod
    def sing():
        raise AssertionError("a pickle was executed")


@pytest.mark.parametrize("name", ["actions.npy", "rewards.npy", "frames/000000.npy"])
def test_a_pickled_object_array_is_refused_and_never_executed(episode, name):
    buffer = io.BytesIO()
    np.save(buffer, np.array([Canary()], dtype=object), allow_pickle=True)
    folder, _, _ = episode
    rewrite(folder / "a.npz", forge(name, buffer.getvalue()))
    with pytest.raises(FormatError, match="only plain numbers"):
        read_everything(folder)


@pytest.mark.parametrize(
    "key",
    ["", "a.b", "a/b", "../x", "/abs", "a\nb", "é", "a" * 81, "tmp-1", "a b", "a\0", ".", ".."],
)
def test_a_key_that_is_no_plain_name_is_refused(tmp_path, episodes_spec, key):
    with pytest.raises(FormatError, match="key"):
        EpisodeWriter(tmp_path, key, spec=episodes_spec)
    with pytest.raises(FormatError, match="where: key"):
        check_key(key, where="where")


def test_what_is_no_folder_of_episodes_is_refused_in_a_sentence(tmp_path, episodes_spec):
    with pytest.raises(FormatError, match="no such folder; record episodes"):
        Episodes(tmp_path / "missing")
    with pytest.raises(FormatError, match=r"episodes\.json: not found"):
        Episodes(tmp_path)
    episodes_spec.write(tmp_path)
    with pytest.raises(FormatError, match="has no episodes"):
        Episodes(tmp_path)
    (tmp_path / "a.b.npz").write_bytes(b"")
    with pytest.raises(FormatError, match=r"key 'a\.b'"):
        Episodes(tmp_path)


def test_an_episode_that_is_missing_or_no_file_is_refused_without_waiting(episode):
    folder, _, _ = episode
    os.mkfifo(folder / "pipe.npz")
    (folder / "sub.npz").mkdir()
    for key, reason in (("gone", "not found"), ("pipe", "regular file"), ("sub", "regular file")):
        with pytest.raises(FormatError, match=reason):
            Episodes(folder).open(key)


def test_the_description_comes_back(tmp_path, episodes_spec):
    episodes_spec.write(tmp_path)
    assert EpisodesSpec.read(tmp_path) == episodes_spec


@settings(max_examples=200)
@given(seed=st.integers(0, 2**32))
def test_10000_changed_descriptions_are_read_or_refused_with_their_name(
    tmp_path, episodes_spec, mutations, may_refuse, seed
):
    path = tmp_path / "episodes.json"
    for data in mutations(episodes_spec.to_dict(), seed=seed, count=50):
        path.unlink(missing_ok=True)  # rewriting in place makes the file system flush every time
        path.write_text(json.dumps(data))
        with may_refuse(FormatError, f"{path}: "):
            spec = EpisodesSpec.read(tmp_path)
            assert isinstance(spec.actions, ActionSpec)
            assert 0 < spec.fps < 1e6
            assert type(spec.height) is type(spec.width) is type(spec.frame_skip) is int


@pytest.mark.parametrize(
    ("total", "held_out"),
    [(0, []), (1, []), (2, [1]), (9, [8]), (10, [9]), (19, [9]), (20, [9, 19]), (35, [9, 19, 29])],
)
def test_every_tenth_episode_in_key_order_is_held_out(total, held_out):
    splits = [split_of(index, total) for index in range(total)]
    assert [index for index, split in enumerate(splits) if split == "validation"] == held_out
    assert set(splits) <= {"train", "validation"}


def test_the_split_of_a_folder_goes_by_key_order(tmp_path, write_episode, episodes_spec):
    for key in ("c", "a", "b"):
        write_episode(tmp_path, key, spec=episodes_spec, num_frames=1)
    episodes = Episodes(tmp_path)
    assert episodes.keys == ["a", "b", "c"]
    assert episodes.split("train") == ["a", "b"]
    assert episodes.split("validation") == ["c"]
