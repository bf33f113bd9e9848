"""Frames of recorded episodes -> codes -> frames, by a tokenizer's rules, several videos at once.

    frames_THWC of any size     -> fit, EpisodeFrames -> frames_THWC of the tokenizer's size
    videos                      -> encode_videos      -> codes_thw of each
    codes_thw of each           -> decode_videos      -> frames_THWC of each
    videos                      -> reconstructed_clips -> true and decoded clips
    true and decoded clips      -> squared_errors     -> sums  ->  PSNR, PSNR of what moves

A video is an iterable of frames_THWC pieces, so that a long episode need not fit into memory.
Videos of like length go through the tokenizer together: one that ends first repeats its last
frame, and what came of that is cut off again, which a causal tokenizer allows.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, fields
from itertools import chain, groupby, zip_longest
from operator import itemgetter
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from worldloom.common import Episodes, Frames, MismatchError, TokenizerSpec, say
from worldloom.tokenizer import VideoTokenizer, resize_frames
from worldloom.tokenizer.metrics import decibels, moving_pixels, squared_error

from .ahead import Ahead

Row = TypeVar("Row")

Video = Iterable[Tensor]
"""Pieces of frames_THWC, or of codes_thw, in order."""

CLIP_FRAMES = 16
"""Frames of a clip whose median tells what moves."""


def require_size(
    size: tuple[int, int], spec: TokenizerSpec, /, *, where: Path, tokenizer: str | None = None
) -> None:
    """Refuse frames that the tokenizer does not take; say so of those that it resizes.

    Args:
        size: height and width of the frames.
        spec: of the tokenizer.
        where: the file or folder that holds them.
        tokenizer: its folder or name, if that is known.

    Raises:
        MismatchError: naming the path and both sizes, if its rule is "exact".
    """
    if size == (spec.height, spec.width):
        return
    whose = "the tokenizer" if tokenizer is None else f"the tokenizer {tokenizer}"
    shapes = (
        f"{where}: frames are {size[0]}x{size[1]} (height x width), but {whose} takes "
        f"{spec.height}x{spec.width}"
    )
    if spec.resize == "exact":
        raise MismatchError(
            f"{shapes} exactly, because any other size changes the picture; use frames of that "
            "size, or train a tokenizer on these"
        )
    say(f"{shapes}; they are resized by its rule, {spec.resize}")


def fit(frames_THWC: Frames, spec: TokenizerSpec, /) -> Frames:
    """Return the frames at the tokenizer's size, by its rule."""
    return resize_frames(frames_THWC, height=spec.height, width=spec.width, rule=spec.resize)


@dataclass(frozen=True, slots=True)
class EpisodeFrames:
    """A recorded episode as a video at the tokenizer's size, read piece by piece."""

    episodes: Episodes
    key: str
    spec: TokenizerSpec

    def __iter__(self) -> Iterator[Tensor]:
        """Yield frames_THWC; the file is open until the end, or until the iterator is closed."""
        with self.episodes.open(self.key) as episode:
            for piece in episode.pieces():
                # A copy: pieces of a file are not writable, of which torch complains.
                yield torch.from_numpy(np.array(fit(piece, self.spec)))


Group = tuple[Sequence[int], Tensor]
"""Numbers of the videos that go through the tokenizer side by side, and a piece of each."""


def side_by_side(
    videos: Sequence[Video], lengths: Sequence[int], /, *, batch: int
) -> Generator[Group, None, None]:
    """Yield the pieces of every video, `batch` videos of like length at a time, stacked."""
    for indices in _alike(lengths, batch):
        with closing(_stacked([videos[index] for index in indices])) as stacked:
            for piece in stacked:
                yield indices, piece


def encode_groups(groups: Iterable[Group], tokenizer: VideoTokenizer, /) -> dict[int, Tensor]:
    """Return codes_thw of each video of `side_by_side`, by its number.

    They cover what was put behind a video that ended before the longest beside it: cut them.
    """

    def encode(pieces: Iterator[Tensor]) -> Iterator[Tensor]:
        session = tokenizer.open_encoder()
        for frames_BTHWC in pieces:
            yield session.push(frames_BTHWC)
        yield session.flush()

    return _each(groups, encode)


def encode_videos(
    videos: Sequence[Video], lengths: Sequence[int], tokenizer: VideoTokenizer, /, *, batch: int
) -> list[Tensor]:
    """Return codes_thw of each video, which do not depend on those beside it.

    Args:
        videos: frames_THWC at the tokenizer's size.
        lengths: frames of each.
        tokenizer: encodes them.
        batch: videos at once.
    """
    with closing(Ahead(side_by_side(videos, lengths, batch=batch))) as groups:
        codes = encode_groups(groups, tokenizer)
    latent_frames = tokenizer.spec.codes.latent_frames
    return [codes[index][: latent_frames(length)] for index, length in enumerate(lengths)]


def decode_videos(
    codes: Sequence[Tensor], lengths: Sequence[int], tokenizer: VideoTokenizer, /, *, batch: int
) -> list[Tensor]:
    """Return frames_THWC of each video's codes_thw; `lengths` are their pixel frames."""

    def decode(pieces: Iterator[Tensor]) -> Iterator[Tensor]:
        session = tokenizer.open_decoder()
        for codes_Bthw in pieces:
            yield session.push(codes_Bthw)

    videos = [[codes_thw] for codes_thw in codes]
    latent_frames = [len(codes_thw) for codes_thw in codes]
    with closing(Ahead(side_by_side(videos, latent_frames, batch=batch))) as groups:
        frames = _each(groups, decode)
    return [frames[index][:length] for index, length in enumerate(lengths)]


def reconstructed_clips(
    videos: Sequence[Video],
    lengths: Sequence[int],
    tokenizer: VideoTokenizer,
    /,
    *,
    batch: int,
    codes: Sequence[Tensor] | None = None,
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Yield each video's clips of CLIP_FRAMES, the last perhaps shorter, true and decoded.

    Args:
        videos: frames_THWC at the tokenizer's size.
        lengths: frames of each.
        tokenizer: encodes and decodes them.
        batch: videos at once.
        codes: codes_thw of each, where they were encoded before.
    """
    for indices in _alike(lengths, batch):
        known = None if codes is None else [codes[index] for index in indices]
        encode = _encoding(tokenizer) if known is None else _looking_up(known, tokenizer)
        decoder, spec = tokenizer.open_decoder(), tokenizer.spec
        empty = torch.empty((len(indices), 0, spec.height, spec.width, 3), dtype=torch.uint8)
        true_BTHWC, decoded_BTHWC, first = empty, empty, 0
        with closing(_stacked([videos[index] for index in indices])) as pieces:
            for piece in chain(pieces, [None]):
                codes_Bthw = encode(piece)
                if piece is not None:
                    true_BTHWC = torch.cat([true_BTHWC, piece], dim=1)
                if codes_Bthw.shape[1]:
                    decoded = decoder.push(codes_Bthw).cpu()
                    decoded_BTHWC = torch.cat([decoded_BTHWC, decoded], dim=1)
                # A session may hold frames back, so the true ones wait for those decoded.
                while first < lengths[indices[-1]]:
                    size = min(CLIP_FRAMES, lengths[indices[-1]] - first)
                    if min(true_BTHWC.shape[1], decoded_BTHWC.shape[1]) < size:
                        break
                    for row, index in enumerate(indices):
                        here = min(size, lengths[index] - first)
                        if here > 0:
                            yield true_BTHWC[row, :here], decoded_BTHWC[row, :here]
                    true_BTHWC, decoded_BTHWC = true_BTHWC[:, size:], decoded_BTHWC[:, size:]
                    first += size


def _encoding(tokenizer: VideoTokenizer) -> Callable[[Tensor | None], Tensor]:
    """Return what encodes piece after piece; None stands for the end."""
    encoder = tokenizer.open_encoder()
    return lambda piece: encoder.flush() if piece is None else encoder.push(piece)


def _looking_up(
    codes: Sequence[Tensor], tokenizer: VideoTokenizer
) -> Callable[[Tensor | None], Tensor]:
    """Return what looks the codes of piece after piece up; None stands for the end."""
    longest = max(map(len, codes))
    codes_Bthw = torch.stack([_filled(codes_thw, longest) for codes_thw in codes])
    frames = latents = 0

    def look_up(piece: Tensor | None) -> Tensor:
        nonlocal frames, latents
        frames += 0 if piece is None else piece.shape[1]
        start, latents = latents, tokenizer.spec.codes.latent_frames(frames)
        return codes_Bthw[:, start:latents]

    return look_up


@dataclass(frozen=True, slots=True, kw_only=True)
class SquaredErrors:
    """Squared errors of decoded frames, summed up: what can be added before it becomes decibels."""

    squared_error: float = 0.0
    """The sum over pixels; of each the mean over its channels, in [0, 1]."""
    pixels: int = 0
    moving_squared_error: float = 0.0
    """The same over the pixels that move."""
    moving_pixels: int = 0

    def __add__(self, other: "SquaredErrors", /) -> "SquaredErrors":
        """Return those of both."""
        return SquaredErrors(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        )

    def psnr(self) -> dict[str, float]:
        """Return the PSNR in all and of what moves; where nothing does, that of equal frames."""
        return {
            "psnr_db": decibels(self.squared_error / max(1, self.pixels)),
            "moving_psnr_db": decibels(self.moving_squared_error / max(1, self.moving_pixels)),
        }


def squared_errors(clips: Iterable[tuple[Tensor, Tensor]], /) -> SquaredErrors:
    """Return the errors of clips of true and decoded frames_THWC, summed in float64."""
    total = SquaredErrors()
    for true_THWC, decoded_THWC in clips:
        error_BTHW = squared_error(true_THWC[None], decoded_THWC[None]).double()
        moving = error_BTHW[moving_pixels(true_THWC[None])]
        total += SquaredErrors(
            squared_error=float(error_BTHW.sum()),
            pixels=error_BTHW.numel(),
            moving_squared_error=float(moving.sum()),
            moving_pixels=len(moving),
        )
    return total


def clip_psnr(clips: Iterable[tuple[Tensor, Tensor]], /) -> dict[str, float]:
    """Return the PSNR over clips of true and decoded frames_THWC, in all and of what moves.

    Squared errors are pooled before they become decibels.
    """
    return squared_errors(clips).psnr()


def batches(rows: Sequence[Row], size: int, /) -> Iterator[Sequence[Row]]:
    """Yield the rows in order, at most `size` at a time."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _alike(lengths: Sequence[int], batch: int) -> Iterator[Sequence[int]]:
    """Yield numbers of videos of like length, the longest last: what is filled up costs as much."""
    return batches(sorted(range(len(lengths)), key=lambda index: lengths[index]), batch)


def _each(
    groups: Iterable[Group], function: Callable[[Iterator[Tensor]], Iterator[Tensor]]
) -> dict[int, Tensor]:
    """Put groups of videos through a causal function of pieces; return each video's result."""
    results: dict[int, Tensor] = {}
    for indices, group in groupby(groups, key=itemgetter(0)):
        parts = [part.cpu() for part in function(piece for _, piece in group)]
        # A session may hold frames back, so any part may be empty.
        whole = torch.cat([part for part in parts if part.shape[1]], dim=1)
        results.update(zip(indices, whole, strict=True))
    return results


def _stacked(videos: Sequence[Video]) -> Generator[Tensor, None, None]:
    """Yield a piece of every video at a time, stacked; one that ended repeats its last frame."""
    with ExitStack() as opened:
        # Closed here and not by the garbage collector: an error would keep their files open.
        streams = [opened.enter_context(closing(_pieces(video))) for video in videos]
        last: list[Tensor] = []
        for pieces in zip_longest(*streams):
            length = max(len(piece) for piece in pieces if piece is not None)
            rows = [last[row] if piece is None else piece for row, piece in enumerate(pieces)]
            yield torch.stack([_filled(row, length) for row in rows])
            last = [row[-1:] for row in rows]


def _pieces(video: Video) -> Generator[Tensor, None, None]:
    """Yield the pieces of a video; closing this closes what the video opened."""
    yield from video


def _filled(piece: Tensor, length: int) -> Tensor:
    """Return a piece with its last frame repeated up to a length."""
    return torch.cat([piece, piece[-1:].expand(length - len(piece), *piece.shape[1:])])
