"""A product with weights: of those as they lie, or of a copy laid out for generating on a CPU.

    tokens_..I  ->  tokens_..O

On a CPU larger products go through oneDNN (onednn.py) where that is faster than torch's own.

What bounds a frame's forward on a CPU is how fast its weights are read: there are few tokens. torch
multiplies by weights as they lie, a fraction as fast as memory allows. A copy in blocks of oneDNN's
own is read at up to twice the speed, from one token to hundreds (benchmarks/generate.py --only
layout). A rollout makes the copies when it begins (`pack_linears`) and uses them in its own
forwards (`packed_weights`), as it uses the keys and values of the frames it has read.

Training has far more tokens, and weights that change: it multiplies by them as they lie.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .onednn import DifferentiableProduct, lay_out, outdoes_torch, product, works

_PACKED_FROM = 1 << 18
"""Fewest weights: below, calling oneDNN takes as long as it saves for a token or a few."""
_LEARNED_FROM = 1 << 18
"""The same where gradients are wanted (benchmarks/arithmetic.py --only products)."""
_in_use: ContextVar[bool] = ContextVar("_in_use", default=False)


class State(NamedTuple):
    """What changes with a layer's weights."""

    address: int
    version: int
    """How often they were written, as far as torch counts."""
    checksum: int


class Linear(nn.Linear):
    """`torch.nn.Linear` that learns through oneDNN where that is faster, and has `pack`."""

    _packed: tuple[Tensor, State] | None = None
    """The copy, and which state of the weights it is of."""

    @classmethod
    def of(cls, layer: nn.Linear, /) -> Self:
        """Return a layer of the same weights."""
        own = cls(layer.in_features, layer.out_features, device="meta")  # which draws no weights
        own.weight, own.bias = layer.weight, layer.bias
        return own

    def pack(self) -> None:
        """Make the copy, where one pays and none is there; it takes as much memory again."""
        weight = self.weight
        if self.training or not _can_pack(weight):
            self._packed = None
            return
        # Fused optimizers and whoever writes to `data` do not count, and addresses come back.
        state = State(weight.data_ptr(), weight._version, _checksum(weight))
        if self._packed is None or self._packed[1] != state:
            self._packed = lay_out(weight), state

    def forward(self, tokens: Tensor, /) -> Tensor:
        """Return the product, plus the bias if there is one."""
        weight = self.weight
        if torch.is_grad_enabled():
            if self._takes(tokens) and _learns_faster(weight) and self._bias_fits():
                learned: Tensor = DifferentiableProduct.apply(tokens, weight, self.bias)
                return learned
        elif self._packed is not None and _in_use.get() and self._takes(tokens):
            packed, state = self._packed
            if (state.address, state.version) == _place(weight):
                return product(tokens, packed, self.bias)
        return linear(tokens, weight, self.bias)

    def _takes(self, tokens: Tensor) -> bool:
        """Tell whether oneDNN is asked about such tokens; else torch has an answer or a message."""
        return (
            tokens.device.type == "cpu"
            and tokens.ndim > 0
            and tokens.dtype == self.weight.dtype
            and tokens.shape[-1] == self.in_features
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
        )

    def _bias_fits(self) -> bool:
        """Tell whether the bias is one that a layer has: torch's product takes others, too."""
        bias, weight = self.bias, self.weight
        return bias is None or (bias.shape == weight.shape[:1] and bias.dtype == weight.dtype)

    def train(self, mode: bool = True) -> Self:
        """Set the mode; weights that will change need no copy."""
        if mode:
            self._packed = None
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        """Move or convert the weights; the copy stays behind."""
        self._packed = None
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Return what is copied and pickled: all but the packed weights, which cannot be."""
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}


def pack_linears(module: nn.Module, /) -> None:
    """Lay out every product's weights in a module for generating, where that pays."""
    for part in module.modules():
        if isinstance(part, Linear):
            part.pack()


@contextmanager
def packed_weights() -> Iterator[None]:
    """Use the copies inside the block, in this thread."""
    before = _in_use.set(True)
    try:
        yield
    finally:
        _in_use.reset(before)


def _place(weight: Tensor) -> tuple[int, int]:
    """Return where weights lie, and how often they were written; -1 where torch does not count."""
    return weight.data_ptr(), -1 if weight.is_inference() else weight._version


def _checksum(weight_OI: Tensor) -> int:
    """Return a number of all bits and of the rows and columns in which they stand."""
    weight_OI = weight_OI.detach()
    size = weight_OI.element_size()
    narrow = torch.int32 if size == 4 else torch.int16
    wide = weight_OI.shape[1] * size % 8 == 0 and weight_OI.data_ptr() % 8 == 0
    lanes_OL = weight_OI.contiguous().view(torch.int64 if wide else narrow)
    sums = (lanes_OL.sum(1), lanes_OL.sum(0))
    first, second = (int((s * torch.arange(1, len(s) + 1)).sum()) for s in sums)
    return first ^ second << 1


def _can_pack(weight: Tensor) -> bool:
    """Tell whether a copy of these weights pays and can be told from another state of them."""
    return (
        type(weight) is nn.Parameter  # not a share of one
        and weight.numel() >= _PACKED_FROM
        and weight.device.type == "cpu"
        and not weight.is_inference()  # those do not count how often they were written
        and works(weight.dtype)
    )


def _learns_faster(weight: Tensor) -> bool:
    """Tell whether oneDNN makes a product with these weights, and its gradients, faster."""
    return (
        weight.numel() >= _LEARNED_FROM
        and weight.dtype == torch.float32  # torch gives bf16 to oneDNN by itself
        and weight.device.type == "cpu"
        and type(weight) in (nn.Parameter, Tensor)  # not a share of one
        and outdoes_torch()
        and works(torch.float32)
    )
