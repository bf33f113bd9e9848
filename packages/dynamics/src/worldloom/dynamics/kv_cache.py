"""Keys and values of past frames, allocated once: append, slide, snapshot.

    keys and values of some tokens  ->  written in place; what may be seen comes back

Layout of the key axis: M meta tokens, then a ring of `context_frames` slots of T tokens, those of
one latent frame. Frame f lives in slot (f - first_frame) mod context_frames, so a new frame
overwrites the one that slides out, and nothing moves: attention does not care in which order keys
lie, since each carries its own rotation. Frame 5,000 costs what frame 50 costs.
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
    """(layers, B, N, M + context_frames * T, K)."""
    values: Tensor
    num_meta: int
    frame_tokens: int
    """Tokens of a latent frame, T."""
    context_frames: int
    first_frame: int
    """The first latent frame that has tokens, and so keys, of its own."""

    @classmethod
    def allocate(
        cls,
        config: DynamicsConfig,
        grid: Grid,
        /,
        *,
        batch: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Self:
        """Allocate the whole cache of a rollout."""
        length = config.num_meta_tokens + config.context_frames * grid.tokens
        head_dim = config.dim // config.num_heads
        shape = (config.num_layers, batch, config.num_heads, length, head_dim)
        return cls(
            keys=torch.zeros(shape, device=device, dtype=dtype),
            values=torch.zeros(shape, device=device, dtype=dtype),
            num_meta=config.num_meta_tokens,
            frame_tokens=grid.tokens,
            context_frames=config.context_frames,
            first_frame=grid.first_frame,
        )

    def slot(self, frame: int, /) -> int:
        """Return the slot of the ring in which a frame lies."""
        return (frame - self.first_frame) % self.context_frames

    def places(self, frame: int, start: int, stop: int, /) -> slice:
        """Return where tokens [start, stop) of a frame lie on the key axis."""
        base = self.num_meta + self.slot(frame) * self.frame_tokens
        return slice(base + start, base + stop)

    def frames(self, frame: int, /) -> int:
        """Return how many slots, from the first, hold a frame once `frame` is in."""
        return min(frame - self.first_frame + 1, self.context_frames)

    def visible(self, frame: int, /) -> int:
        """Return how many keys, from the first, hold meta tokens or frames up to `frame`."""
        return self.num_meta + self.frames(frame) * self.frame_tokens

    @property
    def size_bytes(self) -> int:
        """Memory of the cache."""
        return 2 * self.keys.numel() * self.keys.element_size()

    def clone(self) -> Self:
        """Return an independent copy."""
        return replace(self, keys=self.keys.clone(), values=self.values.clone())
