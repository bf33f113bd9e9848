"""Vectors -> the same at unit root mean square, times a learned scale per channel.

    tokens_..D  ->  tokens_..D

`torch.nn.RMSNorm`, whose gradient torch 2.15 takes in a dozen kernels on a CPU: as many passes over
memory where vectors are many, as many launches where they are few. Here it is written out, in half
as many, with and without a gradient the same numbers. In bf16 that is for generating alone:
training keeps weights in float32. On a GPU and in other types it is torch's own.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

_EPS = torch.finfo(torch.float32).eps
"""That of torch's norm, where the norm is ours."""


class Norm(nn.RMSNorm):
    """Root-mean-square norm over the last axis."""

    def __init__(self, dim: int, /) -> None:
        super().__init__(dim)

    def forward(self, tokens: Tensor, /) -> Tensor:
        """Return the normalised tokens."""
        dtype, weight = tokens.dtype, self.weight
        known = dtype == weight.dtype and dtype in (torch.float32, torch.bfloat16)
        if not known or tokens.device.type != "cpu":
            return super().forward(tokens)
        if not torch.is_grad_enabled():
            return (_unit(tokens)[0] * weight).to(dtype)
        if dtype == torch.bfloat16:
            return super().forward(tokens)
        normalised: Tensor = _Normalised.apply(tokens, weight)
        return normalised


def _unit(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return n = x / sqrt(mean(x^2) + eps), and what x was multiplied by."""
    length = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True, dtype=torch.float32)
    eps = length.new_full((), _EPS)  # a tensor of the module's would be foreign to torch's modes
    scale = torch.addcmul(eps, length, length, value=1 / tokens.shape[-1])
    scale = scale.rsqrt_()
    return tokens * scale, scale


class _Normalised(torch.autograd.Function):
    """n w, with its gradient."""

    @staticmethod
    def forward(ctx: FunctionCtx, tokens: Tensor, weight_D: Tensor) -> Tensor:
        """Return n w."""
        unit, scale = _unit(tokens)
        ctx.save_for_backward(unit, scale, weight_D)
        return unit * weight_D

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
        """Return (g w - n mean(g w n)) / sqrt(mean(x^2) + eps), and the sum of g n."""
        unit, scale, weight_D = ctx.saved_tensors
        along = gradient * unit
        mean = (along @ weight_D).div_(-len(weight_D))[..., None]
        gradient_in = torch.addcmul(gradient * weight_D, unit, mean).mul_(scale)
        return gradient_in, along.sum_to_size(weight_D.shape)
