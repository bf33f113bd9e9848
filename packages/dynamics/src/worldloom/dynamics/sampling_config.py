"""How codes are drawn from a model. Needs no torch."""

from dataclasses import dataclass
from typing import Literal, get_args

from worldloom.common import ConfigError

from .config import Order

DecoderName = Literal["own", "jacobi", "raster", "row", "frame", "auto", "maskgit"]
"""In which forwards the cells of a latent frame are decided. All but maskgit give the same codes.

    own      what suits the model's order: jacobi for raster and row, frame, maskgit for masked
    jacobi   many groups at once, from a guess: few forwards
    raster   group by group, in the model's order: the reference
    row      the same, for models of order row: a row at a time
    frame    the same, for models of order frame: all cells at once
    auto     the exact one that a short measurement finds fastest on this device
    maskgit  all cells at once, and again those that were least sure: for models of order masked
"""

_DECODERS: dict[Order, tuple[DecoderName, ...]] = {
    "raster": ("jacobi", "raster", "auto"),
    "row": ("jacobi", "row", "raster", "auto"),
    "frame": ("frame", "raster", "jacobi", "auto"),
    "masked": ("maskgit", "auto"),
}


def decoders_of(order: Order, /) -> tuple[DecoderName, ...]:
    """Return the decoders that models of an order take, their own one first."""
    return _DECODERS[order]


def named_decoder(name: DecoderName, order: Order, /) -> DecoderName:
    """Return the decoder that a name means for models of an order.

    Raises:
        ConfigError: if they do not take it.
    """
    if name == "own":
        return decoders_of(order)[0]
    if name not in decoders_of(order):
        raise ConfigError(
            f"sampling: decoder is {name}, but this model's order is {order}, whose cells are not "
            f"decided that way; choose one of {', '.join(decoders_of(order))}, or own, which is "
            "the first of these"
        )
    return name


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """How codes are drawn from the model's logits. All of it may change between frames."""

    temperature: float = 0.5
    """Divides the logits; 0 takes the likeliest code."""
    min_p: float = 0.1
    """Drop codes less likely than this share of the likeliest (arXiv:2407.01082); 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest codes whose probabilities sum to this (arXiv:1904.09751); 1 keeps all."""
    top_k: int = 0
    """Keep this many of the likeliest codes, and what ties with the last of them; 0 keeps all.

    A code must pass all three: each looks at the whole distribution after the temperature."""
    guidance_scale: float = 1.0
    """How far to go from what the model expects without actions to what it expects with them, and
    on (arXiv:2207.12598): above 1 actions count for more, 1 is off, 0 ignores them. Needs a model
    that was trained with `action_dropout`."""
    parallel_keep_frac: float = 1.0
    """How much guidance keeps of its part that only makes the model surer of what it expects
    anyway (arXiv:2410.02416); 1 is plain guidance, 0 leaves what points elsewhere."""
    decoder: DecoderName = "own"
    """In which forwards a frame is decided; own is what suits the model's order. jacobi, raster,
    row, frame and auto give the same codes, maskgit (order masked alone) others."""
    refinements: int = 4
    """Passes that maskgit takes for a frame; no other decoder looks at it."""

    def __post_init__(self) -> None:
        """Refuse values outside their ranges."""
        for name in ("temperature", "guidance_scale"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ConfigError(f"sampling: {name} is {value}, must be a number, 0 or more")
        for name in ("min_p", "parallel_keep_frac"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ConfigError(f"sampling: {name} is {value}, must be in [0, 1]")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"sampling: top_p is {self.top_p}, must be in (0, 1]")
        whole = {"top_k": (0, "codes, or 0 for all"), "refinements": (1, "passes, at least 1")}
        for name, (least, what) in whole.items():
            value = getattr(self, name)
            if not (value >= least and value % 1 == 0):
                raise ConfigError(f"sampling: {name} is {value}, must be a number of {what}")
            object.__setattr__(self, name, int(value))  # files may say 3.0
        if self.decoder not in get_args(DecoderName):
            known = ", ".join(get_args(DecoderName))
            raise ConfigError(f"sampling: decoder is {self.decoder!r:.40}, must be one of {known}")

    @property
    def guided(self) -> bool:
        """Whether what the model expects without actions is asked for, too."""
        return self.guidance_scale != 1
