"""Futures of starts -> what people look at: a movie and a sheet of each start, a sheet over all.

a Job, its futures       -> draw_start  -> generated.mp4, generated.gif, contact-sheet.png
all Jobs, their futures  -> draw_starts -> contact-sheet.png: true above generated, row by row
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from worldloom.common import Frames

from .generation import Job
from .pictures import Strip, draw_movie, draw_sheet, encode_gif, encode_mp4, encode_png

_SHEET_COLUMNS = 10
_SHEET_STARTS = 40
"""Starts on a sheet over all: more would make a picture that viewers refuse."""
_SHEET_SIDE = 96
"""About how large a frame is drawn there, in pixels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """How the futures of a start are drawn."""

    titles: Sequence[str]
    """One a future."""
    show_true: bool
    """Whether what truly happened was under the same actions, and so belongs beside them."""
    scale: int
    """Side of a pixel."""
    fps: float
    """Frames a second; 0 if unknown."""


def draw_start(
    folder: Path, job: Job, videos: Sequence[Frames], /, *, words: Sequence[str], look: Look
) -> None:
    """Write generated.mp4, generated.gif and contact-sheet.png of one start's futures.

    Args:
        folder: where to.
        job: the start.
        videos: frames_THWC of every future.
        words: the actions, one a generated frame.
        look: how.
    """
    length, true = len(videos[0]), job.start.true_frames_THWC
    labels = ["given"] * (length - len(words)) + list(words)
    strips = [
        Strip(title=title, frames_THWC=frames)
        for title, frames in zip(look.titles, videos, strict=True)
    ]
    if look.show_true and true is not None:
        strips.insert(0, Strip(title="true", frames_THWC=true[:length]))
    first = Strip(title=strips[0].title, frames_THWC=strips[0].frames_THWC, labels=labels)
    movie = draw_movie(strips, scale=look.scale, captions=labels)
    sheet = draw_sheet([first, *strips[1:]], scale=max(1, look.scale // 2))
    fps = look.fps or 10.0
    (folder / "generated.mp4").write_bytes(encode_mp4(movie, fps=fps))
    (folder / "generated.gif").write_bytes(encode_gif(movie, fps=fps))
    (folder / "contact-sheet.png").write_bytes(encode_png(sheet))


def draw_starts(
    path: Path, jobs: Sequence[Job], videos: Sequence[Frames], /, *, show_true: bool
) -> None:
    """Write one sheet over all starts: a future of each, with what is true above it.

    The last given frame stands first, then frames that lie evenly up to the end. Of very many
    starts the first are drawn.
    """
    strips = []
    for job, frames in list(zip(jobs, videos, strict=True))[:_SHEET_STARTS]:
        true = job.start.true_frames_THWC
        given = len(frames) - len(job.slots_TA)
        shown = np.linspace(given - 1, len(frames) - 1, _SHEET_COLUMNS).round().astype(int)
        shown = np.unique(shown)
        # The labels are of the frames below them: a start's own, as lengths may differ.
        labels = ["given", *(f"+{index - given + 1}" for index in shown[1:])]
        rows = [Strip(title=job.start.source, frames_THWC=frames[shown], labels=labels)]
        if show_true and true is not None:
            known = shown[shown < len(true)]
            rows = [
                Strip(title=f"{job.start.source}: true", frames_THWC=true[known],
                      labels=labels[: len(known)]),
                Strip(title="generated", frames_THWC=frames[shown]),
            ]  # fmt: skip
        strips += rows
    height, width = strips[0].frames_THWC.shape[1:3]
    sheet = draw_sheet(
        strips, scale=max(1, round(_SHEET_SIDE / max(height, width))), columns=_SHEET_COLUMNS
    )
    path.write_bytes(encode_png(sheet))
