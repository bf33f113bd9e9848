"""Token shards -> windows, in an order that is a pure function of (seed, index).

    SHARDS, split, seed  ->  batch i: codes_Bthw int64, slots_BTA int64, valid_Bt bool

No window crosses the border of an episode. Batch i depends on nothing but (seed, i), so resuming
needs one number, and with several processes each takes its rows of the same batch: every window
exactly once. Episodes shorter than a window are padded behind, and `valid_Bt` says which latent
frames are real.

The codes are mapped from the tar where they lie (common/shards.py): reading a window is a slice.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from worldloom.common import FormatError, TokenShards, numpy_stream

from .actions import NULL


@dataclass(frozen=True, slots=True)
class WindowBatch:
    """Windows side by side."""

    codes_Bthw: Tensor
    """int64; padding repeats code 0 and is not valid."""
    slots_BTA: Tensor
    """int64 slots of the r (t - 1) steps between the latent frames; padding is NULL."""
    valid_Bt: Tensor
    """True where the latent frame is one of the episode."""

    def to(self, device: torch.device | str, /) -> "WindowBatch":
        """Return the batch on another device."""
        return WindowBatch(
            self.codes_Bthw.to(device), self.slots_BTA.to(device), self.valid_Bt.to(device)
        )


class Windows:
    """Windows of one split of a folder of token shards."""

    def __init__(self, shards: TokenShards, split: str, /, *, window_frames: int) -> None:
        """Index the split.

        Raises:
            FormatError: if no episode of the split has two latent frames.
        """
        self._shards = shards
        self._window_frames = window_frames
        rows = shards.episodes
        self._episodes = [i for i in shards.split(split) if rows[i].latent_frames >= 2]
        if not self._episodes:
            raise FormatError(
                f"{shards.folder}: the {split} split has no episode of two latent frames; "
                "record more episodes and run `worldloom tokenize` again"
            )
        lengths = np.array([rows[i].latent_frames for i in self._episodes])
        self.latent_frames = int(lengths.sum())
        """Latent frames in all."""
        # An episode of n frames has n - window + 1 windows; a shorter one is one padded window.
        self._ends = np.cumsum(np.maximum(1, lengths - window_frames + 1))

    def __len__(self) -> int:
        """Number of different windows."""
        return int(self._ends[-1])

    def batch(
        self, index: int, /, *, size: int, seed: int, rank: int = 0, num_ranks: int = 1
    ) -> WindowBatch:
        """Return this rank's rows of the index-th batch of `size` windows.

        Raises:
            ValueError: if the batch cannot be dealt out evenly.
            FormatError: if a shard is damaged.
        """
        if size % num_ranks:
            raise ValueError(f"a batch of {size} windows cannot be dealt to {num_ranks} processes")
        draws = numpy_stream(seed, "windows", index).integers(0, len(self), size)
        return self.take(draws[rank::num_ranks])

    def take(self, numbers: np.ndarray, /) -> WindowBatch:
        """Return the windows of these numbers in [0, len(self))."""
        codes_spec, actions = self._shards.codes, self._shards.actions
        t, r = self._window_frames, codes_spec.frames_per_latent
        codes = np.zeros((len(numbers), *codes_spec.codes_shape(t)), np.int64)
        slots = np.full((len(numbers), (t - 1) * r, actions.num_slots), NULL, np.int64)
        valid = np.zeros((len(numbers), t), bool)
        for row, number in enumerate(numbers):
            which = int(np.searchsorted(self._ends, number, side="right"))
            first = int(number) - (int(self._ends[which - 1]) if which else 0)
            episode = self._episodes[which]
            part = self._shards.codes_thw(episode, first, first + t)
            steps = self._shards.slots_TA(episode, first * r, (first + t - 1) * r)
            codes[row, : len(part)] = part
            slots[row, : len(steps)] = steps
            valid[row, : len(part)] = True
        return WindowBatch(
            torch.from_numpy(codes), torch.from_numpy(slots), torch.from_numpy(valid)
        )
