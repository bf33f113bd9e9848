"""Weights laid out for generating: the same products, of the weights as they are."""

from collections.abc import Iterator
from copy import deepcopy

import pytest
import torch
from dynamics.toys import make_model, random_codes, random_slots
from torch import nn
from torch.nn.functional import linear
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from worldloom.common import WeightAverage
from worldloom.dynamics import SamplingConfig, generate_codes
from worldloom.dynamics import linear as module
from worldloom.dynamics.linear import Linear, pack_linears, packed_weights
from worldloom.dynamics.onednn import works

SIZE = 512  # 512 x 512: large enough to pay


def require(*dtypes):
    for dtype in dtypes:
        if not works(dtype):
            pytest.skip(f"torch cannot lay out {dtype} weights for this processor")


@pytest.fixture
def layer():
    require(torch.float32)
    torch.manual_seed(0)
    with torch.inference_mode(mode=False):
        return Linear(SIZE, SIZE).eval().requires_grad_(requires_grad=False)


@pytest.fixture
def calls(monkeypatch):
    """How many products go through a copy."""
    for dtype in (torch.float32, torch.bfloat16):
        works(dtype)  # tries one, once
    product, calls = module.product, []
    monkeypatch.setattr(module, "product", lambda *args: calls.append(1) or product(*args))
    return calls


@pytest.fixture
def rolling() -> Iterator[None]:
    """What is around a rollout's forwards."""
    with torch.inference_mode(), packed_weights():
        yield


def exact(layer, tokens):
    bias = None if layer.bias is None else layer.bias.double()
    return linear(tokens.double(), layer.weight.double(), bias)


def assert_right(layer, tokens, *, error=1e-5):
    product = layer(tokens)
    assert (product.dtype, product.shape) == (tokens.dtype, (*tokens.shape[:-1], SIZE))
    torch.testing.assert_close(product.double(), exact(layer, tokens), atol=error, rtol=error)


@pytest.mark.usefixtures("rolling")
@pytest.mark.parametrize("shape", [(1,), (1, 1), (8,), (2, 3, 64), (513,), (0,), (2, 0)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_a_packed_product_is_the_product(calls, shape, bias, dtype, error):
    require(dtype)
    with torch.inference_mode(mode=False):
        layer = Linear(SIZE, SIZE, bias=bias).eval().to(dtype)
    layer.pack()
    assert_right(layer, torch.randn(*shape, SIZE, dtype=dtype), error=error)
    assert len(calls) == 1


@pytest.mark.usefixtures("rolling")
def test_tokens_need_not_lie_in_order(layer, calls):
    layer.pack()
    assert_right(layer, torch.randn(SIZE, 5, 3).mT.transpose(0, 2))
    assert len(calls) == 1


def write_in_place(layer):
    layer.weight.mul_(2)


def write_data(layer):
    layer.weight.data.mul_(2)


def write_one_of_many(layer):
    layer.weight.data[3, 5] += 1e-3


def permute_rows(layer):
    layer.weight.data.copy_(layer.weight.data.roll(1, 0))


def permute_columns(layer):
    layer.weight.data.copy_(layer.weight.data.roll(2, 1))


def write_through_numpy(layer):
    layer.weight.numpy()[:] *= 2


def fused_step(layer):
    layer.requires_grad_()
    with torch.enable_grad():
        layer(torch.randn(4, SIZE)).sum().backward()
    torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True).step()


def load(layer):
    layer.load_state_dict({name: value / 3 for name, value in layer.state_dict().items()})


def assign(layer):
    """An address that was given back is soon given out again."""
    state = {name: value / 3 for name, value in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)


def swap_data(layer):
    layer.weight.data = torch.randn(SIZE, SIZE) / SIZE


def new_parameter(layer):
    layer.weight = nn.Parameter(torch.randn(SIZE, SIZE) / SIZE, requires_grad=False)


def from_a_vector(layer):
    vector_to_parameters(parameters_to_vector(layer.parameters()) / 2, layer.parameters())


WRITES = [
    write_in_place, write_data, write_one_of_many, permute_rows, permute_columns,
    write_through_numpy, fused_step, load, assign, swap_data, new_parameter, from_a_vector,
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("write", WRITES)
def test_a_rollout_takes_the_weights_as_they_are_when_it_begins(layer, calls, write):
    tokens = torch.randn(4, SIZE)
    for nth in range(1, 5):
        with packed_weights():
            layer.pack()
            assert_right(layer, tokens)
        assert len(calls) == nth
        write(layer)
        assert_right(layer, tokens)  # what is no rollout always does


@torch.no_grad()
@pytest.mark.parametrize("write", [write_in_place, load, swap_data, new_parameter])
def test_a_rollout_under_way_sees_writes_that_torch_counts(layer, calls, write):
    with packed_weights():
        layer.pack()
        write(layer)
        assert_right(layer, torch.randn(4, SIZE))
    assert not calls


@torch.no_grad()
def test_averaged_weights_are_judged_as_they_are_each_time():
    model = make_model().eval()
    average = WeightAverage(model, decay=0.5)
    prompt_Bthw, slots_BTA = random_codes(model, 2), random_slots(model, 6)
    for nth in range(3):
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape))
        average.update(model, step=10 + nth)
        judged = average.of(model)
        found = [
            generate_codes(each, prompt_Bthw, slots_BTA, seeds=[0, 1], sampling=SamplingConfig())
            for each in (judged, deepcopy(judged))
        ]
        assert torch.equal(*found), nth


def test_what_needs_a_gradient_or_trains_uses_no_copy(layer, calls):
    layer.requires_grad_()
    with packed_weights():
        layer.pack()
        layer(torch.randn(2, SIZE)).sum().backward()
        assert layer.weight.grad is not None
        layer.train()
        with torch.no_grad():
            layer(torch.randn(2, SIZE))
            layer.pack()
            layer(torch.randn(2, SIZE))
    assert not calls


@pytest.mark.usefixtures("rolling")
def test_what_does_not_fit_is_torch_s_affair(layer, calls):
    layer.pack()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(2, SIZE)).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="dtype"):
        layer(torch.randn(2, SIZE, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="shapes"):
        layer(torch.randn(2, SIZE + 1))
    assert not calls


@torch.no_grad()
def test_a_packed_layer_can_be_copied(layer, calls):
    tokens = torch.randn(4, SIZE)
    with packed_weights():
        layer.pack()
        layer(tokens)
        other = deepcopy(layer)
        other.weight.mul_(2)
        assert_right(other, tokens)
        assert len(calls) == 1
        other.pack()
        assert_right(other, tokens)
        assert_right(layer, tokens)
        assert len(calls) == 3


@torch.no_grad()
def test_converted_weights_are_packed_anew(layer, calls):
    require(torch.bfloat16)
    tokens = torch.randn(4, SIZE, dtype=torch.bfloat16)
    with packed_weights():
        layer.pack()
        layer.to(torch.bfloat16)
        layer.pack()
        assert_right(layer, tokens, error=3e-2)
        layer.to(torch.float64)
        layer.pack()  # which does nothing
        assert_right(layer, tokens.double())
    assert len(calls) == 1


def test_a_layer_of_another_shares_its_weights_and_draws_none():
    other = nn.Linear(4, 3, bias=False)
    torch.manual_seed(0)
    layer = Linear.of(other)
    assert layer.weight is other.weight
    assert layer.bias is None
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(1))


@torch.no_grad()
def test_only_products_that_gain_are_packed(monkeypatch, calls):
    require(torch.float32)
    monkeypatch.undo()  # of conftest.py's
    monkeypatch.setattr(module, "product", lambda *_: calls.append(1) or torch.zeros(1, SIZE))
    model = nn.Sequential(Linear(SIZE, SIZE), Linear(SIZE, 2), nn.Linear(2, SIZE)).eval()
    pack_linears(model)
    with packed_weights():
        model(torch.randn(1, SIZE))
    assert len(calls) == 1
