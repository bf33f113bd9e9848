"""Frames of recorded episodes -> codes -> frames, by a tokenizer's rules, several videos at once.

    frames_THWC of any size     -> fit, EpisodeFrames -> frames_THWC of the tokenizer's size
    videos                      -> encode_videos      -> codes_thw of each
    codes_thw of each           -> decode_videos      -> frames_THWC of each
    videos                      -> reconstructed_clips -> true and decoded clips
    true and decoded clips      -> clip_psnr          -> PSNR, PSNR of what moves

A video is an iterable of frames_THWC pieces, so that a long episode need not fit into memory.
Videos of like length go through the tokenizer together: one that ends first repeats its last
frame, and what came of that is cut off again, which a causal tokenizer allows.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
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

from .ahead import ahead

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

    def encode(pieces: Iterator[Tensor]) -> Iterator[Tensor]:
        session = tokenizer.open_encoder()
        for frames_BTHWC in pieces:
            yield session.push(frames_BTHWC)
        yield session.flush()

    latent_frames = tokenizer.spec.codes.latent_frames
    return _each(videos, lengths, encode, [latent_frames(length) for length in lengths], batch)


def decode_videos(
    codes: Sequence[Tensor], lengths: Sequence[int], tokenizer: VideoTokenizer, /, *, batch: int
) -> list[Tensor]:
    """Return frames_THWC of each video's codes_thw; `lengths` are their pixel frames."""

    def decode(pieces: Iterator[Tensor]) -> Iterator[Tensor]:
        session = tokenizer.open_decoder()
        for codes_Bthw in pieces:
            yield session.push(codes_Bthw)

    videos = [[codes_thw] for codes_thw in codes]
    return _each(videos, [len(codes_thw) for codes_thw in codes], decode, lengths, batch)


def reconstructed_clips(
    videos: Sequence[Video], lengths: Sequence[int], tokenizer: VideoTokenizer, /, *, batch: int
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Yield each video's clips of CLIP_FRAMES, the last perhaps shorter, true and decoded."""
    for indices in _alike(lengths, batch):
        encoder, decoder = tokenizer.open_encoder(), tokenizer.open_decoder()
        spec = tokenizer.spec
        empty = torch.empty((len(indices), 0, spec.height, spec.width, 3), dtype=torch.uint8)
        true_BTHWC, decoded_BTHWC, first = empty, empty, 0
        with closing(_side_by_side([videos[index] for index in indices])) as pieces:
            for piece in chain(pieces, [None]):
                codes_Bthw = encoder.flush() if piece is None else encoder.push(piece)
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


def clip_psnr(clips: Iterable[tuple[Tensor, Tensor]], /) -> dict[str, float]:
    """Return the PSNR over clips of true and decoded frames_THWC, in all and of what moves.

    Squared errors are pooled before they become decibels; where nothing moves, it is that of
    equal frames.
    """
    error = moving_error = 0.0
    count = moving_count = 0
    for true_THWC, decoded_THWC in clips:
        error_BTHW = squared_error(true_THWC[None], decoded_THWC[None]).double()
        moving = error_BTHW[moving_pixels(true_THWC[None])]
        error, count = error + float(error_BTHW.sum()), count + error_BTHW.numel()
        moving_error, moving_count = moving_error + float(moving.sum()), moving_count + len(moving)
    return {
        "psnr_db": decibels(error / max(1, count)),
        "moving_psnr_db": decibels(moving_error / max(1, moving_count)),
    }


def batches(rows: Sequence[Row], size: int, /) -> Iterator[Sequence[Row]]:
    """Yield the rows in order, at most `size` at a time."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _alike(lengths: Sequence[int], batch: int) -> Iterator[Sequence[int]]:
    """Yield numbers of videos of like length, the longest last: what is filled up costs as much."""
    return batches(sorted(range(len(lengths)), key=lambda index: lengths[index]), batch)


def _each(
    videos: Sequence[Video],
    lengths: Sequence[int],
    function: Callable[[Iterator[Tensor]], Iterator[Tensor]],
    kept: Sequence[int],
    batch: int,
) -> list[Tensor]:
    """Put videos through a causal function of pieces, side by side; keep so much of each result."""

    def pieces() -> Generator[tuple[Sequence[int], Tensor], None, None]:
        for indices in _alike(lengths, batch):
            with closing(_side_by_side([videos[index] for index in indices])) as stacked:
                for piece in stacked:
                    yield indices, piece

    results: dict[int, Tensor] = {}
    # One stream of all groups' pieces: a group's first is read while the one before is encoded.
    with closing(ahead(pieces())) as read:
        for indices, group in groupby(read, key=itemgetter(0)):
            parts = [part.cpu() for part in function(piece for _, piece in group)]
            # A session may hold frames back, so any part may be empty.
            whole = torch.cat([part for part in parts if part.shape[1]], dim=1)
            for index, row in zip(indices, whole, strict=True):
                results[index] = row[: kept[index]]
    return [results[index] for index in range(len(videos))]


def _side_by_side(videos: Sequence[Video]) -> Generator[Tensor, None, None]:
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
