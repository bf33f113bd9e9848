"""Products by oneDNN, the library inside torch that torch's compiler uses on a CPU.

    tokens_..I, weight_OI, bias_O  ->  tokens_..O

torch itself multiplies float32 by MKL, which for the products of a training step takes up to half
as long again on an AMD EPYC, and less on an Intel Xeon (benchmarks/arithmetic.py --only products):
so `outdoes_torch`. Weights laid out once for many forwards are read faster on both. The operators
are torch's own, but not promised to anybody: ask `works` first.
"""

from collections.abc import Callable, Mapping
from functools import cache
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
        turned_OI = weight_OI.T.contiguous().T  # as gradients are multiplied
        for weights in (weight_OI, turned_OI, lay_out(weight_OI)):
            own_3O = product(tokens_3I, weights, weight_OI[0])
            if not torch.allclose(own_3O.double(), exact_3O, rtol=1e-2, atol=1e-2):
                return False
    except (AttributeError, RuntimeError, TypeError):
        return False
    _known_to_work.add(dtype)
    return True


@cache
def outdoes_torch() -> bool:
    """Tell whether oneDNN is faster than torch at a training's products, in float32.

    torch's MKL is Intel's, and on its own processors the faster one (docs/performance.md). Where
    torch has no MKL, or cannot tell the processor, it was not measured.
    """
    ask: Callable[[], Mapping[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)
    maker = str(ask().get("cpu_name", "")).split(" ")[0]
    has_mkl: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    return has_mkl and maker not in ("", "Intel")


def lay_out(weight_OI: Tensor, /) -> Tensor:
    """Return a copy of weights in blocks of oneDNN's own, which it reads fastest."""
    copy: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach(), _TOKENS)
    return copy


def product(tokens: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, /) -> Tensor:
    """Multiply by weights as they lie, or laid out; without a gradient."""
    # oneDNN reads a bias as if it were contiguous.
    bias_O = None if bias_O is None else bias_O.contiguous()
    out: Tensor = torch.ops.mkldnn._linear_pointwise(tokens, weight_OI, bias_O, "none", [], "")
    return out


class DifferentiableProduct(torch.autograd.Function):
    """`product` by weights as they lie, with its gradients, and theirs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(tokens: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        """Return tokens_..O."""
        out = product(tokens, weight_OI, bias_O)
        # It comes as a view, into which autograd lets nobody write.
        own: Tensor = torch.ops.aten._unsafe_view(out, out.shape)
        return own

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Keep what the gradients need."""
        for_tokens, for_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(
            inputs[0] if for_weight else None,
            inputs[1] if for_tokens else None,
        )

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of what went in, where they are wanted."""
        tokens, weight_OI = ctx.saved_tensors
        _, for_weight, for_bias = ctx.needs_input_grad
        # A gradient that is differentiated itself is torch's affair.
        multiply = torch.matmul if torch.is_grad_enabled() else _times
        gradient_NO = gradient.reshape(-1, gradient.shape[-1])
        weight_gradient_OI = None
        if for_weight:
            tokens_NI = tokens.reshape(-1, tokens.shape[-1]).contiguous()
            few = 0 < len(tokens_NI) < _FEW_TOKENS  # none is too few for oneDNN
            weight_gradient_OI = (multiply if few else torch.matmul)(gradient_NO.mT, tokens_NI)
        return (
            None if weight_OI is None else multiply(gradient, weight_OI),
            weight_gradient_OI,
            gradient_NO.sum(0) if for_bias else None,
        )


def _times(first: Tensor, second: Tensor) -> Tensor:
    """Return the matrix product."""
    return product(first, second.mT)
