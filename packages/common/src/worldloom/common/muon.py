"""Muon: matrices and kernels move along orthogonal matrices, all else by AdamW.

    gradient -> momentum -> flattened to a matrix -> its nearest orthogonal one -> the parameter

The few large singular values of a gradient drown what the others say; here all count alike. A
kernel is a matrix of out x (in * its window). What has fewer than two axes (norms, biases) moves
by AdamW. 200 updates of our tokenizer are worth more than 400 of AdamW's (docs/log.md).

Source: Jordan et al. 2024, "Muon"; the quintic iteration is theirs, as is the scale by the shape.
Departs from `torch.optim.Muon`, which takes matrices only and one after the other, in flattening
kernels, in making matrices of one shape orthogonal together, and in carrying AdamW for the rest;
one learning rate serves both, of the size that AdamW wants.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.adamw import adamw

_MATRIX_SCALE = 10.0
"""Muon's customary learning rate is 0.02, where AdamW's is 0.002."""


class Muon(torch.optim.Optimizer):
    """One optimizer for a whole network; takes groups such as those of `decay_groups`.

    In a group with "orthogonal" False, matrices and kernels move by AdamW too: for those that
    begin where they shall stay near, as an identity does. Parameters may be dealt out over
    processes (FSDP2): each makes the whole matrix orthogonal and keeps its share.
    """

    def __init__(  # noqa: PLR0913 - AdamW's and its own
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        precision: torch.dtype = torch.bfloat16,
    ) -> None:
        """Take the parameters.

        Args:
            params: parameters, or groups of them.
            lr: the learning rate, of the size that AdamW wants.
            momentum: share of the past in the mean gradient of matrices and kernels (Nesterov's).
            betas: AdamW's, for all else.
            weight_decay: share of every parameter, times the learning rate, lost per update.
            precision: in which matrices are made orthogonal. bfloat16 learns as well as float32,
                but turns gradients that differ in their last bit into steps that differ by more.
        """
        settings = {
            "lr": lr,
            "momentum": momentum,
            "betas": betas,
            "weight_decay": weight_decay,
            "orthogonal": True,
            "fused": True,  # so that a restored step count goes to its parameter's device
        }
        super().__init__(params, settings)
        self._precision = precision

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Do one update with the gradients that are there."""
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            matrices = [p for p in moved if group["orthogonal"] and p.ndim >= 2]
            others = [p for p in moved if not (group["orthogonal"] and p.ndim >= 2)]
            if matrices:
                self._orthogonal_steps(matrices, group)
            if others:
                self._adam_steps(others, group)

    def _orthogonal_steps(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Move matrices, and kernels flattened to them."""
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        gradients = _gradients(parameters)
        means = [self.state[p]["momentum"] for p in parameters]
        torch._foreach_lerp_(means, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, means, group["momentum"])
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        alike: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
        for number, parameter in enumerate(parameters):
            rows = parameter.shape[0]
            alike[rows, parameter.numel() // rows].append(number)
        for (rows, columns), numbers in alike.items():
            matrices = [_whole(ahead[n]).flatten(1).to(self._precision) for n in numbers]
            scale = _MATRIX_SCALE * math.sqrt(max(1, rows / columns))
            steps = orthogonal(torch.stack(matrices)).unbind()
            moved = [parameters[n] for n in numbers]
            torch._foreach_add_(
                moved,
                [_share(s.view(p.shape).to(p.dtype), p) for s, p in zip(steps, moved, strict=True)],
                alpha=-group["lr"] * scale,
            )

    def _adam_steps(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Move vectors, and what shall move like them."""
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        states = [self.state[p] for p in parameters]
        beta1, beta2 = group["betas"]
        adamw(
            parameters,
            _gradients(parameters),
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=1e-8,
            maximize=False,
        )


def orthogonal(matrices_Bmn: Tensor, /) -> Tensor:
    """Return about U V^T of each matrix U S V^T, in the precision of what is given.

    Five steps of a Newton-Schulz iteration, whose quintic brings every singular value that is not
    tiny to between 0.7 and 1.2: closer does not learn better (Jordan et al. 2024).

    Args:
        matrices_Bmn: matrices of one shape.
    """
    tall = matrices_Bmn.shape[-2] > matrices_Bmn.shape[-1]
    wide = matrices_Bmn.mT if tall else matrices_Bmn
    # Singular values in [0, 1], where the iteration converges.
    wide = (wide / (wide.norm(dim=(-2, -1), keepdim=True) + 1e-7)).contiguous()
    for _ in range(5):
        gram = wide @ wide.mT
        # Sums inside the products: by themselves they take a quarter of the time.
        mix = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        wide = torch.baddbmm(wide, mix, wide, beta=3.4445)
    return wide.mT if tall else wide


def _gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return the gradients of parameters that all have one."""
    return [p.grad for p in parameters if p.grad is not None]


def _whole(tensor: Tensor) -> Tensor:
    """Return a tensor that may be dealt out over processes, whole."""
    whole: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole


def _share(tensor: Tensor, like: Tensor) -> Tensor:
    """Return of a whole tensor, the same in every process, what this one holds of `like`."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
