"""Promises of guidance: the equations hold, the cache says what the full forward says, it helps."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from dynamics.toys import (
    ACTIONS,
    KEYS,
    OPTIONS,
    STEER,
    Mover,
    code_spec,
    make_model,
    random_codes,
    random_slots,
    tiny,
    train,
)
from hypothesis import given
from hypothesis import strategies as st
from worldloom.common import ConfigError
from worldloom.dynamics import NULL, DynamicsModel, Rollout, SamplingConfig, generate_codes
from worldloom.dynamics.guidance import guide
from worldloom.dynamics.sequence import flatten_codes

ORDERS = ("raster", "row", "frame", "masked")
GREEDY = SamplingConfig(temperature=0.0, refinements=1)
seeds = st.integers(0, 2**32)
scales = st.floats(0, 10)
shares = st.floats(0, 1)


def some_logits(seed: int, *, number: int = 2) -> torch.Tensor:
    """Logits (number, B, s, V), as they come: not centred, far apart or near."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(number, 2, 3, 7, generator=generator, dtype=torch.float64)
    return logits * 10 ** torch.randn(number, 2, 3, 1, generator=generator) + 1


def reference(c: np.ndarray, n: np.ndarray, scale: float, keep: float) -> np.ndarray:
    """The equations of guidance.py for one cell, in float64."""
    c, n = c - c.mean(), n - n.mean()
    d = c - n
    p = (d @ c) / (c @ c) * c
    return c + (scale - 1) * (d - p + keep * p)


@given(seed=seeds, scale=scales, keep=shares)
def test_every_cell_is_guided_by_the_equations_and_by_itself(seed, scale, keep):
    given_BsV, free_BsV = some_logits(seed)
    guided_BsV = guide(given_BsV, free_BsV, scale=scale, parallel_keep_frac=keep)
    size = max(given_BsV.abs().max(), free_BsV.abs().max()) * (1 + scale)
    for row, cell in np.ndindex(2, 3):
        c, n = given_BsV[row, cell].numpy(), free_BsV[row, cell].numpy()
        expected_V = reference(c, n, scale, keep)
        assert np.abs(guided_BsV[row, cell].numpy() - expected_V).max() < 1e-5 * size


@given(seed=seeds, scale=scales)
def test_keeping_all_is_plain_guidance_and_scale_1_is_none(seed, scale):
    given_BsV, free_BsV = some_logits(seed).float()
    plain_BsV = free_BsV + scale * (given_BsV - free_BsV)
    guided_BsV = guide(given_BsV, free_BsV, scale=scale, parallel_keep_frac=1.0)
    same_up_to_a_constant(guided_BsV, plain_BsV)
    for keep in (0.0, 0.5, 1.0):
        unguided_BsV = guide(given_BsV, free_BsV, scale=1.0, parallel_keep_frac=keep)
        same_up_to_a_constant(unguided_BsV, given_BsV)


def same_up_to_a_constant(one_BsV: torch.Tensor, other_BsV: torch.Tensor) -> None:
    """Refuse logits that mean different probabilities."""
    apart_BsV = one_BsV - other_BsV
    apart_BsV = apart_BsV - apart_BsV.mean(-1, keepdim=True)
    assert apart_BsV.abs().max() < 1e-5 * max(1, other_BsV.abs().max())


@given(seed=seeds)
def test_keeping_nothing_moves_across_the_prediction_alone(seed):
    given_BsV, free_BsV = some_logits(seed).float()
    guided_BsV = guide(given_BsV, free_BsV, scale=3.0, parallel_keep_frac=0.0)
    prediction_BsV = given_BsV - given_BsV.mean(-1, keepdim=True)
    moved_BsV = guided_BsV - prediction_BsV
    size = (given_BsV.norm(dim=-1) + free_BsV.norm(dim=-1)) * prediction_BsV.norm(dim=-1)
    assert ((moved_BsV * prediction_BsV).sum(-1).abs() < 1e-5 * (size + 1)).all()


@given(seed=seeds, scale=scales, keep=shares)
def test_a_constant_added_to_logits_changes_nothing(seed, scale, keep):
    given_BsV, free_BsV = some_logits(seed).float()
    guided_BsV = guide(given_BsV, free_BsV, scale=scale, parallel_keep_frac=keep)
    shifted_BsV = guide(given_BsV + 3, free_BsV - 2, scale=scale, parallel_keep_frac=keep)
    size = (given_BsV.abs().max() + free_BsV.abs().max() + 5) * (1 + scale)
    assert (guided_BsV - shifted_BsV).abs().max() < 1e-5 * size


def test_a_prediction_that_knows_nothing_is_guided_to_finite_logits():
    nothing_BsV = torch.full((1, 1, 5), 2.0)
    free_BsV = torch.arange(5.0).expand(1, 1, 5)
    guided_BsV = guide(nothing_BsV, free_BsV, scale=2.0, parallel_keep_frac=0.0)
    assert torch.equal(guided_BsV, 2 - free_BsV)


GUIDED_CASES = [pytest.param(order, {}, 1, 1, id=order) for order in ORDERS] + [
    pytest.param("raster", {}, 3, 2, id="raster, levels, stride"),
    pytest.param("frame", {}, 2, 4, id="frame, levels, stride"),
    *(
        pytest.param(order, options, 1, 2, id=f"{order}, {name}")
        for name, options in OPTIONS.items()
        for order in ("raster", "frame")
    ),
]


@torch.inference_mode()
def cached_rows(rollout: Rollout, codes_Bhw: torch.Tensor, slots_BrA: torch.Tensor):
    """What the rollout's cache of 2 B rows says of its next frame if that has these codes."""
    model = rollout.model
    codes_BSQ = flatten_codes("codes", codes_Bhw[:, None], model.spec.tokenizer.codes)[:, 0]
    slots_RrA = torch.cat([slots_BrA, torch.full_like(slots_BrA, NULL)])
    before_RSQ = torch.cat([rollout._past[-1]] * 2)
    there = model.open_frame(rollout.frame, before_RSQ, slots_RrA, rollout._cache.clone())
    rows_RSQ = torch.cat([codes_BSQ, codes_BSQ])
    tokens_RSD = model.remember(there, rows_RSQ)
    levels = [model.level_logits(tokens_RSD, rows_RSQ[..., :q]) for q in range(rows_RSQ.shape[-1])]
    return torch.stack(levels, dim=2).chunk(2)


@pytest.mark.parametrize(("order", "options", "num_levels", "r"), GUIDED_CASES)
def test_guided_from_the_cache_equals_guided_from_the_full_forward(order, options, num_levels, r):
    """Switched on at the start, off, on after the context has slid; scales that change."""
    codes = code_spec(num_levels=num_levels, frames_per_latent=r)
    model = make_model(codes, order=order, **options)
    history_Bthw, slots_BTA = random_codes(model, 2), random_slots(model, 16)
    rollout = Rollout(model, history_Bthw, slots_BTA[:, :r], seeds=[0, 1], sampling=GREEDY)
    free_from, found = None, 0
    for scale in (2.0, 2.0, 3.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.5, 1.5, 4.0, 1.5, 1.5, 1.5):
        frame = rollout.frame
        now_BrA = slots_BTA[:, (frame - 1) * r : frame * r]
        rollout.sampling = replace(GREEDY, guidance_scale=scale, parallel_keep_frac=0.7)
        before = rollout.snapshot()
        made_Bhw = rollout.step(now_BrA)
        history_Bthw = torch.cat([history_Bthw, made_Bhw[:, None]], dim=1)
        if scale == 1:
            free_from = None
        else:
            if free_from is None:
                # Those under no actions have read what a window of the context's length holds.
                free_from = max(0, frame - model.config.context_frames)
            after = rollout.snapshot()
            rollout.restore(before)
            rollout._open_free_rows()
            given_BSQV, free_BSQV = cached_rows(rollout, made_Bhw, now_BrA)
            rollout.restore(after)
            true_given = model(history_Bthw, slots_BTA[:, : frame * r])[:, -1]
            window_Bthw = history_Bthw[:, free_from:]
            null_BTA = torch.full_like(slots_BTA[:, : (window_Bthw.shape[1] - 1) * r], NULL)
            true_free = model(window_Bthw, null_BTA)[:, -1]
            assert (given_BSQV - true_given.view_as(given_BSQV)).abs().max() < 2e-5
            assert (free_BSQV - true_free.view_as(free_BSQV)).abs().max() < 2e-5
            guided = guide(true_given, true_free, scale=scale, parallel_keep_frac=0.7)
            best = guided.topk(2).values
            sure = (best[..., 0] - best[..., 1]).flatten() > 1e-3
            assert sure.float().mean() > 0.9
            assert torch.equal(made_Bhw.flatten()[sure], guided.argmax(-1).flatten()[sure])
            found += int((guided.argmax(-1) != true_given.argmax(-1)).sum())
    assert found > 5  # or guidance changed nothing, and nothing was shown


def test_after_guidance_is_off_again_the_rollout_is_as_if_it_never_was_on():
    model = make_model(order="row")
    slots_BTA = random_slots(model, 12)
    prompt_Bthw = random_codes(model, 1)
    rollouts = [
        Rollout(model, prompt_Bthw, slots_BTA[:, :0], seeds=[0, 1], sampling=GREEDY)
        for _ in range(2)
    ]
    for step in range(5):
        for rollout in rollouts:
            rollout.step(slots_BTA[:, step : step + 1])
    start = rollouts[1].snapshot()
    rollouts[1].sampling = replace(GREEDY, guidance_scale=9.0)
    assert rollouts[1].size_bytes == rollouts[0].size_bytes
    rollouts[1].step(slots_BTA[:, 5:6])
    assert rollouts[1].size_bytes > 1.9 * rollouts[0].size_bytes
    rollouts[1].restore(start)
    rollouts[1].sampling = GREEDY
    for step in range(5, 11):
        now_BrA = slots_BTA[:, step : step + 1]
        assert torch.equal(rollouts[0].step(now_BrA), rollouts[1].step(now_BrA))
    assert rollouts[1].size_bytes == rollouts[0].size_bytes


def test_a_snapshot_of_a_guided_rollout_leads_to_the_same_guided_frames():
    model = make_model(order="frame")
    slots_BTA = random_slots(model, 15)
    guided = SamplingConfig(guidance_scale=2.5, parallel_keep_frac=0.2)
    rollout = Rollout(
        model, random_codes(model, 1), slots_BTA[:, :0], seeds=[0, 1], sampling=guided
    )

    def go(first, last):
        return torch.stack([rollout.step(slots_BTA[:, s : s + 1]) for s in range(first, last)])

    go(0, 5)
    snapshot = rollout.snapshot()
    expected = go(5, 14)
    rollout.sampling = GREEDY
    go(0, 3)
    rollout.sampling = guided
    rollout.restore(snapshot)
    assert torch.equal(go(5, 14), expected)


def test_scale_0_makes_every_action_the_same_and_a_larger_scale_moves_codes_further():
    model = make_model()
    prompt_Bthw, slots_BTA = random_codes(model, 1, batch=8), random_slots(model, 2, batch=8)
    other_BTA = (slots_BTA + 1) % 5

    def made(slots, scale):
        sampling = SamplingConfig(temperature=1.0, min_p=0.0, guidance_scale=scale)
        return generate_codes(model, prompt_Bthw, slots, seeds=range(8), sampling=sampling)[:, 1]

    assert torch.equal(made(slots_BTA, 0.0), made(other_BTA, 0.0))
    apart = [float((made(slots_BTA, s) != made(other_BTA, s)).float().mean()) for s in (0.3, 1, 4)]
    assert all(less < more for less, more in pairwise([0.0, *apart]))


def test_a_model_without_actions_has_nothing_to_be_guided_by():
    model = make_model(actions=ACTIONS["none"])
    prompt_Bthw, slots_BTA = random_codes(model, 1), random_slots(model, 1)
    guided = SamplingConfig(guidance_scale=2.0)
    with pytest.raises(ConfigError, match=r"guidance_scale is 2\.0, must be 1 for this model"):
        Rollout(model, prompt_Bthw, slots_BTA, seeds=[0, 1], sampling=guided)
    rollout = Rollout(model, prompt_Bthw, slots_BTA, seeds=[0, 1], sampling=GREEDY)
    with pytest.raises(ConfigError, match="guidance_scale"):
        rollout.sampling = guided
    assert rollout.sampling == replace(GREEDY, decoder="frame")


@pytest.mark.slow
@pytest.mark.parametrize("actions", [STEER, KEYS], ids=["one", "keys"])
def test_guidance_raises_action_adherence_of_an_under_trained_model(tmp_path, actions):
    """Adherence: of 1,000 unseen starts, the share whose next frame, drawn at temperature 1, has
    the cell lit to which the actions lead, and none of those to which others would have led.

    Under-trained: whenever, in the course of a training, this is between 25% and 75% unguided.
    """
    world, number = Mover(actions), 1000
    world.write(tmp_path / "shards", episodes=64, num_frames=12)
    walks = [world.episode(4, 10_000 + walk) for walk in range(number)]
    codes_Bthw, slots_BTA = (
        torch.from_numpy(np.stack(parts).astype("i8")) for parts in zip(*walks, strict=True)
    )
    possible = torch.unique(slots_BTA[:, 2], dim=0)
    outcomes = torch.tensor(
        [[lit_after(world, codes[2], slots_A) for slots_A in possible] for codes, _ in walks]
    )
    pressed_B = (slots_BTA[:, 2, None] == possible).all(-1).int().argmax(1)
    course = []

    def watch(model: DynamicsModel, num_step: int) -> None:
        adherence = {}
        for scale in (0.0, 1.0, 2.0, 3.0):
            made_Bthw = generate_codes(
                model,
                codes_Bthw[:, :3],
                slots_BTA,
                seeds=range(number),
                sampling=SamplingConfig(temperature=1.0, min_p=0.0, guidance_scale=scale),
            )
            lit_Ba = made_Bthw[:, 3].flatten(1).gather(1, outcomes)
            adheres_B = (lit_Ba.sum(1) == 1) & (lit_Ba.argmax(1) == pressed_B)
            adherence[scale] = float(adheres_B.float().mean())
        if 0.25 < adherence[1.0] < 0.75:
            course.append((num_step, adherence))

    train(
        tmp_path / "shards", tmp_path / "run", model=tiny(), num_steps=140, batch_windows=8,
        corruption=0.0, validate_every=10, checkpoint_every=1000, on_validation=watch,
    )  # fmt: skip
    assert course
    for _, adherence in course:
        # A single gain may be lost in the draws; the largest, below, may not.
        assert adherence[0.0] < adherence[1.0] < adherence[2.0] + 0.02, course
    # Five points are over two standard errors of the difference of two such shares.
    gains = [adherence[2.0] - adherence[1.0] for _, adherence in course]
    assert max(gains) > 0.05, course


def lit_after(world: Mover, codes_hw: np.ndarray, slots_A: torch.Tensor) -> int:
    """Which cell is lit after these actions."""
    row, column = world.next_place(np.argwhere(codes_hw)[0], slots_A.numpy())
    return int(row * world.width + column)
