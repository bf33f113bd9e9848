"""The norm that is written out is torch's."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import rms_norm
from worldloom.dynamics.norm import Norm

SHAPES = [(5, 7, 24), (2, 3, 4, 24), (24,)]
EPS = torch.finfo(torch.float32).eps


def norm_of(scales):
    norm = Norm(len(scales)).to(scales.dtype)
    norm.load_state_dict({"weight": scales})
    return norm


def exact(tokens, scales):
    return rms_norm(tokens.double(), (tokens.shape[-1],), eps=EPS) * scales.double()


def tensors(shape, *, size=1.0):
    generator = torch.Generator().manual_seed(0)
    tokens, gradient = size * torch.randn(2, *shape, generator=generator)
    return tokens, torch.randn(shape[-1], generator=generator), gradient


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1.0, 1e-4, 1e4])
def test_norm_and_gradient_are_those_of_the_formula(shape, size):
    tokens, scales, gradient = tensors(shape, size=size)
    norm, found = norm_of(scales), tokens.clone().requires_grad_()
    wanted = [t.double().requires_grad_() for t in (tokens, scales)]
    normalised, truth = norm(found), exact(*wanted)
    normalised.backward(gradient)
    truth.backward(gradient.double())
    assert_close(normalised, truth)
    assert_close(found.grad, wanted[0].grad)
    assert_close(norm.weight.grad, wanted[1].grad)


def assert_close(one, other):
    most = other.abs().max().item()
    torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5 * most)


@pytest.mark.parametrize("shape", SHAPES)
def test_without_a_gradient_the_numbers_are_the_same(shape):
    tokens, scales, _ = tensors(shape)
    norm = norm_of(scales)
    with torch.no_grad():
        without = norm(tokens)
    assert torch.equal(without, norm(tokens).detach())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("grad", [True, False])
def test_other_types_come_back_as_they_went_in(shape, dtype, grad):
    tokens, scales, _ = (t.to(dtype) for t in tensors(shape))
    with torch.set_grad_enabled(grad):
        normalised = norm_of(scales)(tokens)
    assert normalised.dtype == dtype
    error = 2e-2 if dtype == torch.bfloat16 else 1e-6  # float64 has an eps of its own
    torch.testing.assert_close(normalised.double(), exact(tokens, scales), rtol=error, atol=error)


def test_tokens_of_zeros_stay_zeros_with_a_finite_gradient():
    tokens = torch.zeros(2, 8, requires_grad=True)
    norm = Norm(8)
    norm(tokens).sum().backward()
    assert tokens.grad is not None
    assert tokens.grad.isfinite().all()
    assert not norm(tokens).any()


@pytest.mark.parametrize("grad", [True, False])
def test_a_forward_can_be_traced_with_tensors_that_hold_nothing(grad):
    with FakeTensorMode(), torch.set_grad_enabled(grad):
        assert Norm(8)(torch.randn(2, 8)).shape == (2, 8)
