"""The pictures of a tokenizer judged alone: what it keeps of moving things, what codes it uses.

    true and decoded clips, masks of small things  ->  ShownFrames  ->  reconstructions.png
    how often each code occurs                     ->  draw_usage   ->  usage.png

Decibels hide a lost ball; nobody overlooks it in red.
"""

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from worldloom.tokenizer.metrics import CodeCounts, SmallMasks, usage_of

from .charts import COLOURS, INK, ON_WHITE, QUIET
from .pictures import Strip, draw_sheet, encode_png, fitting_scale

_COLUMNS = 6
_SHOWN = 2 * _COLUMNS
_KEPT, _LOST, _FALSE = (70, 200, 90), (235, 60, 50), (80, 150, 255)
_ERROR_TIMES = 3
_MOST_LEVELS = 8


class _Shown(NamedTuple):
    """One frame of a clip, and what is said above it."""

    true_HWC: Tensor
    decoded_HWC: Tensor
    marked_HWC: Tensor
    label: str


class ShownFrames:
    """Picks from the clips it watches those frames in which small or large things move.

    One frame a clip, spread evenly over the clips of which something moves, whether it is decoded
    well or badly. Memory stays flat: as more come, every second is dropped.
    """

    def __init__(self) -> None:
        self._moving = _Thinned()
        self._still = _Thinned()

    def watch(self, true_THWC: Tensor, decoded_THWC: Tensor, masks: SmallMasks, /) -> None:
        """Take one clip in."""
        small_T, moving_T = masks.small_BTHW[0].sum((1, 2)), masks.moving_BTHW[0].sum((1, 2))
        # Small things first; where there are none, whatever moves.
        best = int((small_T if small_T.any() else moving_T).argmax())
        small_HW, recalled_HW, false_HW = (
            mask[0, best] for mask in (masks.small_BTHW, masks.recalled_BTHW, masks.false_BTHW)
        )
        marked_HWC = (true_THWC[best].float().mean(-1, keepdim=True) * 0.35).byte().repeat(1, 1, 3)
        for mask_HW, colour in (
            (recalled_HW, _KEPT), (small_HW & ~recalled_HW, _LOST), (false_HW, _FALSE)
        ):  # fmt: skip
            marked_HWC[mask_HW] = torch.tensor(colour, dtype=torch.uint8)
        label = f"{int(recalled_HW.sum())} of {int(small_HW.sum())}, {int(false_HW.sum())} false"
        shown = _Shown(true_THWC[best], decoded_THWC[best], marked_HWC, label)
        (self._moving if moving_T.any() else self._still).append(shown)

    def draw(self, folder: Path, /) -> str:
        """Write reconstructions.png; return its name."""
        shown = self._moving.spread(_SHOWN) or self._still.spread(_SHOWN)
        true, decoded, marked = (
            torch.stack(frames).numpy() for frames in list(zip(*shown, strict=True))[:3]
        )
        error = np.abs(true.astype(np.int16) - decoded) * _ERROR_TIMES
        strips = [
            Strip(title="true", frames_THWC=true),
            Strip(title="decoded", frames_THWC=decoded),
            Strip(title=f"error x{_ERROR_TIMES}", frames_THWC=error.clip(0, 255).astype(np.uint8)),
            Strip(title="small things", frames_THWC=marked, labels=[one.label for one in shown]),
        ]
        scale = fitting_scale(*true.shape[1:3], target=136)
        sheet = draw_sheet(strips, scale=scale, columns=_COLUMNS)
        (folder / "reconstructions.png").write_bytes(encode_png(sheet))
        return "reconstructions.png"


class _Thinned:
    """A list that never holds over 256 of what is appended to it, evenly spread."""

    def __init__(self) -> None:
        self._kept: list[_Shown] = []
        self._step = 1
        self._seen = 0

    def append(self, shown: _Shown, /) -> None:
        """Keep it, if its turn has come."""
        if self._seen % self._step == 0:
            self._kept.append(shown)
        self._seen += 1
        if len(self._kept) > 256:
            self._kept, self._step = self._kept[::2], 2 * self._step

    def spread(self, count: int, /) -> list[_Shown]:
        """Return at most `count` of them, from the first to the last."""
        places = np.linspace(0, len(self._kept) - 1, min(count, len(self._kept))).round()
        return [self._kept[int(place)] for place in places]


def draw_usage(folder: Path, counts: CodeCounts, /) -> str:
    """Write usage.png: the share of every code, most frequent first, a chart a level."""
    levels = counts.counts_QV[:_MOST_LEVELS]
    figure = Figure(figsize=(8, 0.4 + 2.6 * len(levels)), layout="constrained")
    grid = figure.subplots(len(levels), squeeze=False)
    for level, (axes, counts_V) in enumerate(zip(grid[:, 0], levels, strict=True)):
        shares_V = counts_V.sort(descending=True).values.double().numpy() / int(counts_V.sum())
        used, vocab_size = int((counts_V > 0).sum()), len(counts_V)
        _, perplexity = usage_of(counts_V)
        edges = np.arange(vocab_size + 1)
        axes.stairs(100 * shares_V, edges, fill=True, color=ON_WHITE[COLOURS[0]])
        axes.axhline(100 / vocab_size, color=ON_WHITE[COLOURS[1]], linestyle=(0, (4, 3)),
                     linewidth=1.4, label="all equally often")  # fmt: skip
        axes.set_yscale("log")
        # Half of one occurrence: the rarest code still has a bar, an unused one has none.
        axes.set_ylim(bottom=50 / int(counts_V.sum()))
        axes.set_xlim(0, vocab_size)
        where = f"level {level + 1}: " if len(counts.counts_QV) > 1 else ""
        axes.set_title(
            f"{where}{used:,} of {vocab_size:,} codes used, perplexity {perplexity:,.0f}",
            fontsize=10, color=ON_WHITE[INK], loc="left",
        )  # fmt: skip
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(ON_WHITE[QUIET])
        axes.tick_params(colors=ON_WHITE[INK], labelsize=9, length=0, pad=5)
        axes.set_ylabel("share (%)", color=ON_WHITE[INK], fontsize=9.5)
        axes.legend(frameon=False, fontsize=9, labelcolor=ON_WHITE[INK])
    grid[-1, 0].set_xlabel("codes, most frequent first", color=ON_WHITE[INK], fontsize=9.5)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=144, facecolor="white", metadata={"Software": None})
    (folder / "usage.png").write_bytes(file.getvalue())
    return "usage.png"
