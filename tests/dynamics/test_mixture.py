"""Promises of mixture.py: rows by weight, a function of (seed, batch, row), of data sets alike."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from dynamics.test_training import assert_equal_runs, rewind
from dynamics.toys import KEYS, STEER, Mover, code_spec, tokenizer_spec, train, write_shards
from worldloom.common import (
    ActionSpec,
    ConfigError,
    MismatchError,
    TokenShards,
    read_metrics,
    write_manifest,
)
from worldloom.dynamics import Mixture, Windows, check_alike
from worldloom.dynamics.loading import TrainingData
from worldloom.dynamics.mixture import weights_of


def telling(folder, number, lengths):
    """Shards in which every code is `number` * 16 plus its frame, and every action 0."""
    episodes = [
        (
            np.broadcast_to((number * 16 + np.arange(frames))[:, None, None], (frames, 3, 4)),
            np.zeros((frames - 1, 1), np.int64),
        )
        for frames in lengths
    ]
    return write_shards(folder, episodes, code_spec(vocab_size=64), STEER)


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> list[TokenShards]:
    """A small data set, a large one, and one whose episodes are shorter than a window."""
    folder = tmp_path_factory.mktemp("three")
    lengths = ([9, 8, 3], [16] * 12 + [5], [2, 3, 3])
    return [telling(folder / f"s{n}", n, rows) for n, rows in enumerate(lengths)]


def mix(three, weights=(3, 1, 2)) -> Mixture:
    return Mixture([Windows(one, "train", window_frames=4) for one in three], weights)


def sets_of(batch) -> list[int]:
    """The data set that every row comes from."""
    return (batch.codes_Bthw[:, 0, 0, 0] // 16).tolist()


def test_every_row_is_a_whole_window_of_the_data_set_that_origins_names(three):
    mixture = mix(three)
    for index in range(8):
        batch = mixture.batch(index, size=32, seed=3)
        named = mixture.origins(index, size=32, seed=3)
        for row, (where, first) in enumerate(named):
            folder, key = where.rsplit(": ", 1)
            (shards,) = [one for one in three if str(one.folder) == folder]
            episode = [row.key for row in shards.episodes].index(key)
            codes_thw = shards.codes_thw(episode, first, first + 4).astype(np.int64)
            assert np.array_equal(batch.codes_Bthw[row, : len(codes_thw)], codes_thw)
            valid = [True] * len(codes_thw) + [False] * (4 - len(codes_thw))
            assert batch.valid_Bt[row].tolist() == valid


@pytest.mark.parametrize("weights", [(3, 1, 2), (0.5, 0.25, 0.25), (1e-9, 1, 1), (1, 1, 1e9)])
def test_data_sets_are_drawn_by_weight_however_large_they_are(three, weights):
    mixture = mix(three, weights)
    drawn = [number for i in range(20) for number in sets_of(mixture.batch(i, size=200, seed=0))]
    shares = np.bincount(drawn, minlength=3) / len(drawn)
    assert shares == pytest.approx(np.array(weights) / sum(weights), abs=0.03)


def test_within_a_data_set_every_window_is_drawn_about_as_often_as_any_other(three):
    mixture = mix(three, (1, 1, 1))
    named = [origin for i in range(30) for origin in mixture.origins(i, size=100, seed=0)]
    large = [origin for origin in named if str(three[1].folder) in origin[0]]
    _, counts = np.unique([f"{key} {first}" for key, first in large], return_counts=True)
    expected = len(large) / len(mixture.parts[1])
    assert len(counts) == len(mixture.parts[1])
    assert ((counts - expected) ** 2 / expected).sum() < 2 * len(counts)


def test_a_batch_is_a_function_of_seed_and_index_and_a_row_of_no_other_row(three):
    whole = mix(three).batch(7, size=64, seed=1)
    again = mix(three)
    for other in range(3):
        again.batch(other, size=4, seed=other)  # whatever was read before
    assert torch.equal(again.batch(7, size=64, seed=1).codes_Bthw, whole.codes_Bthw)
    assert torch.equal(again.batch(7, size=8, seed=1).codes_Bthw, whole.codes_Bthw[:8])
    assert not torch.equal(again.batch(8, size=64, seed=1).codes_Bthw, whole.codes_Bthw)
    assert not torch.equal(again.batch(7, size=64, seed=2).codes_Bthw, whole.codes_Bthw)


@pytest.mark.parametrize("num_ranks", [2, 3, 6])
def test_the_processes_rows_make_exactly_the_whole_batch(three, num_ranks):
    mixture = mix(three)
    whole = mixture.batch(5, size=12, seed=1)
    for rank in range(num_ranks):
        part = mixture.batch(5, size=12, seed=1, rank=rank, num_ranks=num_ranks)
        rows = slice(rank, None, num_ranks)
        assert torch.equal(part.codes_Bthw, whole.codes_Bthw[rows])
        assert torch.equal(part.slots_BTA, whole.slots_BTA[rows])
        assert torch.equal(part.valid_Bt, whole.valid_Bt[rows])
    with pytest.raises(ValueError, match="cannot be dealt"):
        mixture.batch(5, size=12, seed=1, num_ranks=5)


def test_one_folder_gives_the_windows_that_it_always_gave(three):
    """Recorded before there were mixtures: a seed keeps its windows."""
    data = TrainingData.open([three[1]], window_frames=4)
    assert isinstance(data.windows, Windows)
    firsts = data.windows.batch(2, size=8, seed=5).codes_Bthw[:, 0, 0, 0] - 16
    named = data.windows.origins(2, size=8, seed=5)
    assert named == [
        ("e2", 4), ("e3", 12), ("e0", 11), ("e0", 2), ("e10", 2), ("e4", 8), ("e5", 1), ("e3", 5)
    ]  # fmt: skip
    assert [first for _, first in named] == firsts.tolist()


def test_without_weights_latent_frames_weigh_alike_wherever_they_are(three):
    frames = (9 + 8, 12 * 16, 2 + 3)  # the last episode is held out
    assert weights_of(three, None) == frames
    drawn = sets_of(mix(three, weights_of(three, None)).batch(0, size=3000, seed=0))
    shares = np.bincount(drawn, minlength=3) / 3000
    assert shares == pytest.approx(np.array(frames) / sum(frames), abs=0.03)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((1, 2), "weights: 2 for 3 folders of shards"),
        ((1, 2, 3, 4), "weights: 4 for 3 folders of shards"),
        ((1, 0, 2), r"weights: 0 for .*s1, must be more than 0"),
        ((1, 2, -1.5), r"weights: -1.5 for .*s2"),
        ((float("nan"), 2, 1), r"weights: nan for .*s0"),
        ((1, 2, float("inf")), r"weights: inf for .*s2"),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_the_folder(three, weights, message):
    with pytest.raises(ConfigError, match=message):
        weights_of(three, weights)


def rewrite(folder, **changes):
    """Write a data set like the others but for some parts of its manifest."""
    parts = {
        "tokenizer": tokenizer_spec(code_spec(vocab_size=64)),
        "actions": STEER,
        "codebook_VZ": np.random.default_rng(7).normal(size=(64, 4)).astype("f4"),
        "fps": 8.75,
        "frame_skip": 4,
        **changes,
    }
    folder.mkdir()
    write_manifest(folder, [], metrics={}, source={}, **parts)
    return TokenShards(folder)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"actions": KEYS}, ["actions.kind ('keys' against 'discrete')", "actions.names"]),
        (
            {"actions": ActionSpec.discrete(["stay", "up", "down", "right", "left"])},
            ["actions.names"],
        ),
        ({"fps": 30.0}, ["fps (30.0 against 8.75)"]),
        ({"frame_skip": 1}, ["frame_skip (1 against 4)"]),
        (
            {"tokenizer": replace(tokenizer_spec(code_spec(vocab_size=64)), fingerprint="f" * 64)},
            ["fingerprint"],
        ),
        (
            {
                "tokenizer": tokenizer_spec(code_spec(vocab_size=64, height=4)),
            },
            ["codes.grid_height (4 against 3)", "height"],
        ),
        (
            {"codebook_VZ": np.zeros((64, 4), np.float32)},
            ["another codebook"],
        ),
    ],
)
def test_data_sets_that_differ_are_refused_with_every_field_and_both_folders(
    three, tmp_path, changes, named
):
    other = rewrite(tmp_path / "other", **changes)
    with pytest.raises(MismatchError) as refused:
        check_alike([three[0], three[1], other])
    for words in (str(three[0].folder), str(other.folder), *named):
        assert words in str(refused.value)
    with pytest.raises(MismatchError, match=re.escape(str(other.folder))):
        train([three[0].folder, other.folder], tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def walks(tmp_path_factory):
    """Two folders of walks of the same world."""
    folder = tmp_path_factory.mktemp("walks")
    mover = Mover(STEER)
    mover.write(folder / "long", episodes=6, num_frames=12)
    mover.write(folder / "short", episodes=9, num_frames=(3, 7))
    return [folder / "long", folder / "short"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, walks):
    """Six updates on both, checkpoints after the third and the sixth; do not change it."""
    torch.set_num_threads(1)
    run = tmp_path_factory.mktemp("finished") / "run"
    train(walks, run, weights=(1, 3))
    return run


def test_resuming_a_mixture_changes_nothing_to_the_last_bit(finished, walks, tmp_path):
    run = rewind(finished, tmp_path / "run")
    train(walks, run, weights=(1, 3))
    assert "from update 3" in (run / "log.txt").read_text()
    assert_equal_runs(finished, run)


def test_every_data_set_is_validated_on_its_own_held_out_episodes_and_together(finished):
    row = next(row for row in read_metrics(finished) if "validation_loss" in row)
    for name in ("validation_loss", "validation_accuracy"):
        one, other = row[f"{name}_set0"], row[f"{name}_set1"]
        assert one != other
        assert row[name] == pytest.approx((one + 3 * other) / 4)


def test_a_run_goes_on_only_with_the_same_folders_in_the_same_order_and_weights(
    finished, walks, tmp_path
):
    run = rewind(finished, tmp_path / "run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for folders, weights, differ in (
        (walks, (1, 2), r"weights \[1.0, 3.0\] then, \[1.0, 2.0\] now"),
        (walks[::-1], (1, 3), "shards "),
        (walks[:1], None, "shards "),
    ):
        with pytest.raises(MismatchError, match=differ):
            train(folders, run, weights=weights)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
