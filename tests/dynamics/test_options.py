"""What holds for every option of the model: cached equals uncached, and nothing sees the future."""

import pytest
import torch
from dynamics.toys import (
    ACTIONS,
    OPTIONS,
    cached_logits_BfSQV,
    code_spec,
    make_model,
    random_codes,
    random_slots,
)
from worldloom.common import ConfigError
from worldloom.dynamics import NULL, DynamicsConfig, DynamicsModel

ORDERS = ("raster", "row", "frame", "masked")
FEATURES = [(order, name) for order in ORDERS for name in OPTIONS]
WITHOUT_BEFORE = {"previous_frame": False}


def every_option(test):
    """Run a test over orders and options; also without the previous frame, where that can be."""
    cases = [pytest.param(order, OPTIONS[name], id=f"{order}-{name}") for order, name in FEATURES]
    for order in ("raster", "row"):
        cases.append(pytest.param(order, WITHOUT_BEFORE, id=f"{order}-no previous frame"))
        bare = {**WITHOUT_BEFORE, "cell_embedding": False, "positions": "time"}
        cases.append(pytest.param(order, bare, id=f"{order}-nothing but the code beside"))
    return pytest.mark.parametrize(("order", "options"), cases)(test)


@every_option
def test_cached_logits_equal_uncached_ones_long_after_the_context_has_slid(order, options):
    model = make_model(code_spec(frames_per_latent=2, num_levels=2), order=order, **options)
    # The context is 3 frames: the ring goes round three times.
    codes_Bthw, slots_BTA = random_codes(model, 11), random_slots(model, 11)
    cached_BfSQV = cached_logits_BfSQV(model, codes_Bthw, slots_BTA)
    full_BfSQV = model(codes_Bthw, slots_BTA)
    assert (full_BfSQV.std((0, 1, 2, 4)) > 0.3).all()
    model.double()
    exact_BfSQV = model(codes_Bthw, slots_BTA)
    assert (exact_BfSQV - cached_logits_BfSQV(model, codes_Bthw, slots_BTA)).abs().max() < 1e-12
    # In float32 the sums are taken in another order. Fresh streams that nearly cancel each other
    # magnify that, and then no more than they do the rounding of the full forward itself.
    rounding = (full_BfSQV - exact_BfSQV).abs().max()
    bound = max(1e-5 * max(1.0, full_BfSQV.abs().max().item()), rounding.item())
    assert (full_BfSQV - cached_BfSQV).abs().max() < bound


@every_option
def test_logits_of_a_frame_ignore_its_codes_as_far_as_they_are_undecided(order, options):
    """Changing any cell leaves what was said before it bit-identical, and changes what follows."""
    model = make_model(order=order, **options)
    codes_Bthw, slots_BTA = random_codes(model, 5, batch=1), random_slots(model, 5, batch=1)
    before_BfSV = model(codes_Bthw, slots_BTA)
    group = model.grid.group
    for cell in range(12):
        edited_Bthw = codes_Bthw.clone()
        edited_Bthw[:, 2].view(-1)[cell] += 1
        edited_Bthw %= 32
        after_BfSV = model(edited_Bthw, slots_BTA)
        first_free = (cell // group + 1) * group  # what is decided with it does not see it either
        assert torch.equal(before_BfSV[:, 0], after_BfSV[:, 0])
        assert torch.equal(before_BfSV[:, 1, :first_free], after_BfSV[:, 1, :first_free])
        assert not torch.equal(before_BfSV[:, 1:], after_BfSV[:, 1:])


@every_option
def test_an_action_moves_its_frame_and_later_ones_and_none_before(order, options):
    model = make_model(order=order, **options)
    codes_Bthw, slots_BTA = random_codes(model, 6, batch=1), random_slots(model, 6, batch=1)
    before_BfSV = model(codes_Bthw, slots_BTA)
    for other in (NULL, (int(slots_BTA[0, 2, 0]) + 1) % 5):
        slots_BTA[0, 2, 0] = other
        after_BfSV = model(codes_Bthw, slots_BTA)
        assert torch.equal(before_BfSV[:, :2], after_BfSV[:, :2])
        differs_S = (before_BfSV[0, 2] != after_BfSV[0, 2]).any(-1)
        assert differs_S.all()


@every_option
def test_every_cell_learns_of_every_cell_of_the_frame_before(order, options):
    model = make_model(order=order, **options)
    codes_Bthw, slots_BTA = random_codes(model, 3, batch=1), random_slots(model, 3, batch=1)
    before_SV = model(codes_Bthw, slots_BTA)[0, 1]
    for cell in range(12):
        edited_Bthw = codes_Bthw.clone()
        edited_Bthw[0, 1].view(-1)[cell] = (edited_Bthw[0, 1].view(-1)[cell] + 1) % 32
        after_SV = model(edited_Bthw, slots_BTA)[0, 1]
        assert (before_SV != after_SV).any(-1).all()


@every_option
def test_a_row_of_a_batch_does_not_know_the_others(order, options):
    model = make_model(order=order, **options)
    codes_Bthw, slots_BTA = random_codes(model, 4), random_slots(model, 4)
    both_BfSV = model(codes_Bthw, slots_BTA)
    codes_Bthw[1] = (codes_Bthw[1] + 1) % 32
    assert torch.equal(both_BfSV[0], model(codes_Bthw, slots_BTA)[0])


@every_option
def test_every_weight_is_trained(order, options):
    model = make_model(code_spec(num_levels=2), order=order, **options).requires_grad_().train()
    codes_Bthw, slots_BTA = random_codes(model, 4), random_slots(model, 4)
    logits = model(codes_Bthw, slots_BTA)
    if order == "masked":  # what its own codes come in by is for the tokens that refine
        known_Bthw = torch.arange(2 * 4 * 12).reshape(2, 4, 3, 4) % 3 == 0
        _, refined_BfSD = model.tokens_and_refined(codes_Bthw, slots_BTA, known_Bthw)
        logits = torch.stack([logits, model.logits(refined_BfSD, codes_Bthw)])
    logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        if name.startswith("action_head."):
            continue  # the codes' loss does not reach it: test_action_head.py
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any() or not parameter.numel(), name


@pytest.mark.parametrize("kind", sorted(ACTIONS))
@pytest.mark.parametrize("action_input", ["added", "prepended"])
@pytest.mark.parametrize("r", [1, 2])
def test_every_kind_of_action_is_told_from_every_other(kind, action_input, r):
    model = make_model(code_spec(frames_per_latent=r), ACTIONS[kind], action_input=action_input)
    codes_Bthw, slots_BTA = random_codes(model, 2, batch=1), random_slots(model, 2, batch=1)
    logits = [model(codes_Bthw, slots_BTA), model(codes_Bthw, torch.full_like(slots_BTA, NULL))]
    for step in range(r):
        for slot in range(slots_BTA.shape[-1]):
            other = slots_BTA.clone()
            other[0, step, slot] = (other[0, step, slot] + 1) % ACTIONS[kind].sizes[slot]
            logits.append(model(codes_Bthw, other))
    if kind == "none":
        assert torch.equal(logits[0], logits[1])
        return
    for number, one in enumerate(logits):
        assert all(not torch.equal(one, other) for other in logits[:number])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_a_model_directory_holds_the_options(tmp_path, order, name):
    model = make_model(code_spec(num_levels=2), order=order, **OPTIONS[name])
    model.save(tmp_path / "model", card="a toy")
    loaded = DynamicsModel.from_pretrained(tmp_path / "model")
    assert loaded.config == model.config
    codes_Bthw, slots_BTA = random_codes(model, 4), random_slots(model, 4)
    assert torch.equal(model(codes_Bthw, slots_BTA), loaded(codes_Bthw, slots_BTA))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("attention", ["full", "factorised"])
@pytest.mark.parametrize("residual_streams", [1, 2])
def test_computing_layers_again_changes_no_gradient_and_keeps_less(
    order, attention, residual_streams
):
    kept_bytes, gradients = [], []
    for recompute in (False, True):
        model = make_model(
            order=order, attention=attention, residual_streams=residual_streams, num_layers=4
        )
        model.requires_grad_().train().transformer.recompute = recompute
        sizes = {}

        def note(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out_BfSV = model(random_codes(model, 6), random_slots(model, 6))
        kept_bytes.append(sum(sizes.values()))
        out_BfSV.square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert kept_bytes[1] < 0.5 * kept_bytes[0]
    assert all(torch.equal(gradients[0][name], grad) for name, grad in gradients[1].items())


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"head": "cosine"}, "head is 'cosine', must be one of linear, dot, distance"),
        ({"positions": "learned"}, "positions is 'learned', must be one of axial, time"),
        ({"attention": "flash"}, "attention is 'flash', must be one of full, factorised"),
        ({"action_input": "cross"}, "action_input is 'cross', must be one of added, prepended"),
        ({"residual_streams": 0}, "residual_streams is 0, must be at least 1"),
        ({"attention": "factorised", "num_layers": 1}, "would never look along time"),
        ({"previous_frame": False}, "order frame with previous_frame off would feed no codes"),
        (
            {"order": "masked", "previous_frame": False},
            "order masked with previous_frame off would feed no codes",
        ),
    ],
)
def test_an_option_that_there_is_not_is_refused(setting, sentence):
    with pytest.raises(ConfigError, match=sentence):
        DynamicsConfig(**setting)


def test_prepended_actions_are_tokens_that_cells_see():
    """Their own rows of keys, r a frame; nothing of them is predicted."""
    model = make_model(code_spec(frames_per_latent=2), action_input="prepended")
    assert (model.grid.lead, model.grid.tokens) == (2, 14)
    assert model.start_cache(batch=1).keys.shape[3] == 5 + 3 * 14
    codes_Bthw, slots_BTA = random_codes(model, 4), random_slots(model, 4)
    assert model.tokens(codes_Bthw, slots_BTA).shape == (2, 3, 12, 32)
    assert make_model(actions=ACTIONS["none"], action_input="prepended").grid.lead == 0


def test_a_distance_head_finds_the_nearest_code_likeliest():
    model = make_model(head="distance")
    tokens_LD = torch.randn(50, 32)
    latents_LZ = model.head.model_to_latent(tokens_LD)
    nearest_L = torch.cdist(latents_LZ, model.head.vectors_VZ).argmin(-1)
    logits_LV = model.head(tokens_LD)
    assert torch.equal(logits_LV.argmax(-1), nearest_L)
    # And its differences are those of the squared distances, times the learned scale.
    squares_LV = torch.cdist(latents_LZ, model.head.vectors_VZ).square()
    wanted_LV = -model.head.log_scale.exp() * (squares_LV - squares_LV[:, :1])
    assert (logits_LV - logits_LV[:, :1] - wanted_LV).abs().max() < 1e-3


@every_option
def test_a_model_whose_weights_are_bfloat16_says_nearly_the_same(order, options):
    """Cached or not: no part of it falls back to another type."""
    model = make_model(order=order, **options)
    codes_Bthw, slots_BTA = random_codes(model, 5), random_slots(model, 5)
    exact_BfSV = model(codes_Bthw, slots_BTA)
    model.to(torch.bfloat16)
    narrow_BfSV = model(codes_Bthw, slots_BTA)
    assert narrow_BfSV.dtype == torch.bfloat16
    for logits_BfSV in (narrow_BfSV, cached_logits_BfSQV(model, codes_Bthw, slots_BTA)[:, :, :, 0]):
        both = torch.stack([logits_BfSV.float().flatten(), exact_BfSV.flatten()])
        assert torch.corrcoef(both)[0, 1] > 0.99
