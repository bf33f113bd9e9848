"""Promises of streaming.py: exact windows in an order that depends on the seed alone."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import count, pairwise
from pathlib import Path
from threading import Event, Thread

import numpy as np
import pytest
import torch
from dynamics.test_training import ENVIRONMENT, HERE, assert_equal_runs, numbers, rewind
from dynamics.toys import STEER, Mover, code_spec, train, write_shards
from worldloom.common import (
    ActionSpec,
    ConfigError,
    FormatError,
    MismatchError,
    StorageError,
    TokenShards,
    read_metrics,
)
from worldloom.dynamics import NULL, StreamConfig, Windows, WindowStream, open_held_out
from worldloom.dynamics.loading import Ahead

T = 4
LENGTHS = (9, 1, 3, 12, 2, 8, 5, 7, 12, 4, 6, 11, 2, 10)
"""Latent frames; e1 is too short for anything, e12 and e13 are held out."""


@pytest.fixture(scope="module", params=[1, 2, 4])
def telling(request, tmp_path_factory) -> TokenShards:
    """Five shards of episodes whose codes and actions name their own places."""
    r = request.param
    codes = code_spec(vocab_size=300, frames_per_latent=r)
    actions = ActionSpec.multi_discrete([900, 900], names=["step", "negative"])
    episodes = []
    for number, frames in enumerate(LENGTHS):
        # The last latent frame of odd episodes is not full: it covers fewer steps than r.
        steps = (frames - 1) * r - (number % 2 if r > 1 and frames > 1 else 0)
        codes_thw = (number * 20 + np.arange(frames))[:, None, None]
        told = number * 60 + np.arange(steps)
        episodes.append(
            (np.broadcast_to(codes_thw, (frames, 3, 4)), np.stack([told, 899 - told], axis=1))
        )
    folder = tmp_path_factory.mktemp("telling") / "shards"
    return write_shards(folder, episodes, codes, actions, per_shard=3, held_out=2)


def open_stream(
    shards: TokenShards, *, url: str = "", lanes: int = 2, buffer: int = 6, split: str = "train"
) -> WindowStream:
    return WindowStream(
        TokenShards(shards.folder, tars_elsewhere=True),
        split,
        window_frames=T,
        stream=StreamConfig(
            url=url or str(shards.folder / "{file}"), lanes=lanes, buffer_windows=buffer
        ),
    )


def places_of(stream: WindowStream, batches: int, *, size: int = 4, seed: int = 0) -> list:
    return [place for i in range(batches) for place in stream.origins(i, size=size, seed=seed)]


def assert_equal_batches(one, other) -> None:
    assert torch.equal(one.codes_Bthw, other.codes_Bthw)
    assert torch.equal(one.slots_BTA, other.slots_BTA)
    assert torch.equal(one.valid_Bt, other.valid_Bt)


def test_a_window_of_a_stream_is_the_window_that_the_mapped_shards_have_there(telling):
    """Codes, the actions between them under every temporal stride, and the padding."""
    stream, mapped = open_stream(telling), Windows(telling, "train", window_frames=T)
    numbers = {place: n for n, place in enumerate(mapped.places(np.arange(len(mapped))))}
    for index in range(40):
        batch = stream.batch(index, size=4, seed=1)
        places = stream.origins(index, size=4, seed=1)
        assert_equal_batches(batch, mapped.take(np.array([numbers[place] for place in places])))
        episodes = [int(key.removeprefix("e")) for key, _ in places]
        firsts = [first for _, first in places]
        told = [20 * e + first for e, first in zip(episodes, firsts, strict=True)]
        assert batch.codes_Bthw[:, 0, 0, 0].tolist() == told
        r = telling.codes.frames_per_latent
        for row, (episode, first) in enumerate(zip(episodes, firsts, strict=True)):
            step = batch.slots_BTA[row, 0].tolist()
            assert step == [60 * episode + first * r, 899 - 60 * episode - first * r]


def test_padding_of_short_episodes_is_null_and_not_valid(telling):
    stream = open_stream(telling, lanes=1, buffer=1)
    places = places_of(stream, len(stream), size=1)
    index = next(n for n, (key, _) in enumerate(places) if key == "e4")  # two latent frames
    batch = stream.batch(index, size=1, seed=0)
    assert batch.valid_Bt.tolist() == [[True, True, False, False]]
    assert not batch.codes_Bthw[0, 2:].any()
    steps = len(telling.slots_TA(4))
    assert (batch.slots_BTA[0, steps:] == NULL).all()
    assert (batch.slots_BTA[0, :steps] != NULL).all()


def test_a_pass_shows_every_shard_once_and_every_episode_about_as_often_as_it_has_frames(telling):
    stream = open_stream(telling, lanes=1, buffer=1)
    counts = Counter(key for key, _ in places_of(stream, len(stream), size=1))
    # As many windows as cover the episode, and never more than there are.
    expected = {
        f"e{number}": min(max(1, frames - T + 1), -(-frames // T))
        for number, frames in enumerate(LENGTHS[:-2])
        if frames > 1
    }
    assert counts == expected
    assert len(stream) == sum(expected.values())


def test_over_many_passes_every_window_of_the_split_is_shown(telling):
    stream, mapped = open_stream(telling), Windows(telling, "train", window_frames=T)
    shown = set(places_of(stream, 60 * len(stream) // 4))
    assert shown == set(mapped.places(np.arange(len(mapped))))


@pytest.mark.parametrize("lanes", [1, 2, 3, 4, 12])
def test_lanes_share_every_pass_without_loss_or_doubling(telling, lanes):
    """Also where there are fewer shards than lanes: 4 shards here have something to learn."""
    stream = open_stream(telling, lanes=lanes)
    visits = Counter()
    had = [0] * lanes
    for lane in range(lanes):
        for visit in stream._dealt(lane, 7):
            assert visit.position == had[lane]
            had[lane] += stream._shard_counts[visit.shard]
            visits[visit.epoch, visit.shard] += 1
            if visit.position > 6 * len(stream):
                break
    last = min(epoch for epoch, _ in visits)
    shards = set(stream._shard_counts)
    through = [e for e in range(last, 60) if {(e, shard) for shard in shards} <= visits.keys()]
    assert set(visits.values()) == {1}
    assert len(through) >= 6  # in every pass that all lanes are through with: all shards
    starts = [next(stream._dealt(lane, 7)) for lane in range(lanes)]
    assert len({(visit.epoch, visit.shard) for visit in starts}) == lanes


def test_no_lane_has_had_more_than_a_shard_more_than_another(telling):
    stream = open_stream(telling, lanes=3)
    largest = max(stream._shard_counts.values())
    had = [0, 0, 0]
    lanes = [stream._dealt(lane, 0) for lane in range(3)]
    coming = [next(lane) for lane in lanes]
    for _ in range(100):
        which = min(range(3), key=lambda lane: (coming[lane].epoch, coming[lane].position))
        had[which] = coming[which].position + stream._shard_counts[coming[which].shard]
        coming[which] = next(lanes[which])
        assert max(visit.position for visit in coming) - min(had) <= 2 * largest


def test_a_batch_is_a_function_of_seed_and_index_alone_wherever_reading_begins(telling):
    whole = open_stream(telling)
    batches = [whole.batch(index, size=4, seed=3) for index in range(50)]
    for start in (0, 1, 7, 23, 49):
        fresh = open_stream(telling)
        for index in range(start, min(50, start + 3)):
            assert_equal_batches(fresh.batch(index, size=4, seed=3), batches[index])
    jumping = open_stream(telling)
    for index in (30, 2, 3, 41):
        assert_equal_batches(jumping.batch(index, size=4, seed=3), batches[index])
    other = open_stream(telling)
    assert not torch.equal(other.batch(5, size=4, seed=4).codes_Bthw, batches[5].codes_Bthw)


def test_the_processes_take_whole_lanes_and_together_the_whole_batch(telling):
    whole = open_stream(telling, lanes=6)
    batches = [whole.batch(index, size=12, seed=1) for index in range(6)]
    for num_ranks in (2, 3, 6):
        for rank in range(num_ranks):
            mine = open_stream(telling, lanes=6)
            for index in (2, 3, 4, 5):
                part = mine.batch(index, size=12, seed=1, rank=rank, num_ranks=num_ranks)
                assert_equal_batches(part, batches[index].rows(slice(rank, None, num_ranks)))
            assert list(mine._lanes) == list(range(rank, 6, num_ranks))


@pytest.mark.parametrize(
    ("lanes", "size", "num_ranks", "message"),
    [
        (4, 6, 1, "batch of 6 windows cannot be dealt to 4 lanes"),
        (4, 12, 3, "4 lanes cannot be dealt to 3 processes"),
    ],
)
def test_what_cannot_be_dealt_evenly_is_refused(telling, lanes, size, num_ranks, message):
    with pytest.raises(ConfigError, match=message):
        open_stream(telling, lanes=lanes).batch(0, size=size, seed=0, num_ranks=num_ranks)


def test_the_buffer_mixes_windows_of_several_shards_and_a_buffer_of_one_does_not(telling):
    def neighbours(buffer):
        keys = [key for key, _ in places_of(open_stream(telling, lanes=1, buffer=buffer), 40)]
        return sum(one == other for one, other in pairwise(keys))

    assert neighbours(1) > 2 * neighbours(40)


def logged(shards: TokenShards, tmp_path: Path) -> tuple[str, Path]:
    """A command that notes which shard it is asked for, and sends it."""
    log = tmp_path / "asked.txt"
    return f"pipe:echo {{file}} >> {log}; cat {shards.folder}/{{file}}", log


def test_resuming_opens_only_shards_whose_windows_can_still_come(tmp_path):
    shards = Mover(STEER).write(tmp_path / "shards", episodes=60, num_frames=12)
    url, log = logged(shards, tmp_path)
    stream = open_stream(shards, url=url, lanes=1, buffer=8)
    in_a_pass = len(stream._shard_counts)
    assert in_a_pass > 12
    stream.batch(len(stream) // 4 * 3 - 10, size=4, seed=0)  # most of the third pass is behind it
    assert len(log.read_text().split()) < 8


def test_streams_are_closed_with_the_commands_that_send_them(telling, tmp_path):
    url = f"pipe:echo $$ >> {tmp_path}/ids; cat {telling.folder}/{{file}}; exec sleep 1000"
    stream = open_stream(telling, url=url, lanes=2)
    stream.batch(0, size=2, seed=0)
    stream.close()
    ids = list(map(int, (tmp_path / "ids").read_text().split()))
    assert ids
    give_up = time.monotonic() + 10
    while any(map(is_there, ids)):
        assert time.monotonic() < give_up, "a command outlived its stream"
        time.sleep(0.01)


def is_there(number: int) -> bool:
    """Whether there is a process of that number."""
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return True


def test_held_out_windows_are_read_once_and_are_those_of_the_held_out_episodes(telling, tmp_path):
    url, log = logged(telling, tmp_path)
    shards = TokenShards(telling.folder, tars_elsewhere=True)
    stream = StreamConfig(url=url, lanes=3, buffer_windows=5)
    windows = open_held_out(shards, window_frames=T, stream=stream)
    batch = windows.batch(0, size=16, seed=0)
    asked = log.read_text()
    assert set((batch.codes_Bthw[:, 0, 0, 0] // 20).tolist()) == {12, 13}
    assert set(asked.split()) == {"shard-000004.tar"}
    assert len(asked.split()) < 6  # though a pass has 4 windows
    named = windows.origins(0, size=16, seed=0)
    told = [20 * int(key.removeprefix("e")) + first for key, first in named]
    assert batch.codes_Bthw[:, 0, 0, 0].tolist() == told
    assert_equal_batches(windows.batch(0, size=16, seed=0), batch)
    assert log.read_text() == asked


def test_an_error_in_the_thread_is_raised_where_the_batch_is_wanted(walks):
    ahead = Ahead(open_stream(walks, url="pipe:false {file}"), count(), size=2, seed=0)
    with ahead, pytest.raises(StorageError, match="broke off"):
        ahead.next()


def test_a_stuck_sender_does_not_keep_training_from_ending(walks):
    stream = open_stream(walks, url="pipe:exec sleep 1000; {file}")
    with Ahead(stream, count(), size=2, seed=0):
        give_up = time.monotonic() + 60
        while not stream._open:
            assert time.monotonic() < give_up, "no sender was started"
            time.sleep(0.01)
        time.sleep(0.2)  # by now it is read from
        began = time.monotonic()
    assert time.monotonic() - began < 4  # after 5 s the thread would be left alone


def test_batches_made_ahead_are_the_batches_in_their_order(telling):
    windows = open_stream(telling)
    expected = [open_stream(telling).batch(index, size=4, seed=2) for index in range(3, 12)]
    with Ahead(windows, range(3, 12), size=4, seed=2) as ahead:
        for batch in expected:
            assert_equal_batches(ahead.next().to("cpu"), batch)
        with pytest.raises(StopIteration):
            ahead.next()


# Training from a stream.


@pytest.fixture(scope="module")
def streamed(tmp_path_factory, walks) -> Path:
    """A run of six updates with checkpoints after the third and the sixth; do not change it."""
    torch.set_num_threads(1)
    run = tmp_path_factory.mktemp("streamed") / "run"
    train(walks.folder, run, stream=from_pipe(walks))
    return run


def from_pipe(shards: TokenShards, **settings) -> StreamConfig:
    settings = {"lanes": 2, "buffer_windows": 6, **settings}
    return StreamConfig(url=f"pipe:cat {shards.folder}/{{file}}", **settings)


def test_resuming_a_stream_changes_nothing_to_the_last_bit(streamed, walks, tmp_path):
    run = rewind(streamed, tmp_path / "run")
    train(walks.folder, run, stream=from_pipe(walks))
    assert "from update 3" in (run / "log.txt").read_text()
    assert_equal_runs(streamed, run)


def test_a_training_whose_stream_is_stuck_saves_when_it_is_asked_to_stop(
    streamed, walks, tmp_path, monkeypatch
):
    run = rewind(streamed, tmp_path / "run")
    waits, ended = Event(), Event()
    true_wait = Ahead.wait

    def wait(self, **how):
        waits.set()
        return true_wait(self, **how)

    def ask():
        waits.wait(60)
        while not ended.wait(0.5):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Ahead, "wait", wait)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    asking = Thread(target=ask)
    asking.start()
    stuck = StreamConfig(url="pipe:exec sleep 1000; {file}", lanes=2, buffer_windows=6)
    try:
        with pytest.raises(SystemExit) as stopped:
            train(walks.folder, run, stream=stuck)
    finally:
        ended.set()
        asking.join()
        signal.signal(signal.SIGTERM, before)
    assert stopped.value.code == 143
    assert "stopped at update 3" in (run / "log.txt").read_text()
    train(walks.folder, run, stream=from_pipe(walks))
    assert_equal_runs(streamed, run)


def test_tars_may_be_elsewhere_and_come_from_elsewhere(streamed, walks, tmp_path):
    (tmp_path / "shards").mkdir()
    for name in ("manifest.json", "codebook.safetensors"):
        shutil.copy(walks.folder / name, tmp_path / "shards" / name)
    with pytest.raises(FormatError, match=r"shard-000000\.tar: is missing"):
        TokenShards(tmp_path / "shards")
    run = rewind(streamed, tmp_path / "run")
    url = str(walks.folder / "{file}")
    stream = StreamConfig(url=url, lanes=2, buffer_windows=6)
    train(tmp_path / "shards", run, stream=stream)
    assert_equal_runs(streamed, run)


def test_a_run_goes_on_only_with_the_same_order(streamed, walks, tmp_path):
    run = rewind(streamed, tmp_path / "run")
    for stream in (from_pipe(walks, lanes=4), from_pipe(walks, buffer_windows=7), None):
        with pytest.raises(MismatchError, match="stream"):
            train(walks.folder, run, stream=stream)


def test_several_folders_and_lanes_that_do_not_fit_are_refused_before_anything_is_written(
    walks, tmp_path
):
    with pytest.raises(ConfigError, match="a stream is of one folder"):
        train([walks.folder, walks.folder], tmp_path / "run", stream=from_pipe(walks))
    with pytest.raises(ConfigError, match="4 windows cannot be dealt to 3 lanes"):
        train(walks.folder, tmp_path / "run", stream=from_pipe(walks, lanes=3))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_stream_that_breaks_off_stops_training_and_the_next_run_continues(walks, tmp_path):
    log, broken = tmp_path / "asked.txt", tmp_path / "broken"
    url = (
        f"pipe:echo {{file}} >> {log}; if [ -e {broken} ] && [ $(wc -l < {log}) -gt 7 ]; then "
        f"head -c 3000 {walks.folder}/{{file}}; exit 9; fi; cat {walks.folder}/{{file}}"
    )
    stream = StreamConfig(url=url, lanes=2, buffer_windows=6)
    settings = {"num_steps": 20, "checkpoint_every": 3}
    broken.touch()
    with pytest.raises(StorageError, match=r"broke off \(exit 9\)"):
        train(walks.folder, tmp_path / "run", stream=stream, **settings)
    assert read_metrics(tmp_path / "run")[-1]["step"] > 3
    broken.unlink()
    train(walks.folder, tmp_path / "run", stream=stream, **settings)
    train(walks.folder, tmp_path / "whole", stream=from_pipe(walks), **settings)
    assert_equal_runs(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
def test_two_processes_train_from_a_stream_what_one_trains(walks, tmp_path):
    program = (
        "import sys, torch; from pathlib import Path; from dynamics.toys import train\n"
        "from worldloom.dynamics import StreamConfig\n"
        "torch.set_num_threads(1)\n"
        "stream = StreamConfig(url=sys.argv[3], lanes=2, buffer_windows=6)\n"
        "train(Path(sys.argv[1]), Path(sys.argv[2]), stream=stream)\n"
    )
    (tmp_path / "train.py").write_text(program)
    runs = {n: tmp_path / f"run{n}" for n in (1, 2)}
    train(walks.folder, runs[1], stream=from_pipe(walks))
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
            tmp_path / "train.py", walks.folder, runs[2], from_pipe(walks).url,
        ],
        env={**ENVIRONMENT, "PYTHONPATH": str(HERE.parent)},
        capture_output=True,
        text=True,
        timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (numbers(runs[n]) for n in (1, 2))
    for first, second in zip(one, two, strict=True):
        for name in ("loss", "gradient_norm", "validation_loss"):
            if name in first:
                assert second[name] == pytest.approx(first[name], rel=1e-5), first["step"]


def test_the_log_says_what_share_of_the_time_training_waited_for_data(streamed):
    shares = [row["data_wait_share"] for row in read_metrics(streamed) if "loss" in row]
    assert len(shares) == 6
    assert all(0 <= share < 1 for share in shares)
