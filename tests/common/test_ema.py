"""Promises of ema.py: a slow copy that disturbs nobody, warms up, and comes back from a file."""

import pytest
import torch
from worldloom.common import ConfigError, FormatError, WeightAverage


def tiny():
    """Two parameters and a buffer, all zero."""
    model = torch.nn.Linear(2, 1)
    model.register_buffer("codebook", torch.zeros(3))
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    return model


def fill(model, value):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


def test_the_average_follows_with_the_decay_and_less_in_the_first_updates():
    model, expected = tiny(), 0.0
    average = WeightAverage(model, decay=0.5)
    for step, value in enumerate([1.0, -2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0]):
        average.update(fill(model, value), step=step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
        for mean in average.of(model).parameters():
            torch.testing.assert_close(mean, torch.full_like(mean, expected))
    assert decay == 0.5  # or the warm-up was all there was


def test_looking_at_the_average_changes_neither_it_nor_the_model():
    model = tiny()
    average = WeightAverage(model, decay=0.9)
    average.update(fill(model, 1.0), step=0)
    before = {name: tensor.clone() for name, tensor in average.tensors().items()}
    judged = average.of(model.train())
    assert judged is not model
    assert not judged.training
    assert model.training
    assert not any(p.requires_grad for p in judged.parameters())
    assert all(p.requires_grad and (p == 1).all() for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in average.tensors().items())


def test_buffers_are_those_of_the_model_as_they_stand():
    model = tiny()
    average = WeightAverage(model, decay=0.9)
    model.codebook.copy_(torch.tensor([1.0, 2.0, 3.0]))
    assert average.of(model).codebook.tolist() == [1, 2, 3]
    model.codebook[0] = 9
    assert average.of(model).codebook.tolist() == [9, 2, 3]
    assert "codebook" not in average.tensors()


def test_a_restored_average_goes_on_to_the_last_bit():
    model = tiny()
    whole, first = WeightAverage(model, decay=0.97), WeightAverage(model, decay=0.97)
    for step in range(40):
        fill(model, 0.1 * step)
        whole.update(model, step=step)
        if step < 20:
            first.update(model, step=step)
    second = WeightAverage(fill(tiny(), 5.0), decay=0.97)
    second.load(first.tensors(), where="test")
    for step in range(20, 40):
        second.update(fill(model, 0.1 * step), step=step)
    for name, tensor in whole.tensors().items():
        assert torch.equal(tensor, second.tensors()[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {"bias": t["bias"]}, r"'weight' has shape None, but must have \(1, 2\)"),
        (lambda t: {**t, "more": t["bias"]}, r"'more' has shape \(1,\), but must have None"),
        (lambda t: {**t, "bias": torch.zeros(4)}, r"'bias' has shape \(4,\), but must have \(1,\)"),
    ],
)
def test_the_average_of_another_model_is_refused_by_name(change, message):
    average = WeightAverage(tiny(), decay=0.9)
    with pytest.raises(FormatError, match=f"here: .*{message}"):
        average.load(change(average.tensors()), where="here")


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1])
def test_a_decay_that_follows_nothing_or_everything_is_refused(decay):
    with pytest.raises(ConfigError, match="above 0 and below 1"):
        WeightAverage(tiny(), decay=decay)
