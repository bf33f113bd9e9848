"""Promises of model.py: what logits may know, and that a saved model is the same model."""

import numpy as np
import pytest
import torch
from dynamics.toys import ACTIONS, code_spec, codebook_VZ, make_model, random_codes, random_slots
from worldloom.common import ConfigError, FormatError, MismatchError, ShapeError, save_model
from worldloom.dynamics import NULL, DynamicsModel

ORDERS = ("raster", "row", "frame", "masked")


def seen_cells(order: str, cell: int, width: int) -> range:
    """The cells of its own frame that a cell may know, by the definition of the orders."""
    return range({"raster": cell, "row": cell // width * width}.get(order, 0))


@pytest.mark.parametrize("order", ORDERS)
def test_logits_ignore_the_frame_they_predict_and_all_later_ones(order):
    model = make_model(order=order)
    codes_Bthw, slots_BTA = random_codes(model, 6), random_slots(model, 6)
    before_BfSV = model(codes_Bthw, slots_BTA)
    edited_Bthw = codes_Bthw.clone()
    edited_Bthw[:, 3:] = (edited_Bthw[:, 3:] + 1) % 32
    after_BfSV = model(edited_Bthw, slots_BTA)
    # f = 0 predicts latent frame 1, so f = 2 predicts the first edited one.
    assert torch.equal(before_BfSV[:, :2], after_BfSV[:, :2])
    assert torch.equal(before_BfSV[:, 2, 0], after_BfSV[:, 2, 0])  # the first cell sees no other
    differs_BS = (before_BfSV[:, 3] != after_BfSV[:, 3]).any(-1)
    assert differs_BS.all()  # or the model ignores the past


@pytest.mark.parametrize("order", ORDERS)
def test_within_a_frame_a_cell_sees_what_its_order_says_and_all_of_that(order):
    model = make_model(order=order)
    codes_Bthw, slots_BTA = random_codes(model, 4), random_slots(model, 4)
    before_BfSV = model(codes_Bthw, slots_BTA)
    for changed in range(12):
        edited_Bthw = codes_Bthw.clone()
        edited_Bthw[:, 2, changed // 4, changed % 4] += 1
        edited_Bthw %= 32
        differs_S = (before_BfSV != model(edited_Bthw, slots_BTA)).any(-1)[:, 1].all(0)
        expected = [changed in seen_cells(order, cell, 4) for cell in range(12)]
        assert differs_S.tolist() == expected, changed


@pytest.mark.parametrize("order", ORDERS)
def test_every_cell_sees_every_cell_of_the_frame_before(order):
    """Also the last ones, which no token of their own frame is fed."""
    model = make_model(order=order)
    codes_Bthw, slots_BTA = random_codes(model, 2), random_slots(model, 2)
    before_BfSV = model(codes_Bthw, slots_BTA)
    for changed in range(12):
        edited_Bthw = codes_Bthw.clone()
        edited_Bthw[:, 0, changed // 4, changed % 4] += 1
        differs_BS = (before_BfSV != model(edited_Bthw % 32, slots_BTA)).any(-1)[:, 0]
        assert differs_BS.all(), changed


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("r", [1, 2, 4])
def test_the_slots_of_a_step_change_the_frame_they_lead_to_and_later_ones_only(order, r):
    model = make_model(code_spec(frames_per_latent=r), order=order)
    codes_Bthw, slots_BTA = random_codes(model, 5), random_slots(model, 5)
    before_BfSV = model(codes_Bthw, slots_BTA)
    for step in range(slots_BTA.shape[1]):
        edited_BTA = slots_BTA.clone()
        edited_BTA[:, step] = (edited_BTA[:, step] + 1) % 5
        differs_Bf = (before_BfSV != model(codes_Bthw, edited_BTA)).flatten(2).any(-1)
        led_to = step // r + 1
        assert differs_Bf[:, led_to - 1].all()
        assert not differs_Bf[:, : led_to - 1].any()


@pytest.mark.parametrize("r", [2, 4])
def test_the_steps_within_a_latent_frame_are_told_apart(r):
    model = make_model(code_spec(frames_per_latent=r))
    codes_Bthw, slots_BTA = random_codes(model, 2), torch.zeros(2, r, 1, dtype=torch.int64)
    logits = []
    for step in range(r):
        slots_BTA[:] = 0
        slots_BTA[:, step] = 3
        logits.append(model(codes_Bthw, slots_BTA))
    assert all(not torch.equal(logits[0], other) for other in logits[1:])


@pytest.mark.parametrize("order", ORDERS)
def test_one_layer_sees_as_many_frames_as_the_context_and_no_more(order):
    model = make_model(order=order, num_layers=1, context_frames=3)
    codes_Bthw, slots_BTA = random_codes(model, 8), random_slots(model, 8)
    before_BfSV = model(codes_Bthw, slots_BTA)
    edited_Bthw = codes_Bthw.clone()
    edited_Bthw[:, 2] = (edited_Bthw[:, 2] + 1) % 32
    differs_f = (before_BfSV != model(edited_Bthw, slots_BTA)).flatten(2).any(-1).all(0)
    # A frame's tokens are fed frame f - 1; they see the tokens of 3 frames, so back to f - 3.
    own = order in ("raster", "row")
    assert differs_f.tolist() == [False, own, True, True, True, False, False]


def test_fed_codes_are_what_is_known_and_true_codes_what_is_asked():
    model = make_model()
    codes_Bthw, slots_BTA = random_codes(model, 4), random_slots(model, 4)
    other_Bthw = random_codes(model, 4, seed=1)
    fed = model(codes_Bthw, slots_BTA, inputs_Bthw=other_Bthw)
    assert torch.equal(fed, model(other_Bthw, slots_BTA))
    assert not torch.equal(fed, model(codes_Bthw, slots_BTA))


@pytest.mark.parametrize("kind", sorted(ACTIONS))
@pytest.mark.parametrize("r", [1, 2])
def test_every_kind_of_actions_is_learned_from_and_may_be_null(kind, r):
    model = make_model(code_spec(frames_per_latent=r), ACTIONS[kind]).train().requires_grad_()
    codes_Bthw, slots_BTA = random_codes(model, 3), random_slots(model, 3)
    known = model(codes_Bthw, slots_BTA)
    unknown = model(codes_Bthw, torch.full_like(slots_BTA, NULL))
    assert known.isfinite().all()
    assert unknown.isfinite().all()
    assert torch.equal(known, unknown) == (kind == "none")
    known.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name  # several processes wait for all of them


def test_a_key_means_the_same_in_whichever_slot_it_stands():
    model = make_model(actions=ACTIONS["keys"])
    slots_BfrA = torch.tensor([[[[3, 0, 0]]], [[[1, 3, 0]]], [[[1, 0, 0]]]])
    three, both, one = model.actions(slots_BfrA)
    empty = model.actions(torch.zeros(1, 1, 1, 3, dtype=torch.int64))[0]
    # both - one - (three - none) is zero where "+ key 3" adds the same vector.
    assert (both - one - three + empty).abs().max() < 1e-6


def test_the_last_windows_mask_is_kept_and_no_other():
    model = make_model()
    for frames in (3, 5, 4, 4):
        model(random_codes(model, frames), random_slots(model, frames))
    key, (_, sight) = model.layout._kept
    assert key[0] == 4
    assert sight.length == 3 * 12
    assert [block.mask_LM.shape for block in sight.blocks] == [(3 * 12, 5 + 3 * 12)]


def test_parts_of_two_sizes_share_what_is_kept():
    """A batch of 7 in parts of 5 and then 2, update after update."""
    layout = make_model().layout
    (turn_5, sight), (turn_2, same) = layout.window(4, 5), layout.window(4, 2)
    assert same is sight
    assert layout.window(4, 5)[0] is turn_5
    assert layout.window(4, 2)[0] is turn_2
    layout.window(4, 3)
    assert layout.window(4, 5)[0] is not turn_5  # of more sizes the last two stay
    assert layout.window(5, 5)[1] is not sight


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("num_meta_tokens", [0, 4])
def test_long_windows_are_looked_at_in_blocks_and_that_changes_nothing(
    order, num_meta_tokens, monkeypatch
):
    """Of 96 tokens, of which a block sees what its mask says and no more."""
    codes = code_spec(height=2, width=4)
    model = make_model(codes, order=order, num_meta_tokens=num_meta_tokens, context_frames=5)
    codes_Bthw, slots_BTA = random_codes(model, 12), random_slots(model, 12)
    whole_BfSV = model.double()(codes_Bthw, slots_BTA)
    model.layout._kept = None
    monkeypatch.setattr("worldloom.dynamics.sight._BLOCK_ROWS", 10)
    assert (model(codes_Bthw, slots_BTA) - whole_BfSV).abs().max() < 1e-12
    blocks = model.layout._kept[1][1].blocks
    assert len(blocks) > 7
    assert any(block.first > 0 for block in blocks)
    scores = sum(block.mask_LM.numel() for block in blocks)
    assert scores < 0.6 * sum(block.rows for block in blocks) ** 2


def test_training_goes_on_after_a_forward_in_inference_mode():
    model = make_model().requires_grad_()
    codes_Bthw, slots_BTA = random_codes(model, 3), random_slots(model, 3)
    with torch.inference_mode():
        model(codes_Bthw, slots_BTA)
    model(codes_Bthw, slots_BTA).sum().backward()


def test_the_weights_are_a_function_of_the_seed_alone():
    one, torch_state = make_model(seed=3), torch.random.get_rng_state()
    torch.manual_seed(99)
    same, other = make_model(seed=3), make_model(seed=4)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.head.to_logits.weight, other.head.to_logits.weight)
    torch.random.set_rng_state(torch_state)


@pytest.mark.parametrize(
    ("frames", "steps", "grid"), [(1, 0, (3, 4)), (3, 3, (3, 4)), (3, 2, (4, 3))]
)
def test_codes_and_actions_that_do_not_fit_are_refused(frames, steps, grid):
    model = make_model()
    codes_Bthw = torch.zeros(1, frames, *grid, dtype=torch.int64)
    with pytest.raises(ShapeError):
        model(codes_Bthw, torch.zeros(1, steps, 1, dtype=torch.int64))


@pytest.mark.parametrize(
    "sizes",
    [
        {"dim": 33}, {"dim": 30, "num_heads": 2}, {"num_heads": 0}, {"num_layers": 0},
        {"context_frames": 1}, {"num_meta_tokens": -1}, {"order": "spiral"}, {"ff_mult": 0.0},
        {"ff_mult": float("nan")},
    ],
)  # fmt: skip
def test_sizes_that_make_no_model_are_refused(sizes):
    with pytest.raises(ConfigError, match=next(iter(sizes))):
        make_model(**sizes)


@pytest.mark.parametrize(
    ("num_levels", "other", "match"),
    [
        (1, {"vocab_size": 31}, "V is 31, must be 32"),
        (1, {"num_levels": 2}, "3 axes, must be 2"),
        (2, {}, "2 axes, must be 3"),
        (2, {"num_levels": 3}, "Q is 3, must be 2"),
    ],
)
def test_a_codebook_of_another_shape_is_refused(num_levels, other, match):
    model = make_model(code_spec(num_levels=num_levels))
    with pytest.raises(ShapeError, match=f"codebook: .*{match}"):
        DynamicsModel(model.config, model.spec, codebook_VZ(code_spec(**other)))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("num_meta_tokens", [0, 5])
@pytest.mark.parametrize("num_levels", [1, 3])
def test_a_saved_model_comes_back_to_the_last_bit(order, num_meta_tokens, num_levels, tmp_path):
    codes = code_spec(num_levels=num_levels)
    model = make_model(codes, order=order, num_meta_tokens=num_meta_tokens)
    model.save(tmp_path / "model", card="# toy")
    loaded = DynamicsModel.from_pretrained(tmp_path / "model")
    assert (loaded.spec, loaded.config) == (model.spec, model.config)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    codes_Bthw, slots_BTA = random_codes(model, 4), random_slots(model, 4)
    assert torch.equal(loaded(codes_Bthw, slots_BTA), model(codes_Bthw, slots_BTA))


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("harm", ["missing", "altered", "cut"])
def test_a_damaged_model_is_refused(file, harm, tmp_path):
    make_model().save(tmp_path / "model", card="# toy")
    path = tmp_path / "model" / file
    content = bytearray(path.read_bytes())
    if harm == "missing":
        path.unlink()
    elif harm == "cut":
        path.write_bytes(content[:-7])
    else:
        content[content.index(b"{") + len(content) // 2] ^= 1
        path.write_bytes(content)
    with pytest.raises(FormatError, match=file.replace(".", r"\.")):
        DynamicsModel.from_pretrained(tmp_path / "model")


def test_a_model_of_other_sizes_or_another_kind_is_refused(tmp_path):
    model = make_model()
    model.save(tmp_path / "model", card="# toy")
    config = {"spec": model.spec.to_dict()}
    sizes = {"num_layers": 2, "dim": 64, "num_heads": 2}
    for number, (kind, content, error, match) in enumerate(
        [
            ("dynamics", {**config, "dynamics": sizes}, FormatError, "do not fit the config"),
            ("dynamics", {**config, "dynamics": {"width": 3}}, FormatError, "unknown key 'width'"),
            ("dynamics", {"dynamics": sizes}, FormatError, "the fields dynamics, spec"),
            ("tokenizer", {**config, "dynamics": sizes}, MismatchError, "a tokenizer model"),
        ]
    ):
        folder = tmp_path / str(number)
        save_model(folder, kind=kind, config=content, weights=model.state_dict(), card="")
        with pytest.raises(error, match=match):
            DynamicsModel.from_pretrained(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"fps": "8"}, {"fps": float("inf")}, {"fps": True}, {"frame_skip": -1}, {"frame_skip": 1.5},
        {"speed": 3}, {"tokenizer": None}, {"actions": {}},
    ],
)  # fmt: skip
def test_a_spec_that_lies_is_refused(change):
    spec = make_model().spec
    assert type(spec).from_dict(spec.to_dict(), where="here") == spec
    with pytest.raises(FormatError, match=r"^here"):
        type(spec).from_dict({**spec.to_dict(), **change}, where="here")
    short = spec.to_dict()
    del short["fps"]
    with pytest.raises(FormatError, match=r"^here"):
        type(spec).from_dict(short, where="here")


@pytest.mark.parametrize("num_levels", [1, 3])
@pytest.mark.parametrize("factor", [1e-4, 1e4])
def test_the_codebook_enters_at_unit_scale_whatever_its_own_scale_is(num_levels, factor):
    """Of levels, the sum of one vector each, whichever they are."""
    codes = code_spec(num_levels=num_levels)
    model = make_model(codes)
    vectors_VZ = codebook_VZ(codes) * np.float32(factor)
    scaled = DynamicsModel(model.config, model.spec, vectors_VZ)
    scaled.before.latent_to_model = torch.nn.Identity()  # what enters it comes out
    scaled.before.learned.weight.data = torch.zeros(len(scaled.before.vectors), codes.code_dim)
    every = torch.cartesian_prod(*[torch.arange(32)] * num_levels).reshape(-1, num_levels)
    assert scaled.before(every).std(correction=0).item() == pytest.approx(1, rel=1e-2)
    summed = vectors_VZ.reshape(num_levels, 32, -1)[np.arange(num_levels), every.numpy()].sum(1)
    entered = scaled.before(every).detach().numpy()
    np.testing.assert_allclose(entered / scaled.before.scale.item(), summed, rtol=1e-4, atol=1e-5)
    assert scaled.before(torch.full((num_levels,), 32)).abs().max() == 0  # no code
