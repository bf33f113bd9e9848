"""Promises of level_head.py and of levels everywhere: each sees those below it and no other."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from dynamics.toys import (
    TRAINING,
    Dice,
    code_spec,
    codebook_VZ,
    make_model,
    random_codes,
    random_slots,
    tiny,
    train,
)
from worldloom.common import CodeSpec, FormatError, ShapeError, stream
from worldloom.dynamics import (
    DynamicsModel,
    Rollout,
    SamplingConfig,
    WindowBatch,
    Windows,
    cross_entropy,
    generate_codes,
    validate,
)
from worldloom.dynamics.disturbance import corrupt, disturb
from worldloom.dynamics.losses import num_right
from worldloom.dynamics.sampling import keyed_gumbel
from worldloom.dynamics.sequence import flatten_codes, unflatten_codes

ORDERS = ("raster", "row", "frame", "masked")
THREE = code_spec(num_levels=3)


def test_a_level_sees_the_levels_below_it_in_its_cell_and_not_itself_nor_those_above():
    model = make_model(THREE, order="frame")  # no cell sees another of its frame
    codes_BthwQ, slots_BTA = random_codes(model, 4), random_slots(model, 4)
    before = model(codes_BthwQ, slots_BTA)
    for level in range(3):
        edited = codes_BthwQ.clone()
        edited[:, 2, 1, 3, level] = (edited[:, 2, 1, 3, level] + 1) % 32
        differs_fSQ = (before != model(edited, slots_BTA)).any(-1).all(0)
        own_S = torch.arange(12) == 7
        for other in range(3):
            assert differs_fSQ[1, :, other].tolist() == (own_S & (other > level)).tolist()
        assert not differs_fSQ[0].any()
        assert differs_fSQ[2].all()  # every code of the frame after it knows


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("level", [1, 2])
def test_changing_a_later_level_leaves_the_cells_level_0_bit_identical_and_changes_what_follows(
    order, level
):
    model = make_model(THREE, order=order)
    codes_BthwQ, slots_BTA = random_codes(model, 4), random_slots(model, 4)
    before = model(codes_BthwQ, slots_BTA)
    for cell in range(12):
        edited = codes_BthwQ.clone()
        edited[:, 2].flatten(1, 2)[:, cell, level] += 1
        after = model(edited % 32, slots_BTA)
        same_SQ = (before == after).all(-1).all(0)[1]
        start = cell // model.grid.group * model.grid.group
        follows_S = torch.arange(12) >= start + model.grid.group
        # Of the cells that follow in its frame, and of no other, level 0 differs.
        assert torch.equal(before[:, 1, ~follows_S, 0], after[:, 1, ~follows_S, 0])
        assert not same_SQ[follows_S].any()
        assert torch.equal(before[:, 0], after[:, 0])


def test_level_0_is_what_it_is_in_a_model_of_one_level():
    """Its logits come from the token alone; the later levels only add theirs."""
    model = make_model(THREE)
    codes_BthwQ, slots_BTA = random_codes(model, 3), random_slots(model, 3)
    before = model(codes_BthwQ, slots_BTA)
    with torch.no_grad():
        for parameter in model.level_head.parameters():
            parameter.add_(1)
    after = model(codes_BthwQ, slots_BTA)
    assert torch.equal(before[..., 0, :], after[..., 0, :])
    assert not torch.equal(before[..., 1, :], after[..., 1, :])
    assert make_model().level_head is None


def test_every_level_has_parameters_that_learn():
    model = make_model(THREE, order="raster").train().requires_grad_()
    codes_BthwQ, slots_BTA = random_codes(model, 3), random_slots(model, 3)
    batch = WindowBatch(codes_BthwQ, slots_BTA, torch.ones(2, 3, dtype=torch.bool))
    cross_entropy(model(codes_BthwQ, slots_BTA), batch)[0].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_a_fresh_model_has_no_opinion_at_any_level():
    model = DynamicsModel(tiny(), make_model(THREE).spec, codebook_VZ(THREE))
    codes_BthwQ, slots_BTA = random_codes(model, 3), random_slots(model, 3)
    probs = model(codes_BthwQ, slots_BTA).softmax(-1)
    assert (probs.amax((0, 1, 2, 4)) < 0.08).all()  # 1/32 is 0.03


def test_the_codes_that_are_fed_are_the_disturbed_ones_but_below_a_level_the_true_ones():
    """What the next level holds is the rest of the true code, never of a wrong one."""
    model = make_model(THREE, order="raster")
    codes, other = random_codes(model, 4), random_codes(model, 4, seed=1)
    slots_BTA = random_slots(model, 4)
    fed = model(codes, slots_BTA, inputs_Bthw=other)
    assert torch.equal(fed[..., 0, :], model(other, slots_BTA)[..., 0, :])
    half = other.clone()
    half[..., 0] = codes[..., 0]
    assert torch.equal(fed[..., 1, :], model(half, slots_BTA, inputs_Bthw=other)[..., 1, :])
    assert not torch.equal(fed[..., 1, :], model(other, slots_BTA)[..., 1, :])


def test_a_step_draws_each_level_given_those_below_it_with_noise_of_its_own():
    """By hand: level after level from the full forward, one cell after the other."""
    model = make_model(THREE, order="row")
    sampling = SamplingConfig(temperature=1.0, min_p=0.0)
    prompt, slots_BTA = random_codes(model, 2), random_slots(model, 3)
    drawn = generate_codes(model, prompt, slots_BTA, seeds=[5, 6], sampling=sampling)
    by_hand = torch.cat([prompt, torch.zeros_like(prompt[:, :1])], dim=1)
    for row in range(3):
        for level in range(3):
            logits_BwV = model(by_hand, slots_BTA)[:, 1, 4 * row : 4 * row + 4, level]
            cells = slice(4 * row, 4 * row + 4)
            noise = keyed_gumbel(torch.tensor([5, 6]), 2, cells, 32, level=level)
            by_hand[:, 2, row, :, level] = (logits_BwV + noise).argmax(-1)
    assert torch.equal(drawn, by_hand)


def test_frame_after_frame_every_level_goes_its_own_way():
    model = make_model(THREE)
    rollout = Rollout(
        model, random_codes(model, 1), random_slots(model, 1), seeds=[0, 1],
        sampling=SamplingConfig(temperature=2.0, min_p=0.0),
    )  # fmt: skip
    frames = torch.stack([rollout.step(random_slots(model, 2, seed=i)) for i in range(20)])
    assert frames.shape == (20, 2, 3, 4, 3)
    assert frames.flatten(0, 3).unique(dim=0).shape[0] > 400


@pytest.mark.parametrize("codes", [code_spec(), THREE])
def test_flattening_codes_is_undone_by_unflattening_them(codes: CodeSpec):
    codes_Bthw = torch.arange(2 * 5 * 12 * codes.num_levels)
    codes_Bthw = codes_Bthw.reshape(2, *codes.codes_shape(5))
    flat = flatten_codes("codes", codes_Bthw, codes)
    assert flat.shape == (2, 5, 12, codes.num_levels)
    again = torch.stack([unflatten_codes(flat[:, frame], codes) for frame in range(5)], dim=1)
    assert torch.equal(again, codes_Bthw)


BAD_PROMPTS = {
    "one level": ((1, 2, 3, 4), 0, ShapeError, "4 axes, must be 5"),
    "three levels": ((1, 2, 3, 4, 3), 0, ShapeError, "Q is 3, must be 2"),
    "another grid": ((1, 2, 4, 3, 2), 0, ShapeError, "h is 4, must be 3"),
    "a code too high": ((1, 2, 3, 4, 2), 32, FormatError, r"level 1 in \[0, 32\], .* \[0, 32\)"),
    "a negative code": ((1, 2, 3, 4, 2), -1, FormatError, r"level 1 in \[-1, 0\], .* \[0, 32\)"),
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_a_prompt_of_other_levels_or_with_a_code_that_is_none_is_refused(name):
    shape, bad, error, match = BAD_PROMPTS[name]
    model = make_model(code_spec(num_levels=2))
    prompt = torch.zeros(shape, dtype=torch.int64)
    prompt.flatten()[-1] = bad
    slots_BTA = random_slots(model, 2, batch=1)
    with pytest.raises(error, match=f"prompt: .*{match}"):
        Rollout(model, prompt, slots_BTA, seeds=[0], sampling=SamplingConfig())
    with pytest.raises(error, match=f"prompt: .*{match}"):
        generate_codes(model, prompt, slots_BTA, seeds=[0], sampling=SamplingConfig())


def test_a_model_of_levels_refuses_codes_without_them_and_the_other_way_round():
    for num_levels, other in ((1, 2), (2, 1), (2, 3)):
        model, stranger = (make_model(code_spec(num_levels=q)) for q in (num_levels, other))
        with pytest.raises(ShapeError, match="codes: expected"):
            model(random_codes(stranger, 3), random_slots(model, 3))
        with pytest.raises(ShapeError, match="inputs: expected"):
            model(
                random_codes(model, 3),
                random_slots(model, 3),
                inputs_Bthw=random_codes(stranger, 3),
            )


def padded_batch():
    model = make_model(THREE)
    codes, slots_BTA = random_codes(model, 5, batch=3), random_slots(model, 5, batch=3)
    valid_Bt = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [True] * 2 + [False] * 3])
    return model, WindowBatch(codes, slots_BTA, valid_Bt)


def test_the_loss_is_the_mean_over_the_levels_of_the_real_frames():
    model, batch = padded_batch()
    logits = model(batch.codes_Bthw, batch.slots_BTA)
    nats, count = cross_entropy(logits, batch)
    each, right = [], 0
    for level in range(3):
        part = replace(batch, codes_Bthw=batch.codes_Bthw[..., level])
        level_nats, level_count = cross_entropy(logits[..., level, :], part)
        each.append(level_nats / level_count)
        right += num_right(logits[..., level, :], part)
    assert count == (4 + 2 + 1) * 12 * 3
    assert (nats / count).item() == pytest.approx(torch.stack(each).mean().item(), rel=1e-6)
    assert num_right(logits, batch) == right
    changed = batch.codes_Bthw.clone()
    changed[1, 3:], changed[2, 2:] = 0, 0
    assert cross_entropy(logits, replace(batch, codes_Bthw=changed))[0] == nats


def test_corruption_replaces_each_level_by_itself_and_the_same_share_of_each():
    rngs = [stream(0, "test", row) for row in range(400)]
    codes = torch.zeros(400, 9, 3, 4, 2, dtype=torch.int64)
    wrong = (corrupt(codes, 0.5, 1000, rngs) != 0).float()
    share_tQ = wrong.mean((0, 2, 3))
    assert not share_tQ[0].any()
    assert share_tQ[-1].tolist() == pytest.approx([0.25, 0.25], abs=0.03)
    assert (wrong[..., 0] != wrong[..., 1]).any()
    both = (wrong[:, -1, ..., 0] * wrong[:, -1, ..., 1]).mean().item()
    assert both == pytest.approx(0.25 / 3, abs=0.02)  # the mean of the square of a rate in [0, .5)


def test_a_row_with_levels_is_disturbed_alike_in_whichever_process_it_is():
    _, batch = padded_batch()
    training = replace(TRAINING, corruption=0.9)
    whole = disturb(batch, training, vocab_size=32, step=4, rows=[0, 1, 2])
    assert not torch.equal(whole.codes_Bthw, batch.codes_Bthw)
    alone = disturb(batch.rows(slice(2, 3)), training, vocab_size=32, step=4, rows=[2])
    assert torch.equal(alone.codes_Bthw[0], whole.codes_Bthw[2])


def test_windows_have_the_levels_of_the_shards(tmp_path):
    world = Dice()
    shards = world.write(tmp_path / "shards", episodes=6, num_frames=5)
    batch = Windows(shards, "train", window_frames=8).batch(0, size=4, seed=0)
    assert batch.codes_Bthw.shape == (4, 8, 2, 3, 2)
    for codes_thwQ, slots_TA in zip(batch.codes_Bthw.numpy(), batch.slots_BTA.numpy(), strict=True):
        wanted = world.later_levels(codes_thwQ[:5, ..., 0], slots_TA[:4])
        assert np.array_equal(codes_thwQ[1:5], wanted[1:])
        assert not codes_thwQ[5:].any()  # padding


def test_validation_tells_every_level_and_their_mean(tmp_path):
    shards = Dice().write(tmp_path / "shards", episodes=4, num_frames=8)
    model = make_model(shards.codes)
    windows = Windows(shards, "validation", window_frames=5)
    one, two = (
        validate(model, windows, seed=0, num_windows=12, batch_windows=batch) for batch in (5, 12)
    )
    assert one == pytest.approx(two, rel=1e-5)
    assert one.keys() == {
        "validation_loss", "validation_accuracy", "validation_loss_0", "validation_accuracy_0",
        "validation_loss_1", "validation_accuracy_1", "free_running_accuracy", "copy_accuracy",
    }  # fmt: skip
    for name in ("validation_loss", "validation_accuracy"):
        assert one[name] == pytest.approx((one[name + "_0"] + one[name + "_1"]) / 2, rel=1e-6)


def test_free_running_accuracy_counts_codes_and_not_cells(tmp_path):
    """Copying is right in as many codes as stay, whether or not the others of their cells do."""
    shards = Dice().write(tmp_path / "shards", episodes=4, num_frames=8)
    windows = Windows(shards, "validation", window_frames=5)
    codes = windows.batch(0, size=12, seed=0).codes_Bthw
    stays = (codes[:, 2] == codes[:, 1]).float()
    scores = validate(make_model(shards.codes), windows, seed=0, num_windows=12)
    assert scores["copy_accuracy"] == pytest.approx(stays.mean().item())
    assert scores["copy_accuracy"] > stays.all(-1).float().mean().item()


class Learned(Exception):  # noqa: N818 (no error: how a training is left early)
    """Every later level of every cell is right."""


@pytest.mark.slow
@pytest.mark.parametrize("order", ["frame", "row"])
@pytest.mark.parametrize("num_levels", [2, 3])
def test_a_second_level_that_follows_from_the_first_and_the_action_is_right_within_600_updates(
    num_levels, order, tmp_path
):
    """Level 0 is thrown, so nothing but the drawn code itself can tell what level 1 must be."""
    world = Dice(num_levels)
    games = [world.episode(9, 1000 + number) for number in range(16)]
    prompt = torch.from_numpy(np.stack([codes for codes, _ in games]))[:, :1]
    slots_BTA = torch.from_numpy(np.stack([slots for _, slots in games]))

    def on_validation(model: DynamicsModel, _step: int) -> None:
        made = generate_codes(
            model, prompt, slots_BTA, seeds=range(16), sampling=SamplingConfig(temperature=1.0)
        ).numpy()[:, 1:]
        wanted = [
            world.later_levels(np.concatenate([codes[:1], codes])[..., 0], slots)[1:]
            for codes, slots in zip(made, slots_BTA.numpy(), strict=True)
        ]
        dice_differ = len(np.unique(made[..., 0])) == 6
        if dice_differ and np.array_equal(made, np.stack(wanted)):
            raise Learned

    with pytest.raises(Learned):
        train(
            # So many throws that they cannot be learned by heart, which would confuse the rest.
            world.write(tmp_path / "shards", episodes=400, num_frames=16).folder,
            tmp_path / "run",
            model=tiny(order=order),
            on_validation=on_validation,
            num_steps=600,
            batch_windows=32,
            window_frames=6,
            optimizer="adamw",  # adding modulo six, Muon stays long sure of parity alone
            learning_rate=1e-2,
            warmup_steps=20,
            corruption=0.0,
            action_dropout=0.0,
            validate_every=100,
            checkpoint_every=600,
            log_every=100,
        )
