"""Tokens -> tokens: the layers, with one forward for training and for cached sampling.

    tokens_BLD, rotation, what may be seen  ->  tokens_BLD

The feed-forward layers and norms are x-transformers'. The attention around them is ours, because
x-transformers' cache grows by concatenation, is causal only and takes no mask, while ours is
written in place (kv_cache.py) and must see rows and frames as the order says. Queries and keys
are normalised per head (arXiv:2302.05442), and values mix with the first layer's by a learned
share (value residual, arXiv:2410.17897), which is free.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from x_transformers.x_transformers import FeedForward

from .config import DynamicsConfig
from .kv_cache import KVCache
from .positions import Rotary, rotate


@dataclass(slots=True)
class Sight:
    """What the tokens of one forward may see.

    Without a cache they see each other through the mask. With one, their keys are first written to
    `places`; then they see the first `visible` keys of the cache, through the mask if there is one.
    """

    mask: Tensor | None
    """(queries, keys), True where a query may see a key; None for everywhere."""
    cache: KVCache | None = None
    places: slice | None = None
    visible: int = 0


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
        self.value_mix = nn.Parameter(torch.full((config.num_heads, 1, 1), -2.0)) if layer else None

    def forward(
        self, tokens_BLD: Tensor, turn: Rotary, sight: Sight, first_values: Tensor | None, /
    ) -> tuple[Tensor, Tensor]:
        """Return what the layer adds, and the first layer's values_BNLK."""
        # On a CPU only the matrix products gain by bf16: attention's backward is three times slower
        # in it, and the norms fall out of their fused kernel. So attention is float32 there.
        on_cpu = tokens_BLD.device.type == "cpu"
        qkv = self.to_qkv(self.norm(tokens_BLD))
        query, key, value = rearrange(
            qkv.float() if on_cpu else qkv, "B L (three N K) -> three B N L K",
            three=3, N=self.num_heads,
        )  # fmt: skip
        query = rotate(self.query_norm(query), turn)
        key = rotate(self.key_norm(key), turn)
        if first_values is None:
            first_values = value
        if self.value_mix is not None:
            value = torch.lerp(value, first_values, self.value_mix.sigmoid().to(value.dtype))
        if sight.cache is not None:
            key, value = self._remember(key, value, sight)
        with torch.autocast(query.device.type, enabled=not on_cpu):
            seen_BNLK = scaled_dot_product_attention(query, key, value, attn_mask=sight.mask)
        added_BLD: Tensor = self.to_out(rearrange(seen_BNLK, "B N L K -> B L (N K)"))
        return added_BLD, first_values

    def _remember(self, key: Tensor, value: Tensor, sight: Sight) -> tuple[Tensor, Tensor]:
        """Write keys and values into the cache; return all that is visible."""
        assert sight.cache is not None
        assert sight.places is not None
        keys, values = sight.cache.keys[self.layer], sight.cache.values[self.layer]
        keys[:, :, sight.places] = key
        values[:, :, sight.places] = value
        return keys[:, :, : sight.visible], values[:, :, : sight.visible]


class Transformer(nn.Module):
    """Pre-norm layers of attention and gated feed-forward."""

    def __init__(self, config: DynamicsConfig) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(Attention(config, i) for i in range(config.num_layers))
        self.feed_forwards = nn.ModuleList(
            nn.Sequential(
                nn.RMSNorm(config.dim),
                FeedForward(
                    config.dim, mult=config.ff_mult, glu=True, swish=True, no_bias=True,
                    zero_init_output=True,
                ),
            )
            for _ in range(config.num_layers)
        )  # fmt: skip
        self.norm = nn.RMSNorm(config.dim)

    def forward(self, tokens_BLD: Tensor, turn: Rotary, sight: Sight, /) -> Tensor:
        """Return tokens_BLD after all layers and the last norm."""
        first_values: Tensor | None = None
        for attention, feed_forward in zip(self.attentions, self.feed_forwards, strict=True):
            added_BLD, first_values = attention(tokens_BLD, turn, sight, first_values)
            tokens_BLD = tokens_BLD + added_BLD
            tokens_BLD = tokens_BLD + feed_forward(tokens_BLD)
        out_BLD: Tensor = self.norm(tokens_BLD)
        return out_BLD
