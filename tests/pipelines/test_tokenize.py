"""tokenize.py: what is written is what the tokenizer says, whatever stops it on the way."""

import gc
import os
import random
import shutil
import signal
import threading
import time
import tracemalloc

import numpy as np
import pytest
import torch
from chain_worlds import PUSHES, hashes, identities, save_tokenizer, write_pushed_squares
from worldloom.common import (
    Episodes,
    EpisodesSpec,
    EpisodeWriter,
    FormatError,
    MismatchError,
    TokenShards,
)
from worldloom.pipelines import measures
from worldloom.pipelines.encoding import (
    EpisodeFrames,
    clip_psnr,
    encode_videos,
    reconstructed_clips,
)
from worldloom.pipelines.tokenize import TokenizeConfig, tokenize
from worldloom.tokenizer import load_tokenizer, resize_frames

# The third is longer than a piece of 64 frames, one has no action at all, none are alike.
LENGTHS = (20, 7, 70, 1, 33, 12)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer") / "model")


@pytest.fixture(scope="module")
def episodes_folder(tmp_path_factory):
    return write_pushed_squares(tmp_path_factory.mktemp("recorded") / "episodes", LENGTHS)


@pytest.fixture(scope="module")
def words(episodes_folder, tokenizer_folder):
    """The command line but for --output: two episodes a shard, three shards."""
    return ("tokenize", "--episodes", episodes_folder, "--tokenizer", tokenizer_folder,
            "--shard-episodes", 2, "--device", "cpu", "--workers", 1, "--output")  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(commands, words, tmp_path_factory):
    """The shards as nobody disturbed them."""
    output = tmp_path_factory.mktemp("undisturbed") / "shards"
    ended = commands.run(*words, output)
    assert ended.code == 0, ended.err
    return output, ended


def check_whole_or_absent(folder, wanted):
    """Every file under a final name is the one that an undisturbed run leaves."""
    for name, digest in hashes(folder).items():
        assert name.startswith("tmp-") or digest == wanted[name]


def check_continues(commands, words, output, wanted):
    """Running the command again ends as if nothing had happened, and redoes no finished shard."""
    finished = {
        f"shard-{index:06d}.{suffix}"
        for index in range(3)
        if (output / f"shard-{index:06d}.json").exists()
        for suffix in ("tar", "json")
    }
    before = identities(output) if output.exists() else {}
    ended = commands.run(*words, output)
    assert ended.code == 0, ended.err
    assert hashes(output) == wanted
    after = identities(output)
    assert {name: after[name] for name in finished} == {name: before[name] for name in finished}
    return finished


def test_stdout_gets_the_folder_and_stderr_what_to_do_next(undisturbed):
    output, ended = undisturbed
    assert ended.out == f"{output}\n"
    assert f"next: worldloom train-dynamics --shards {output} " in ended.err
    assert "\\n" not in ended.err
    assert sorted(path.name for path in output.iterdir()) == [
        "codebook.safetensors", "manifest.json", "plan.json",
        *(f"shard-{i:06d}.{suffix}" for i in range(3) for suffix in ("json", "tar")),
    ]  # fmt: skip


def test_every_episode_has_the_codes_of_encoding_it_alone_and_its_own_actions(
    undisturbed, episodes_folder, tokenizer_folder
):
    tokenizer, episodes = load_tokenizer(tokenizer_folder), Episodes(episodes_folder)
    shards = TokenShards(undisturbed[0])
    shards.verify()
    assert [row.key for row in shards.episodes] == episodes.keys
    assert shards.tokenizer == tokenizer.spec
    for index, row in enumerate(shards.episodes):
        with episodes.open(row.key) as episode:
            alone_thw = tokenizer.encode(torch.from_numpy(episode.frames())[None])[0].numpy()
            slots_TA = PUSHES.encode(episode.actions)
        assert np.array_equal(shards.codes_thw(index), alone_thw)
        assert np.array_equal(shards.slots_TA(index), slots_TA)
        assert row.split == episodes.split_of(row.key)


def test_who_is_encoded_beside_whom_changes_no_code(
    commands, words, undisturbed, tmp_path, episodes_folder
):
    output = tmp_path / "shards"
    assert commands.run(*words, output, "--batch-episodes", 1).code == 0
    mine, other = TokenShards(output), TokenShards(undisturbed[0])
    for index in range(len(LENGTHS)):
        assert np.array_equal(mine.codes_thw(index), other.codes_thw(index))


NINE = range(1, 10)
"""Plan, three shards and their markers, codebook, manifest: nine files are written."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("failpoint", "passes"),
    # A kill after `fsync` leaves what one after `write` leaves, so each takes a share of the files.
    [("write", NINE[::2]), ("fsync", NINE[1::2]), ("rename", NINE), ("shard-marker", range(1, 4))],
)
def test_killed_at_any_step_and_run_again_it_leaves_the_files_of_an_undisturbed_run(
    commands, words, undisturbed, tmp_path, failpoint, passes
):
    wanted = hashes(undisturbed[0])
    kept = []
    for nth in passes:
        output = tmp_path / str(nth)
        killed = commands.run(*words, output, failpoint=f"{failpoint}:{nth}")
        assert killed.code == -signal.SIGKILL, killed.err
        check_whole_or_absent(output, wanted)
        kept.append(len(check_continues(commands, words, output, wanted)))
    assert max(kept) > 0  # or nothing was ever finished, and nothing could have been kept
    survivor = commands.run(*words, tmp_path / "more", failpoint=f"{failpoint}:{NINE.stop}")
    assert survivor.code == 0  # or there are steps that were not tried


@pytest.mark.slow
def test_killed_at_random_times_and_run_again_it_leaves_the_files_of_an_undisturbed_run(
    commands, words, undisturbed, tmp_path
):
    wanted = hashes(undisturbed[0])
    began = time.monotonic()
    assert commands.run(*words, tmp_path / "clock").code == 0
    took, rng, killed = time.monotonic() - began, random.Random(3), 0
    for nth in range(20):
        output = tmp_path / str(nth)
        running = commands.start(*words, output)
        time.sleep(took * rng.random())
        running.send(signal.SIGKILL)
        killed += running.wait().code == -signal.SIGKILL
        check_whole_or_absent(output, wanted)
        check_continues(commands, words, output, wanted)
    assert killed


@pytest.mark.parametrize("begun", ["plan.json", "shard-000000.tar"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_it_and_leaves_nothing_half_written(
    commands, words, undisturbed, tmp_path, number, code, begun
):
    wanted = hashes(undisturbed[0])
    for attempt in range(5):
        output = tmp_path / str(attempt)
        running = commands.start(*words, output)
        while not (output / begun).exists() and running.is_running():
            time.sleep(0.001)
        running.send(number)
        ended = running.wait()
        if ended.code != 0:
            break
    assert ended.code == code, ended.err
    check_whole_or_absent(output, wanted)
    assert not list(output.glob("tmp-*"))
    check_continues(commands, words, output, wanted)


class Reader:
    """A video of one-frame pieces that counts how many were read."""

    def __init__(self, frames_THWC):
        self.frames_THWC, self.read = frames_THWC, 0

    def __iter__(self):
        for frame in self.frames_THWC.split(1):
            self.read += 1
            yield frame


class Patient:
    """A tokenizer that takes no frames before the next ones are read; says if it waited in vain."""

    def __init__(self, tokenizer, video):
        self.spec, self.video, self.in_vain = tokenizer.spec, video, False
        self._session, self._pushed = tokenizer.open_encoder(), 0

    def open_encoder(self):
        return self

    def push(self, frames_BTHWC):
        self._pushed += 1
        wanted = min(self._pushed + 1, len(self.video.frames_THWC))
        give_up = time.monotonic() + 30
        while self.video.read < wanted and not self.in_vain:
            time.sleep(0.001)
            self.in_vain = time.monotonic() > give_up
        return self._session.push(frames_BTHWC)

    def flush(self):
        return self._session.flush()


def test_frames_are_read_while_those_before_them_are_encoded(tokenizer_folder, episodes_folder):
    tokenizer, episodes = load_tokenizer(tokenizer_folder), Episodes(episodes_folder)
    with episodes.open(episodes.keys[1]) as episode:
        frames_THWC = torch.from_numpy(episode.frames())
    video = Reader(frames_THWC)
    patient = Patient(tokenizer, video)
    (codes_thw,) = encode_videos([video], [len(frames_THWC)], patient, batch=1)
    assert not patient.in_vain
    assert torch.equal(codes_thw, tokenizer.encode(frames_THWC[None])[0])


def test_no_thread_outlives_it(tokenizer_folder, episodes_folder, tmp_path):
    before = set(threading.enumerate())
    tokenize(
        TokenizeConfig(
            episodes=episodes_folder, tokenizer=str(tokenizer_folder), output=tmp_path / "shards",
            device="cpu",
        )
    )  # fmt: skip
    assert set(threading.enumerate()) <= before  # one of an earlier test may end meanwhile


def test_a_finished_folder_is_left_as_it_is(commands, words, undisturbed):
    output, _ = undisturbed
    before = identities(output)
    ended = commands.run(*words, output)
    assert (ended.code, ended.out) == (0, f"{output}\n")
    assert "finished before" in ended.err
    assert "encoding" not in ended.err
    assert identities(output) == before


def test_what_was_lost_after_the_end_is_made_again_and_nothing_else(
    commands, words, undisturbed, tmp_path
):
    output = tmp_path / "shards"
    shutil.copytree(undisturbed[0], output)
    (output / "shard-000001.tar").unlink()
    before = identities(output)
    assert commands.run(*words, output).code == 0
    assert hashes(output) == hashes(undisturbed[0])
    assert identities(output)["shard-000000.tar"] == before["shard-000000.tar"]


@pytest.mark.parametrize("finished", [True, False])
def test_another_plan_is_refused_with_the_fields_that_differ(
    commands, words, undisturbed, tmp_path, tokenizer_folder, finished
):
    output = tmp_path / "shards"
    shutil.copytree(undisturbed[0], output)
    if not finished:
        (output / "manifest.json").unlink()
    before = hashes(output)
    ended = commands.run(*words, output, "--shard-episodes", 3)
    assert ended.code == 3
    assert "shard_episodes 2 then, 3 now" in ended.err
    assert "num_episodes" not in ended.err
    other = save_tokenizer(tmp_path / "other", seed=5)
    ended = commands.run(*words, output, "--tokenizer", other)
    mine, theirs = (load_tokenizer(folder).spec.fingerprint for folder in (tokenizer_folder, other))
    assert ended.code == 3
    assert f"tokenizer '{mine}' then, '{theirs}' now" in ended.err
    assert hashes(output) == before


def test_episodes_that_were_added_or_recorded_anew_are_another_plan(tokenizer_folder, tmp_path):
    folder = write_pushed_squares(tmp_path / "episodes", (5, 6))
    config = TokenizeConfig(
        episodes=folder, tokenizer=str(tokenizer_folder), output=tmp_path / "shards", device="cpu"
    )
    tokenize(config)
    shutil.copy(folder / "episode-000001.npz", tmp_path / "kept.npz")
    with EpisodeWriter(folder, "episode-000001", spec=Episodes(folder).spec) as writer:
        writer.append(np.zeros((16, 16, 3), np.uint8))
        writer.finish(np.zeros(0, np.int64))
    with pytest.raises(MismatchError, match="source"):
        tokenize(config)
    shutil.copy(tmp_path / "kept.npz", folder / "episode-000001.npz")
    assert tokenize(config) == tmp_path / "shards"


def test_frames_of_another_size_follow_the_tokenizers_rule(tokenizer_folder, tmp_path):
    folder = write_pushed_squares(tmp_path / "large", (9, 5), size=32)
    tokenizer = load_tokenizer(tokenizer_folder)
    assert tokenizer.spec.resize == "stretch"
    shards = TokenShards(
        tokenize(
            TokenizeConfig(
                episodes=folder,
                tokenizer=str(tokenizer_folder),
                output=tmp_path / "shards",
                device="cpu",
            )
        )
    )
    with Episodes(folder).open("episode-000000") as episode:
        small = resize_frames(episode.frames(), height=16, width=16, rule="stretch")
    assert small.shape[1:] == (16, 16, 3)
    alone = tokenizer.encode(torch.from_numpy(small)[None])[0].numpy()
    assert np.array_equal(shards.codes_thw(0), alone)


def test_frames_of_another_size_are_refused_where_the_rule_is_exact(tmp_path):
    exact = save_tokenizer(tmp_path / "exact", resize="exact")
    folder = write_pushed_squares(tmp_path / "large", (9, 5), size=32)
    config = TokenizeConfig(
        episodes=folder, tokenizer=str(exact), output=tmp_path / "shards", device="cpu"
    )
    with pytest.raises(MismatchError, match=r"frames are 32x32.* takes 16x16 exactly"):
        tokenize(config)
    assert not config.output.exists()


def test_a_corrupt_episode_is_named_and_costs_no_finished_shard(
    commands, words, undisturbed, tmp_path, episodes_folder
):
    folder = tmp_path / "episodes"
    shutil.copytree(episodes_folder, folder)
    bad = folder / "episode-000002.npz"
    content = bad.read_bytes()
    flipped = bytearray(content)
    flipped[200] ^= 0xFF  # inside the frames: the size stays, the checksum does not
    bad.write_bytes(flipped)
    output = tmp_path / "shards"
    ended = commands.run(*words, output, "--episodes", folder)
    assert ended.code == 3
    assert str(bad) in ended.err
    assert len(ended.err.strip().splitlines()) == 1
    assert sorted(hashes(output)) == ["plan.json", "shard-000000.json", "shard-000000.tar"]
    bad.write_bytes(content)
    check_continues(commands, (*words[:-1], "--episodes", folder, "--output"), output,
                    hashes(undisturbed[0]))  # fmt: skip


def test_a_corrupt_episode_leaves_no_file_open_and_no_thread_running(tmp_path, tokenizer_folder):
    folder = write_pushed_squares(tmp_path / "episodes", (9,) * 6)
    (folder / "episode-000004.npz").write_bytes(b"no zip")
    config = TokenizeConfig(
        episodes=folder, tokenizer=str(tokenizer_folder), output=tmp_path / "shards", device="cpu"
    )
    gc.collect()  # what an earlier test left
    files, threads = set(os.listdir("/proc/self/fd")), set(threading.enumerate())
    with pytest.raises(FormatError, match="episode-000004"):
        tokenize(config)
    assert set(os.listdir("/proc/self/fd")) <= files
    assert set(threading.enumerate()) <= threads


def test_a_full_disk_is_one_sentence_and_leaves_what_was_whole(
    commands, words, undisturbed, tmp_path
):
    wanted = hashes(undisturbed[0])
    limit = (undisturbed[0] / "shard-000001.tar").stat().st_size - 1
    output = tmp_path / "shards"
    ended = commands.run(*words, output, largest_file_bytes=limit)
    assert ended.code == 1
    assert len(ended.err.strip().splitlines()) == 1
    assert "shard-000001.tar" in ended.err or "shard-000000.tar" in ended.err
    assert "bytes free" in ended.err
    assert not list(output.glob("tmp-*"))
    check_whole_or_absent(output, wanted)
    check_continues(commands, words, output, wanted)


def test_missing_or_empty_input_ends_with_3_within_5_seconds(
    commands, words, tmp_path, episodes_folder
):
    (tmp_path / "empty").mkdir()
    shutil.copy(episodes_folder / "episodes.json", tmp_path / "empty")
    for flag, folder in [("--episodes", "missing"), ("--episodes", "empty"), ("--tokenizer", "no")]:
        began = time.monotonic()
        ended = commands.run(*words, tmp_path / "shards", flag, tmp_path / folder)
        assert ended.code == 3
        assert ended.cpu_s < 5
        assert time.monotonic() - began < 30  # others may be busy with the machine
        assert str(tmp_path / folder) in ended.err
        assert len(ended.err.strip().splitlines()) == 1
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--shard-episode", 2), "did you mean --shard-episodes"),
        (("--shard-episodes", 0), "--shard-episodes must be at least 1, got 0"),
        (("--device", "abacus"), "--device abacus"),
        (("--device", "meta"), "--device meta"),
    ],
)
def test_wrong_settings_end_with_2_and_write_nothing(commands, words, tmp_path, flags, said):
    ended = commands.run(*words, tmp_path / "shards", *flags)
    assert ended.code == 2
    assert said in ended.err
    assert not (tmp_path / "shards").exists()


def test_a_folder_of_something_else_is_not_touched(commands, words, tmp_path):
    (tmp_path / "tmp-mine").write_text("keep me")
    (tmp_path / "notes.txt").write_text("keep me")
    ended = commands.run(*words, tmp_path)
    assert ended.code == 2
    assert "notes.txt" in ended.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", "tmp-mine"]
    assert commands.run(*words, tmp_path / "notes.txt").code == 2


def test_memory_does_not_grow_with_the_length_of_an_episode(tmp_path, tokenizer_folder):
    def peak(pieces: int) -> int:
        folder = tmp_path / f"of-{pieces}"
        spec = EpisodesSpec(
            actions=PUSHES, height=128, width=128, fps=8.75, frame_skip=4, source={}
        )
        spec.write(folder)
        frame = np.zeros((128, 128, 3), np.uint8)
        for key in ("a", "b"):
            with EpisodeWriter(folder, key, spec=spec) as writer:
                for _ in range(64 * pieces):
                    writer.append(frame)
                writer.finish(np.zeros(64 * pieces - 1, np.int64))
        config = TokenizeConfig(
            episodes=folder, tokenizer=str(tokenizer_folder), output=folder / "shards", device="cpu"
        )
        tracemalloc.start()
        tokenize(config)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    few, many = peak(2), peak(12)
    one_piece = 64 * 128 * 128 * 3
    assert few > one_piece  # or numpy's arrays were not counted
    # How many pieces are there at once depends on how far ahead of the encoder the reader is.
    assert many < few + 3 * one_piece


def test_the_manifest_has_the_reconstruction_that_evaluate_measures(
    undisturbed, tokenizer_folder, episodes_folder
):
    """Over whole held-out episodes, in the same clips; one is longer than a piece of a file."""
    tokenizer, episodes = load_tokenizer(tokenizer_folder), Episodes(episodes_folder)
    held_out = measures.read_held_out(episodes, episodes.split("validation"), tokenizer)
    measured, metrics = measures.reconstruction(held_out), TokenShards(undisturbed[0]).metrics
    for name in ("psnr_db", "moving_psnr_db"):
        assert metrics[name] == pytest.approx(measured[name], abs=1e-4)
    assert metrics["split"] == "validation"


def test_clips_streamed_side_by_side_are_those_of_whole_episodes(tokenizer_folder, episodes_folder):
    tokenizer, episodes = load_tokenizer(tokenizer_folder), Episodes(episodes_folder)
    held_out = measures.read_held_out(episodes, episodes.keys, tokenizer)
    videos = [EpisodeFrames(episodes, key, tokenizer.spec) for key in episodes.keys]
    clips = list(reconstructed_clips(videos, LENGTHS, tokenizer, batch=4))
    assert sum(len(true) for true, _ in clips) == sum(LENGTHS)
    assert {len(true) for true, _ in clips} == {length % 16 or 16 for length in LENGTHS} | {16}
    measured, wanted = clip_psnr(clips), measures.reconstruction(held_out)
    for name, value in measured.items():
        assert value == pytest.approx(wanted[name], abs=1e-4)


def test_where_none_is_held_out_the_training_episodes_are_measured_and_called_so(
    commands, tokenizer_folder, tmp_path
):
    folder = write_pushed_squares(tmp_path / "episodes", (9,))
    ended = commands.run("tokenize", "--episodes", folder, "--tokenizer", tokenizer_folder,
                         "--device", "cpu", "--output", tmp_path / "shards")  # fmt: skip
    assert ended.code == 0, ended.err
    assert "reconstruction on training episodes (none is held out)" in ended.err
    assert TokenShards(tmp_path / "shards").metrics["split"] == "train"


def test_the_hash_of_the_codes_is_the_same_whatever_the_folder_is_called(
    undisturbed, tokenizer_folder, episodes_folder, tmp_path
):
    moved, renamed = tmp_path / "moved", tmp_path / "renamed"
    shutil.copytree(episodes_folder, moved)
    shutil.copytree(tokenizer_folder, renamed)
    output = tokenize(
        TokenizeConfig(
            episodes=moved,
            tokenizer=str(renamed),
            output=tmp_path / "elsewhere",
            shard_episodes=2,
            device="cpu",
        )
    )
    assert hashes(output) == hashes(undisturbed[0])
