"""Promises of losses.py, disturbance.py and validation.py: what is asked, fed and measured."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from dynamics.toys import KEYS, STEER, TRAINING, Mover, make_model, random_codes, random_slots
from worldloom.common import ConfigError, stream
from worldloom.dynamics import (
    NULL,
    DynamicsTrainingConfig,
    SamplingConfig,
    WindowBatch,
    Windows,
    cross_entropy,
    generate_codes,
    validate,
)
from worldloom.dynamics.disturbance import corrupt, disturb, drop_actions
from worldloom.dynamics.losses import num_right


def padded_batch():
    model = make_model()
    codes_Bthw, slots_BTA = random_codes(model, 5, batch=3), random_slots(model, 5, batch=3)
    valid_Bt = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [True] * 2 + [False] * 3])
    return model, WindowBatch(codes_Bthw, slots_BTA, valid_Bt)


def rngs(number, *purpose):
    return [stream(0, "test", *purpose, row) for row in range(number)]


def test_cross_entropy_is_the_sum_over_the_codes_of_real_frames():
    model, batch = padded_batch()
    logits_BfSV = model(batch.codes_Bthw, batch.slots_BTA)
    nats, count = cross_entropy(logits_BfSV, batch)
    expected, right, codes = 0.0, 0, 0
    for row, frames in enumerate([5, 3, 2]):
        for frame in range(1, frames):
            logits_SV = logits_BfSV[row, frame - 1]
            true_S = batch.codes_Bthw[row, frame].flatten()
            expected -= logits_SV.log_softmax(-1)[torch.arange(12), true_S].sum().item()
            right += (logits_SV.argmax(-1) == true_S).sum().item()
            codes += 12
    assert nats.item() == pytest.approx(expected, rel=1e-5)
    assert (num_right(logits_BfSV, batch).item(), count) == (right, codes)


def test_the_loss_of_bfloat16_logits_is_taken_in_float32():
    model, batch = padded_batch()
    logits_BfSV = model(batch.codes_Bthw, batch.slots_BTA).bfloat16()
    nats, _ = cross_entropy(logits_BfSV, batch)
    assert nats.dtype == torch.float32
    assert nats == cross_entropy(logits_BfSV.float(), batch)[0]


def test_actions_are_dropped_window_by_window_and_never_in_part():
    slots_BTA = torch.ones(400, 6, 2, dtype=torch.int64)
    dropped_BTA = drop_actions(slots_BTA, 0.25, rngs(400))
    null_B = (dropped_BTA == NULL).flatten(1).all(1)
    kept_B = (dropped_BTA == 1).flatten(1).all(1)
    assert (null_B ^ kept_B).all()
    assert 70 < null_B.sum() < 130
    assert torch.equal(drop_actions(slots_BTA, 0.0, rngs(400)), slots_BTA)


def test_corruption_grows_from_nothing_along_the_window_and_differs_from_window_to_window():
    codes_Bthw = torch.zeros(400, 9, 3, 4, dtype=torch.int64)
    wrong = (corrupt(codes_Bthw, 0.5, 1000, rngs(400)) != 0).float()
    share_t = wrong.mean((0, 2, 3))
    assert share_t[0] == 0
    assert (share_t[1:] > share_t[:-1]).all()
    assert share_t[-1].item() == pytest.approx(0.25, abs=0.03)  # rates are drawn from [0, 0.5)
    rates_B = wrong[:, -1].mean((1, 2))
    assert rates_B.min() < 0.1
    assert rates_B.max() > 0.4
    assert torch.equal(corrupt(codes_Bthw, 0.0, 1000, rngs(400)), codes_Bthw)
    assert not codes_Bthw.any()  # the truth stays what it is


def test_a_row_is_disturbed_alike_in_whichever_process_it_is():
    _, batch = padded_batch()
    training = replace(TRAINING, corruption=0.9, action_dropout=0.5)

    def fed(rows, step):
        part = WindowBatch(
            batch.codes_Bthw[list(rows)], batch.slots_BTA[list(rows)], batch.valid_Bt[list(rows)]
        )
        return disturb(part, training, vocab_size=32, step=step, rows=rows)

    whole = fed([0, 1, 2], 4)
    for row in range(3):
        alone = fed([row], 4)
        assert torch.equal(alone.codes_Bthw[0], whole.codes_Bthw[row])
        assert torch.equal(alone.slots_BTA[0], whole.slots_BTA[row])
    assert torch.equal(fed([0, 1, 2], 4).codes_Bthw, whole.codes_Bthw)
    assert not torch.equal(fed([0, 1, 2], 5).codes_Bthw, whole.codes_Bthw)
    assert torch.equal(whole.valid_Bt, batch.valid_Bt)


def test_validation_scores_do_not_depend_on_how_many_windows_are_looked_at_at_once(mover_shards):
    codes = mover_shards.codes
    model = make_model(codes)
    windows = Windows(mover_shards, "validation", window_frames=5)
    scores = [
        validate(model, windows, seed=3, num_windows=20, batch_windows=batch)
        for batch in (1, 7, 20)
    ]
    for other in scores[1:]:
        assert other == pytest.approx(scores[0], rel=1e-5)
    assert scores[0].keys() == {
        "validation_loss", "validation_accuracy", "free_running_accuracy", "copy_accuracy"
    }  # fmt: skip


def test_copying_scores_what_repeating_the_last_frame_is_worth(mover_shards):
    windows = Windows(mover_shards, "validation", window_frames=5)
    batch = windows.batch(0, size=20, seed=3)
    same = (batch.codes_Bthw[:, 2] == batch.codes_Bthw[:, 1]).float().mean().item()
    scores = validate(make_model(mover_shards.codes), windows, seed=3, num_windows=20)
    assert scores["copy_accuracy"] == pytest.approx(same)


@pytest.mark.parametrize("batch_windows", [3, 20])
def test_the_first_quarter_of_the_windows_is_rolled_out_to_the_eighth_frame(
    tmp_path, batch_windows
):
    """Compared with rollouts of the windows one by one; some end before their eighth frame."""
    shards = Mover(STEER).write(tmp_path / "shards", episodes=24, num_frames=(12, 20))
    model = make_model(shards.codes)
    windows = Windows(shards, "validation", window_frames=16)
    scores = validate(model, windows, seed=3, num_windows=20, batch_windows=batch_windows)
    batch = windows.batch(0, size=20, seed=3)
    right: dict[str, list[float]] = {"": [], "_at_4": [], "_at_8": []}
    copied: dict[str, list[float]] = {"": [], "_at_4": [], "_at_8": []}
    for number in range(20):
        codes_1thw = batch.codes_Bthw[number : number + 1]
        made_1thw = generate_codes(
            model, codes_1thw[:, :8], batch.slots_BTA[number : number + 1], seeds=[number],
            sampling=SamplingConfig(),
        )  # fmt: skip
        for which, frame in (("", 8), ("_at_4", 11), ("_at_8", 15)):
            judged = batch.valid_Bt[number, frame] and (which == "" or number < 5)
            if judged:
                true_hw = codes_1thw[0, frame]
                right[which].append((made_1thw[0, frame] == true_hw).float().mean().item())
                copied[which].append((codes_1thw[0, 7] == true_hw).float().mean().item())
    assert len(right[""]) == 20
    assert 0 < len(right["_at_8"]) < len(right["_at_4"]) == 5
    for which in right:
        assert scores["free_running_accuracy" + which] == pytest.approx(np.mean(right[which]))
        assert scores["copy_accuracy" + which] == pytest.approx(np.mean(copied[which]))


def test_windows_shorter_than_their_prompt_are_not_rolled_out_of(tmp_path):
    shards = Mover(KEYS).write(tmp_path / "shards", episodes=3, num_frames=3)
    model = make_model(shards.codes, KEYS)
    scores = validate(model, Windows(shards, "validation", window_frames=8), seed=0, num_windows=4)
    assert scores.keys() == {"validation_loss", "validation_accuracy"}


@pytest.mark.parametrize(
    "setting",
    [
        {"num_steps": 0}, {"batch_windows": 0}, {"window_frames": 1}, {"validate_every": 0},
        {"checkpoint_every": 0}, {"log_every": -1}, {"warmup_steps": -1}, {"corruption": 1.1},
        {"action_dropout": -0.1}, {"learning_rate": float("nan")}, {"weight_decay": -1.0},
    ],
)  # fmt: skip
def test_a_training_that_would_do_nothing_or_worse_is_refused(setting):
    with pytest.raises(ConfigError, match=f"training: {next(iter(setting))} is"):
        DynamicsTrainingConfig(**setting)
