"""Frames -> what a terminal is told to show: half blocks, two pixels a character, in true colour.

    frame_HWC, columns, rows  ->  fit_cells   ->  picture_HWC of at most (2 rows, columns) pixels
    picture_HWC               ->  HalfBlocks  ->  the text that changes what was drawn before to it

Frames grow by whole factors only and shrink by the mean of what falls together. What has not
changed is not sent again: a frame of 64x64 is 80 kB, and it may go over a slow line.
"""

import numpy as np
from worldloom.common import Frames

from ..pictures import enlarge

_BLOCK = "\N{UPPER HALF BLOCK}"


def fit_cells(frame_HWC: Frames, /, *, columns: int, rows: int) -> Frames:
    """Return the frame as large as fits into so many characters, an even number of pixels high."""
    height, width = frame_HWC.shape[:2]
    share = min(columns / width, 2 * rows / height)
    if share >= 1:
        picture = enlarge(frame_HWC, times=int(share))
    else:
        from PIL import Image

        size = (max(1, int(width * share)), max(1, int(height * share)))
        picture = np.asarray(Image.fromarray(frame_HWC).resize(size, Image.Resampling.BOX))
    return np.pad(picture, ((0, len(picture) % 2), (0, 0), (0, 0)))


class HalfBlocks:
    """One picture on a terminal, kept up to date."""

    def __init__(self) -> None:
        self._cells: Frames = np.zeros((0, 0, 6), np.uint8)
        """Of what is there: rows, columns, the colours of the upper and the lower pixel."""

    def forget(self) -> None:
        """Draw all of the next picture: something else was drawn over this one."""
        self._cells = self._cells[:0]

    def draw(self, picture_HWC: Frames, /, *, top: int, left: int) -> str:
        """Return what to write so that the terminal shows this picture.

        Args:
            picture_HWC: of an even height.
            top: line of its first row, the first of a terminal being 1.
            left: the same of its first column.
        """
        cells = np.concatenate([picture_HWC[0::2], picture_HWC[1::2]], axis=2)
        if cells.shape == self._cells.shape:
            changed = (cells != self._cells).any(axis=2)
        else:
            changed = np.ones(cells.shape[:2], bool)
        self._cells = cells
        text = []
        for row in np.flatnonzero(changed.any(axis=1)):
            columns = np.flatnonzero(changed[row])
            first, last = int(columns[0]), int(columns[-1]) + 1
            text.append(f"\x1b[{top + row};{left + first}H{_row_text(cells[row, first:last])}")
        return "".join(text) + "\x1b[0m" if text else ""


def _row_text(cells: Frames) -> str:
    """Return a row of blocks; a colour is said once for neighbours that share it."""
    borders = np.flatnonzero((cells[1:] != cells[:-1]).any(axis=1)) + 1
    starts = [0, *borders.tolist()]
    ends = [*borders.tolist(), len(cells)]
    text = []
    for start, end in zip(starts, ends, strict=True):
        r, g, b, below_r, below_g, below_b = cells[start].tolist()
        text.append(f"\x1b[38;2;{r};{g};{b};48;2;{below_r};{below_g};{below_b}m")
        text.append(_BLOCK * (end - start))
    return "".join(text)
