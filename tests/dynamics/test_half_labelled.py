"""Promises about data of which a part has no known actions: null is fed, no no-op is invented."""

import numpy as np
import pytest
import torch
from dynamics.test_training import assert_equal_runs, rewind
from dynamics.toys import KEYS, STEER, Mover, make_model, tiny, train, write_shards
from shard_forging import change_manifest
from worldloom.common import ActionSpec, MismatchError, TokenShards, read_metrics
from worldloom.dynamics import (
    NULL,
    DynamicsModel,
    DynamicsSpec,
    StreamConfig,
    Windows,
    WindowStream,
    check_alike,
    open_held_out,
    validate,
)
from worldloom.dynamics.loading import TrainingData
from worldloom.dynamics.losses import cross_entropy
from worldloom.dynamics.validation import validate_all

LENGTHS = (9, 6, 12, 3, 8, 2, 10, 7)
SILENT = (1, 2, 3, 6)
"""Episodes of which nobody knows the actions; the last two are held out."""


def half(folder, actions=STEER, *, lengths=LENGTHS, silent=SILENT, held_out=2) -> TokenShards:
    """Walks of one world; codes of every cell but the lit one are 0."""
    mover = Mover(actions)
    walks = [mover.episode(frames, seed) for seed, frames in enumerate(lengths)]
    told = [
        (codes, None if number in silent else slots) for number, (codes, slots) in enumerate(walks)
    ]
    return write_shards(folder, told, mover.codes, actions, held_out=held_out, per_shard=3)


def silent_video(folder, *, seed=100) -> TokenShards:
    """Walks of the same world, as video without actions."""
    mover = Mover(STEER)
    walks = [mover.episode(8, seed + number) for number in range(4)]
    told = [(codes, np.zeros((len(slots), 0), np.int64)) for codes, slots in walks]
    return write_shards(folder, told, mover.codes, ActionSpec.none())


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> TokenShards:
    return half(tmp_path_factory.mktemp("half") / "shards")


def sources_of(shards):
    """The windows of a folder, mapped and streamed, for training and held out."""
    stream = StreamConfig(url=f"{shards.folder}/{{file}}", lanes=2, buffer_windows=6)
    there = TokenShards(shards.folder, tars_elsewhere=True)
    return {
        "mapped": Windows(shards, "train", window_frames=4),
        "streamed": WindowStream(there, "train", window_frames=4, stream=stream),
        "held out": open_held_out(shards, window_frames=4),
        "held out, streamed": open_held_out(there, window_frames=4, stream=stream),
    }


@pytest.mark.parametrize("how", ["mapped", "streamed", "held out", "held out, streamed"])
@pytest.mark.parametrize("actions", [STEER, KEYS])
def test_a_window_has_the_known_actions_or_null_in_every_slot(tmp_path, actions, how):
    shards = half(tmp_path / "shards", actions)
    source = sources_of(shards)[how]
    by_key = {row.key: index for index, row in enumerate(shards.episodes)}
    seen = set()
    for number in range(4):
        batch = source.batch(number, size=16, seed=1)
        places = source.origins(number, size=16, seed=1)
        for slots_TA, valid_t, (key, first) in zip(
            batch.slots_BTA, batch.valid_Bt, places, strict=True
        ):
            episode = by_key[key]
            seen.add(shards.episodes[episode].labelled)
            steps = int(valid_t.sum()) - 1
            wanted = torch.full_like(slots_TA, NULL)
            if shards.episodes[episode].labelled:
                wanted[:steps] = torch.from_numpy(shards.slots_TA(episode, first, first + steps))
            assert torch.equal(slots_TA, wanted)
    assert seen == {True, False}


def test_windows_without_known_actions_teach_no_action_and_least_of_all_the_no_op(shards):
    model = make_model(shards.codes).requires_grad_(requires_grad=True)
    batch = Windows(shards, "train", window_frames=4).batch(0, size=32, seed=0)
    unknown_B = (batch.slots_BTA == NULL).all(2).all(1)
    for rows, taught in ((unknown_B, False), (~unknown_B, True)):
        part = batch.rows(rows.nonzero()[:, 0])
        model.zero_grad()
        nats, _ = cross_entropy(model(part.codes_Bthw, part.slots_BTA), part)
        nats.backward()
        table_VD = model.actions.table.weight.grad
        # Row 0 is null.
        assert bool(table_VD[0].abs().max() > 0) != taught
        assert bool(table_VD[1:].abs().max() > 0) == taught


def test_only_known_actions_are_labels_of_the_action_head(shards):
    model = make_model(shards.codes, action_head=True)
    batch = Windows(shards, "train", window_frames=4).batch(0, size=32, seed=0)
    slots_BfrA = batch.slots_BTA[:, :, None]
    labels = int(model.action_head.num_labels(slots_BfrA, batch.valid_Bt[:, 1:]))
    assert labels == int((batch.slots_BTA != NULL).all(2).sum())
    assert 0 < labels < int(batch.valid_Bt[:, 1:].sum())


# Folders without actions beside folders that have some


def test_video_without_actions_goes_together_with_one_kind_of_them(tmp_path, shards):
    video = silent_video(tmp_path / "video")
    for folders in ([video, shards], [shards, video], [video, shards, video]):
        check_alike(folders)
        assert DynamicsSpec.of(*folders).actions == STEER
    data = TrainingData.open([video, shards], window_frames=4, weights=(1, 1))
    model = make_model(shards.codes)
    seen = set()
    for number in range(3):
        batch = data.windows.batch(number, size=16, seed=0)
        named = data.windows.origins(number, size=16, seed=0)
        for slots_TA, (where, _) in zip(batch.slots_BTA, named, strict=True):
            if where.startswith(str(video.folder)):
                assert (slots_TA == NULL).all()
                seen.add("video")
            elif (slots_TA != NULL).any():
                seen.add("actions")
        assert model(batch.codes_Bthw, batch.slots_BTA).isfinite().all()
    assert seen == {"video", "actions"}
    for held_out in data.held_out:
        assert held_out.batch(0, size=4, seed=0).slots_BTA.shape == (4, 3, 1)


def test_two_kinds_of_actions_do_not_go_together_nor_does_video_of_another_speed(tmp_path, shards):
    video = silent_video(tmp_path / "video")
    keys = half(tmp_path / "keys", KEYS)
    for folders in ([video, shards, keys], [shards, video, keys], [keys, shards]):
        with pytest.raises(MismatchError, match=r"cannot be mixed.*actions\.kind"):
            check_alike(folders)
    change_manifest(video.folder, lambda data: data.update(fps=20.0))
    with pytest.raises(MismatchError, match=r"fps \(20\.0 against 8\.75\)"):
        check_alike([shards, TokenShards(video.folder)])


# Measured


def test_a_model_is_measured_on_all_windows_and_beside_that_on_those_with_actions(shards):
    windows = Windows(shards, "validation", window_frames=5)
    model = make_model(shards.codes)
    scores = validate(model, windows, seed=0, num_windows=24)
    batch = windows.batch(0, size=24, seed=0)
    stays_B = (batch.codes_Bthw[:, 2] == batch.codes_Bthw[:, 1]).float().mean((1, 2))
    known_B = (batch.slots_BTA[:, 0] != NULL).all(-1)
    assert known_B.any()
    assert not known_B.all()
    assert scores["copy_accuracy"] == pytest.approx(stays_B.mean().item())
    assert scores["copy_accuracy_with_actions"] == pytest.approx(stays_B[known_B].mean().item())
    assert "free_running_accuracy_with_actions" in scores


def test_where_all_actions_are_known_or_none_the_numbers_are_told_once(tmp_path, mover_shards):
    video = silent_video(tmp_path / "video")
    for shards in (mover_shards, video):
        model = make_model(shards.codes, shards.actions)
        windows = Windows(shards, "validation", window_frames=4)
        scores = validate(model, windows, seed=0, num_windows=8)
        assert scores.keys() == {
            "validation_loss", "validation_accuracy", "free_running_accuracy", "copy_accuracy"
        }  # fmt: skip


def test_of_several_folders_windows_with_actions_are_those_of_all(tmp_path, mover_shards):
    model = make_model(mover_shards.codes, mover_shards.actions)
    folders = [mover_shards, silent_video(tmp_path / "video"), mover_shards]
    data = TrainingData.open(folders, window_frames=4, weights=[1, 5, 2])
    scores = validate_all(model, data, seed=0, num_windows=24)
    for name in ("free_running_accuracy", "copy_accuracy"):
        each = [scores[f"{name}_set{number}"] for number in range(3)]
        assert scores[f"{name}_with_actions"] == pytest.approx((each[0] + 2 * each[2]) / 3)
        assert scores[name] == pytest.approx((each[0] + 5 * each[1] + 2 * each[2]) / 8)
    alike = TrainingData.open([mover_shards, mover_shards], window_frames=4, weights=[1, 2])
    told = validate_all(model, alike, seed=0, num_windows=8)
    assert not any("with_actions" in name for name in told)


def test_an_action_head_is_judged_by_the_actions_that_are_known(shards):
    model = make_model(shards.codes, action_head=True)
    windows = Windows(shards, "validation", window_frames=5)
    scores = validate(model, windows, seed=0, num_windows=24)
    batch = windows.batch(0, size=24, seed=0)
    tokens_BfSD = model.tokens(batch.codes_Bthw, batch.slots_BTA)
    codes_BtSQ = batch.codes_Bthw.flatten(2)[..., None]
    slots_BfrA = batch.slots_BTA[:, :, None]
    logits_BfLX = model.action_head(tokens_BfSD, codes_BtSQ, slots_BfrA)
    nats, count, right = model.action_head.nats(logits_BfLX, slots_BfrA, batch.valid_Bt[:, 1:])
    assert scores["validation_action_loss"] == pytest.approx(float(nats / count), rel=1e-4)
    assert scores["validation_action_accuracy"] == pytest.approx(float(right / count))


# Trained on


def test_resuming_on_half_labelled_data_changes_nothing_to_the_last_bit(tmp_path, shards):
    finished = tmp_path / "finished"
    train(shards.folder, finished, model=tiny(action_head=True))
    run = rewind(finished, tmp_path / "run")
    train(shards.folder, run, model=tiny(action_head=True))
    assert "from update 3" in (run / "log.txt").read_text()
    assert_equal_runs(finished, run)


def test_a_folder_without_actions_may_stand_first_and_the_model_knows_the_others(tmp_path, shards):
    video = silent_video(tmp_path / "video")
    model = train([video.folder, shards.folder], tmp_path / "run")
    assert DynamicsModel.from_pretrained(model).spec.actions == STEER
    row = next(row for row in read_metrics(tmp_path / "run") if "validation_loss" in row)
    assert {"validation_loss_set0", "validation_loss_set1"} <= row.keys()


@pytest.mark.slow
def test_what_actions_do_is_learned_from_the_episodes_that_have_some(tmp_path):
    """Two of three walks have none; a rollout under true actions is then right in every cell."""
    # Of 48 walks, 14 that it learns from have actions, and some moves are met too seldom.
    silent = tuple(number for number in range(120) if number % 3)
    shards = half(tmp_path / "shards", lengths=(12,) * 120, silent=silent, held_out=8)
    model = train(
        shards.folder,
        tmp_path / "run",
        model=tiny(context_frames=6),
        num_steps=600,  # with 400 it depended on how a processor rounds
        batch_windows=32,
        window_frames=8,
        learning_rate=5e-3,
        corruption=0.0,
        validate_every=600,
        checkpoint_every=600,
    )
    windows = Windows(shards, "validation", window_frames=6)
    scores = validate(DynamicsModel.from_pretrained(model), windows, seed=1, num_windows=64)
    assert scores["free_running_accuracy_with_actions"] > 0.999
    # Without them it knows that the cell moves, but not where to.
    assert scores["free_running_accuracy"] < scores["free_running_accuracy_with_actions"] - 0.02
