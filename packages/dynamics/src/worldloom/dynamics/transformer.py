"""Tokens -> tokens: the layers, with one forward for training and for cached sampling.

    tokens_BLD, rotation, what may be seen  ->  tokens_BLD

The feed-forward layers are x-transformers'. The attention beside them is ours, because
x-transformers' cache grows by concatenation, is causal only and takes no mask, while ours is
written in place (kv_cache.py) and sees what the order says (sight.py). Queries and keys are
normalised per head (arXiv:2302.05442), and values mix with the first layer's by a learned share
(value residual, arXiv:2410.17897), which is free. There may be several residual streams
(hyper_connection.py).
"""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from einops import reduce, repeat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .config import DynamicsConfig
from .hyper_connection import HyperConnection
from .linear import Linear
from .norm import Norm
from .positions import Rotation, rotate
from .sight import Sight

with warnings.catch_warnings():
    # x-transformers 2.31 scripts a function on import, which torch 2.15 warns of; a person who
    # trains can do nothing about it. Remove when x-transformers stops.
    warnings.simplefilter("ignore", FutureWarning)
    from x_transformers.x_transformers import GLU, FeedForward


class Attention(nn.Module):
    """Attention with normalised queries and keys, rotary positions and value residual."""

    def __init__(self, config: DynamicsConfig, layer: int) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.layer = layer
        head_dim = config.dim // config.num_heads
        self.norm = Norm(config.dim)
        self.to_qkv = Linear(config.dim, 3 * config.dim, bias=False)
        self.query_norm = Norm(head_dim)
        self.key_norm = Norm(head_dim)
        self.to_out = Linear(config.dim, config.dim, bias=False)
        nn.init.zeros_(self.to_out.weight)
        # The share of the first layer's values, per head; sigmoid(-2) = 0.12 at the start.
        mixes = config.value_residual and layer > 0
        self.value_mix = nn.Parameter(torch.full((config.num_heads,), -2.0)) if mixes else None

    def forward(
        self, tokens_BLD: Tensor, turn: Rotation, sight: Sight, first_values: Tensor | None, /
    ) -> tuple[Tensor, Tensor]:
        """Return what the layer adds, and the first layer's values_BLNK."""
        qkv_BLE = self.to_qkv(self.norm(tokens_BLD))
        # Heads stay behind tokens until the last moment: norm and rotation then run over memory in
        # the order in which it lies.
        if _narrow_on_cpu(tokens_BLD):
            qkv_BLE = qkv_BLE.float()
        # Not einops, which takes longer than a small product does: a cell's forward is all this.
        query, key, value = qkv_BLE.unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        query = rotate(self.query_norm(query), turn)
        key = rotate(self.key_norm(key), turn)
        if first_values is None:
            first_values = value
        if self.value_mix is not None:
            share_N1 = self.value_mix.sigmoid().to(value.dtype)[:, None]
            value = torch.lerp(value, first_values, share_N1)
        with _attention_precision(tokens_BLD):
            seen_BNLK = sight.seen(
                self.layer, *(part.transpose(1, 2) for part in (query, key, value))
            )
        added_BLD: Tensor = self.to_out(seen_BNLK.transpose(1, 2).flatten(2))
        return added_BLD, first_values


def _narrow_on_cpu(tokens_BLD: Tensor) -> bool:
    """Tell whether this is bf16 on a CPU, where only the matrix products gain by it.

    Attention's backward is three times slower in bf16 there, and the norms fall out of their fused
    kernel. So both stay in float32.
    """
    return tokens_BLD.device.type == "cpu" and torch.is_autocast_enabled("cpu")


def _attention_precision(tokens_BLD: Tensor) -> AbstractContextManager[object]:
    """Return the context in which attention runs: see `_narrow_on_cpu`."""
    return torch.autocast("cpu", enabled=False) if _narrow_on_cpu(tokens_BLD) else nullcontext()


def gated_feed_forward(dim: int, /, *, mult: float) -> nn.Sequential:
    """Return a norm and a gated layer, whose output is to be added to what went in; 0 at first."""
    layer = FeedForward(dim, mult=mult, glu=True, swish=True, no_bias=True, zero_init_output=True)
    layer.ff[0], layer.ff[-1] = _Gate(layer.ff[0]), Linear.of(layer.ff[-1])
    return nn.Sequential(Norm(dim), layer)


class _Gate(nn.Module):
    """x-transformers' GLU without its last factor, which is 1 here.

    That is one pass less over the widest tensors there are, forward and backward.
    """

    def __init__(self, gate: GLU) -> None:
        super().__init__()
        self.proj, self.act = Linear.of(gate.proj), gate.act

    def forward(self, tokens_BLD: Tensor, /) -> Tensor:
        """Return tokens_BLF."""
        up_BLF, gate_BLF = self.proj(tokens_BLD).chunk(2, dim=-1)
        gated_BLF: Tensor = up_BLF * self.act(gate_BLF)
        return gated_BLF


class Layer(nn.Module):
    """Attention, then a gated feed-forward; each adds to the residual stream, or to its streams."""

    def __init__(self, config: DynamicsConfig, index: int) -> None:
        super().__init__()
        self.attention = Attention(config, index)
        self.feed_forward = gated_feed_forward(config.dim, mult=config.ff_mult)
        self.streams: nn.ModuleList | None = None
        if config.residual_streams > 1:
            self.streams = nn.ModuleList(
                HyperConnection(
                    config.dim, index=2 * index + half, num_streams=config.residual_streams
                )
                for half in range(2)
            )

    def forward(
        self, tokens_BLD: Tensor, turn: Rotation, sight: Sight, first_values: Tensor | None, /
    ) -> tuple[Tensor, Tensor]:
        """Return tokens_BLD after the layer, and the first layer's values_BLNK.

        With several streams, tokens_BLsD go in and come out.
        """
        values: list[Tensor] = []

        def attend(tokens_BLD: Tensor) -> Tensor:
            added_BLD: Tensor
            added_BLD, value = self.attention(tokens_BLD, turn, sight, first_values)
            values.append(value)
            return added_BLD

        tokens_BLD = self._add(0, attend, tokens_BLD)
        tokens_BLD = self._add(1, self.feed_forward, tokens_BLD)
        return tokens_BLD, values[0]

    def _add(self, half: int, branch: Callable[[Tensor], Tensor], tokens_BLD: Tensor) -> Tensor:
        """Return the residual stream, or streams, after a branch."""
        if self.streams is None:
            return tokens_BLD + branch(tokens_BLD)
        tokens_BLsD: Tensor = self.streams[half](tokens_BLD, branch)
        return tokens_BLsD


class Transformer(nn.Module):
    """Pre-norm layers of attention and gated feed-forward."""

    def __init__(self, config: DynamicsConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_layers))
        self.norm = Norm(config.dim)
        self.num_streams = config.residual_streams
        self.recompute = False
        """Whether training computes each layer again for its gradient, which keeps far less."""

    def forward(self, tokens_BLD: Tensor, turn: Rotation, sight: Sight, /) -> Tensor:
        """Return tokens_BLD after all layers and the last norm."""
        recompute = self.recompute and torch.is_grad_enabled()
        if self.num_streams > 1:
            tokens_BLD = repeat(tokens_BLD, "B L D -> B L s D", s=self.num_streams)
        first_values: Tensor | None = None
        for layer in self.layers:
            state = (tokens_BLD, turn, sight, first_values)
            run = partial(checkpoint, layer, use_reentrant=False) if recompute else layer
            tokens_BLD, first_values = run(*state)
        if self.num_streams > 1:
            tokens_BLD = reduce(tokens_BLD, "B L s D -> B L D", "sum")
        out_BLD: Tensor = self.norm(tokens_BLD)
        return out_BLD
