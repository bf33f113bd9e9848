"""Promises of clips.py: no clip crosses a border, and batch i is a function of (seed, i)."""

from collections import Counter

import numpy as np
import pytest
import torch
from tokenizer.toys import write_clips
from worldloom.common import Episodes, FormatError
from worldloom.tokenizer import Clips, resize_frames

LENGTHS = (5, 3, 9, 4, 70)  # 70: more than one piece of the file


@pytest.fixture(scope="module")
def episodes(tmp_path_factory) -> Episodes:
    """Five episodes; every pixel of a frame is (episode, index, 200)."""
    clips = []
    for number, length in enumerate(LENGTHS):
        frames = np.full((length, 8, 12, 3), 200, np.uint8)
        frames[..., 0] = number
        frames[..., 1] = np.arange(length)[:, None, None]
        clips.append(frames)
    return write_clips(tmp_path_factory.mktemp("numbered") / "episodes", clips)


def make_clips(episodes, **changes):
    settings = {"clip_frames": 4, "size": (8, 12), "resize": "exact"} | changes
    return Clips(episodes, episodes.keys, **settings)


@pytest.mark.parametrize("cache_bytes", [0, 9 * 8 * 12 * 3, 1 << 20])
def test_no_clip_crosses_the_border_of_an_episode(episodes, cache_bytes):
    clips = make_clips(episodes, cache_bytes=cache_bytes)
    for index in range(10):
        for frames_THWC in clips.batch(index, size=6, seed=0).numpy():
            assert len(np.unique(frames_THWC[..., 0])) == 1
            assert np.unique(np.diff(frames_THWC[:, 0, 0, 1].astype(int))).tolist() == [1]


def test_origins_say_where_the_clips_are_from(episodes):
    clips = make_clips(episodes)
    batch_BTHWC = clips.batch(3, size=8, seed=1)
    found = [(f"episode-{clip[0, 0, 0, 0]}", int(clip[0, 0, 0, 1])) for clip in batch_BTHWC]
    assert clips.origins(3, size=8, seed=1) == found


def test_every_starting_frame_is_equally_likely(episodes):
    clips = make_clips(episodes)
    origins = clips.origins(0, size=76_000, seed=0)
    counts = Counter(origins)
    possible = {
        (f"episode-{number}", first)
        for number, length in enumerate(LENGTHS)
        for first in range(length - 3)
    }
    assert set(counts) == possible
    expected = 76_000 / len(possible)  # 1,000: a standard deviation is about 31
    assert all(abs(count - expected) < 160 for count in counts.values())


def test_a_batch_is_a_pure_function_of_seed_and_index(episodes):
    forwards, backwards = make_clips(episodes), make_clips(episodes, cache_bytes=0)
    batches = [forwards.batch(index, size=4, seed=7) for index in range(6)]
    for index in reversed(range(6)):
        assert torch.equal(backwards.batch(index, size=4, seed=7), batches[index])
    assert not torch.equal(forwards.batch(0, size=4, seed=8), batches[0])
    assert not torch.equal(batches[1], batches[0])


def test_memory_stays_within_its_bound(episodes):
    room = (9 + 5) * 8 * 12 * 3
    clips = make_clips(episodes, cache_bytes=room)
    for index in range(20):
        clips.batch(index, size=4, seed=0)
    kept = sum(frames.nbytes for frames in clips._kept.values())
    assert 0 < kept <= room


def test_episodes_shorter_than_a_clip_are_left_out_and_counted(episodes):
    clips = make_clips(episodes, clip_frames=5)
    assert clips.keys == ["episode-0", "episode-2", "episode-4"]
    assert (clips.num_short, clips.num_frames) == (2, 5 + 9 + 70)


def test_clips_are_of_the_size_asked_for_by_the_rule_asked_for(episodes):
    clips = make_clips(episodes, size=(16, 16), resize="pad")
    (key, first), *_ = clips.origins(0, size=2, seed=0)
    with episodes.open(key) as episode:
        frames = episode.frames(first, first + 4)
    expected = resize_frames(frames, height=16, width=16, rule="pad")
    assert np.array_equal(clips.batch(0, size=2, seed=0)[0].numpy(), expected)


def test_a_folder_without_an_episode_long_enough_is_refused(episodes):
    with pytest.raises(FormatError, match=r"no episode has 71 frames \(the longest of 5 has 70\)"):
        make_clips(episodes, clip_frames=71)


def test_no_episodes_at_all_are_refused(episodes):
    with pytest.raises(FormatError, match=r"no episode has 4 frames \(the longest of 0 has 0\)"):
        Clips(episodes, [], clip_frames=4, size=(8, 12), resize="exact")
