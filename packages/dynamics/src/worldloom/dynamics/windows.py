"""Token shards -> windows, in an order that is a pure function of (seed, index).

    SHARDS, split, seed  ->  batch i: codes_Bthw int64, slots_BTA int64, valid_Bt bool

No window crosses the border of an episode. Batch i depends on nothing but (seed, i), so resuming
needs one number, and with several processes each takes its rows of the same batch: every window
exactly once. Episodes shorter than a window are padded behind, and `valid_Bt` says which latent
frames are real. Where nobody knows the actions of an episode, every slot of its windows is NULL.

The codes are mapped from the tar where they lie (common/shard_reader.py): reading a window is a
slice. They stay in the small type of the file (`StoredWindows`) until they are on the device:
what bounds the loader is the memory that it writes.
"""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from worldloom.common import (
    ActionSpec,
    CodeArray,
    CodeSpec,
    FormatError,
    SlotArray,
    TokenShards,
    numpy_stream,
)

from .actions import NULL


@dataclass(frozen=True, slots=True)
class WindowBatch:
    """Windows side by side."""

    codes_Bthw: Tensor
    """int64, with a last axis Q where cells have levels; padding is code 0 and not valid."""
    slots_BTA: Tensor
    """int64 slots of the r (t - 1) steps between the latent frames; NULL where no action is known,
    and in padding."""
    valid_Bt: Tensor
    """True where the latent frame is one of the episode."""
    known_Bthw: Tensor | None = None
    """Of windows that a model of order masked is fed, True where it may look at a cell's own code
    to predict others of its frame; without levels. None in all others."""

    def to(self, device: torch.device | str, /) -> "WindowBatch":
        """Return the batch on another device."""
        return self._each(lambda tensor: tensor.to(device))

    def rows(self, rows: slice, /) -> "WindowBatch":
        """Return some of the windows."""
        return self._each(lambda tensor: tensor[rows])

    def _each(self, change: Callable[[Tensor], Tensor]) -> "WindowBatch":
        """Return a batch of the changed tensors."""
        known_Bthw = None if self.known_Bthw is None else change(self.known_Bthw)
        return WindowBatch(
            change(self.codes_Bthw), change(self.slots_BTA), change(self.valid_Bt), known_Bthw
        )


class StoredWindows:
    """Rows for windows, with codes in the type of the shards; padding until they are put there."""

    def __init__(
        self, num_rows: int, /, *, codes: CodeSpec, actions: ActionSpec, window_frames: int
    ) -> None:
        steps = (window_frames - 1) * codes.frames_per_latent
        self.codes_Bthw: npt.NDArray[Any] = np.zeros(
            (num_rows, *codes.codes_shape(window_frames)), codes.dtype
        )
        self.slots_BTA = np.full((num_rows, steps, actions.num_slots), NULL, np.int64)
        self.valid_Bt = np.zeros((num_rows, window_frames), bool)

    def put(self, row: int, codes_thw: CodeArray, slots_TA: SlotArray, /) -> None:
        """Copy one window into a row; it may be shorter than the row, and without actions."""
        frames = len(codes_thw)
        self.codes_Bthw[row, :frames] = codes_thw
        if slots_TA.size:  # of shards without actions they have no slots at all
            self.slots_BTA[row, : len(slots_TA)] = slots_TA
        self.valid_Bt[row, :frames] = True

    def repeated(self, rows: npt.NDArray[np.int64], /) -> Self:
        """Return these rows, as often as they are named."""
        other = copy(self)
        other.codes_Bthw = self.codes_Bthw[rows]
        other.slots_BTA = self.slots_BTA[rows]
        other.valid_Bt = self.valid_Bt[rows]
        return other

    def to(self, device: torch.device | str, /) -> WindowBatch:
        """Return the batch on a device, where the codes become int64."""
        on_cpu = torch.device(device).type == "cpu"
        return WindowBatch(
            # On a CPU numpy is quicker at it.
            torch.from_numpy(self.codes_Bthw.astype(np.int64))
            if on_cpu
            else widened(self.codes_Bthw, device),
            torch.from_numpy(self.slots_BTA).to(device),
            torch.from_numpy(self.valid_Bt).to(device),
        )


class WindowSource(Protocol):
    """What gives the i-th batch: the windows of a folder, of several, or of a stream."""

    @property
    def latent_frames(self) -> int:
        """Latent frames in all."""

    def __len__(self) -> int:
        """Number of windows: all different ones, or those of one pass through a stream."""

    def stored(
        self, index: int, /, *, size: int, seed: int, rank: int = 0, num_ranks: int = 1
    ) -> StoredWindows:
        """Return what `batch` returns, with codes in the type of the shards."""

    def batch(
        self, index: int, /, *, size: int, seed: int, rank: int = 0, num_ranks: int = 1
    ) -> WindowBatch:
        """Return this rank's rows of the index-th batch of `size` windows.

        Row i of what is returned is row rank + i * num_ranks of the whole batch.
        """

    def origins(self, index: int, /, *, size: int, seed: int) -> list[tuple[str, int]]:
        """Return (key of the episode, first latent frame) of every window of a batch."""


class Windows:
    """Windows of one split of a folder of token shards."""

    def __init__(
        self,
        shards: TokenShards,
        split: str,
        /,
        *,
        window_frames: int,
        actions: ActionSpec | None = None,
    ) -> None:
        """Index the split.

        Args:
            shards: codes and actions.
            split: "train" or "validation".
            window_frames: latent frames per window, t, at least 2.
            actions: those of the model; None takes the shards' own. Others only for shards that
                have none (`DynamicsSpec.of`): their windows then have NULL in every slot.

        Raises:
            FormatError: if no episode of the split has two latent frames.
            ValueError: if a window would have nothing to predict.
        """
        self.shards = shards
        self.window_frames = window_frames
        self.actions = shards.actions if actions is None else actions
        self._episodes = np.array(episodes_of(shards, split, window_frames=window_frames))
        lengths = np.array([shards.episodes[i].latent_frames for i in self._episodes])
        self.latent_frames = int(lengths.sum())
        """Latent frames in all."""
        # An episode of n frames has n - window + 1 windows; a shorter one is one padded window.
        self._ends = np.cumsum(np.maximum(1, lengths - window_frames + 1))
        self._starts = np.concatenate([[0], self._ends[:-1]])

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
        return self.stored(index, size=size, seed=seed, rank=rank, num_ranks=num_ranks).to("cpu")

    def stored(
        self, index: int, /, *, size: int, seed: int, rank: int = 0, num_ranks: int = 1
    ) -> StoredWindows:
        """Return what `batch` returns, with codes in the type of the shards."""
        rows = rows_of(rank, num_ranks, size=size)
        return self._take(self.draw(index, size=size, seed=seed)[rows])

    def origins(self, index: int, /, *, size: int, seed: int) -> list[tuple[str, int]]:
        """Return (key of the episode, first latent frame) of every window of a batch."""
        return self.places(self.draw(index, size=size, seed=seed))

    def take(self, numbers: npt.NDArray[np.int64], /) -> WindowBatch:
        """Return the windows of these numbers in [0, len(self)).

        Raises:
            FormatError: if a shard is damaged.
        """
        return self._take(numbers).to("cpu")

    def draw(
        self, index: int, /, *, size: int, seed: int, purpose: tuple[int, ...] = ()
    ) -> npt.NDArray[np.int64]:
        """Return the numbers of the windows of a whole batch; `purpose` tells draws apart."""
        return numpy_stream(seed, "windows", index, *purpose).integers(0, len(self), size)

    def places(self, numbers: npt.NDArray[np.int64], /) -> list[tuple[str, int]]:
        """Return (key of the episode, first latent frame) of windows."""
        episodes, firsts = self._find(numbers)
        return [
            (self.shards.episodes[episode].key, first)
            for episode, first in zip(episodes, firsts, strict=True)
        ]

    def put(
        self,
        stored: StoredWindows,
        rows: npt.NDArray[np.int64],
        numbers: npt.NDArray[np.int64],
        /,
    ) -> None:
        """Copy the windows of these numbers into these rows.

        Raises:
            FormatError: if a shard is damaged.
        """
        shards, t = self.shards, self.window_frames
        r = shards.codes.frames_per_latent
        places = list(zip(rows.tolist(), *self._find(numbers), strict=True))
        for row, episode, first in places:
            stored.put(
                row,
                shards.stored_codes_thw(episode, first, first + t),
                shards.stored_slots_TA(episode, first * r, (first + t - 1) * r),
            )
        # Once for all rows: by itself every look at a window costs as much as its copy.
        if int(stored.codes_Bthw.max()) >= shards.codes.vocab_size:
            for _, episode, first in places:
                shards.codes_thw(episode, first, first + t)  # which refuses it, and says where

    def _take(self, numbers: npt.NDArray[np.int64]) -> StoredWindows:
        """Return windows in the type of the shards."""
        stored = StoredWindows(
            len(numbers),
            codes=self.shards.codes,
            actions=self.actions,
            window_frames=self.window_frames,
        )
        self.put(stored, np.arange(len(numbers)), numbers)
        return stored

    def _find(self, numbers: npt.NDArray[np.int64]) -> tuple[list[int], list[int]]:
        """Return the episodes and the first latent frames of windows."""
        which = np.searchsorted(self._ends, numbers, side="right")
        return self._episodes[which].tolist(), (numbers - self._starts[which]).tolist()


def widened(codes: npt.NDArray[Any], device: torch.device | str, /) -> Tensor:
    """Return unsigned integers as int64 on a device, to which only their own bytes are sent."""
    bits = 8 * codes.dtype.itemsize
    # Not as torch.uint16 and uint32, which not every device has: as the signed type of their size.
    signed = codes if bits == 8 else codes.view(f"i{codes.dtype.itemsize}")
    wide = torch.from_numpy(signed).to(device).to(torch.int64)
    return wide if bits == 8 else wide & ((1 << bits) - 1)


def rows_of(rank: int, num_ranks: int, /, *, size: int) -> slice:
    """Return which rows of a batch are a rank's.

    Raises:
        ValueError: if the batch cannot be dealt out evenly.
    """
    if size % num_ranks:
        raise ValueError(f"a batch of {size} windows cannot be dealt to {num_ranks} processes")
    return slice(rank, None, num_ranks)


def episodes_of(shards: TokenShards, split: str, /, *, window_frames: int) -> list[int]:
    """Return the episodes of a split that have something to predict, in the manifest's order.

    Raises:
        FormatError: if there are none.
        ValueError: if a window would have nothing to predict.
    """
    if window_frames < 2:
        raise ValueError(f"windows of {window_frames} latent frames, must be at least 2")
    found = [i for i in shards.split(split) if shards.episodes[i].latent_frames >= 2]
    if not found:
        raise FormatError(
            f"{shards.folder}: the {split} split has no episode of two latent frames, so there "
            "is nothing to predict; record more episodes and run `worldloom tokenize` again"
        )
    return found
