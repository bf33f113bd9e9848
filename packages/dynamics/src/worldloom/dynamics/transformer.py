"""Tokens -> tokens: the layers, with one forward for training and for cached sampling.

    tokens_BLD, rotation, what may be seen  ->  tokens_BLD

The feed-forward layers are x-transformers'. The attention beside them is ours, because
x-transformers' cache grows by concatenation, is causal only and takes no mask, while ours is
written in place (kv_cache.py) and must see rows and frames as the order says. Queries and keys
are normalised per head (arXiv:2302.05442), and values mix with the first layer's by a learned
share (value residual, arXiv:2410.17897), which is free.
"""

import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from .config import DynamicsConfig
from .kv_cache import CacheView
from .positions import Rotation, rotate

with warnings.catch_warnings():
    # x-transformers 2.31 scripts a function on import, which torch 2.15 warns of; a person who
    # trains can do nothing about it. Remove when x-transformers stops.
    warnings.simplefilter("ignore", FutureWarning)
    from x_transformers.x_transformers import FeedForward


@dataclass(frozen=True, slots=True)
class Sight:
    """What the tokens of one forward may see: each other, or what lies in a cache."""

    mask: Tensor | None
    """(queries, keys), True where a query may see a key; None for everywhere."""
    view: CacheView | None = None
    """Where the tokens' own keys go first, and how far they see."""


class Attention(nn.Module):
    """Attention with normalised queries and keys, rotary positions and value residual."""

    def __init__(self, config: DynamicsConfig, layer: int) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.layer = layer
        head_dim = config.dim // config.num_heads
        self.norm = nn.RMSNorm(config.dim)
        self.to_qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.query_norm = nn.RMSNorm(head_dim)
        self.key_norm = nn.RMSNorm(head_dim)
        self.to_out = nn.Linear(config.dim, config.dim, bias=False)
        nn.init.zeros_(self.to_out.weight)
        # The share of the first layer's values, per head; sigmoid(-2) = 0.12 at the start.
        self.value_mix = nn.Parameter(torch.full((config.num_heads, 1), -2.0)) if layer else None

    def forward(
        self, tokens_BLD: Tensor, turn: Rotation, sight: Sight, first_values: Tensor | None, /
    ) -> tuple[Tensor, Tensor]:
        """Return what the layer adds, and the first layer's values_BLNK."""
        qkv_BLE = self.to_qkv(self.norm(tokens_BLD))
        # Heads stay behind tokens until the last moment: norm and rotation then run over memory in
        # the order in which it lies.
        query, key, value = rearrange(
            qkv_BLE.float() if _narrow_on_cpu(tokens_BLD) else qkv_BLE,
            "B L (three N K) -> three B L N K", three=3, N=self.num_heads,
        )  # fmt: skip
        query = rotate(self.query_norm(query), turn)
        key = rotate(self.key_norm(key), turn)
        if first_values is None:
            first_values = value
        if self.value_mix is not None:
            value = torch.lerp(value, first_values, self.value_mix.sigmoid().to(value.dtype))
        query, key, heads = (part.transpose(1, 2) for part in (query, key, value))
        if sight.view is not None:
            key, heads = sight.view.put(self.layer, key, heads)
        with _attention_precision(tokens_BLD):
            seen_BNLK = scaled_dot_product_attention(query, key, heads, attn_mask=sight.mask)
        added_BLD: Tensor = self.to_out(rearrange(seen_BNLK, "B N L K -> B L (N K)"))
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
    return nn.Sequential(nn.RMSNorm(dim), layer)


class Transformer(nn.Module):
    """Pre-norm layers of attention and gated feed-forward."""

    def __init__(self, config: DynamicsConfig) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(Attention(config, i) for i in range(config.num_layers))
        self.feed_forwards = nn.ModuleList(
            gated_feed_forward(config.dim, mult=config.ff_mult) for _ in range(config.num_layers)
        )
        self.norm = nn.RMSNorm(config.dim)

    def forward(self, tokens_BLD: Tensor, turn: Rotation, sight: Sight, /) -> Tensor:
        """Return tokens_BLD after all layers and the last norm."""
        first_values: Tensor | None = None
        for attention, feed_forward in zip(self.attentions, self.feed_forwards, strict=True):
            added_BLD, first_values = attention(tokens_BLD, turn, sight, first_values)
            tokens_BLD = tokens_BLD + added_BLD
            tokens_BLD = tokens_BLD + feed_forward(tokens_BLD)
        out_BLD: Tensor = self.norm(tokens_BLD)
        return out_BLD
