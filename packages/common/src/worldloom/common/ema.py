"""Averaged weights: where a training is heading, rather than where the last batch pushed it.

The average is a model of its own, so whoever looks at it cannot disturb the training.

    model after every update  ->  WeightAverage.update  ->  averaged parameters
    model                     ->  WeightAverage.of      ->  the averaged model, ready to be judged

Only parameters are averaged. Buffers (a codebook that is a moving average already) are copied as
they stand. At update i the decay is at most (1 + i) / (10 + i), so that the average does not
remember the random weights it began with.

Source: Polyak averaging; the warm-up is that of TensorFlow's ExponentialMovingAverage.
"""

import copy
from collections.abc import Mapping
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from .errors import ConfigError, FormatError

Model = TypeVar("Model", bound=nn.Module)


class WeightAverage(Generic[Model]):
    """A copy of a model whose parameters follow it slowly."""

    def __init__(self, model: Model, /, *, decay: float) -> None:
        """Begin with the model's own weights.

        Args:
            model: what is trained; it is not changed.
            decay: share of the average that stays at each update, in (0, 1).

        Raises:
            ConfigError: if decay lies outside (0, 1).
        """
        if not 0 < decay < 1:
            raise ConfigError(
                f"average: decay is {decay}, must be above 0 and below 1; 0.999 follows the last "
                "thousand updates"
            )
        self.decay = decay
        with torch.no_grad():
            self._means = {name: p.detach().clone() for name, p in model.named_parameters()}
        self._copy: Model | None = None

    @torch.no_grad()
    def update(self, model: Model, /, *, step: int) -> None:
        """Move towards the model after its update number `step`, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self._means.values()), list(model.parameters()), 1 - decay)

    @torch.no_grad()
    def of(self, model: Model, /) -> Model:
        """Return the averaged model in evaluation mode, with the buffers that `model` has now.

        It is the same object every time; the next `update` moves it.
        """
        if self._copy is None:
            self._copy = copy.deepcopy(model).requires_grad_(requires_grad=False)
            for name, parameter in self._copy.named_parameters():
                parameter.data = self._means[name]  # the average itself: no second copy
        for own, buffer in zip(self._copy.buffers(), model.buffers(), strict=True):
            own.copy_(buffer)
        return self._copy.eval()

    def tensors(self) -> dict[str, Tensor]:
        """Return the averaged parameters by name, for a checkpoint."""
        return dict(self._means)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], /, *, where: str) -> None:
        """Put saved parameters back.

        Raises:
            FormatError: if a name or a shape is not one of this model's.
        """
        own = self.tensors()
        wanted = {name: tuple(tensor.shape) for name, tensor in own.items()}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found != wanted:
            differing = sorted(
                name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)
            )
            raise FormatError(
                f"{where}: the averaged weights are not this model's; {differing[0]!r} has shape "
                f"{found.get(differing[0])}, but must have {wanted.get(differing[0])}"
            )
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
