"""Episodes -> clips of fixed length, in an order that is a pure function of (seed, index).

    EPISODES, seed  ->  batch i: frames_BTHWC uint8

No clip crosses the border of an episode. Batch i depends on nothing but (seed, i), so a resumed run
sees what an uninterrupted one would. Episodes shorter than a clip are left out and counted.
"""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from worldloom.common import Episodes, FormatError, Frames, numpy_stream

from .pixels import resize_frames


class Clips:
    """Random clips of a folder of episodes.

    Every starting frame of every episode is equally likely. Decoded episodes are kept in memory up
    to `cache_bytes`; a small corpus is decoded once.
    """

    def __init__(
        self,
        episodes: Episodes,
        keys: Sequence[str],
        /,
        *,
        clip_frames: int,
        size: tuple[int, int],
        resize: str,
        cache_bytes: int = 2 << 30,
    ) -> None:
        """Index the episodes.

        Raises:
            FormatError: if no episode is long enough for one clip.
        """
        self._episodes = episodes
        self._clip_frames = clip_frames
        self._size = size
        self._resize = resize
        self._cache: OrderedDict[str, Frames] = OrderedDict()
        self._cache_bytes = cache_bytes
        self._cached_bytes = 0
        lengths = {}
        for key in keys:
            with episodes.open(key) as episode:
                lengths[key] = episode.num_frames
        self.keys = [key for key, length in lengths.items() if length >= clip_frames]
        self.num_short = len(lengths) - len(self.keys)
        """Episodes left out because they are shorter than a clip."""
        self.num_frames = sum(lengths[key] for key in self.keys)
        if not self.keys:
            raise FormatError(
                f"{episodes.folder}: no episode has {clip_frames} frames (the longest has "
                f"{max(lengths.values(), default=0)}); record longer ones or lower --clip-frames"
            )
        starts = np.array([lengths[key] - clip_frames + 1 for key in self.keys])
        self._ends = np.cumsum(starts)

    def batch(self, index: int, /, *, size: int, seed: int) -> Tensor:
        """Return frames_BTHWC, uint8, of the index-th batch."""
        draws = numpy_stream(seed, "clips", index).integers(0, self._ends[-1], size)
        return torch.from_numpy(np.stack([self._clip(int(draw)) for draw in draws]))

    def _clip(self, draw: int) -> Frames:
        """Return the clip that begins at the draw-th starting frame of all."""
        which = int(np.searchsorted(self._ends, draw, side="right"))
        start = draw - (int(self._ends[which - 1]) if which else 0)
        frames = self._frames(self.keys[which])
        return frames[start : start + self._clip_frames]

    def _frames(self, key: str) -> Frames:
        """Return all frames of an episode at the tokenizer's size, from memory if they are there."""
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        with self._episodes.open(key) as episode:
            height, width = self._size
            frames = resize_frames(
                episode.frames(), height=height, width=width, rule=self._resize  # type: ignore[arg-type]
            )  # fmt: skip
        self._cache[key] = frames
        self._cached_bytes += frames.nbytes
        while self._cached_bytes > self._cache_bytes and len(self._cache) > 1:
            _, oldest = self._cache.popitem(last=False)
            self._cached_bytes -= oldest.nbytes
        return frames
