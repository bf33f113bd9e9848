"""How much of a codebook is used, and what to change when it has collapsed.

    codes_Bthw or codes_BthwQ  ->  count_codes  ->  counts_QV
    counts_QV                  ->  measure      ->  Health of every level: share used, perplexity
    Health of every level      ->  advice       ->  a sentence for the log, or None

A collapsed codebook is one or a few codes for everything: pictures without detail, and a world
whose next frame is easily guessed and not worth guessing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from worldloom.common import CodeSpec

from .config import QuantizerConfig

COLLAPSED = 0.2
"""A level is said to have collapsed below this share of the codes that could have occurred."""


@dataclass(frozen=True, slots=True)
class Health:
    """How the codes of one level are used in a number of cells."""

    num_codes: int
    """Size of the codebook, V."""
    num_cells: int
    """How many codes were counted."""
    num_used: int
    """Codes that occur at least once."""
    perplexity: float
    """Codes that would be as hard to guess if they were equally frequent."""

    @property
    def used(self) -> float:
        """Share of the codebook that occurs."""
        return self.num_used / self.num_codes

    @property
    def has_collapsed(self) -> bool:
        """Whether few codes occur of those that could: fewer cells than codes cannot use all."""
        return self.num_used < COLLAPSED * min(self.num_codes, self.num_cells)


def count_codes(codes: Tensor, spec: CodeSpec, /) -> Tensor:
    """Return counts_QV, int64: how often every code of every level occurs.

    Args:
        codes: codes_Bthw, or codes_BthwQ where the spec has several levels.
        spec: what they mean.
    """
    codes_NQ = rearrange(codes, "... Q -> (...) Q") if spec.num_levels > 1 else codes.reshape(-1, 1)
    counts = [torch.bincount(level, minlength=spec.vocab_size) for level in codes_NQ.unbind(-1)]
    return torch.stack(counts)


def measure(counts_QV: Tensor, /) -> list[Health]:
    """Return the health of every level; of no codes at all, nothing used."""
    health = []
    for counts_V in counts_QV.cpu().double():
        total = float(counts_V.sum())
        entropy = float(torch.special.entr(counts_V / max(total, 1.0)).sum())
        health.append(
            Health(len(counts_V), int(total), int((counts_V > 0).sum()), math.exp(entropy))
        )
    return health


def summary(levels: Sequence[Health], /) -> dict[str, float]:
    """Return the numbers for the log: the mean over the levels, then each level if several."""
    numbers = {
        "codes_used": sum(level.used for level in levels) / len(levels),
        "perplexity": sum(level.perplexity for level in levels) / len(levels),
    }
    if len(levels) > 1:
        for number, level in enumerate(levels, start=1):
            numbers[f"codes_used_level_{number}"] = level.used
            numbers[f"perplexity_level_{number}"] = level.perplexity
    return numbers


def advice(levels: Sequence[Health], quantizer: QuantizerConfig, /) -> str | None:
    """Return what is wrong and what to change, in a sentence; None if no level has collapsed."""
    collapsed = [number for number, level in enumerate(levels) if level.has_collapsed]
    if not collapsed:
        return None
    level = levels[collapsed[0]]
    which = f" of level {collapsed[0] + 1}" if len(levels) > 1 else ""
    return (
        f"the codebook{which} has collapsed: {level.num_used} of {level.num_codes} codes occur in "
        f"{level.num_cells} held-out cells (perplexity {level.perplexity:.1f}), so most of the "
        f"vocabulary says nothing; {_cure(quantizer)}, and begin again in another --output"
    )


def _cure(quantizer: QuantizerConfig) -> str:
    """Return what to try, the likeliest first."""
    if quantizer.kind == "fsq":
        return (
            f"shorten --model.quantizer.fsq-levels {quantizer.fsq_levels}, or lower "
            "--training.learning-rate"
        )
    if quantizer.kind == "lfq":
        return (
            f"raise --model.quantizer.entropy above {quantizer.entropy:g}, halve "
            "--model.quantizer.vocab-size, or lower --training.learning-rate"
        )
    return (
        f"raise --model.quantizer.dead-code-threshold above {quantizer.dead_code_threshold:g}, "
        f"lower --training.learning-rate or --model.quantizer.vocab-size {quantizer.vocab_size}, "
        "or take --model.quantizer.kind fsq, which has no codes to lose"
    )
