"""A plan and a few clips -> what `worldloom tokenize` will take, before it is begun.

    TokenizeJob, pending units  ->  estimate  ->  TokenizeDryRun: the numbers, one a line

Bytes are exact, since a tar's size follows from the lengths of its episodes. Time is an estimate:
the first frames of a few episodes are read, encoded and decoded as a worker does, and multiplied.
"""

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from worldloom.common import Episodes, FormatError, say, shard_bytes
from worldloom.tokenizer import VideoTokenizer, load_tokenizer

from .encoding import EpisodeFrames, batches, side_by_side
from .units import (
    TokenizeJob,
    UnitWorker,
    measured_split,
    too_many_damaged,
    units_of,
)

_PROBE_S = 3.0
"""How long clips are encoded at most, for the estimate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizeDryRun:
    """What tokenizing would take. As text: one `name value` a line."""

    units: int
    """Shards still to do by this process and its workers."""
    episodes: int
    """Episodes in them."""
    frames: int
    shard_bytes: int
    """Size of those shards, to the byte, if no episode turns out damaged."""
    workers: int
    frames_per_s: float
    """An estimate of what one worker encodes, measures and writes."""
    expected_s: float
    """An estimate of the whole, without the start of the processes."""

    def __str__(self) -> str:
        """Return what a program can read: `units 12`, and so on."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return "\n".join(
            f"{name} {value:.1f}" if isinstance(value, float) else f"{name} {value}"
            for name, value in values.items()
        )


def estimate(
    job: TokenizeJob,
    episodes: Episodes,
    tokenizer: VideoTokenizer,
    /,
    *,
    pending: Sequence[int],
    workers: int,
) -> TokenizeDryRun:
    """Count what is to do, time a few clips, say what it will take, and return it.

    Args:
        job: what a worker would be given.
        episodes: the job's.
        tokenizer: the job's, on the CPU.
        pending: numbers of the shards that are to do.
        workers: how many would do them at once.

    Raises:
        FormatError: if more episodes than may be skipped cannot be opened.
    """
    units = units_of(episodes.keys, job.shard_episodes)
    damaged: dict[str, str] = {}
    lengths: dict[str, int] = {}
    size_bytes = 0
    for index in pending:
        rows = []
        for key in units[index]:
            try:
                with episodes.open(key) as episode:
                    lengths[key] = episode.num_frames
                    about = episodes.split_of(key), episode.metadata, episode.labelled
            except FormatError as error:
                damaged[key] = str(error).replace(f"{episodes.folder}/", "")
                if len(damaged) > job.skip_bad:
                    raise too_many_damaged(damaged, job.skip_bad, job.episodes) from error
                continue
            rows.append((key, lengths[key], *about))
        size_bytes += shard_bytes(rows, codes=tokenizer.spec.codes, actions=episodes.spec.actions)
    speed = _frames_per_s(job, episodes, tokenizer, lengths) if lengths else 0.0
    frames = sum(lengths.values())
    dry = TokenizeDryRun(
        units=len(pending),
        episodes=len(lengths),
        frames=frames,
        shard_bytes=size_bytes,
        workers=workers,
        frames_per_s=speed,
        expected_s=frames / speed / workers if speed else 0.0,
    )
    for why in damaged.values():
        say(f"would be skipped: {episodes.folder}/{why}")
    say(
        f"{dry.units} shards to do: {dry.episodes:,} episodes, {dry.frames:,} frames, "
        f"{dry.shard_bytes / 1e6:.1f} MB of codes and actions"
    )
    say(
        f"about {dry.expected_s:.0f} s with {workers} workers (an estimate: one encoded "
        f"{speed:.0f} frames/s of a few clips just now)"
    )
    say("nothing was encoded for good and nothing was written: this was a dry run")
    return dry


def _frames_per_s(
    job: TokenizeJob, episodes: Episodes, tokenizer: VideoTokenizer, lengths: dict[str, int]
) -> float:
    """Return how many frames one worker does in a second, from the first of a few episodes."""
    if job.device != "cpu":
        tokenizer = load_tokenizer(job.tokenizer, device=job.device)
    split = measured_split(episodes)
    measured = sum(n for key, n in lengths.items() if episodes.split_of(key) == split)
    share = measured / sum(lengths.values())
    # A worker, for the threads that it computes with.
    with closing(UnitWorker(job, episodes, tokenizer)):
        for keys in batches(list(lengths), job.batch_episodes):
            try:
                began = time.perf_counter()
                piece_BTHWC = _first_piece(episodes, keys, tokenizer, lengths)
                reading_s = (time.perf_counter() - began) / piece_BTHWC.shape[1]
            except FormatError:
                continue  # damaged inside: the run will say so
            encoding_s, decoding_s = _coding_s(piece_BTHWC, tokenizer)
            return len(keys) / (reading_s * (1 + share) + encoding_s + share * decoding_s)
    return 0.0


def _first_piece(
    episodes: Episodes, keys: Sequence[str], tokenizer: VideoTokenizer, lengths: dict[str, int]
) -> Tensor:
    """Return the first frames_BTHWC of several episodes side by side."""
    videos = [EpisodeFrames(episodes, key, tokenizer.spec) for key in keys]
    groups = side_by_side(videos, [lengths[key] for key in keys], batch=len(keys))
    with closing(groups):
        return next(groups)[1]


def _coding_s(piece_BTHWC: Tensor, tokenizer: VideoTokenizer) -> tuple[float, float]:
    """Return the seconds that encoding and decoding take, for a frame of every episode."""
    encoder, decoder = tokenizer.open_encoder(), tokenizer.open_decoder()
    encoding_s = decoding_s = 0.0
    timed = 0
    for number, frames_B1HWC in enumerate(torch.split(piece_BTHWC, 1, dim=1)):
        if number == 1:  # the first warmed up
            encoding_s, decoding_s, timed = 0.0, 0.0, 0
        began = time.perf_counter()
        codes_Bthw = encoder.push(frames_B1HWC).cpu()
        encoded = time.perf_counter()
        if codes_Bthw.shape[1]:
            decoder.push(codes_Bthw).cpu()
        encoding_s += encoded - began
        decoding_s += time.perf_counter() - encoded
        timed += 1
        if encoding_s + decoding_s > _PROBE_S:
            break
    return encoding_s / timed, decoding_s / timed
