"""Promises of windows.py: exact cuts of episodes, in an order that is a function of the seed."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from dynamics.toys import STEER, code_spec, write_shards
from worldloom.common import ActionSpec, FormatError, TokenShards
from worldloom.dynamics import NULL, StreamConfig, Windows, WindowStream
from worldloom.dynamics.loading import TrainingData
from worldloom.dynamics.windows import widened

LENGTHS = (9, 1, 3, 12, 2, 8, 5, 7)
"""Latent frames; e1 is too short for anything, e7 is held out."""


def code_of(episode: int, frame: int) -> int:
    """Every cell of every frame says which frame it is."""
    return episode * 12 + frame


def slot_of(episode: int, step: int) -> int:
    """Every action says which step it is."""
    return episode * 50 + step


@pytest.fixture(scope="module", params=[1, 2, 4])
def telling(request, tmp_path_factory) -> TokenShards:
    """Episodes whose codes and actions name their own places."""
    r = request.param
    codes = code_spec(vocab_size=96, frames_per_latent=r)
    actions = ActionSpec.multi_discrete([400, 400], names=["step", "negative"])
    episodes = []
    for number, frames in enumerate(LENGTHS):
        # The last latent frame of odd episodes is not full: it covers fewer steps than r.
        steps = (frames - 1) * r - (number % 2 if r > 1 and frames > 1 else 0)
        codes_thw = np.array([code_of(number, f) for f in range(frames)])[:, None, None]
        told = np.array([slot_of(number, step) for step in range(steps)], np.int64)
        episodes.append(
            (np.broadcast_to(codes_thw, (frames, 3, 4)), np.stack([told, 399 - told], axis=1))
        )
    return write_shards(
        tmp_path_factory.mktemp("telling") / "shards", episodes, codes, actions, per_shard=3
    )


def test_a_window_is_an_exact_cut_of_one_episode_with_the_actions_between_its_frames(telling):
    r = telling.codes.frames_per_latent
    windows = Windows(telling, "train", window_frames=4)
    batch = windows.take(np.arange(len(windows)))
    seen = set()
    for codes_thw, slots_TA, valid_t in zip(
        batch.codes_Bthw, batch.slots_BTA, batch.valid_Bt, strict=True
    ):
        episode, first = divmod(int(codes_thw[0, 0, 0]), 12)
        seen.add((episode, first))
        length = min(4, LENGTHS[episode] - first)
        assert valid_t.tolist() == [True] * length + [False] * (4 - length)
        for frame in range(4):
            code = code_of(episode, first + frame) if frame < length else 0
            assert (codes_thw[frame] == code).all()
        steps = len(telling.slots_TA(episode))
        for step in range(3 * r):
            # The step at first * r leads out of the window's first latent frame.
            there = first * r + step < steps
            told = slot_of(episode, first * r + step)
            assert slots_TA[step].tolist() == ([told, 399 - told] if there else [NULL, NULL])
    # Every start of every episode of the split, and a short episode once.
    assert seen == {
        (episode, first)
        for episode, length in enumerate(LENGTHS)
        if length > 1 and episode != 7
        for first in range(max(1, length - 3))
    }
    assert len(seen) == len(windows)


def test_the_held_out_split_has_its_own_episodes_only(telling):
    batch = Windows(telling, "validation", window_frames=3).take(np.arange(5))
    assert set((batch.codes_Bthw[:, 0, 0, 0] // 12).tolist()) == {7}


def test_a_batch_is_a_function_of_seed_and_index_alone(telling):
    def first_codes(seed, index):
        windows = Windows(telling, "train", window_frames=4)
        for other in range(3):
            windows.batch(other, size=4, seed=other)  # whatever was read before
        return windows.batch(index, size=64, seed=seed).codes_Bthw

    assert torch.equal(first_codes(1, 7), first_codes(1, 7))
    assert not torch.equal(first_codes(1, 7), first_codes(2, 7))
    assert not torch.equal(first_codes(1, 7), first_codes(1, 8))


@pytest.mark.parametrize("num_ranks", [2, 3, 6])
def test_the_processes_rows_make_exactly_the_whole_batch(telling, num_ranks):
    windows = Windows(telling, "train", window_frames=4)
    whole = windows.batch(5, size=12, seed=1)
    for rank in range(num_ranks):
        part = windows.batch(5, size=12, seed=1, rank=rank, num_ranks=num_ranks)
        rows = slice(rank, None, num_ranks)
        assert torch.equal(part.codes_Bthw, whole.codes_Bthw[rows])
        assert torch.equal(part.slots_BTA, whole.slots_BTA[rows])
        assert torch.equal(part.valid_Bt, whole.valid_Bt[rows])
    with pytest.raises(ValueError, match="cannot be dealt"):
        windows.batch(5, size=12, seed=1, num_ranks=5)


def test_origins_name_the_windows_of_a_batch(telling):
    windows = Windows(telling, "train", window_frames=4)
    batch = windows.batch(3, size=20, seed=2)
    named = [
        code_of(int(key.removeprefix("e")), first)
        for key, first in windows.origins(3, size=20, seed=2)
    ]
    assert named == batch.codes_Bthw[:, 0, 0, 0].tolist()


def test_every_window_is_drawn_about_as_often_as_any_other(telling):
    windows = Windows(telling, "train", window_frames=4)
    drawn = np.concatenate(
        [windows.batch(i, size=500, seed=0).codes_Bthw[:, 0, 0, 0].numpy() for i in range(8)]
    )
    counts = np.bincount(drawn, minlength=96)
    counts = counts[counts > 0]
    expected = 4000 / len(windows)
    assert len(counts) == len(windows)
    assert ((counts - expected) ** 2 / expected).sum() < 2 * len(windows) + 20


def test_a_split_with_nothing_to_predict_is_refused(tmp_path):
    still = np.zeros((1, 3, 4), np.int64), np.zeros((0, 1), np.int64)
    shards = write_shards(tmp_path / "shards", [still] * 3, code_spec(), STEER)
    with pytest.raises(FormatError, match="the train split has no episode of two latent frames"):
        Windows(shards, "train", window_frames=4)
    with pytest.raises(ValueError, match="at least 2"):
        Windows(shards, "train", window_frames=1)


@pytest.mark.parametrize("member", ["codes", "actions"])
def test_a_damaged_shard_is_refused_where_it_is_read(mover_shards, tmp_path, member):
    shutil.copytree(mover_shards.folder, tmp_path / "shards")
    row = mover_shards.episodes[0]
    offset, size = row.span(member)
    path = tmp_path / "shards" / "shard-000000.tar"
    content = bytearray(path.read_bytes())
    content[offset + size - 1] = 0xEE  # neither a code of two, nor an action of five
    path.write_bytes(content)
    windows = Windows(TokenShards(tmp_path / "shards"), "train", window_frames=12)
    with pytest.raises(FormatError, match=rf"e0\.{member}\.npy"):
        windows.take(np.arange(len(windows)))


def test_batches_move_and_split_row_by_row(mover_shards):
    batch = Windows(mover_shards, "train", window_frames=5).batch(0, size=6, seed=0)
    part = batch.rows(slice(2, 4)).to("cpu")
    assert torch.equal(part.codes_Bthw, batch.codes_Bthw[2:4])
    assert torch.equal(part.slots_BTA, batch.slots_BTA[2:4])
    assert torch.equal(part.valid_Bt, batch.valid_Bt[2:4])


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32"])
def test_codes_become_the_same_int64_on_a_device_as_on_the_cpu(dtype):
    most = np.iinfo(dtype).max
    codes = np.array([[0, 1, most // 2, most // 2 + 1, most]], dtype)
    wide = widened(codes, "cpu")
    assert wide.dtype == torch.int64
    assert wide.tolist() == codes.astype(np.int64).tolist()


def anonymous_bytes() -> int:
    """Memory of this process that is not a mapped file."""
    told = Path("/proc/self/smaps_rollup").read_text()
    return int(re.search(r"Anonymous: +(\d+) kB", told)[1]) * 1024


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").exists(), reason="this system does not tell such memory"
)
@pytest.mark.parametrize("kind", ["mapped", "stream"])
def test_memory_is_flat_from_1_to_100_shards(tmp_path, kind):
    """Of 40 MB in 100 shards under 8 MB stay: the index, and the buffer of a stream."""
    codes = code_spec(height=16, width=16, vocab_size=300)
    rng = np.random.default_rng(0)

    def episode():
        # Small until it is written: memory that was freed would hide what is kept later.
        codes_t11 = rng.integers(0, 300, (100, 1, 1))
        return np.broadcast_to(codes_t11, (100, 16, 16)), rng.integers(0, 5, (99, 1))

    def write(name, count):
        folder = tmp_path / name
        episodes = (episode() for _ in range(8 * count))
        return write_shards(folder, list(episodes), codes, STEER, per_shard=8).folder

    def growth(folder):
        before = anonymous_bytes()
        elsewhere = kind == "stream"
        shards = TokenShards(folder, tars_elsewhere=elsewhere)
        if elsewhere:
            stream = StreamConfig(url=str(folder / "{file}"), lanes=4, buffer_windows=64)
            windows = WindowStream(shards, "train", window_frames=8, stream=stream)
        else:
            windows = Windows(shards, "train", window_frames=8)
        for index in range(600):  # a pass through the stream, and 6 windows of each episode
            windows.batch(index, size=16, seed=0)
        return anonymous_bytes() - before

    small, large = write("small", 1), write("large", 100)
    growth(small)  # what libraries allocate when they are first used
    grown = {folder.name: growth(folder) for folder in (small, large)}
    assert grown["large"] < 8 << 20, grown
    assert sum(path.stat().st_size for path in large.glob("*.tar")) > 40 << 20


@pytest.mark.parametrize("key", ["e0", "e7"])
@pytest.mark.parametrize("part", ["codes", "actions"])
def test_a_code_or_an_action_that_cannot_be_is_found_before_anything_is_learned(
    tmp_path, part, key
):
    """e0 is to be learned from, e7 is held out."""
    walks = [(np.zeros((6, 3, 4), np.uint8), np.zeros((5, 1), np.uint8)) for _ in range(8)]
    folder = write_shards(tmp_path / "shards", walks, code_spec(vocab_size=9), STEER).folder
    TrainingData.open([TokenShards(folder)], window_frames=4)
    path = folder / f"shard-00000{int(key == 'e7')}.tar"
    content = bytearray(path.read_bytes())
    row = next(row for row in TokenShards(folder).episodes if row.key == key)
    offset, size = row.span(part)
    content[offset + size - 1] = 9  # as if written by another tokenizer, for another game
    path.write_bytes(content)
    with pytest.raises(FormatError, match=rf"{path.name}: {key}\.{part}\.npy: "):
        TrainingData.open([TokenShards(folder)], window_frames=4)
