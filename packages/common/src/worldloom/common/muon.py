"""Muon: matrices and kernels move along orthogonal matrices, all else by AdamW.

    gradient -> momentum -> flattened to a matrix -> its nearest orthogonal one -> the parameter

The few large singular values of a gradient drown what the others say; here all count alike. A
kernel is a matrix of out x (in * its window). What has fewer than two axes (norms, biases) moves
by AdamW. 200 updates of our tokenizer are worth more than 400 of AdamW's (docs/log.md).

Source: Jordan et al. 2024, "Muon"; the quintic iteration is theirs, as is the scale by the shape.
Departs from `torch.optim.Muon`, which takes matrices only, in flattening kernels and in carrying
AdamW for the rest; one learning rate serves both, of the size that AdamW wants.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_MATRIX_SCALE = 10.0
"""Muon's customary learning rate is 0.02, where AdamW's is 0.002."""


class Muon(torch.optim.Optimizer):
    """One optimizer for a whole network; takes groups such as those of `decay_groups`.

    In a group with "orthogonal" False, matrices and kernels move by AdamW too: for those that
    begin where they shall stay near, as an identity does.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
    ) -> None:
        """Take the parameters.

        Args:
            params: parameters, or groups of them.
            lr: the learning rate, of the size that AdamW wants.
            momentum: share of the past in the mean gradient of matrices and kernels (Nesterov's).
            betas: AdamW's, for all else.
            weight_decay: share of every parameter, times the learning rate, lost per update.
        """
        settings = {
            "lr": lr,
            "momentum": momentum,
            "betas": betas,
            "weight_decay": weight_decay,
            "orthogonal": True,
        }
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Do one update with the gradients that are there."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                orthogonal = group["orthogonal"] and parameter.ndim >= 2
                move = self._orthogonal_step if orthogonal else self._adam_step
                move(parameter, parameter.grad, group)

    def _orthogonal_step(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Move a matrix, or a kernel flattened to one."""
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum, mean = group["momentum"], state["momentum"]
        mean.lerp_(gradient, 1 - momentum)
        matrix = gradient.lerp(mean, momentum).flatten(1)
        rows, columns = matrix.shape
        scale = _MATRIX_SCALE * math.sqrt(max(1, rows / columns))
        step = orthogonal(matrix).view_as(parameter).to(parameter.dtype)
        parameter.add_(step, alpha=-group["lr"] * scale)

    def _adam_step(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Move a vector as AdamW does."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        count = float(state["step"])
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].lerp_(gradient.square(), 1 - beta2)
        spread = (state["exp_avg_sq"] / (1 - beta2**count)).sqrt_().add_(1e-8)
        rate = group["lr"] / (1 - beta1**count)
        parameter.addcdiv_(state["exp_avg"], spread, value=-rate)


def orthogonal(matrix: Tensor, /) -> Tensor:
    """Return about U V^T of a matrix U S V^T, in bfloat16.

    Five steps of a Newton-Schulz iteration, whose quintic brings every singular value that is not
    tiny to between 0.7 and 1.2: closer does not learn better (Jordan et al. 2024).
    """
    wide: Tensor = matrix.bfloat16()
    tall = wide.shape[0] > wide.shape[1]
    wide = wide.mT if tall else wide
    wide = wide / (wide.norm() + 1e-7)  # singular values in [0, 1], where the iteration converges
    for _ in range(5):
        gram = wide @ wide.mT
        wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * gram @ gram) @ wide
    return wide.mT if tall else wide
