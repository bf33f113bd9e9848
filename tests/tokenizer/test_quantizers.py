"""Promises of every quantizer. A new one joins by being added to QUANTIZERS."""

from collections.abc import Callable

import pytest
import torch
from worldloom.tokenizer import QuantizerConfig
from worldloom.tokenizer.quantizers import VQ, Quantizer

QUANTIZERS: dict[str, Callable[[], Quantizer]] = {
    "vq": lambda: VQ(QuantizerConfig(vocab_size=64, code_dim=8), tokens_per_step=96)
}


def latents(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build(name: str, *, training_steps: int) -> Quantizer:
    """A quantizer after some training forwards, in evaluation."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        quantizer = QUANTIZERS[name]()
        for seed in range(training_steps):
            quantizer(latents(4, 96, 8, seed=seed))
    return quantizer.eval()


@pytest.fixture(params=sorted(QUANTIZERS))
def trained(request) -> Quantizer:
    """A quantizer that was trained a little."""
    return build(request.param, training_steps=4)


@pytest.fixture(params=[(name, steps) for name in sorted(QUANTIZERS) for steps in (0, 4)], ids=str)
def either(request) -> Quantizer:
    """A quantizer as it is built, and one that was trained a little."""
    name, steps = request.param
    return build(name, training_steps=steps)


def weights(quantizer: Quantizer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}


def test_looking_a_code_up_and_quantizing_gives_it_back_for_every_code(either):
    codes_BN = torch.arange(len(either.codebook))[None]
    assert torch.equal(either.quantize(either.lookup(codes_BN)), codes_BN)


def test_so_it_does_through_bfloat16(either):
    codes_BN = torch.arange(len(either.codebook))[None]
    assert torch.equal(either.quantize(either.lookup(codes_BN).bfloat16()), codes_BN)


def test_so_it_does_under_autocast_which_the_quantizer_leaves(either):
    codes_BN = torch.arange(len(either.codebook))[None]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(either.quantize(either.lookup(codes_BN)), codes_BN)
        quantized_BNZ, _, loss = either(latents(1, 9, 8))
    assert (quantized_BNZ.dtype, loss.dtype) == (torch.float32, torch.float32)


def test_codes_are_those_of_the_nearest_vectors(either):
    latents_BNZ = latents(3, 50, 8, seed=9)
    distance_BNV = torch.cdist(latents_BNZ.double(), either.codebook.double())
    assert torch.equal(either.quantize(latents_BNZ), distance_BNV.argmin(-1))


def test_of_equal_codebook_vectors_the_first_is_the_code():
    quantizer = QUANTIZERS["vq"]().eval()
    quantizer.vq.codebook = torch.ones(64, 8)
    assert torch.equal(quantizer.quantize(latents(2, 5, 8)), torch.zeros(2, 5, dtype=torch.int64))


def test_many_vectors_are_quantized_as_few_are(trained, monkeypatch):
    latents_BNZ = latents(3, 50, 8)
    whole = trained.quantize(latents_BNZ)
    monkeypatch.setattr("worldloom.tokenizer.quantizers.vq._PIECE", 7)
    assert torch.equal(trained.quantize(latents_BNZ), whole)


def test_lookup_takes_codes_of_any_shape(trained):
    codes = torch.arange(24).reshape(2, 3, 4)
    assert torch.equal(trained.lookup(codes)[1, 2, 3], trained.codebook[23])


def test_evaluation_changes_nothing_even_before_any_training(either):
    before = weights(either)
    either.quantize(latents(2, 40, 8))
    either(latents(2, 40, 8))
    after = weights(either)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_training_moves_the_codebook(trained):
    before = trained.codebook.clone()
    trained.train()(latents(2, 40, 8, seed=5))
    assert not torch.equal(trained.codebook, before)


def test_what_a_forward_returns_agrees_with_quantize_and_lookup(trained):
    latents_BNZ = latents(2, 40, 8, seed=5)
    quantized_BNZ, codes_BN, loss = trained(latents_BNZ)
    assert torch.equal(codes_BN, trained.quantize(latents_BNZ))
    assert torch.equal(quantized_BNZ, trained.lookup(codes_BN))
    expected = 0.25 * (latents_BNZ - quantized_BNZ).square().mean()
    torch.testing.assert_close(loss, expected)


def test_the_gradient_passes_through_to_the_latents(trained):
    latents_BNZ = latents(2, 40, 8, seed=5).requires_grad_()
    quantized_BNZ, _, _ = trained.train()(latents_BNZ)
    quantized_BNZ.square().sum().backward()
    assert (latents_BNZ.grad.abs().sum(-1) > 0).all()


def test_the_library_evaluates_to_the_same_codes(trained):
    latents_BNZ = latents(2, 40, 8, seed=5)
    _, codes_BN, _ = trained.vq.eval()(latents_BNZ)
    assert torch.equal(trained.quantize(latents_BNZ), codes_BN)
