"""Promises of muon.py: orthogonal steps for matrices and kernels, AdamW's for the rest."""

import pytest
import torch
from worldloom.common import Muon, decay_groups, load_optimizer, optimizer_tensors
from worldloom.common.muon import orthogonal


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parameter(*shape, seed=0):
    value = torch.nn.Parameter(noise(*shape, seed=seed))
    value.grad = noise(*shape, seed=seed + 1)
    return value


@pytest.mark.parametrize("shape", [(8, 8), (8, 40), (40, 8), (64, 576)])
def test_an_orthogonal_step_keeps_the_directions_and_evens_out_the_sizes(shape):
    u, s, v = torch.linalg.svd(noise(*shape), full_matrices=False)
    (found,) = orthogonal(
        (u @ torch.diag(torch.logspace(0, -1, len(s))) @ v)[None].bfloat16()
    ).float()
    sizes = u.mT @ found @ v.mT
    assert sizes.diagonal().min() > 0.5
    assert sizes.diagonal().max() < 1.3
    assert (sizes - torch.diag(sizes.diagonal())).abs().max() < 0.1


def test_a_step_does_not_depend_on_the_gradient_s_scale():
    small, large = parameter(8, 4, 3, 3), parameter(8, 4, 3, 3)
    large.grad = large.grad * 2.0**10
    for each in (small, large):
        Muon([each], lr=1e-3).step()
    torch.testing.assert_close(small, large)


def test_a_kernel_moves_as_the_matrix_it_is():
    kernel, matrix = parameter(8, 4, 3, 3), parameter(8, 4, 3, 3)
    matrix = torch.nn.Parameter(kernel.detach().flatten(1).clone())
    matrix.grad = kernel.grad.flatten(1)
    for each in (kernel, matrix):
        Muon([each], lr=1e-3).step()
    assert torch.equal(kernel.flatten(1), matrix)


def test_vectors_move_as_under_adamw():
    ours, theirs = parameter(33), parameter(33)
    muon = Muon([ours], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    adamw = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for seed in range(7):
        ours.grad, theirs.grad = noise(33, seed=seed), noise(33, seed=seed)
        muon.step()
        adamw.step()
    torch.testing.assert_close(ours, theirs)


def test_matrices_of_a_group_that_is_not_orthogonal_move_as_under_adamw():
    ours, theirs = parameter(5, 7), parameter(5, 7)
    Muon([{"params": [ours], "orthogonal": False}], lr=1e-2, betas=(0.9, 0.95)).step()
    torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), weight_decay=0).step()
    torch.testing.assert_close(ours, theirs)


def test_matrices_of_one_shape_move_together_as_each_would_alone():
    shapes = [(8, 12), (5, 7), (8, 12), (12, 8), (8, 3, 4)]
    together = [parameter(*shape, seed=n) for n, shape in enumerate(shapes)]
    alone = [parameter(*shape, seed=n) for n, shape in enumerate(shapes)]
    optimizers = [Muon(together, lr=1e-2, weight_decay=0.1)]
    optimizers += [Muon([each], lr=1e-2, weight_decay=0.1) for each in alone]
    for seed in range(3):
        for number, (one, other) in enumerate(zip(together, alone, strict=True)):
            one.grad = noise(*one.shape, seed=10 * seed + number)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other)


def test_a_parameter_without_gradient_stays_and_keeps_no_state():
    moved, still = parameter(6, 4), parameter(6, 4)
    before, still.grad = still.detach().clone(), None
    optimizer = Muon([moved, still], lr=0.1, weight_decay=0.5)
    optimizer.step()
    assert torch.equal(still, before)
    assert still not in optimizer.state
    assert not torch.equal(moved, before)


def test_in_float32_gradients_that_differ_in_their_last_bits_move_alike():
    """Or several processes would train another model than one does."""
    apart = {}
    for precision in (torch.float32, torch.bfloat16):
        one, other = parameter(128, 192), parameter(128, 192)
        other.grad = other.grad * (1 + 1e-6 * noise(128, 192, seed=9))
        for each in (one, other):
            torch.nn.init.zeros_(each)  # so that small differences show
            Muon([each], lr=1e-3, precision=precision).step()
        apart[precision] = (one - other).abs().max().item()
    assert apart[torch.float32] < 2e-8  # of steps of about 1e-3
    assert apart[torch.bfloat16] > 1e-6


def test_weights_decay_by_their_group_alone():
    model = torch.nn.Linear(5, 3)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    for value in model.parameters():
        value.grad = torch.zeros_like(value)
    Muon(decay_groups(model, weight_decay=0.5), lr=0.1).step()
    torch.testing.assert_close(model.weight, before["weight"] * 0.95)
    assert torch.equal(model.bias, before["bias"])


def test_it_goes_on_from_its_saved_state_to_the_last_bit():
    def run(model, optimizer, steps):
        for seed in steps:
            for number, value in enumerate(model.parameters()):
                value.grad = noise(*value.shape, seed=10 * seed + number)
            optimizer.step()

    whole, cut = torch.nn.Linear(6, 4), torch.nn.Linear(6, 4)
    cut.load_state_dict(whole.state_dict())
    run(whole, Muon(decay_groups(whole, weight_decay=0.1), lr=0.01), range(6))
    first = Muon(decay_groups(cut, weight_decay=0.1), lr=0.01)
    run(cut, first, range(3))
    saved = {name: value.clone() for name, value in optimizer_tensors(first).items()}
    second = Muon(decay_groups(cut, weight_decay=0.1), lr=0.01)
    load_optimizer(second, saved, where="here")
    run(cut, second, range(3, 6))
    assert torch.equal(whole.weight, cut.weight)
    assert torch.equal(whole.bias, cut.bias)


def test_it_learns_an_ill_conditioned_map_sooner_than_adamw():
    """What it is for: directions that a gradient barely shows."""
    inputs = noise(512, 16) @ torch.diag(torch.logspace(0, -2, 16))
    wanted = inputs @ noise(16, 16, seed=2)
    losses = {}
    for name, make in (
        ("muon", lambda p: Muon(p, lr=2e-3)),
        ("adamw", lambda p: torch.optim.AdamW(p, lr=2e-3, betas=(0.9, 0.95), weight_decay=0)),
    ):
        weight = torch.nn.Parameter(torch.zeros(16, 16))
        optimizer = make([weight])
        for _ in range(200):
            loss = (inputs @ weight - wanted).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[name] = loss.item()
    assert losses["muon"] < 0.2 * losses["adamw"]
