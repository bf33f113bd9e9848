"""Keys and values of past frames, allocated once: append, slide, snapshot.

    keys and values of some tokens  ->  written in place; a view of all that may be seen comes back

Layout of the key axis: M meta tokens, then a ring of `context_frames` slots of S cells. Frame f
lives in slot (f - first_frame) mod context_frames, so a new frame overwrites the one that slides
out, and nothing moves: attention does not care in which order keys lie, since each carries its
own rotation. Frame 5,000 costs what frame 50 costs.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from .config import DynamicsConfig
from .sequence import Grid


@dataclass(frozen=True, slots=True)
class KVCache:
    """One rollout's keys and values, every layer's."""

    keys: Tensor
    """(layers, B, N, M + context_frames * S, K)."""
    values: Tensor
    num_meta: int
    cells: int
    context_frames: int
    first_frame: int
    """The first latent frame that has tokens, and so keys, of its own."""

    @classmethod
    def allocate(
        cls, config: DynamicsConfig, grid: Grid, /, *, batch: int, device: torch.device
    ) -> Self:
        """Allocate the whole cache of a rollout, float32."""
        length = config.num_meta_tokens + config.context_frames * grid.cells
        head_dim = config.dim // config.num_heads
        shape = (config.num_layers, batch, config.num_heads, length, head_dim)
        return cls(
            keys=torch.zeros(shape, device=device),
            values=torch.zeros(shape, device=device),
            num_meta=config.num_meta_tokens,
            cells=grid.cells,
            context_frames=config.context_frames,
            first_frame=grid.first_frame,
        )

    def places(self, frame: int, start: int, stop: int, /) -> slice:
        """Return where cells [start, stop) of a frame lie on the key axis."""
        slot = (frame - self.first_frame) % self.context_frames
        base = self.num_meta + slot * self.cells
        return slice(base + start, base + stop)

    def visible(self, frame: int, /) -> int:
        """Return how many keys, from the first, hold meta tokens or frames up to `frame`."""
        frames = min(frame - self.first_frame + 1, self.context_frames)
        return self.num_meta + frames * self.cells

    @property
    def size_bytes(self) -> int:
        """Memory of the cache."""
        return 2 * self.keys.numel() * self.keys.element_size()

    def clone(self) -> Self:
        """Return an independent copy."""
        return replace(self, keys=self.keys.clone(), values=self.values.clone())


@dataclass(frozen=True, slots=True)
class CacheView:
    """What one forward does with a cache: where its tokens go, and how far it sees."""

    cache: KVCache
    places: slice
    """Where on the key axis the keys of its tokens are written."""
    visible: int
    """How many keys, from the first, it sees."""

    def put(self, layer: int, key_BNsK: Tensor, value_BNsK: Tensor, /) -> tuple[Tensor, Tensor]:
        """Write a layer's keys and values of the tokens; return all that is seen, (B, N, M, K)."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[:, :, self.places] = key_BNsK
        values[:, :, self.places] = value_BNsK
        return keys[:, :, : self.visible], values[:, :, : self.visible]
