"""Episodes -> clips of fixed length, in an order that is a pure function of (seed, index).

    EPISODES, seed  ->  batch i: frames_BTHWC uint8

No clip crosses the border of an episode. Batch i depends on nothing but (seed, i), so a resumed
run sees what an uninterrupted one would. Episodes shorter than a clip are left out and counted.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from worldloom.common import Episodes, FormatError, Frames, ResizeRule, numpy_stream

from .pixels import resize_frames


class Clips:
    """Random clips of a folder of episodes; every starting frame is equally likely.

    Episodes are decoded once and kept as long as `cache_bytes` lasts. Of those that found no room
    each clip is read from its file by itself: slower, but memory stays where it is.
    """

    def __init__(  # noqa: PLR0913 - what a clip is, in plain sight; a group of it would need a name
        self,
        episodes: Episodes,
        keys: Sequence[str],
        /,
        *,
        clip_frames: int,
        size: tuple[int, int],
        resize: ResizeRule,
        cache_bytes: int = 2 << 30,
    ) -> None:
        """Index the episodes.

        Args:
            episodes: the folder.
            keys: which of its episodes.
            clip_frames: frames per clip, T.
            size: height and width of the clips.
            resize: how frames of another size are made to fit.
            cache_bytes: how much memory decoded episodes may take.

        Raises:
            FormatError: if no episode is long enough for one clip, or one is damaged.
        """
        self._episodes = episodes
        self._clip_frames = clip_frames
        self._size = size
        self._resize = resize
        self._kept: dict[str, Frames] = {}
        self._room_bytes = cache_bytes
        self._lengths: dict[str, int] = {}
        for key in keys:
            with episodes.open(key) as episode:
                self._lengths[key] = episode.num_frames
        self.keys = [key for key in keys if self._lengths[key] >= clip_frames]
        """Episodes that clips come from."""
        self.num_short = len(keys) - len(self.keys)
        """Episodes left out because they are shorter than a clip."""
        self.num_frames = sum(self._lengths[key] for key in self.keys)
        """Frames of all episodes that clips come from."""
        if not self.keys:
            raise FormatError(
                f"{episodes.folder}: no episode has {clip_frames} frames (the longest of "
                f"{len(keys)} has {max(self._lengths.values(), default=0)}); record longer ones, "
                "or lower clip_frames"
            )
        starts = [self._lengths[key] - clip_frames + 1 for key in self.keys]
        self._ends = np.cumsum(starts)

    def origins(self, index: int, /, *, size: int, seed: int) -> list[tuple[str, int]]:
        """Return (key, first frame) of every clip of the index-th batch."""
        draws = numpy_stream(seed, "clips", index).integers(0, self._ends[-1], size)
        which = np.searchsorted(self._ends, draws, side="right")
        first = np.concatenate([[0], self._ends[:-1]])
        return [(self.keys[w], int(draw - first[w])) for w, draw in zip(which, draws, strict=True)]

    def batch(
        self, index: int, /, *, size: int, seed: int, rank: int = 0, num_ranks: int = 1
    ) -> Tensor:
        """Return frames_BTHWC, uint8, of the index-th batch, or of this rank's rows of it.

        Args:
            index: number of the batch, from 0.
            size: clips in it over all ranks, B; at least one for each.
            seed: of the order of the clips.
            rank: row i of what is returned is row rank + i * num_ranks of the whole batch.
            num_ranks: processes that share the batch.
        """
        origins = self.origins(index, size=size, seed=seed)[rank::num_ranks]
        return torch.from_numpy(np.stack([self._clip(key, start) for key, start in origins]))

    def _clip(self, key: str, start: int) -> Frames:
        """Return the clip of an episode that begins at a frame."""
        stop = start + self._clip_frames
        if key not in self._kept:
            height, width = self._size
            size_bytes = self._lengths[key] * height * width * 3
            if size_bytes > self._room_bytes:
                return self._read(key, start, stop)
            self._kept[key] = self._read(key, 0, self._lengths[key])
            self._room_bytes -= size_bytes
        return self._kept[key][start:stop]

    def _read(self, key: str, start: int, stop: int) -> Frames:
        """Return frames [start, stop) of an episode at the tokenizer's size."""
        height, width = self._size
        with self._episodes.open(key) as episode:
            frames = episode.frames(start, stop)
        return resize_frames(frames, height=height, width=width, rule=self._resize)
