"""Products by oneDNN where gradients are wanted: what torch computes, and its derivatives."""

import pytest
import torch
from dynamics.toys import OPTIONS, make_model, random_codes, random_slots
from torch import nn
from torch.utils.checkpoint import checkpoint
from worldloom.dynamics import DynamicsModel, linear
from worldloom.dynamics.linear import Linear
from worldloom.dynamics.onednn import DifferentiableProduct, outdoes_torch, works

WIDE, LONG = 640, 512  # enough weights to pay

pytestmark = pytest.mark.skipif(
    not works(torch.float32), reason="torch cannot multiply by oneDNN on this processor"
)


@pytest.fixture
def calls(monkeypatch):
    """How many products are learned by oneDNN, which is taken to be the faster one here."""
    calls = []
    monkeypatch.setattr(linear, "outdoes_torch", lambda: True)

    class Counted:
        def apply(*inputs):
            calls.append(inputs)
            return DifferentiableProduct.apply(*inputs)

    monkeypatch.setattr(linear, "DifferentiableProduct", Counted)
    return calls


def derivatives(layer, tokens, along):
    """The product and the gradients of all that went into it."""
    inputs = [tokens, *layer.parameters()]
    product = layer(tokens)
    return [product, *torch.autograd.grad(product, inputs, along)]


def by_torch(layer, tokens, along):
    exact = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None).double()
    exact.load_state_dict(layer.state_dict())
    return derivatives(exact, tokens.detach().double().requires_grad_(), along.double())


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (7, 18), (130,), (2, 400), (0,), (3, 0)])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_those_of_torch(calls, shape, bias):
    torch.manual_seed(0)
    layer = Linear(WIDE, LONG, bias=bias)
    tokens = torch.randn(*shape, WIDE, requires_grad=True)
    along = torch.randn(*shape, LONG)
    found = derivatives(layer, tokens, along)
    assert len(calls) == 1
    for own, exact in zip(found, by_torch(layer, tokens, along), strict=True):
        torch.testing.assert_close(own.double(), exact, atol=1e-4, rtol=1e-5)
        assert own.is_contiguous()


def test_neither_tokens_nor_gradients_need_lie_in_order(calls):
    torch.manual_seed(0)
    layer = Linear(WIDE, LONG)
    tokens = torch.randn(WIDE, 9, 5).permute(2, 1, 0).requires_grad_()
    for along in (torch.randn(LONG, 9, 5).permute(2, 1, 0), torch.ones(()).expand(5, 9, LONG)):
        found = derivatives(layer, tokens, along)
        for own, exact in zip(found, by_torch(layer, tokens, along), strict=True):
            torch.testing.assert_close(own.double(), exact, atol=1e-4, rtol=1e-5)
    assert len(calls) == 2


def test_tokens_may_lie_over_one_another(calls):
    torch.manual_seed(0)
    layer = Linear(WIDE, LONG)
    for stride in (0, 16):
        tokens = torch.randn(WIDE + 7 * 16).as_strided((7, WIDE), (stride, 1)).requires_grad_()
        along = torch.randn(7, LONG)
        found = derivatives(layer, tokens, along)
        exact = by_torch(layer, tokens.contiguous(), along)
        for own, right in zip(found, exact, strict=True):
            torch.testing.assert_close(own.double(), right, atol=1e-4, rtol=1e-5)
    assert len(calls) == 2


BIASES = {
    "every other number": lambda: torch.randn(2 * LONG)[::2],
    "one number for all": lambda: torch.randn(1).expand(LONG),
}
ODD_BIASES = {
    "a number": lambda: torch.randn(()),
    "one number": lambda: torch.randn(1),
}


@pytest.mark.parametrize("form", [*BIASES, *ODD_BIASES])
def test_a_bias_need_not_lie_in_order(calls, form):
    torch.manual_seed(0)
    layer = Linear(WIDE, LONG, bias=False)
    bias = {**BIASES, **ODD_BIASES}[form]()
    del layer.bias
    layer.bias = bias
    tokens = torch.randn(5, WIDE)
    exact = tokens.double() @ layer.weight.double().T + bias.double()
    torch.testing.assert_close(layer(tokens).double(), exact, atol=1e-4, rtol=1e-5)
    assert len(calls) == (form in BIASES)


def test_what_comes_out_can_be_written_to(calls):
    layer = Linear(WIDE, LONG)
    tokens = torch.randn(2, 3, WIDE, requires_grad=True)
    layer(tokens).add_(1).mul_(2).sum().backward()
    right = 2 * layer.weight.double().sum(0).expand(2, 3, WIDE)
    torch.testing.assert_close(tokens.grad.double(), right, atol=1e-4, rtol=1e-5)
    assert len(calls) == 1


@pytest.mark.parametrize("frozen", ["tokens", "weight"])
def test_only_what_a_gradient_needs_is_kept(calls, frozen):
    layer = Linear(WIDE, LONG, bias=False)
    tokens = torch.randn(4, WIDE, requires_grad=True)
    {"tokens": tokens, "weight": layer.weight}[frozen].requires_grad_(requires_grad=False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(tokens)
    assert len(calls) == len(kept) == 1
    assert kept[0].data_ptr() == {"weight": layer.weight, "tokens": tokens}[frozen].data_ptr()


@pytest.mark.parametrize("frozen", ["tokens", "weight", "bias"])
def test_what_is_frozen_gets_no_gradient(calls, frozen):
    layer = Linear(WIDE, LONG)
    tokens = torch.randn(4, WIDE, requires_grad=True)
    inputs = {"tokens": tokens, "weight": layer.weight, "bias": layer.bias}
    inputs[frozen].requires_grad_(requires_grad=False)
    layer(tokens).sum().backward()
    assert len(calls) == 1
    for name, tensor in inputs.items():
        assert (tensor.grad is None) == (name == frozen)


def test_gradients_have_gradients(calls):
    """A penalty on the gradient of what went in, and its gradient in the weights."""
    torch.manual_seed(0)
    layer = Linear(WIDE, LONG)
    own = torch.randn(3, WIDE, requires_grad=True)
    exact = nn.Linear(WIDE, LONG).double()
    exact.load_state_dict(layer.state_dict())
    penalties = []
    for each, tokens in ((layer, own), (exact, own.detach().double().requires_grad_())):
        out = each(tokens).square().sum()
        (slope,) = torch.autograd.grad(out, tokens, create_graph=True)
        slope.square().sum().backward()
        penalties.append([tokens.grad, each.weight.grad])
    assert len(calls) == 1
    for found, right in zip(*penalties, strict=True):
        torch.testing.assert_close(found.double(), right, rtol=1e-4, atol=1e-2)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_function_transforms_work(calls):
    layer = Linear(WIDE, LONG)
    tokens = torch.randn(3, WIDE)
    slopes = torch.func.vmap(torch.func.grad(lambda row: layer(row).square().sum()))(tokens)
    exact = 2 * (tokens.double() @ layer.weight.double().T + layer.bias.double())
    torch.testing.assert_close(slopes.double(), exact @ layer.weight.double(), atol=1e-3, rtol=1e-4)
    assert calls


def test_recomputed_layers_learn_the_same(calls):
    layer = Linear(WIDE, LONG)
    tokens = torch.randn(4, WIDE, requires_grad=True)
    along = torch.randn(4, LONG)
    plain = derivatives(layer, tokens, along)
    again = derivatives(Recomputed(layer), tokens, along)
    assert all(torch.equal(*pair) for pair in zip(plain, again, strict=True))
    assert len(calls) == 3


class Recomputed(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, tokens):
        return checkpoint(self.layer, tokens, use_reentrant=False)


def test_all_else_is_torch_s_affair(calls):
    layer = Linear(WIDE, LONG)
    tokens = torch.randn(4, WIDE)
    with torch.no_grad():
        layer(tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(tokens)
    for dtype in (torch.float64, torch.bfloat16):
        Linear(WIDE, LONG, dtype=dtype)(tokens.to(dtype))
    Linear(WIDE, 8)(tokens)
    Linear(WIDE, LONG, device="meta")(tokens.to("meta"))
    torch.compile(layer, backend="eager")(tokens)
    with pytest.raises(RuntimeError, match="shapes"):
        layer(tokens[:, 1:])
    with pytest.raises(RuntimeError, match="dtype"):
        layer(tokens.double())
    with pytest.raises(RuntimeError, match="at least 1D"):
        layer(torch.randn(()))
    assert not calls


@pytest.mark.parametrize(
    ("processor", "mkl", "onednn"),
    [
        ({"cpu_name": "AMD Zen 4"}, True, True),
        ({"cpu_name": "Intel Xeon"}, True, False),
        ({"cpu_name": ""}, True, False),
        ({}, True, False),
        ({"cpu_name": "AMD Zen 4"}, False, False),
        (None, True, False),  # a torch that cannot tell
    ],
)
def test_training_multiplies_by_torch_where_that_is_faster(
    monkeypatch, calls, processor, mkl, onednn
):
    if processor is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor, raising=False)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    monkeypatch.setattr(linear, "outdoes_torch", outdoes_torch.__wrapped__)
    Linear(WIDE, LONG)(torch.randn(2, WIDE))
    assert bool(calls) == onednn


@pytest.mark.parametrize("options", ["defaults", *OPTIONS])
def test_a_model_learns_what_it_learns_by_torch(monkeypatch, calls, options):
    found = []
    for least in (1, 1 << 40):
        monkeypatch.setattr(linear, "_LEARNED_FROM", least)
        model = make_model(**OPTIONS.get(options, {}))
        found.append(gradients(model))
    assert calls
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], atol=1e-5, rtol=1e-4, msg=name)


def gradients(model: DynamicsModel):
    model.train().requires_grad_()
    codes_Bthw, slots_BTA = random_codes(model, 3), random_slots(model, 3)
    model(codes_Bthw, slots_BTA).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
