"""Settings of the dynamics model, its training and its sampling. Needs no torch."""

from dataclasses import dataclass
from typing import Literal

from worldloom.common import ConfigError

Order = Literal["raster", "row", "frame"]
"""What a cell may see of its own latent frame, besides all earlier frames.

    raster  every cell before it, row by row: one forward a cell
    row     the rows above it: one forward a row
    frame   nothing: one forward a frame
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicsConfig:
    """Sizes of the transformer. Stored in its directory, which it is enough to rebuild."""

    num_layers: int = 8
    """Transformer layers."""
    dim: int = 512
    """Width of the residual stream, D. A multiple of num_heads."""
    num_heads: int = 8
    """Attention heads, N; the width of one head is dim / num_heads."""
    ff_mult: float = 2.0
    """Width of the gated feed-forward layers, as a multiple of dim."""
    order: Order = "frame"
    """What a cell may see of its own frame: raster (all before it), row (rows above), frame."""
    context_frames: int = 16
    """Latent frames visible at once, t, the current one included. Not pixel frames."""
    num_meta_tokens: int = 16
    """Learned tokens in front of the sequence that every frame sees; may be 0."""

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit together."""
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ConfigError(
                f"dynamics: dim {self.dim} over {self.num_heads} heads is not an even whole "
                "number; rotary positions turn pairs of channels"
            )
        if self.context_frames < 2:
            raise ConfigError("dynamics: context_frames must be at least 2: a past and a present")


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicsTrainingConfig:
    """How the dynamics model is trained."""

    num_steps: int = 50_000
    """Optimizer updates."""
    batch_windows: int = 32
    """Windows per update, over all processes."""
    window_frames: int = 16
    """Latent frames per window; more than the context teaches how it slides."""
    learning_rate: float = 1e-3
    """Peak of the schedule: linear warmup, then a cosine to a hundredth."""
    warmup_steps: int = 50
    """Updates of linear warmup."""
    weight_decay: float = 0.05
    """Of AdamW, on matrices only."""
    action_dropout: float = 0.05
    """Share of windows whose actions become null, so that the model also knows none."""
    corruption: float = 0.1
    """Largest share of input codes replaced at random; it grows along the window. Against drift."""
    bf16: bool = False
    """Compute in bfloat16; faster on GPUs and some CPUs."""
    validate_every: int = 200
    """Updates between free-running validations."""
    checkpoint_every: int = 200
    """Updates between checkpoints; a killed run continues from the last."""
    log_every: int = 20
    """Updates between lines of the log."""
    seed: int = 0
    """Of the weights, the order of the windows, dropout and corruption."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """How codes are drawn from the model's logits."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest code."""
    min_p: float = 0.1
    """Drop codes less likely than this share of the likeliest (arXiv:2407.01082); 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest codes whose probabilities sum to this (arXiv:1904.09751); 1 keeps all."""

    def __post_init__(self) -> None:
        """Refuse values outside their ranges."""
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"sampling: temperature {self.temperature} must be >= 0")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"sampling: min_p {self.min_p} must be in [0, 1]")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"sampling: top_p {self.top_p} must be in (0, 1]")
