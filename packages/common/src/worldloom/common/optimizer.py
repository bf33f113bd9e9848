"""What two training loops share about updates: parameter groups, schedules, state as tensors.

    optimizer        -> optimizer_tensors ->  {"0.exp_avg": ..., "0.step": ...}, for a checkpoint
    the same tensors -> load_optimizer    ->  the optimizer, to the last bit

Settings (rates, decays) are not part of the state: they come from the config and the step.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from .errors import FormatError


def decay_groups(model: nn.Module, /, *, weight_decay: float) -> list[dict[str, Any]]:
    """Return parameter groups in which only matrices and kernels decay, never norms or biases."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def warmup_cosine(step: int, /, *, warmup_steps: int, num_steps: int, floor: float = 0.01) -> float:
    """Return the factor on the learning rate at update `step` >= 0: up, then down to `floor`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def warmup_stable_decay(
    step: int,
    /,
    *,
    warmup_steps: int,
    num_steps: int,
    decay_share: float = 0.2,
    floor: float = 0.01,
) -> float:
    """Return the factor on the learning rate at update `step` >= 0: up, level, then down.

    Level is where a training can be lengthened, or branched, without knowing its end; the last
    `decay_share` of all updates fall exponentially to `floor` and bring most of what a cosine
    brings over its whole length (MiniCPM, arXiv:2404.06395, section 4.2).
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    decay_steps = max(1, min(round(decay_share * num_steps), num_steps - warmup_steps))
    done = (step - (num_steps - decay_steps)) / decay_steps
    return float(floor ** min(1.0, max(0.0, done)))


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float, /) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def optimizer_tensors(optimizer: torch.optim.Optimizer, /) -> dict[str, Tensor]:
    """Return the optimizer's state as named tensors; its settings come from the config."""
    return {
        f"{index}.{name}": torch.as_tensor(value)
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def load_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], /, *, where: str
) -> None:
    """Put a saved state back.

    Raises:
        FormatError: if a name or a shape is not one of this optimizer's.
    """
    state: dict[int, dict[str, Tensor]] = {}
    shapes = [p.shape for group in optimizer.param_groups for p in group["params"]]
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        if not index.isdecimal() or int(index) >= len(shapes) or not key:
            raise FormatError(f"{where}: {name!r} is no state of this optimizer")
        if tensor.ndim and tensor.shape != shapes[int(index)]:
            raise FormatError(
                f"{where}: {name!r} has shape {tuple(tensor.shape)}, but the optimizer's parameter "
                f"has {tuple(shapes[int(index)])}"
            )
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
