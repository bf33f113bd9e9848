"""Products by oneDNN, the library inside torch that torch's compiler uses on a CPU.

    tokens_..I, weight_OI, bias_O  ->  tokens_..O

torch itself multiplies float32 by MKL, which on some processors takes up to 1.4 times as long for
the products of a training step (benchmarks/train_step.py --only products). The operators are
torch's own, but not promised to anybody: ask `works` first.
"""

from typing import Any

import torch
from torch import Tensor

_TOKENS = 8
"""For how many a copy is laid out; measured, one layout serves all."""
_FEW_TOKENS = 128
"""Below, oneDNN is the faster one for the gradient of weights, too."""
_known_to_work: set[torch.dtype] = set()


def works(dtype: torch.dtype, /) -> bool:
    """Tell whether this torch, on this processor, does these products: try one, until one is right.

    A failure is not remembered: it may be that of a mode of torch that is on just now.
    """
    if dtype in _known_to_work:
        return True
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    weight_OI = torch.linspace(-1, 1, 256).reshape(16, 16).to(dtype)
    tokens_3I = torch.linspace(1, 0, 48).reshape(3, 16).to(dtype)
    exact_3O = tokens_3I.double() @ weight_OI.double().T + weight_OI[0].double()
    try:
        products = [product(tokens_3I, w, weight_OI[0]) for w in (weight_OI, lay_out(weight_OI))]
    except (AttributeError, RuntimeError, TypeError):
        return False
    if all(torch.allclose(p.double(), exact_3O, rtol=1e-2, atol=1e-2) for p in products):
        _known_to_work.add(dtype)
    return dtype in _known_to_work


def lay_out(weight_OI: Tensor, /) -> Tensor:
    """Return a copy of weights in blocks of oneDNN's own, which it reads fastest."""
    copy: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach(), _TOKENS)
    return copy


def product(tokens: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, /) -> Tensor:
    """Multiply by weights as they lie, or laid out; without a gradient."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(tokens, weight_OI, bias_O, "none", [], "")
    return out


class DifferentiableProduct(torch.autograd.Function):
    """`product` by weights as they lie, with its gradients, and theirs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(tokens: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        """Return tokens_..O."""
        return product(tokens, weight_OI, bias_O)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Keep what the gradients need."""
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of what went in, where they are wanted."""
        tokens, weight_OI = ctx.saved_tensors
        for_tokens, for_weight, for_bias = ctx.needs_input_grad
        # A gradient that is differentiated itself is torch's affair.
        multiply = torch.matmul if torch.is_grad_enabled() else _times
        gradient_NO, tokens_NI = (t.reshape(-1, t.shape[-1]) for t in (gradient, tokens))
        few = 0 < len(gradient_NO) < _FEW_TOKENS  # none is too few for oneDNN
        return (
            multiply(gradient, weight_OI) if for_tokens else None,
            (multiply if few else torch.matmul)(gradient_NO.mT, tokens_NI) if for_weight else None,
            gradient_NO.sum(0) if for_bias else None,
        )


def _times(first: Tensor, second: Tensor) -> Tensor:
    """Return the matrix product."""
    return product(first, second.mT)
