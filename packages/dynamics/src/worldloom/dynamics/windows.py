"""Token shards -> windows, in an order that is a pure function of (seed, index).

    SHARDS, split, seed  ->  batch i: codes_Bthw int64, slots_BTA int64, valid_Bt bool

No window crosses the border of an episode. Batch i depends on nothing but (seed, i), so resuming
needs one number, and with several processes each takes its rows of the same batch: every window
exactly once. Episodes shorter than a window are padded behind, and `valid_Bt` says which latent
frames are real.

The codes are mapped from the tar where they lie (common/shard_reader.py): reading a window is a
slice.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from worldloom.common import FormatError, TokenShards, numpy_stream

from .actions import NULL


@dataclass(frozen=True, slots=True)
class WindowBatch:
    """Windows side by side."""

    codes_Bthw: Tensor
    """int64, with a last axis Q where cells have levels; padding is code 0 and not valid."""
    slots_BTA: Tensor
    """int64 slots of the r (t - 1) steps between the latent frames; padding is NULL."""
    valid_Bt: Tensor
    """True where the latent frame is one of the episode."""

    def to(self, device: torch.device | str, /) -> "WindowBatch":
        """Return the batch on another device."""
        return WindowBatch(
            self.codes_Bthw.to(device), self.slots_BTA.to(device), self.valid_Bt.to(device)
        )

    def rows(self, rows: slice, /) -> "WindowBatch":
        """Return some of the windows."""
        return WindowBatch(self.codes_Bthw[rows], self.slots_BTA[rows], self.valid_Bt[rows])


class Windows:
    """Windows of one split of a folder of token shards."""

    def __init__(self, shards: TokenShards, split: str, /, *, window_frames: int) -> None:
        """Index the split.

        Args:
            shards: codes and actions.
            split: "train" or "validation".
            window_frames: latent frames per window, t, at least 2.

        Raises:
            FormatError: if no episode of the split has two latent frames.
            ValueError: if a window would have nothing to predict.
        """
        if window_frames < 2:
            raise ValueError(f"windows of {window_frames} latent frames, must be at least 2")
        self._shards = shards
        self._window_frames = window_frames
        rows = shards.episodes
        self._episodes = [i for i in shards.split(split) if rows[i].latent_frames >= 2]
        if not self._episodes:
            raise FormatError(
                f"{shards.folder}: the {split} split has no episode of two latent frames, so there "
                "is nothing to predict; record more episodes and run `worldloom tokenize` again"
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

        Row i of what is returned is row rank + i * num_ranks of the whole batch.

        Raises:
            ValueError: if the batch cannot be dealt out evenly.
            FormatError: if a shard is damaged.
        """
        if size % num_ranks:
            raise ValueError(f"a batch of {size} windows cannot be dealt to {num_ranks} processes")
        return self.take(self._draw(index, size, seed)[rank::num_ranks])

    def origins(self, index: int, /, *, size: int, seed: int) -> list[tuple[str, int]]:
        """Return (key of the episode, first latent frame) of every window of a batch."""
        found = [self._find(int(number)) for number in self._draw(index, size, seed)]
        return [(self._shards.episodes[episode].key, first) for episode, first in found]

    def take(self, numbers: npt.NDArray[np.int64], /) -> WindowBatch:
        """Return the windows of these numbers in [0, len(self)).

        Raises:
            FormatError: if a shard is damaged.
        """
        codes_spec, actions = self._shards.codes, self._shards.actions
        t, r = self._window_frames, codes_spec.frames_per_latent
        codes_Bthw = np.zeros((len(numbers), *codes_spec.codes_shape(t)), np.int64)
        slots_BTA = np.full((len(numbers), (t - 1) * r, actions.num_slots), NULL, np.int64)
        valid_Bt = np.zeros((len(numbers), t), bool)
        for row, number in enumerate(numbers):
            episode, first = self._find(int(number))
            part_thw = self._shards.codes_thw(episode, first, first + t)
            part_TA = self._shards.slots_TA(episode, first * r, (first + t - 1) * r)
            codes_Bthw[row, : len(part_thw)] = part_thw
            slots_BTA[row, : len(part_TA)] = part_TA
            valid_Bt[row, : len(part_thw)] = True
        return WindowBatch(
            torch.from_numpy(codes_Bthw), torch.from_numpy(slots_BTA), torch.from_numpy(valid_Bt)
        )

    def _draw(self, index: int, size: int, seed: int) -> npt.NDArray[np.int64]:
        """Return the numbers of the windows of a whole batch."""
        return numpy_stream(seed, "windows", index).integers(0, len(self), size)

    def _find(self, number: int) -> tuple[int, int]:
        """Return the episode and the first latent frame of a window."""
        which = int(np.searchsorted(self._ends, number, side="right"))
        first = number - (int(self._ends[which - 1]) if which else 0)
        return self._episodes[which], first
