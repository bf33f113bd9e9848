"""Where the weights of a training lie, and how processes agree on gradients.

    Objective  ->  Placement.objective, what is called; gradients are means over the processes

`Replicated` holds all weights in every process: alone, or under DistributedDataParallel.
`Sharded` (sharding.py) deals them out. The learner (learner.py) knows only what is here.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from worldloom.common import WeightAverage, load_weights

from .model import DynamicsModel
from .objective import Objective


class Placement(Protocol):
    """What a learner asks of the place where weights lie. All processes call it together."""

    objective: nn.Module
    """The objective, to be called: its backward makes gradients the means over the processes."""

    def syncing(self, *, last: bool) -> AbstractContextManager[object]:
        """Return the context of one forward and backward; only the last of an update syncs."""

    def clip(self, most: float, /) -> Tensor:
        """Scale the gradients down to a norm of `most`; return the norm that they had."""

    def whole(self, tensors: Mapping[str, Tensor], /) -> dict[str, Tensor]:
        """Return tensors whole, for a checkpoint; empty where nobody writes one."""

    def shares(
        self, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor], /
    ) -> dict[str, Tensor]:
        """Return of whole tensors what is held here, dealt out as those of `like`."""

    def load_weights(self, weights: Mapping[str, Tensor], /, *, where: str) -> None:
        """Put whole weights into the model."""

    def judged(
        self, average: WeightAverage[DynamicsModel] | None, /
    ) -> AbstractContextManager[DynamicsModel | None]:
        """Lend the model in evaluation mode, averaged if there is an average.

        None where nobody looks at it: in every process but the main one, if it is dealt out.
        """


class Replicated:
    """All weights in every process."""

    def __init__(self, objective: Objective, accelerator: Accelerator, /) -> None:
        """Take the place of one process, or of one of several that hold the same weights.

        Args:
            objective: on its device.
            accelerator: made with the arguments of DistributedDataParallel.
        """
        self.objective: nn.Module = accelerator.prepare_model(objective)
        self._dynamics = objective.dynamics
        self._accelerator = accelerator

    def syncing(self, *, last: bool) -> AbstractContextManager[object]:
        """Return the context of one forward and backward; only the last of an update syncs."""
        if last:
            return nullcontext()
        context: AbstractContextManager[object] = self._accelerator.no_sync(self.objective)
        return context

    def clip(self, most: float, /) -> Tensor:
        """Scale the gradients down to a norm of `most`; return the norm that they had."""
        parameters = [p for p in self._dynamics.parameters() if p.grad is not None]
        norm = _norm([p.grad for p in parameters if p.grad is not None])
        if not norm <= most:  # a norm that is no number, too, goes where it always went
            nn.utils.clip_grads_with_norm_(parameters, most, norm)
        return norm

    def whole(self, tensors: Mapping[str, Tensor], /) -> dict[str, Tensor]:
        """Return the tensors: they are whole."""
        return dict(tensors)

    def shares(
        self, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor], /
    ) -> dict[str, Tensor]:
        """Return the tensors: all of them are held here."""
        return dict(tensors)

    def load_weights(self, weights: Mapping[str, Tensor], /, *, where: str) -> None:
        """Put weights into the model."""
        load_weights(self._dynamics, weights, where=where)

    @contextmanager
    def judged(
        self, average: WeightAverage[DynamicsModel] | None, /
    ) -> Iterator[DynamicsModel | None]:
        """Lend the model in evaluation mode, averaged if there is an average."""
        # Layers are compiled for training's one shape; a rollout has others at every frame.
        with torch.compiler.set_stance("force_eager"):
            yield self._dynamics.eval() if average is None else average.of(self._dynamics)


def _norm(gradients: Sequence[Tensor]) -> Tensor:
    """Return the norm of all gradients as one vector.

    On a CPU by dot products: torch's own norm reads memory at half its speed, and adds up so many
    squares in one place that for 50 million numbers it is 5e-4 short (docs/log.md).
    """
    if any(gradient.device.type != "cpu" for gradient in gradients):
        return nn.utils.get_total_norm(gradients)
    vectors = [gradient.reshape(-1) for gradient in gradients]
    return torch.stack([torch.dot(vector, vector) for vector in vectors]).sum().sqrt()
