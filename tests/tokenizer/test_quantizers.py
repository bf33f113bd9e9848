"""Promises of every quantizer. A new one joins by being added to QUANTIZERS."""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import vector_quantize_pytorch as library
from safetensors.torch import load_file
from tokenizer.process_of_two import CONFIGS, LFQ, half_batch
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from worldloom.common import library_seed
from worldloom.tokenizer import QuantizerConfig
from worldloom.tokenizer.quantizers import Quantizer, build_quantizer
from worldloom.tokenizer.quantizers.nearest import nearest

QUANTIZERS = {
    "vq": QuantizerConfig(vocab_size=64, code_dim=8),
    "vq cosine": QuantizerConfig(vocab_size=64, code_dim=8, cosine=True),
    "fsq": QuantizerConfig(kind="fsq", fsq_levels=(4, 5, 2)),
    "lfq": QuantizerConfig(kind="lfq", vocab_size=64),
    "lfq spherical": QuantizerConfig(kind="lfq", vocab_size=64, spherical=True),
    "residual": QuantizerConfig(kind="residual", vocab_size=32, code_dim=8, num_levels=3),
    "residual cosine": QuantizerConfig(
        kind="residual", vocab_size=32, code_dim=8, num_levels=2, cosine=True
    ),
}
LEARNED = [name for name, config in QUANTIZERS.items() if config.kind in ("vq", "residual")]
TOKENS = 4 * 96


def latents(quantizer: Quantizer, *shape: int, seed: int = 0) -> torch.Tensor:
    """Latents as an encoder may give them to this quantizer; within (-1, 1), where fsq wants."""
    shape = (*shape, quantizer.codebook.shape[-1])
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).tanh()


def build(name: str, *, training_steps: int, seed: int = 0) -> Quantizer:
    """A quantizer after some training forwards, in evaluation."""
    with library_seed(seed):
        quantizer = build_quantizer(QUANTIZERS[name], tokens_per_step=TOKENS)
        for step in range(training_steps):
            quantizer(latents(quantizer, 4, 96, seed=step))
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


@pytest.fixture(params=LEARNED)
def learned(request) -> Quantizer:
    """A trained quantizer with a codebook that it learned."""
    return build(request.param, training_steps=4)


def weights(quantizer: Quantizer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def levels(quantizer: Quantizer) -> torch.Tensor:
    """Its codebook_QVZ, also where Q is 1."""
    return quantizer.codebook if quantizer.depth > 1 else quantizer.codebook[None]


def assert_every_code_comes_back(quantizer: Quantizer, dtype: torch.dtype) -> None:
    first_VZ, *later = levels(quantizer)
    codes_BN = torch.arange(len(first_VZ))[None]
    found = quantizer.quantize(first_VZ[codes_BN].to(dtype))
    assert torch.equal(found if quantizer.depth == 1 else found[..., 0], codes_BN)
    # What reaches a later level is what the earlier ones left over, so it is asked by itself.
    for codebook_VZ in later:
        assert torch.equal(nearest(codebook_VZ[codes_BN].to(dtype).float(), codebook_VZ), codes_BN)


# Codes and vectors.


def test_looking_a_code_up_and_quantizing_gives_it_back_for_every_code(either):
    assert_every_code_comes_back(either, torch.float32)


def test_so_it_does_through_bfloat16(either):
    assert_every_code_comes_back(either, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "fsq_levels",
    [(2,), (3,), (256,), (2, 2, 2), (7, 6, 5), (8, 8, 8), (8, 5, 5, 5), (8, 8, 8, 5, 5, 5)],
)
def test_so_it_does_on_every_grid(fsq_levels, dtype):
    config = QuantizerConfig(kind="fsq", fsq_levels=fsq_levels)
    assert_every_code_comes_back(build_quantizer(config, tokens_per_step=1), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("vocab_size", [2, 4, 512, 2**18])
def test_so_it_does_on_every_cube(vocab_size, spherical, dtype):
    config = QuantizerConfig(kind="lfq", vocab_size=vocab_size, spherical=spherical)
    quantizer = build_quantizer(config, tokens_per_step=1)
    assert quantizer.codebook.shape == (vocab_size, vocab_size.bit_length() - 1)
    assert_every_code_comes_back(quantizer, dtype)


@pytest.mark.parametrize("name", sorted(QUANTIZERS))
def test_the_codebook_has_the_sizes_of_the_config_and_no_two_equal_vectors(name):
    config, quantizer = QUANTIZERS[name], build(name, training_steps=4)
    assert quantizer.depth == config.depth
    assert levels(quantizer).shape == (config.depth, config.size, config.dim)
    assert quantizer.codebook.dtype == torch.float32
    for codebook_VZ in levels(quantizer):
        assert len(codebook_VZ.unique(dim=0)) == len(codebook_VZ)


def test_codes_are_int64_below_the_vocabulary_one_or_one_a_level_for_every_latent(trained):
    codes = trained.quantize(latents(trained, 3, 50))
    assert codes.dtype == torch.int64
    assert codes.shape == ((3, 50) if trained.depth == 1 else (3, 50, trained.depth))
    assert 0 <= codes.min() <= codes.max() < levels(trained).shape[1]


def test_codes_are_those_of_the_nearest_vectors_level_by_level(trained):
    latents_BNZ = latents(trained, 3, 50, seed=9)
    found = trained.quantize(latents_BNZ)
    found_BNQ = found if trained.depth > 1 else found[..., None]
    left_BNZ = latents_BNZ.double()
    for level, codebook_VZ in enumerate(levels(trained).double()):
        wanted_BNZ = normalize(left_BNZ, dim=-1) if getattr(trained, "cosine", False) else left_BNZ
        distance_BNV = torch.cdist(wanted_BNZ, codebook_VZ)
        assert torch.equal(found_BNQ[..., level], distance_BNV.argmin(-1))
        left_BNZ = left_BNZ - codebook_VZ[found_BNQ[..., level]]


def test_with_cosine_the_length_of_a_latent_says_nothing_and_vectors_have_length_1():
    for steps in (0, 4):
        quantizer = build("vq cosine", training_steps=steps)
        latents_BNZ = latents(quantizer, 3, 50)
        assert torch.equal(quantizer.quantize(latents_BNZ), quantizer.quantize(8 * latents_BNZ))
        torch.testing.assert_close(quantizer.codebook.norm(dim=-1), torch.ones(64))


def test_of_equal_codebook_vectors_the_first_is_the_code():
    quantizer = build("vq", training_steps=0)
    quantizer.vq.codebook = torch.ones(64, 8)
    codes_BN = quantizer.quantize(latents(quantizer, 2, 5))
    assert torch.equal(codes_BN, torch.zeros(2, 5, dtype=torch.int64))


def test_a_latent_has_the_same_code_whatever_stands_beside_it(trained):
    latents_BNZ = latents(trained, 3, 50)
    whole = trained.quantize(latents_BNZ)
    for row in range(3):
        assert torch.equal(trained.quantize(latents_BNZ[row : row + 1]), whole[row : row + 1])
        assert torch.equal(
            trained.quantize(latents_BNZ[row : row + 1, 7:8]), whole[row, 7][None, None]
        )
    assert torch.equal(trained.quantize(latents_BNZ.flip(0)), whole.flip(0))


def test_many_vectors_are_quantized_as_few_are(trained, monkeypatch):
    latents_BNZ = latents(trained, 3, 50)
    whole = trained.quantize(latents_BNZ)
    monkeypatch.setattr("worldloom.tokenizer.quantizers.nearest._PIECE", 7)
    assert torch.equal(trained.quantize(latents_BNZ), whole)


@pytest.mark.parametrize("shape", [(2, 0), (0, 5), (0, 0)])
def test_no_latents_have_no_codes_and_no_codes_no_vectors(trained, shape):
    codes = trained.quantize(latents(trained, *shape))
    assert codes.shape[:2] == shape
    assert codes.dtype == torch.int64
    assert trained.lookup(codes).shape == (*shape, trained.codebook.shape[-1])


def test_lookup_takes_codes_of_any_shape_and_sums_the_levels(trained):
    depth = trained.depth
    codes = torch.arange(24 * depth).reshape(2, 3, 4, depth) % levels(trained).shape[1]
    vectors = trained.lookup(codes if depth > 1 else codes[..., 0])
    expected = sum(levels(trained)[level][codes[1, 2, 3, level]] for level in range(depth))
    assert vectors.shape[:3] == (2, 3, 4)
    torch.testing.assert_close(vectors[1, 2, 3], expected, rtol=0, atol=1e-6)


# Precision.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_latents_of_any_dtype_are_quantized_in_float32(trained, dtype):
    latents_BNZ = latents(trained, 3, 50).to(dtype)
    assert torch.equal(trained.quantize(latents_BNZ), trained.quantize(latents_BNZ.float()))
    for mode in (False, True):
        quantized_BNZ, _, loss = trained.train(mode)(latents_BNZ)
        assert (quantized_BNZ.dtype, loss.dtype) == (torch.float32, torch.float32)


def test_quantizers_leave_autocast(either):
    latents_BNZ = latents(either, 3, 50)
    expected = either.quantize(latents_BNZ)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(either.quantize(latents_BNZ), expected)
        assert_every_code_comes_back(either, torch.float32)
        for mode in (False, True):
            quantized_BNZ, _, loss = either.train(mode)(latents_BNZ)
            assert (quantized_BNZ.dtype, loss.dtype) == (torch.float32, torch.float32)


# Evaluation.


def test_evaluation_changes_nothing_even_before_any_training(either):
    before = weights(either)
    either.quantize(latents(either, 2, 40))
    either(latents(either, 2, 40))
    assert same(weights(either), before)


def test_quantize_changes_nothing_in_training_either(either):
    before = weights(either.train())
    either.quantize(latents(either, 2, 40))
    assert same(weights(either), before)


def test_what_a_forward_returns_in_evaluation_agrees_with_quantize_and_lookup(either):
    latents_BNZ = latents(either, 2, 40, seed=5)
    quantized_BNZ, codes, loss = either(latents_BNZ)
    assert torch.equal(codes, either.quantize(latents_BNZ))
    assert torch.equal(quantized_BNZ, either.lookup(codes))
    assert loss.shape == ()
    assert loss.isfinite()


class _LargestTensor(TorchDispatchMode):
    """Notes how many entries the largest tensor has that any operation returns."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.entries = max(self.entries, tensor.numel())
        return out


@pytest.mark.parametrize(
    "config",
    [
        QuantizerConfig(vocab_size=2**10, code_dim=2),
        QuantizerConfig(kind="fsq", fsq_levels=(8, 8, 8, 5, 5, 5)),
        QuantizerConfig(kind="lfq", vocab_size=2**18),
        QuantizerConfig(kind="residual", vocab_size=2**10, code_dim=2),
    ],
    ids=lambda config: config.kind,
)
def test_no_array_of_all_latents_by_all_codes_is_built(config, monkeypatch):
    monkeypatch.setattr("worldloom.tokenizer.quantizers.nearest._PIECE_DISTANCES", 2**16)
    quantizer = build_quantizer(config, tokens_per_step=1).eval()
    latents_BNZ = latents(quantizer, 1, 2**12)
    with _LargestTensor() as largest:
        quantizer.quantize(latents_BNZ)
        quantizer(latents_BNZ)
    assert largest.entries <= max(2**16, quantizer.codebook.numel())
    assert largest.entries < config.size * 2**12


def test_a_large_lfq_trains_without_such_an_array():
    quantizer = build_quantizer(QuantizerConfig(kind="lfq", vocab_size=2**18), tokens_per_step=1)
    latents_BNZ = latents(quantizer, 1, 2**11).requires_grad_()
    with _LargestTensor() as largest:
        quantizer(latents_BNZ)[2].backward()
    assert largest.entries <= quantizer.codebook.numel()
    assert latents_BNZ.grad.abs().sum() > 0


# Training.


def test_the_gradient_passes_through_to_every_latent(trained):
    latents_BNZ = latents(trained, 2, 40, seed=5).requires_grad_()
    quantized_BNZ, _, _ = trained.train()(latents_BNZ)
    direction_Z = torch.linspace(1, 2, quantized_BNZ.shape[-1])
    (quantized_BNZ * direction_Z).sum().backward()
    assert (latents_BNZ.grad.abs().sum(-1) > 0).all()
    # Passing through neither shrinks nor multiplies it, whatever the number of levels.
    ratio = latents_BNZ.grad.norm(dim=-1) / direction_Z.norm()
    assert 0.3 < ratio.median() < 1.7


def test_training_gives_the_codes_and_vectors_that_evaluation_would(trained):
    latents_BNZ = latents(trained, 2, 40, seed=5).requires_grad_()
    expected = trained.quantize(latents_BNZ)
    vectors_BNZ = trained.lookup(expected)
    quantized_BNZ, codes, _ = trained.train()(latents_BNZ)
    assert torch.equal(codes, expected)
    torch.testing.assert_close(quantized_BNZ, vectors_BNZ, rtol=1e-4, atol=1e-5)


def test_training_on_spread_latents_uses_most_codes(trained):
    codes = trained.train()(latents(trained, 40, 96, seed=5))[1]
    for level in range(trained.depth):
        used = (codes if trained.depth == 1 else codes[..., level]).unique()
        assert len(used) > 0.75 * levels(trained).shape[1]


@pytest.mark.parametrize("name", LEARNED)
def test_training_moves_the_codebook_and_nothing_else_does(name):
    quantizer = build(name, training_steps=4)
    before = quantizer.codebook.clone()
    quantizer.train()(latents(quantizer, 2, 40, seed=5))
    assert (quantizer.codebook != before).any(-1).any(-1).all()
    assert not list(quantizer.parameters())


@pytest.mark.parametrize("name", LEARNED)
def test_codes_that_nobody_uses_are_replaced(name):
    quantizer = build(name, training_steps=4)
    # All latents lie near two points now, where few codes are.
    points_BNZ = latents(quantizer, 1, 2, seed=7).repeat(1, 200, 1)
    for step in range(60):
        quantizer.train()(points_BNZ + 0.1 * latents(quantizer, 1, 400, seed=step))
    used = quantizer.eval().quantize(points_BNZ + 0.1 * latents(quantizer, 1, 400, seed=999))
    used_N = used.flatten() if quantizer.depth == 1 else used[..., 0].flatten()
    assert len(used_N.unique()) > 0.75 * levels(quantizer).shape[1]


@pytest.mark.parametrize("name", [name for name in sorted(QUANTIZERS) if name != "fsq"])
def test_the_loss_draws_latents_to_their_vectors_level_by_level(name):
    quantizer, config = build(name, training_steps=4), QUANTIZERS[name]
    latents_BNZ = latents(quantizer, 2, 40, seed=5)
    codes = quantizer.quantize(latents_BNZ)
    expected, left_BNZ = torch.zeros(()), latents_BNZ
    for level, codebook_VZ in enumerate(levels(quantizer)):
        vectors_BNZ = codebook_VZ[codes if quantizer.depth == 1 else codes[..., level]]
        on_sphere = config.cosine or config.spherical
        wanted_BNZ = normalize(left_BNZ, dim=-1) if on_sphere else left_BNZ
        expected = expected + config.commitment * (wanted_BNZ - vectors_BNZ).square().mean()
        left_BNZ = left_BNZ - vectors_BNZ
    torch.testing.assert_close(quantizer(latents_BNZ)[2], expected)
    if name in LEARNED:
        torch.testing.assert_close(quantizer.train()(latents_BNZ)[2], expected)


def test_latents_beyond_the_grid_still_learn_and_are_brought_back():
    """A tanh, or a clamp with its own gradient, would leave them where they are for ever."""
    quantizer = build("fsq", training_steps=0).train()
    far_BNZ = (5 * latents(quantizer, 2, 40).sign()).requires_grad_()
    quantized_BNZ, _, loss = quantizer(far_BNZ)
    assert quantized_BNZ.abs().max() <= 1 + 1e-6
    (gradient,) = torch.autograd.grad(quantized_BNZ.sum(), far_BNZ, retain_graph=True)
    assert torch.equal(gradient, torch.ones_like(gradient))
    (gradient,) = torch.autograd.grad(loss, far_BNZ)
    assert torch.equal(gradient.sign(), far_BNZ.sign())  # downhill is towards the grid


# State and randomness.


def test_a_state_dict_brings_the_codes_along(request, trained):
    name = next(n for n in sorted(QUANTIZERS, key=len) if request.node.callspec.id == n)
    other = build(name, training_steps=1, seed=1)
    other.load_state_dict(weights(trained))
    latents_BNZ = latents(trained, 2, 40, seed=5)
    assert torch.equal(other.codebook, trained.codebook)
    assert torch.equal(other.quantize(latents_BNZ), trained.quantize(latents_BNZ))


@pytest.mark.parametrize("name", sorted(QUANTIZERS))
def test_torchs_seed_is_the_only_randomness(name):
    results = []
    for noise in (1, 2):
        random.seed(noise)
        np.random.seed(noise)  # noqa: NPY002 - the global generator is what must not matter
        results.append(build(name, training_steps=6))
    assert same(weights(results[0]), weights(results[1]))


@pytest.mark.parametrize("name", LEARNED)
def test_another_seed_gives_another_codebook(name):
    before, after = (build(name, training_steps=0, seed=seed).codebook for seed in (0, 1))
    assert not torch.equal(before, after)


# Against the library.


def test_the_library_evaluates_to_the_same_codes():
    for name in ("vq", "vq cosine"):
        quantizer = build(name, training_steps=4)
        latents_BNZ = latents(quantizer, 2, 40, seed=5)
        _, codes_BN, _ = quantizer.vq.eval()(latents_BNZ)
        assert torch.equal(quantizer.quantize(latents_BNZ), codes_BN)


def test_the_library_rounds_to_the_same_grid():
    quantizer = build("fsq", training_steps=0)
    reference = library.FSQ([4, 5, 2], preserve_symmetry=True, bound_hard_clamp=True)
    latents_BNZ = latents(quantizer, 2, 400)
    vectors_BNZ, codes_BN = reference(latents_BNZ)
    assert torch.equal(quantizer.quantize(latents_BNZ), codes_BN.long())
    torch.testing.assert_close(quantizer.lookup(codes_BN.long()), vectors_BNZ)
    torch.testing.assert_close(quantizer.codebook, reference.implicit_codebook)


@pytest.mark.parametrize("spherical", [False, True])
def test_the_entropy_loss_is_the_librarys_while_that_fits_in_memory(spherical):
    config = QuantizerConfig(
        kind="lfq", vocab_size=64, spherical=spherical, entropy=0.3, commitment=0.7
    )
    quantizer = build_quantizer(config, tokens_per_step=1)
    reference = library.LFQ(
        codebook_size=64, spherical=spherical, entropy_loss_weight=0.3, commitment_loss_weight=0.7
    )
    latents_BNZ = latents(quantizer, 2, 40)
    theirs = reference(latents_BNZ, inv_temperature=6.0 if spherical else 1.0)  # ours is warmer
    torch.testing.assert_close(
        quantizer(latents_BNZ)[2], theirs.entropy_aux_loss, rtol=1e-4, atol=0
    )
    assert torch.equal(quantizer(latents_BNZ)[1], reference(latents_BNZ).indices.long())


@pytest.mark.parametrize("name", ["lfq", "lfq spherical"])
def test_the_entropy_loss_separates_latents_that_all_have_one_code(name):
    quantizer = build(name, training_steps=0).train()
    latents_BNZ = (0.5 + 0.2 * latents(quantizer, 2, 200)).requires_grad_()
    assert len(quantizer.quantize(latents_BNZ).unique()) == 1
    optimizer = torch.optim.Adam([latents_BNZ], lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        on_sphere = normalize(latents_BNZ, dim=-1) if quantizer.spherical else latents_BNZ
        quantizer.entropy_loss(on_sphere).backward()
        optimizer.step()
    assert len(quantizer.quantize(latents_BNZ).unique()) > 32


# Several levels.


def test_every_level_describes_what_the_ones_before_it_left_over():
    quantizer = build("residual", training_steps=4)
    latents_BNZ = latents(quantizer, 4, 96, seed=1)
    codes_BNQ = quantizer.quantize(latents_BNZ)
    errors, vectors_BNZ = [], torch.zeros_like(latents_BNZ)
    for level, codebook_VZ in enumerate(quantizer.codebook):
        vectors_BNZ = vectors_BNZ + codebook_VZ[codes_BNQ[..., level]]
        errors.append((latents_BNZ - vectors_BNZ).square().mean().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]


# Several processes.


@pytest.fixture(scope="module")
def of_two(tmp_path_factory) -> list[dict[str, torch.Tensor]]:
    """What each of two processes found that trained quantizers together."""
    folder = tmp_path_factory.mktemp("two")
    script = Path(__file__).parent / "process_of_two.py"
    environment = {**os.environ, "PYTHONPATH": str(script.parent.parent)}
    both = [
        subprocess.Popen([sys.executable, script, folder, str(rank)], env=environment)
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    return [load_file(folder / f"{rank}.safetensors") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_processes_that_train_together_have_one_codebook(of_two, name):
    ours, theirs = (found[name] for found in of_two)
    assert torch.equal(ours, theirs)
    assert len(ours.reshape(-1, 6).unique(dim=0)) > 40


@pytest.mark.slow
def test_the_codebook_of_two_processes_stands_for_the_latents_of_both(of_two):
    codebook_VZ = of_two[0]["vq False"]
    for rank in range(2):
        nearest_BN = torch.cdist(half_batch(rank, 11), codebook_VZ).argmin(-1)
        assert len(nearest_BN.unique()) > 16


@pytest.mark.slow
def test_the_entropy_loss_of_two_processes_counts_the_latents_of_both(of_two):
    halves = [half_batch(rank).requires_grad_() for rank in range(2)]
    quantizer = build_quantizer(LFQ, tokens_per_step=400)
    whole = quantizer.entropy_loss(torch.cat(halves, dim=1))
    whole.backward()
    mean = sum(found["entropy"] for found in of_two) / 2
    torch.testing.assert_close(mean[0], whole.detach(), rtol=1e-5, atol=1e-5)
    for half, found in zip(halves, of_two, strict=True):
        # Accelerate divides the sum of the processes' gradients by their number.
        torch.testing.assert_close(found["gradient"] / 2, half.grad, rtol=1e-3, atol=1e-4)
