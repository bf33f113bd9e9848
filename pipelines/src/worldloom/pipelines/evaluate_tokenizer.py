"""The measurements of a tokenizer. Each takes clips, episodes or frames, and any VideoTokenizer.

    true and decoded clips  -> reconstruction -> PSNR, SSIM, small things kept, lost and invented
    true and decoded clips  -> Perceptual     -> LPIPS, or why there is none
    every episode or shard  -> codebook_use   -> codes used, perplexity, how often codes change
    frames_BTHWC            -> speed          -> frames a second, encoding and decoding

Errors and counts are pooled before they become numbers; see worldloom.tokenizer.metrics.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from worldloom.common import Episodes, TokenizerSpec, TokenShards, progress
from worldloom.tokenizer import VideoTokenizer
from worldloom.tokenizer.metrics import (
    CodeCounts,
    SmallMasks,
    SmallObjects,
    count_codes,
    count_small_objects,
    small_object_masks,
    ssim,
)
from worldloom.tokenizer.perceptual import LPIPS_LEAST_SIZE, load_lpips, lpips_distance

from .encoding import EpisodeFrames, batches, clip_psnr, encode_videos

SIDE_BY_SIDE = 16
"""Videos that the tokenizer takes at once."""

_SSIM_LEAST_SIZE = 11
_SPEED_REPEATS = 5

Watcher = Callable[[Tensor, Tensor, SmallMasks], None]
"""Sees every true and decoded clip_THWC, and the masks_1THW of its small things."""


def narrower_than(spec: TokenizerSpec, small_pixels: int, /) -> int:
    """Return the width in this tokenizer's pixels of what has `small_pixels` at 64 x 64."""
    # Of things narrower than one pixel there are none.
    return max(2, round(small_pixels * min(spec.height, spec.width) / 64))


def reconstruction(
    clips: Iterable[tuple[Tensor, Tensor]],
    /,
    *,
    narrower_than: int,
    watchers: Sequence[Watcher] = (),
) -> dict[str, Any]:
    """Return how true decoded clips are: PSNR in all and of what moves, SSIM, small things.

    Args:
        clips: true and decoded clip_THWC, uint8, of any length.
        narrower_than: pixels; see `worldloom.tokenizer.metrics.small_object_masks`.
        watchers: see each clip as it passes, so that one pass is enough.
    """
    counts: list[SmallObjects] = []
    similarities: list[float] = []

    def passing() -> Iterator[tuple[Tensor, Tensor]]:
        for true_THWC, decoded_THWC in clips:
            pair = true_THWC[None], decoded_THWC[None]
            masks = small_object_masks(*pair, narrower_than=narrower_than)
            counts.append(count_small_objects(masks))
            if min(true_THWC.shape[1:3]) >= _SSIM_LEAST_SIZE:
                similarities.append(ssim(*pair) * len(true_THWC))
            for watch in watchers:
                watch(true_THWC, decoded_THWC, masks)
            yield true_THWC, decoded_THWC

    psnr = clip_psnr(passing())
    small = sum(counts[1:], start=counts[0])
    return {
        **psnr,
        "ssim": sum(similarities) / small.frames if similarities else None,
        "num_frames": small.frames,
        "small_objects": {
            **small.numbers(),
            "narrower_than_pixels": narrower_than,
            "small_pixels": small.small_pixels,
            "false_pixels": small.false_pixels,
            "small_frames": small.small_frames,
        },
    }


class Perceptual:
    """The mean LPIPS of the clips it watches; None, with the reason, where it cannot be had."""

    def __init__(self, spec: TokenizerSpec, /, *, device: str) -> None:
        self.reason: str | None = None
        self._distances: list[Tensor] = []
        network = load_lpips(device=device)
        if isinstance(network, str):
            self.reason = network
        elif min(spec.height, spec.width) < LPIPS_LEAST_SIZE:
            self.reason = (
                f"not measured: frames are {spec.height} x {spec.width}, and LPIPS needs at least "
                f"{LPIPS_LEAST_SIZE} x {LPIPS_LEAST_SIZE}"
            )
        else:
            self._network = network

    def watch(self, true_THWC: Tensor, decoded_THWC: Tensor, _masks: SmallMasks, /) -> None:
        """Take one clip in."""
        if self.reason is None:
            self._distances.append(lpips_distance(self._network, true_THWC, decoded_THWC))

    def numbers(self) -> dict[str, Any]:
        """Return "lpips" of all frames, and the reason if it is None."""
        if self.reason is not None:
            return {"lpips": None, "lpips_reason": self.reason}
        return {
            "lpips": float(torch.cat(self._distances).mean(dtype=torch.float64)),
            "lpips_reason": None,
        }


def codebook_use(
    shards: Path | None, episodes: Episodes, tokenizer: VideoTokenizer, /
) -> CodeCounts:
    """Count the codes of one pass over every episode, and how often they change.

    Raises:
        MismatchError: if the shards are another tokenizer's.
    """
    spec = tokenizer.spec
    videos: Iterable[Tensor]
    if shards is not None:
        tokens = TokenShards(shards)
        spec.require(tokens.tokenizer, here="the tokenizer", there=str(shards))
        rows = range(len(tokens.episodes))
        videos = (torch.from_numpy(tokens.codes_thw(row).astype(np.int64)) for row in rows)
    else:
        videos = _encoded(episodes, tokenizer)
    total: CodeCounts | None = None
    for codes_thw in videos:
        counted = count_codes(codes_thw[None], spec.codes)
        total = counted if total is None else total + counted
    assert total is not None, "neither episodes nor shards are ever none"
    return total


def speed(
    tokenizer: VideoTokenizer,
    frames_BTHWC: Tensor,
    /,
    *,
    device: str,
    repeats: int = _SPEED_REPEATS,
) -> dict[str, Any]:
    """Return how many frames a second it encodes and decodes: the median, after a warm-up.

    Args:
        tokenizer: on the device.
        frames_BTHWC: uint8, on the CPU, where codes and decoded frames are awaited too.
        device: named in the result.
        repeats: of the measurement.
    """
    num_clips, num_frames = frames_BTHWC.shape[:2]
    seconds: dict[str, list[float]] = {"encode": [], "decode": []}
    for _ in range(1 + repeats):
        began = time.perf_counter()
        codes_Bthw = tokenizer.encode(frames_BTHWC).cpu()  # waits for the device, too
        between = time.perf_counter()
        tokenizer.decode(codes_Bthw, num_frames=num_frames).cpu()
        seconds["encode"].append(between - began)
        seconds["decode"].append(time.perf_counter() - between)
    return {
        **{
            f"{name}_frames_per_s": num_clips * num_frames / median(times[1:])
            for name, times in seconds.items()
        },
        "batch": num_clips,
        "clip_frames": num_frames,
        "device": device,
        "threads": torch.get_num_threads(),
    }


class Longest:
    """Keeps the first of the longest clips it watches, to measure the speed on."""

    def __init__(self, count: int, /) -> None:
        self._count = count
        self._kept: list[Tensor] = []

    def watch(self, true_THWC: Tensor, _decoded: Tensor, _masks: SmallMasks, /) -> None:
        """Take one clip in."""
        longest = len(self._kept[0]) if self._kept else 0
        if len(true_THWC) > longest:
            self._kept = []
        if len(true_THWC) >= longest and len(self._kept) < self._count:
            self._kept.append(true_THWC)

    def frames_BTHWC(self) -> Tensor:
        """Return as many clips as were asked for, repeated if there were fewer."""
        rows = [self._kept[number % len(self._kept)] for number in range(self._count)]
        return torch.stack(rows)


def lengths_of(episodes: Episodes, keys: Sequence[str], /) -> list[int]:
    """Return the number of frames of each episode."""
    lengths = []
    for key in keys:
        with episodes.open(key) as episode:
            lengths.append(episode.num_frames)
    return lengths


def _encoded(episodes: Episodes, tokenizer: VideoTokenizer) -> Iterator[Tensor]:
    """Yield codes_thw of every episode."""
    for keys in progress(list(batches(episodes.keys, SIDE_BY_SIDE)), "encoding episodes"):
        videos = [EpisodeFrames(episodes, key, tokenizer.spec) for key in keys]
        yield from encode_videos(videos, lengths_of(episodes, keys), tokenizer, batch=SIDE_BY_SIDE)
