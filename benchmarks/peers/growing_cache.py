"""x-transformers' own Decoder with its own cache, which grows by concatenation.

a config of ours, cells  ->  GrowingCache;  a number of frames  ->  Times of one

A frame is one forward a cell, before a full context. Tokens alone: no codes, logits or noise.
"""

import torch
from turns import Times, timed
from worldloom.dynamics import DynamicsConfig
from x_transformers import Decoder


class GrowingCache:
    """A decoder of the sizes of ours, and a cache of all frames before one."""

    def __init__(self, config: DynamicsConfig, *, cells: int) -> None:
        """Build it with fresh weights and fill its cache."""
        self._decoder = Decoder(
            dim=config.dim,
            depth=config.num_layers,
            heads=config.num_heads,
            attn_dim_head=config.dim // config.num_heads,
            rotary_emb_dim=config.dim // config.num_heads,  # all of a head, as ours
            rotary_pos_emb=True,
            use_rmsnorm=True,
            attn_qk_norm=True,
            attn_qk_norm_dim_scale=True,
            ff_glu=True,
            ff_swish=True,
            ff_mult=config.ff_mult,
            ff_no_bias=True,
            attn_flash=True,
        ).eval()
        self._past = config.num_meta_tokens + (config.context_frames - 1) * cells
        self._tokens_BLD = torch.randn(1, self._past + cells, config.dim)
        with torch.inference_mode():
            _, self._full = self._decoder(self._tokens_BLD[:, : self._past], return_hiddens=True)

    def __call__(self, frames: int) -> Times:
        """Make a frame so often."""
        return timed(self._frame, frames)

    @torch.inference_mode()
    def _frame(self) -> None:
        cache, length = self._full, self._tokens_BLD.shape[1]
        for stop in range(self._past + 1, length + 1):
            _, cache = self._decoder(self._tokens_BLD[:, :stop], cache=cache, return_hiddens=True)
