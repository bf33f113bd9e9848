"""The defects of genie2-pytorch that this package must not inherit, one test each, by their names.

Those that have whole files of their own are there: positions while sampling and after sliding
(test_positions.py, test_rollout.py), free-running actions (test_learning.py).
"""

import subprocess
import sys

import pytest
import torch
from dynamics.toys import ACTIONS, STEER, code_spec, make_model, random_codes, random_slots
from worldloom.dynamics import (
    NULL,
    Rollout,
    SamplingConfig,
    WindowBatch,
    cross_entropy,
    generate_codes,
)
from worldloom.dynamics.actions import ActionEmbedding
from worldloom.dynamics.meta_tokens import MetaTokens

GREEDY = SamplingConfig(temperature=0.0)


def test_zero_initialised_meta_tokens_stop_all_training():
    fresh = MetaTokens(1000, 64)
    assert fresh.tokens_MD.std().item() == pytest.approx(0.02, rel=0.05)
    model = make_model().train().requires_grad_()
    codes_Bthw, slots_BTA = random_codes(model, 4), random_slots(model, 4)
    valid_Bt = torch.ones(2, 4, dtype=torch.bool)
    nats, count = cross_entropy(
        model(codes_Bthw, slots_BTA), WindowBatch(codes_Bthw, slots_BTA, valid_Bt)
    )
    (nats / count).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() < 1e3, name
    assert model.meta.tokens_MD.grad.abs().max() > 0


@torch.inference_mode()
def test_rotary_positions_computed_from_a_partial_sequence():
    """A cell asked for alone has the angles that it has in the whole sequence."""
    model = make_model(order="raster")
    codes_Bthw, slots_BTA = random_codes(model, 5), random_slots(model, 5)
    full_BfSV = model(codes_Bthw, slots_BTA)
    rollout = Rollout(model, codes_Bthw[:, :4], slots_BTA[:, :3], seeds=[0, 1], sampling=GREEDY)
    codes_BtSQ = codes_Bthw.flatten(2)[..., None]
    there = model.open_frame(4, codes_BtSQ[:, 3], slots_BTA[:, 3:], rollout._cache)
    for cell in range(12):
        tokens_BsD = model.cached_tokens(there, slice(cell, cell + 1), codes_BtSQ[:, 4])
        logits_BV = model.to_logits(tokens_BsD)[:, 0]
        assert (logits_BV - full_BfSV[:, 3, cell]).abs().max() < 1e-5


def test_inverted_variable_length_mask():
    """Only real frames are learned from, and what stands in the padding changes nothing."""
    model = make_model().requires_grad_()
    codes_Bthw, slots_BTA = random_codes(model, 5), random_slots(model, 5)
    valid_Bt = torch.tensor([[True] * 5, [True, True, True, False, False]])
    sums = []
    for padding in (0, 9):
        codes_Bthw[1, 3:] = padding
        slots_BTA[1, 2:] = NULL if padding else 1
        logits_BfSV = model(codes_Bthw, slots_BTA)
        sums.append(cross_entropy(logits_BfSV, WindowBatch(codes_Bthw, slots_BTA, valid_Bt)))
    assert sums[0] == sums[1]
    assert sums[0][1] == (4 + 2) * 12
    logits_BfSV.retain_grad()
    sums[1][0].backward()
    used_Bf = (logits_BfSV.grad != 0).flatten(2).any(-1)
    assert used_Bf.tolist() == [[True] * 4, [True, True, False, False]]


def test_padding_becomes_a_label():
    model = make_model().requires_grad_()
    codes_Bthw = torch.zeros(1, 3, 3, 4, dtype=torch.int64)  # padding is code 0
    slots_BTA = torch.full((1, 2, 1), NULL)
    logits_BfSV = model(codes_Bthw, slots_BTA)
    batch = WindowBatch(codes_Bthw, slots_BTA, torch.tensor([[True, True, False]]))
    logits_BfSV.retain_grad()
    cross_entropy(logits_BfSV, batch)[0].backward()
    assert not logits_BfSV.grad[:, 1].any()


@pytest.mark.parametrize("kind", sorted(ACTIONS))
def test_no_actions_crash(kind):
    """No actions at all (A = 0), and null everywhere, train and generate."""
    model = make_model(actions=ACTIONS[kind]).requires_grad_()
    codes_Bthw = random_codes(model, 4)
    slots_BTA = torch.full_like(random_slots(model, 4), NULL)
    batch = WindowBatch(codes_Bthw, slots_BTA, torch.ones(2, 4, dtype=torch.bool))
    cross_entropy(model(codes_Bthw, slots_BTA), batch)[0].backward()
    generated = generate_codes(
        model, codes_Bthw[:, :1], slots_BTA, seeds=[0, 1], sampling=SamplingConfig()
    )
    assert generated.shape == codes_Bthw.shape


def test_several_keys_at_once_never_construct():
    model = make_model(actions=ACTIONS["keys"])
    codes_Bthw = random_codes(model, 2, batch=1)
    logits = {
        keys: model(codes_Bthw, torch.tensor([[keys]]))
        for keys in ((0, 0, 0), (1, 0, 0), (2, 0, 0), (1, 2, 0), (1, 2, 3))
    }
    values = list(logits.values())
    assert all(not torch.equal(values[i], values[j]) for i in range(5) for j in range(i))


def test_generation_ignores_actions():
    model = make_model()
    prompt_Bthw = random_codes(model, 2, batch=1)
    made = {
        action: generate_codes(
            model, prompt_Bthw, torch.full((1, 6, 1), action), seeds=[0], sampling=GREEDY
        )
        for action in range(5)
    }
    assert len({tuple(codes.flatten().tolist()) for codes in made.values()}) == 5


def test_all_cells_of_a_frame_share_one_position():
    """With the same code everywhere, and before, cells are still told apart."""
    model = make_model(order="frame")
    same_Bthw = torch.full((1, 3, 3, 4), 7)
    logits_SV = model(same_Bthw, random_slots(model, 3, batch=1))[0, 1]
    assert len({tuple(row) for row in logits_SV.tolist()}) == 12
    with torch.no_grad():
        model.cell.weight[:] = model.cell.weight[:1]  # by their rotary places alone, too
    codes_Bthw = random_codes(model, 3, batch=1)
    codes_Bthw[:, 1] = 7
    logits_SV = model(codes_Bthw, random_slots(model, 3, batch=1))[0, 1]
    assert len({tuple(row) for row in logits_SV.tolist()}) == 12


@pytest.mark.parametrize("r", [2, 4])
def test_temporal_compression_misaligns_positions(r):
    """A latent frame is one step of time, however many pixel frames and actions it has."""
    plain, compressed = make_model(), make_model(code_spec(frames_per_latent=r))
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if name != "actions.table.weight":
                compressed.get_parameter(name).copy_(parameter)
    codes_Bthw = random_codes(plain, 6)
    with torch.no_grad():
        for model in (plain, compressed):
            model.actions.table.weight.zero_()
    assert torch.equal(
        plain(codes_Bthw, random_slots(plain, 6)),
        compressed(codes_Bthw, random_slots(compressed, 6)),
    )


def test_null_equals_no_op():
    embedding = ActionEmbedding(STEER, steps=2, dim=8)
    no_op, null = torch.zeros(1, 1, 2, 1, dtype=torch.int64), torch.full((1, 1, 2, 1), NULL)
    assert not torch.equal(embedding(no_op), embedding(null))
    for slots_BfrA, rows in ((no_op, [1, 7]), (null, [0, 6])):
        embedding.table.weight.grad = None
        embedding(slots_BfrA).sum().backward()
        touched = embedding.table.weight.grad.abs().sum(1).nonzero().flatten().tolist()
        assert touched == rows


@pytest.mark.parametrize("kind", sorted(ACTIONS))
def test_an_action_shares_a_row_with_another_or_with_null(kind):
    """Each value of each slot has its own; but a key has one in all slots."""
    spec = ACTIONS[kind]
    embedding = ActionEmbedding(spec, steps=2, dim=8)
    slots = 1 if kind == "keys" else len(spec.sizes)
    rows = {
        int(embedding.first_rows_rA[step, slot]) + value
        for step in range(2)
        for slot in range(slots)
        for value in range(NULL, spec.sizes[slot])
    }
    count = 2 * sum(spec.sizes[slot] + 1 for slot in range(slots))
    assert rows == set(range(count))
    assert len(embedding.table.weight) == max(1, count)


def test_no_key_value_cache():
    """A step computes one frame's tokens, not the past's again."""
    model = make_model()
    rollout = Rollout(
        model, random_codes(model, 3), random_slots(model, 3), seeds=[0, 1], sampling=GREEDY
    )
    lengths = []
    hook = model.transformer.register_forward_pre_hook(
        lambda _module, args: lengths.append(args[0].shape[1])
    )
    rollout.step(random_slots(model, 2))
    hook.remove()
    assert lengths == [12]


def test_no_context_limit():
    model = make_model()
    assert model.config.context_frames == 3
    codes_Bthw, slots_BTA = random_codes(model, 30), random_slots(model, 31)
    one = generate_codes(model, codes_Bthw, slots_BTA, seeds=[0, 1], sampling=GREEDY)
    assert one.shape[1] == 31


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5), (5, 1), (2, 7)])
@pytest.mark.parametrize("order", ["raster", "row", "frame"])
def test_square_grids_only(height, width, order):
    model = make_model(code_spec(height=height, width=width), order=order)
    slots_BTA = random_slots(model, 4)
    codes = generate_codes(model, random_codes(model, 1), slots_BTA, seeds=[0, 1], sampling=GREEDY)
    assert codes.shape == (2, 4, height, width)
    assert torch.equal(model(codes, slots_BTA).argmax(-1), codes[:, 1:].flatten(2))


def test_importing_it_needs_the_network():
    program = (
        "import sys\n"
        "def refuse(event, args):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo', 'urllib.Request'):\n"
        "        raise SystemExit(f'{event} {args}')\n"
        "sys.addaudithook(refuse)\n"
        "import worldloom.dynamics as d\n"
        "[getattr(d, name) for name in dir(d)]\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_cross_entropy_moves_the_codebook():
    """The codebook is the tokenizer's: what is learned stands beside it."""
    model = make_model(order="raster").train().requires_grad_()
    codes_Bthw, slots_BTA = random_codes(model, 3), random_slots(model, 3)
    before = [model.before.vectors.clone(), model.beside.vectors.clone()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(codes_Bthw, slots_BTA).square().sum().backward()
    optimizer.step()
    assert torch.equal(model.before.vectors, before[0])
    assert torch.equal(model.beside.vectors, before[1])
