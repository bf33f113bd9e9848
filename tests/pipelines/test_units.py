"""units.py: a shard follows from the job alone, whoever makes it, and when."""

import gc
import os
import shutil
import threading
import time
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from chain_worlds import hashes, identities, save_tokenizer, write_pushed_squares
from worldloom.common import (
    Episodes,
    FormatError,
    MismatchError,
    finished_shard,
    read_json,
    write_bytes,
    write_json,
)
from worldloom.pipelines import measures
from worldloom.pipelines.encoding import SquaredErrors
from worldloom.pipelines.tokenize import TokenizeConfig, tokenize
from worldloom.pipelines.units import TokenizeJob, UnitWorker, make_plan, open_unit_worker
from worldloom.tokenizer import load_tokenizer

LENGTHS = (20, 7, 70, 1, 33, 12, 9, 9, 40, 5, 18, 3)
"""Two are held out: the tenth, and nobody else; units are of five."""


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer") / "model")


@pytest.fixture(scope="module")
def episodes_folder(tmp_path_factory):
    return write_pushed_squares(tmp_path_factory.mktemp("recorded") / "episodes", LENGTHS)


@pytest.fixture
def job(tmp_path, tokenizer_folder, episodes_folder):
    return make_job(tmp_path / "shards", tokenizer_folder, episodes_folder)


def make_job(output, tokenizer, episodes, **settings):
    """A job whose plan is written."""
    settings = {"shard_episodes": 5, "batch_episodes": 3, **settings}
    sizes = {name: settings[name] for name in ("shard_episodes", "batch_episodes")}
    plan = make_plan(Episodes(episodes), load_tokenizer(tokenizer), **sizes)
    write_json(output / "plan.json", plan)
    settings = {"skip_bad": 0, "device": "cpu", "threads": 1, **settings}
    return TokenizeJob(
        episodes=episodes, tokenizer=str(tokenizer), output=output, plan=plan, **settings
    )


def do(job, *units):
    """Have units done by one worker; return the reports."""
    worker = open_unit_worker(job)
    try:
        return [worker.answer(index) for index in units]
    finally:
        worker.close()


def damage(folder, number, *, late=False):
    """Cut an episode short, or flip a bit behind all that its first frames need."""
    path = folder / f"episode-{number:06d}.npz"
    content = bytearray(path.read_bytes())
    if late:
        content[content.index(b"frames/000001.npy") + 60] ^= 0xFF
        path.write_bytes(content)
    else:
        path.write_bytes(content[: len(content) // 2])
    return path


def test_a_unit_is_the_same_in_any_order_by_any_worker_and_however_it_was_read(job, tmp_path):
    do(job, 0, 1, 2)
    other = replace(job, output=tmp_path / "other")
    write_json(other.output / "plan.json", job.plan)
    worker = open_unit_worker(other)
    worker.answer(2, following=0)
    worker.answer(1, following=1)  # not what was read ahead, and then what was done just now
    worker.answer(1)
    worker.close()
    do(other, 0)
    assert hashes(other.output) == hashes(job.output)


def test_a_report_says_what_was_done(job):
    (report,) = do(job, 2)
    tar = job.output / "shard-000002.tar"
    assert (report.index, report.num_episodes, report.num_frames) == (2, 2, 18 + 3)
    assert report.size_bytes == tar.stat().st_size
    assert report.seconds > 0
    assert report.skipped == {}


def test_job_and_report_travel_to_another_process(job):
    (report,) = do(job, 2)
    for value in (job, report):
        assert ForkingPickler.loads(ForkingPickler.dumps(value)) == value


def test_what_the_units_measure_adds_up_to_what_evaluate_measures(job):
    do(job, 0, 1, 2)
    total = SquaredErrors()
    for index in range(3):
        total += SquaredErrors(**finished_shard(job.output, index).measured)
    episodes, tokenizer = Episodes(job.episodes), load_tokenizer(job.tokenizer)
    assert episodes.split("validation") == ["episode-000009"]
    held_out = measures.read_held_out(episodes, episodes.split("validation"), tokenizer)
    wanted = measures.reconstruction(held_out)
    assert total.pixels == 5 * 16 * 16
    for name, value in total.psnr().items():
        assert value == pytest.approx(wanted[name], abs=1e-4)
    assert finished_shard(job.output, 0).measured["pixels"] == 0


class Spied:
    """A tokenizer that notes how many threads torch has while it encodes."""

    def __init__(self, tokenizer):
        self._tokenizer, self.threads = tokenizer, set()

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def open_encoder(self):
        self.threads.add(torch.get_num_threads())
        return self._tokenizer.open_encoder()


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_a_worker_computes_with_one_thread_and_gives_the_others_back(
    job, tmp_path, episodes_folder, tokenizer_folder, three_threads
):
    do(job, 0)
    spied = Spied(load_tokenizer(job.tokenizer))
    worker = UnitWorker(job, Episodes(job.episodes), spied)
    worker.answer(0)
    assert spied.threads == {1}
    worker.close()
    assert torch.get_num_threads() == 3
    config = TokenizeConfig(
        episodes=episodes_folder, tokenizer=str(tokenizer_folder), output=tmp_path / "whole",
        shard_episodes=5, batch_episodes=3, device="cpu", workers=1,
    )  # fmt: skip
    tokenize(config)
    assert torch.get_num_threads() == 3
    tar = "shard-000000.tar"
    assert hashes(config.output)[tar] == hashes(job.output)[tar]


class Noted(Episodes):
    """Episodes that note which of them were opened."""

    def __init__(self, folder):
        super().__init__(folder)
        self.opened = []

    def open(self, key, /):
        self.opened.append(key)
        return super().open(key)


def test_the_first_frames_of_the_next_unit_are_read_before_it_is_asked_for(job):
    episodes = Noted(job.episodes)
    worker = UnitWorker(job, episodes, load_tokenizer(job.tokenizer))
    worker.answer(0, following=2)
    give_up = time.monotonic() + 30
    # Opened for their lengths, then the first three of like length again for their frames.
    while episodes.opened.count(episodes.keys[11]) < 2 and time.monotonic() < give_up:
        time.sleep(0.001)
    assert episodes.opened.count(episodes.keys[11]) == 2
    assert episodes.keys[5] not in episodes.opened
    episodes.opened.clear()
    worker.answer(2)
    assert episodes.opened.count(episodes.keys[11]) == 1  # for its actions; not read once more
    worker.close()


def test_closing_leaves_no_thread_and_no_file_open(job):
    gc.collect()  # what an earlier test left
    threads, files = set(threading.enumerate()), set(os.listdir("/proc/self/fd"))
    worker = open_unit_worker(job)
    worker.answer(0, following=1)
    worker.close()
    assert set(threading.enumerate()) <= threads
    assert set(os.listdir("/proc/self/fd")) <= files


def test_the_leftovers_of_a_unit_go_when_it_is_redone_and_those_of_others_stay(job):
    for name in ("tmp-7-shard-000001.tar", "tmp-8-shard-000001.json", "tmp-7-shard-000002.tar",
                 "tmp-7-plan.json"):  # fmt: skip
        write_bytes(job.output / name, b"torn")
    do(job, 1)
    assert sorted(path.name for path in job.output.glob("tmp-*")) == [
        "tmp-7-plan.json",
        "tmp-7-shard-000002.tar",
    ]


# Damaged episodes


@pytest.fixture
def fifty(tmp_path):
    """Fifty episodes; the 27th has two pieces of frames."""
    lengths = [3 + number % 5 for number in range(50)]
    lengths[26] = 90
    return write_pushed_squares(tmp_path / "fifty", tuple(lengths))


@pytest.mark.parametrize("late", [False, True], ids=["cut short", "a flipped bit, late"])
def test_a_damaged_episode_in_the_middle_of_50_is_left_out_named_and_changes_no_other(
    tmp_path, tokenizer_folder, fifty, late
):
    whole = make_job(tmp_path / "whole", tokenizer_folder, fifty, shard_episodes=10)
    do(whole, 2)
    bad = damage(fifty, 26, late=late)
    job = make_job(tmp_path / "shards", tokenizer_folder, fifty, shard_episodes=10, skip_bad=1)
    (report,) = do(job, 2)
    assert list(report.skipped) == ["episode-000026"]
    why = report.skipped["episode-000026"]
    assert why.startswith(bad.name)
    assert str(tmp_path) not in why
    record, before = finished_shard(job.output, 2), finished_shard(whole.output, 2)
    assert record.skipped == report.skipped
    assert [row.key for row in record.episodes] == [
        row.key for row in before.episodes if row.key != "episode-000026"
    ]
    theirs = {row.key: codes_of(whole.output, row) for row in before.episodes}
    for row in record.episodes:
        assert np.array_equal(codes_of(job.output, row), theirs[row.key])


def codes_of(folder, row):
    content = (folder / f"shard-{row.shard:06d}.tar").read_bytes()
    return np.frombuffer(content[row.codes_offset + 128 : row.codes_offset + row.codes_bytes], "u1")


def test_the_bytes_do_not_depend_on_how_an_episode_is_damaged(tmp_path, tokenizer_folder, fifty):
    tars = set()
    kept = (fifty / "episode-000026.npz").read_bytes()
    for late in (False, True):
        (fifty / "episode-000026.npz").write_bytes(kept)
        damage(fifty, 26, late=late)
        job = make_job(tmp_path / str(late), tokenizer_folder, fifty, skip_bad=1)
        do(job, 5)
        tars.add((job.output / "shard-000005.tar").read_bytes())
    assert len(tars) == 1


def test_without_leave_a_damaged_episode_stops_the_unit_and_leaves_no_trace(
    tmp_path, tokenizer_folder, fifty
):
    bad = damage(fifty, 26)
    job = make_job(tmp_path / "shards", tokenizer_folder, fifty)
    with pytest.raises(FormatError, match=str(bad)):
        do(job, 4, 5)
    assert sorted(hashes(job.output)) == ["plan.json", "shard-000004.json", "shard-000004.tar"]


@pytest.mark.parametrize("numbers", [(25, 26, 27), (1, 26, 44)], ids=["one unit", "three units"])
def test_a_worker_stops_at_one_damaged_episode_too_many(tmp_path, tokenizer_folder, fifty, numbers):
    paths = [damage(fifty, number) for number in numbers]
    job = make_job(tmp_path / "shards", tokenizer_folder, fifty, skip_bad=2)
    with pytest.raises(FormatError) as error:
        do(job, *range(10))
    said = str(error.value)
    assert f"{paths[2]}: " in said
    for path in paths[:2]:
        assert path.stem in said
    assert "--skip-bad 3" in said
    do(replace(job, skip_bad=3), *range(10))
    skipped = [key for i in range(10) for key in finished_shard(job.output, i).skipped]
    assert skipped == [path.stem for path in paths]


def test_a_unit_of_nothing_but_damage_is_an_empty_shard(tmp_path, tokenizer_folder, fifty):
    for number in range(5):
        damage(fifty, number)
    job = make_job(tmp_path / "shards", tokenizer_folder, fifty, skip_bad=5)
    (report,) = do(job, 0)
    assert (report.num_episodes, len(report.skipped)) == (0, 5)
    assert finished_shard(job.output, 0).episodes == ()


def test_an_error_that_is_no_episodes_fault_is_not_taken_for_one(job):
    """A tokenizer whose codes are out of range: every episode is whole, so none is skipped."""
    tokenizer = load_tokenizer(job.tokenizer)

    class Wrong(Spied):
        def open_encoder(self):
            return self

        def push(self, frames_BTHWC):
            return torch.full((*frames_BTHWC.shape[:2], 4, 4), 16)

        def flush(self):
            return torch.zeros((1, 0, 4, 4), dtype=torch.int64)

    worker = UnitWorker(replace(job, skip_bad=9), Episodes(job.episodes), Wrong(tokenizer))
    with pytest.raises(FormatError, match=r"16.* must be in \[0, 16\)"):
        worker.answer(0)
    worker.close()
    assert finished_shard(job.output, 0) is None


# What does not belong together


def test_a_worker_elsewhere_refuses_other_episodes_and_another_tokenizer(
    job, tmp_path, episodes_folder
):
    other = save_tokenizer(tmp_path / "other", seed=5)
    with pytest.raises(MismatchError, match=r"another plan \(tokenizer '.*' then, '.*' now\)"):
        open_unit_worker(replace(job, tokenizer=str(other)))
    copy = tmp_path / "copy"
    shutil.copytree(episodes_folder, copy)
    (copy / "episode-000011.npz").unlink()
    with pytest.raises(MismatchError, match=r"num_episodes 12 then, 11 now, source"):
        open_unit_worker(replace(job, episodes=copy))


def test_a_folder_that_was_begun_anew_meanwhile_gets_no_shard_of_the_old_plan(job):
    worker = open_unit_worker(job)
    worker.answer(0)
    before = identities(job.output)
    plan = read_json(job.output / "plan.json", what="the plan")
    write_json(job.output / "plan.json", {**plan, "batch_episodes": 4})
    with pytest.raises(MismatchError, match="batch_episodes 4 then, 3 now"):
        worker.answer(1)
    worker.close()
    after = identities(job.output)
    assert {name: after[name] for name in after if name != "plan.json"} == {
        name: before[name] for name in before if name != "plan.json"
    }
