"""The decoder that a short measurement finds fastest here: all of them give the same codes.

    Draw, guess_BSQ  ->  codes_BSQ, and now and then what the clock says

It depends on model, device and batch, and on how much moves. The first frames are given to each
candidate in turn, later ones to the fastest. Nothing is lost by measuring: every candidate decides
its frame exactly. Only where two candidates' scores tie to the last bits may the clock decide, so
where a run must repeat to the bit, name a decoder.
"""

import time
from math import inf

import torch
from torch import Tensor

from .decoder import Decoder, Draw
from .jacobi import Jacobi
from .raster import Raster

_ROUNDS = 4
"""Frames that each candidate gets; the first of them, which warms it up, is not counted."""


class Auto:
    """Tries, then stays with the fastest."""

    def __init__(self) -> None:
        self._candidates: list[Decoder] = [Raster(), Jacobi(), Jacobi(reach=inf)]
        self._seconds: list[list[float]] = [[] for _ in self._candidates]
        self._chosen: Decoder | None = None

    @property
    def chosen(self) -> Decoder | None:
        """The fastest; None while it is measuring."""
        return self._chosen

    def decide(self, draw: Draw, guess_BSQ: Tensor, /) -> Tensor:
        """Return codes_BSQ, those of `Raster`."""
        if draw.group == guess_BSQ.shape[1]:  # one forward, whoever makes it
            return self._candidates[0].decide(draw, guess_BSQ)
        if self._chosen is not None:
            return self._chosen.decide(draw, guess_BSQ)
        turn = min(range(len(self._seconds)), key=lambda number: len(self._seconds[number]))
        _wait_for(guess_BSQ.device)
        began = time.perf_counter()
        codes_BSQ = self._candidates[turn].decide(draw, guess_BSQ)
        _wait_for(guess_BSQ.device)
        self._seconds[turn].append(time.perf_counter() - began)
        if all(len(seconds) == _ROUNDS for seconds in self._seconds):
            middle = [sorted(seconds[1:])[(_ROUNDS - 1) // 2] for seconds in self._seconds]
            self._chosen = self._candidates[middle.index(min(middle))]
        return codes_BSQ


def _wait_for(device: torch.device) -> None:
    """Let a device finish what it was given, so that the clock shows its time."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
