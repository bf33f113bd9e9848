"""Weights that are dealt out: each process holds its share, and sees a layer whole while it runs.

    Objective                        ->  Sharded  ->  Sharded.objective, what is called
    shares by name, in all processes ->  whole    ->  plain tensors on the CPU, for a checkpoint
    plain tensors by name            ->  shares   ->  what this process holds of them

FSDP2 (`fully_shard`): parameters, gradients and what the optimizer remembers are dealt out over the
processes; the matrices of a layer are gathered before its forward and its backward, and let go
after it. A checkpoint holds whole tensors, so it says nothing of how many processes there were, and
one process may go on with it.

Accelerate's plugin for FSDP2 is not used: on a CPU it silently gives DistributedDataParallel.

Source: torch.distributed.fsdp; Zhao et al., arXiv:2304.11277.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from worldloom.common import WeightAverage, load_weights

from .model import DynamicsModel
from .objective import Objective


class Sharded:
    """Weights dealt out over all processes; a `Placement` (placement.py)."""

    def __init__(
        self, objective: Objective, accelerator: Accelerator, /, *, whole_layers: bool = False
    ) -> None:
        """Deal out the parameters of an objective, in place.

        An optimizer must be made of the parameters that are there afterwards, and the objective's
        forward is the only way in: it gathers what belongs to no layer.

        Args:
            objective: on its device, with the same weights in every process.
            accelerator: says how many processes there are; there must be a group of them.
            whole_layers: gather all of a layer together and not its matrices alone, so that
                nothing happens inside of a layer that is compiled; in bf16 its norms are rounded.
        """
        dynamics = objective.dynamics
        self._dynamics = dynamics
        self._device = accelerator.device
        # The judged model runs by itself in one process, which a sharded one cannot.
        self._judged = copy.deepcopy(dynamics).cpu() if accelerator.is_main_process else None
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        policy = MixedPrecisionPolicy(
            # Matrix products run in it under autocast anyway, so this halves what is sent.
            param_dtype=torch.bfloat16 if objective.bf16 else None,
            reduce_dtype=torch.float32,
            # The residual stream stays float32, as it does without sharding.
            cast_forward_inputs=False,
        )
        for layer in dynamics.transformer.layers:
            # Norms in bf16 beside a float32 stream would fall out of their fused kernel. So they
            # stay with what the whole model gathers, in float32.
            matrices: list[nn.Module] = [m for m in layer.modules() if isinstance(m, nn.Linear)]
            fully_shard([layer] if whole_layers else matrices, mesh=mesh, mp_policy=policy)
        rest = MixedPrecisionPolicy(cast_forward_inputs=False)
        fully_shard(objective, mesh=mesh, mp_policy=rest)
        self.objective: nn.Module = objective

    def syncing(self, *, last: bool) -> AbstractContextManager[object]:
        """Return the context of one forward and backward: every one is summed over processes.

        Waiting for the last would keep whole gradients until then, the memory that is to be saved.
        """
        return nullcontext()

    def clip(self, most: float, /) -> Tensor:
        """Scale the gradients down to a norm of `most`; return the norm that they had, whole."""
        norm = nn.utils.clip_grad_norm_(self._dynamics.parameters(), most)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def whole(self, tensors: Mapping[str, Tensor], /) -> dict[str, Tensor]:
        """Return tensors whole and on the CPU, one gathered after the other; empty but in main."""
        gathered = {}
        # Sorted: what was read from a file comes in an order of each process's own, and all must
        # gather the same tensor.
        for name, tensor in sorted(tensors.items()):
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self._judged is not None:
                gathered[name] = full.detach().cpu()
        return gathered

    def shares(
        self, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor], /
    ) -> dict[str, Tensor]:
        """Return of whole tensors what is held here, dealt out as those of `like`.

        Every process has them all, so nothing is sent. A tensor of another shape than that of its
        name in `like`, or of a name that is not there, comes back whole: who loads it refuses it,
        or it is a count and never was dealt out.
        """
        return {name: _share(tensor, like.get(name)) for name, tensor in tensors.items()}

    def load_weights(self, weights: Mapping[str, Tensor], /, *, where: str) -> None:
        """Put whole weights into the model."""
        load_weights(self._dynamics, self.shares(weights, self._dynamics.state_dict()), where=where)

    @contextmanager
    def judged(
        self, average: WeightAverage[DynamicsModel] | None, /
    ) -> Iterator[DynamicsModel | None]:
        """Lend the main process a whole copy of the model, on its device for so long; others None.

        In evaluation mode, averaged if there is an average.
        """
        weights = self._dynamics.state_dict() | ({} if average is None else average.tensors())
        gathered = self.whole(weights)
        if self._judged is None:
            yield None
            return
        self._judged.load_state_dict(gathered)
        del gathered
        try:
            yield self._judged.to(self._device).eval()
        finally:
            self._judged.cpu()


def _share(tensor: Tensor, like: Tensor | None) -> Tensor:
    """Return a whole tensor dealt out as another of its shape."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(
        tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )
