"""Promises of order masked: what its refining tokens see, what they learn, and that it resumes."""

from dataclasses import replace

import pytest
import torch
from dynamics.test_training import assert_equal_runs, rewind
from dynamics.toys import (
    OPTIONS,
    TRAINING,
    code_spec,
    make_model,
    random_codes,
    random_slots,
    tiny,
    train,
)
from torch.nn.functional import cross_entropy
from worldloom.common import read_metrics
from worldloom.dynamics import (
    DynamicsModel,
    SamplingConfig,
    WindowBatch,
    generate_codes,
    open_held_out,
    validate,
)
from worldloom.dynamics.disturbance import disturb, mask_cells
from worldloom.dynamics.objective import Objective
from worldloom.dynamics.sequence import flatten_codes

TINY = tiny(order="masked")


def some_known(batch: int, frames: int, *, seed: int = 0) -> torch.Tensor:
    """known_Bthw: a third of the cells."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((batch, frames, 3, 4), generator=generator) < 1 / 3


@pytest.fixture
def model():
    return make_model(order="masked")


def test_with_all_cells_masked_refining_tokens_are_the_remembered_ones(model):
    codes_Bthw, slots_BTA = random_codes(model, 8), random_slots(model, 8)
    nothing_Bthw = torch.zeros(2, 8, 3, 4, dtype=torch.bool)
    tokens, refined = model.tokens_and_refined(codes_Bthw, slots_BTA, nothing_Bthw)
    assert (tokens - refined).abs().max() < 2e-5
    assert (tokens - model.tokens(codes_Bthw, slots_BTA)).abs().max() < 2e-5


def test_what_is_known_of_a_frame_changes_its_refining_tokens_and_nothing_else(model):
    codes_Bthw, slots_BTA = random_codes(model, 6), random_slots(model, 6)
    known_Bthw = some_known(2, 6)
    before = model.tokens_and_refined(codes_Bthw, slots_BTA, known_Bthw)
    known_Bthw[:, 3] = ~known_Bthw[:, 3]
    after = model.tokens_and_refined(codes_Bthw, slots_BTA, known_Bthw)
    assert torch.equal(before[0], after[0])
    differs_BfS = (before[1] != after[1]).any(-1)
    assert differs_BfS[:, 2].all()  # tokens begin with latent frame 1
    assert not differs_BfS[:, [0, 1, 3, 4]].any()


def test_a_refining_token_sees_the_known_codes_of_its_frame_and_no_masked_one(model):
    codes_Bthw, slots_BTA = random_codes(model, 5), random_slots(model, 5)
    known_Bthw = some_known(2, 5)
    _, before = model.tokens_and_refined(codes_Bthw, slots_BTA, known_Bthw)
    assert 5 < known_Bthw[:, 2].sum() < 19
    for cell in range(12):
        edited_Bthw = codes_Bthw.clone()
        edited_Bthw[:, 2].flatten(1)[:, cell] += 1
        edited_Bthw %= 32
        _, after = model.tokens_and_refined(edited_Bthw, slots_BTA, known_Bthw)
        differs_BS = (before != after).any(-1)[:, 1]
        for row in range(2):
            known = bool(known_Bthw[row, 2].flatten()[cell])
            assert differs_BS[row].tolist() == [known] * 12
        assert torch.equal(before[:, 0], after[:, 0])
        assert (before != after).any(-1)[:, 2].all()  # the frame after it is fed all of them


def test_corrupted_codes_are_what_is_known(model):
    codes_Bthw, slots_BTA = random_codes(model, 4), random_slots(model, 4)
    other_Bthw, known_Bthw = random_codes(model, 4, seed=1), some_known(2, 4)
    fed = model.tokens_and_refined(codes_Bthw, slots_BTA, known_Bthw, inputs_Bthw=other_Bthw)
    true = model.tokens_and_refined(other_Bthw, slots_BTA, known_Bthw)
    assert all(torch.equal(one, other) for one, other in zip(fed, true, strict=True))


@pytest.mark.parametrize("name", ["default", *OPTIONS])
def test_cached_refining_equals_uncached_and_leaves_the_cache_as_it_was(name):
    options = OPTIONS.get(name, {})
    codes = code_spec(frames_per_latent=2, num_levels=2)
    model = make_model(codes, order="masked", **options)
    codes_BthwQ, slots_BTA = random_codes(model, 11), random_slots(model, 11)
    known_Bthw = some_known(2, 11)
    full, full_refined = model.tokens_and_refined(codes_BthwQ, slots_BTA, known_Bthw)
    codes_BtSQ = flatten_codes("codes", codes_BthwQ, codes)
    cache, nonsense = model.start_cache(batch=2), torch.full_like(codes_BtSQ[:, 0], 31)
    for frame in range(1, 11):
        now_BrA = slots_BTA[:, (frame - 1) * 2 : frame * 2]
        there = model.open_frame(frame, codes_BtSQ[:, frame - 1], now_BrA, cache)
        remembered = model.remember(there, nonsense)  # with all cells masked, whatever they are
        kept = cache.clone()
        for seed in range(2):
            known_BS = some_known(2, 11, seed=seed)[:, frame].flatten(1)
            shown_BSQ = torch.where(known_BS[..., None], codes_BtSQ[:, frame], nonsense)
            refined = model.refined_tokens(there, shown_BSQ, known_BS)
            assert torch.equal(cache.keys, kept.keys)
            assert torch.equal(cache.values, kept.values)
            if seed == 0:
                assert (refined - full_refined[:, frame - 1]).abs().max() < 2e-5
        assert (remembered - full[:, frame - 1]).abs().max() < 2e-5


def padded(model) -> WindowBatch:
    codes_Bthw, slots_BTA = random_codes(model, 5, batch=3), random_slots(model, 5, batch=3)
    valid_Bt = torch.ones(3, 5, dtype=torch.bool)
    valid_Bt[1, 3:] = False
    return WindowBatch(codes_Bthw, slots_BTA, valid_Bt)


@pytest.mark.parametrize("num_levels", [1, 2])
def test_the_loss_is_of_all_codes_from_none_and_of_the_masked_ones_from_the_others(num_levels):
    codes = code_spec(num_levels=num_levels)
    model = make_model(codes, order="masked")
    batch = padded(model)
    fed = replace(
        batch, codes_Bthw=random_codes(model, 5, batch=3, seed=9), known_Bthw=some_known(3, 5)
    )
    objective = Objective(model, z_loss=True, bf16=False)
    losses, counts = objective(batch, fed), objective.counts(batch, fed)

    pair = model.tokens_and_refined(
        batch.codes_Bthw, fed.slots_BTA, fed.known_Bthw, inputs_Bthw=fed.codes_Bthw
    )
    labels_BfSQ = flatten_codes("codes", batch.codes_Bthw, codes)[:, 1:]
    masked_BfS = ~fed.known_Bthw[:, 1:].flatten(2)
    nats, squares, right, number = 0.0, 0.0, 0, 0
    for tokens_BfSD, counted_BfS in zip(
        pair, (torch.ones_like(masked_BfS), masked_BfS), strict=True
    ):
        logits = model.logits(tokens_BfSD, batch.codes_Bthw).reshape(*labels_BfSQ.shape, -1)
        chosen = counted_BfS & batch.valid_Bt[:, 1:, None]
        logits_NQV, labels_NQ = logits[chosen], labels_BfSQ[chosen]
        nats += cross_entropy(logits_NQV.flatten(0, 1), labels_NQ.flatten(), reduction="sum")
        squares += logits_NQV.logsumexp(-1).square().sum()
        right += int((logits_NQV.argmax(-1) == labels_NQ).sum())
        number += labels_NQ.numel()
    assert losses.code_nats.item() == pytest.approx(float(nats), rel=1e-5)
    assert losses.squares.item() == pytest.approx(float(squares), rel=1e-5)
    assert losses.codes_right.item() == right
    assert counts.tolist() == [number, 0]
    # Parts of a batch add up to the whole.
    parts = [slice(0, 1), slice(1, 3)]
    summed = sum(objective(batch.rows(r), fed.rows(r)).code_nats.item() for r in parts)
    assert summed == pytest.approx(float(nats), rel=1e-5)
    assert sum(objective.counts(batch.rows(r), fed.rows(r)) for r in parts).tolist() == [number, 0]


def test_masks_follow_the_cosine_schedule_and_leave_one_cell_at_least_on_each_side(model):
    batch = WindowBatch(
        torch.zeros(500, 6, 3, 4, dtype=torch.int64),
        torch.zeros(500, 5, 1, dtype=torch.int64),
        torch.ones(500, 6, dtype=torch.bool),
    )
    known_BtS = mask_cells(batch, TRAINING, step=0, rows=range(500)).known_Bthw.flatten(2)
    masked_N = 12 - known_BtS.sum(-1).flatten()
    assert (masked_N.min(), masked_N.max()) == (1, 11)
    # ceil(12 cos(pi u / 2)) of a thousand equally likely u, but never all twelve.
    wanted = torch.ceil(12 * torch.cos(torch.pi / 2 * (torch.arange(1000) + 0.5) / 1000))
    wanted = wanted.clamp(max=11)
    for count in range(1, 12):
        share = (masked_N == count).float().mean()
        assert share == pytest.approx((wanted == count).float().mean().item(), abs=0.03)
    # Every cell as often as the others, and each frame by itself.
    assert known_BtS.float().mean((0, 1)).std() < 0.02
    assert (known_BtS[:, 0] != known_BtS[:, 1]).any(1).float().mean() > 0.8


def test_masks_are_a_function_of_seed_update_and_row_and_shift_no_other_draw(model):
    batch = padded(model)
    fed = disturb(batch, TRAINING, vocab_size=32, step=4, rows=[0, 1, 2])
    whole = mask_cells(fed, TRAINING, step=4, rows=[0, 1, 2])
    assert torch.equal(whole.codes_Bthw, fed.codes_Bthw)
    assert torch.equal(whole.slots_BTA, fed.slots_BTA)
    part = mask_cells(fed.rows(slice(1, 3)), TRAINING, step=4, rows=[1, 2])
    assert torch.equal(part.known_Bthw, whole.known_Bthw[1:])
    others = [
        mask_cells(fed, TRAINING, step=5, rows=[0, 1, 2]),
        mask_cells(fed, replace(TRAINING, seed=6), step=4, rows=[0, 1, 2]),
        mask_cells(fed, TRAINING, step=4, rows=[3, 4, 5]),
    ]
    assert not any(torch.equal(whole.known_Bthw, other.known_Bthw) for other in others)
    # The masks of a batch go where its rows go.
    assert torch.equal(whole.rows(slice(2, 3)).known_Bthw, whole.known_Bthw[2:])
    assert torch.equal(whole.to("cpu").known_Bthw, whole.known_Bthw)
    assert fed.to("cpu").known_Bthw is None


@pytest.fixture(scope="module")
def finished(tmp_path_factory, mover_shards):
    """A run of six updates with a checkpoint after the third; do not change it."""
    torch.set_num_threads(1)
    run = tmp_path_factory.mktemp("masked") / "run"
    train(mover_shards.folder, run, model=TINY, micro_windows=3, z_loss=1e-3)
    return run


def test_resuming_changes_nothing_to_the_last_bit(finished, mover_shards, tmp_path):
    run = rewind(finished, tmp_path / "run")
    train(mover_shards.folder, run, model=TINY, micro_windows=3, z_loss=1e-3)
    assert_equal_runs(finished, run)


def test_windows_computed_in_parts_are_learned_from_as_all_at_once(
    finished, mover_shards, tmp_path
):
    train(mover_shards.folder, tmp_path / "run", model=TINY, z_loss=1e-3)
    one, other = ([row["loss"] for row in read_metrics(run) if "loss" in row]
                  for run in (finished, tmp_path / "run"))  # fmt: skip
    assert one == pytest.approx(other, rel=1e-4)


def test_what_is_validated_is_the_prediction_from_all_masked_and_a_refined_rollout(
    finished, mover_shards
):
    model = DynamicsModel.from_pretrained(finished / "model")
    windows = open_held_out(mover_shards, window_frames=5)
    scores = validate(model, windows, seed=5, num_windows=6)
    batch = windows.batch(0, size=6, seed=5).to("cpu")
    logits_BfSV = model(batch.codes_Bthw, batch.slots_BTA)
    counted = batch.valid_Bt[:, 1:, None].expand(logits_BfSV.shape[:3])
    labels_BfS = batch.codes_Bthw[:, 1:].flatten(2)
    nats = cross_entropy(logits_BfSV[counted], labels_BfS[counted])
    assert scores["validation_loss"] == pytest.approx(nats.item(), rel=1e-5)
    whole_B = batch.valid_Bt[:, :3].all(1)
    made_Bthw = generate_codes(
        model, batch.codes_Bthw[:, :2], batch.slots_BTA[:, :2], seeds=range(6),
        sampling=SamplingConfig(decoder="maskgit"),
    )  # fmt: skip
    right = (made_Bthw == batch.codes_Bthw[:, :3])[whole_B, 2].float().mean()
    assert scores["free_running_accuracy"] == pytest.approx(right.item())
