"""Promises of optimizer.py: a restored state goes on to the last bit; who decays; the schedule."""

from itertools import pairwise

import pytest
import torch
from worldloom.common import (
    FormatError,
    decay_groups,
    load_optimizer,
    optimizer_tensors,
    set_learning_rate,
    stream,
    warmup_cosine,
    warmup_stable_decay,
)


def tiny(seed=0):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
    generator = stream(seed, "weights")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    optimizer = torch.optim.AdamW(decay_groups(model, weight_decay=0.1), lr=1e-2)
    return model, optimizer


def train(model, optimizer, steps):
    for step in steps:
        batch = torch.randn(5, 3, generator=stream(0, "batch", step))
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()


def test_a_restored_optimizer_goes_on_to_the_last_bit():
    whole, whole_optimizer = tiny()
    train(whole, whole_optimizer, range(10))
    first, first_optimizer = tiny()
    train(first, first_optimizer, range(5))
    second, second_optimizer = tiny(seed=1)
    second.load_state_dict(first.state_dict())
    load_optimizer(second_optimizer, optimizer_tensors(first_optimizer), where="test")
    train(second, second_optimizer, range(5, 10))
    for one, other in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: {**t, "9.exp_avg": torch.zeros(1)},
        lambda t: {**t, "²": torch.zeros(1)},
        lambda t: {**t, "0": torch.zeros(1)},
        lambda t: {**t, "x.step": torch.zeros(1)},
        lambda t: {**t, "0.exp_avg": torch.zeros(7)},
    ],
)
def test_a_state_of_another_optimizer_is_refused(change):
    model, optimizer = tiny()
    train(model, optimizer, range(1))
    with pytest.raises(FormatError, match=r"here: .*optimizer"):
        load_optimizer(optimizer, change(optimizer_tensors(optimizer)), where="here")


def test_only_matrices_decay():
    model, _ = tiny()
    decayed, plain = decay_groups(model, weight_decay=0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in plain["params"]} == {1}
    model[0].weight.requires_grad_(False)
    assert len(decay_groups(model, weight_decay=0.1)[0]["params"]) == 1


def test_the_learning_rate_rises_then_falls_to_its_floor():
    factors = [warmup_cosine(s, warmup_steps=4, num_steps=20, floor=0.1) for s in range(25)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    assert factors[12] == pytest.approx(0.55)  # half way between 1 and the floor
    assert all(a > b for a, b in pairwise(factors[4:21]))
    assert factors[20:] == pytest.approx([0.1] * 5)
    _, optimizer = tiny()
    set_learning_rate(optimizer, 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}


def test_the_stable_schedule_rises_in_a_line_stays_level_and_falls_exponentially_to_its_floor():
    factors = [
        warmup_stable_decay(step, warmup_steps=10, num_steps=100, decay_share=0.2)
        for step in range(100)
    ]
    assert factors[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert factors[10:81] == [1.0] * 71
    ratios = {round(after / before, 9) for before, after in pairwise(factors[80:])}
    assert ratios == {round(0.01 ** (1 / 20), 9)}
    assert factors[-1] == pytest.approx(0.01 ** (19 / 20))


@pytest.mark.parametrize("decay_share", [0.0, 1.0])
def test_the_stable_schedule_may_fall_never_or_all_the_time(decay_share):
    factors = [
        warmup_stable_decay(step, warmup_steps=0, num_steps=10, decay_share=decay_share)
        for step in range(10)
    ]
    assert factors[0] == 1
    assert (factors[-1] == 1) == (decay_share == 0)


def test_lengthening_a_stable_schedule_changes_nothing_before_its_fall():
    short, long = (
        [warmup_stable_decay(step, warmup_steps=5, num_steps=n) for step in range(80)]
        for n in (100, 1000)
    )
    assert short == long
