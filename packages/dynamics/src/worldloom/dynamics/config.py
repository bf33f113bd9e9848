"""Settings of the dynamics model, its training and its sampling. Needs no torch."""

from dataclasses import dataclass
from typing import Literal, get_args

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
        if self.order not in get_args(Order):
            known = ", ".join(get_args(Order))
            raise ConfigError(f"dynamics: order is {self.order!r:.40}, must be one of {known}")
        for name, count in (("num_layers", self.num_layers), ("num_heads", self.num_heads)):
            if count < 1:
                raise ConfigError(f"dynamics: {name} is {count}, must be at least 1")
        if self.num_meta_tokens < 0:
            raise ConfigError(
                f"dynamics: num_meta_tokens is {self.num_meta_tokens}, must be at least 0"
            )
        if not self.dim * self.ff_mult >= 2:
            raise ConfigError(
                f"dynamics: dim {self.dim} times ff_mult {self.ff_mult} leaves the feed-forward "
                "layers no width"
            )
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ConfigError(
                f"dynamics: dim {self.dim} over {self.num_heads} heads is not an even whole "
                "number; rotary positions turn pairs of channels"
            )
        if self.context_frames < 2:
            raise ConfigError(
                f"dynamics: context_frames is {self.context_frames}, must be at least 2: "
                "a past and a present"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicsTrainingConfig:
    """How the dynamics model is trained."""

    num_steps: int = 50_000
    """Optimizer updates."""
    batch_windows: int = 32
    """Windows per update, over all processes."""
    window_frames: int = 16
    """Latent frames per window; more than the context of the model teaches how it slides."""
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
    """Compute in bfloat16, the loss in float32; faster on GPUs and some CPUs."""
    validate_every: int = 200
    """Updates between free-running validations."""
    checkpoint_every: int = 200
    """Updates between checkpoints; a killed run continues from the last."""
    log_every: int = 20
    """Updates between lines of the log."""
    seed: int = 0
    """Of the weights, the order of the windows, dropout and corruption."""

    def __post_init__(self) -> None:
        """Refuse a training that would do nothing, and shares that are none."""
        counts = {
            "num_steps": self.num_steps,
            "batch_windows": self.batch_windows,
            "validate_every": self.validate_every,
            "checkpoint_every": self.checkpoint_every,
            "log_every": self.log_every,
        }
        for name, count in counts.items():
            if count < 1:
                raise ConfigError(f"training: {name} is {count}, must be at least 1")
        if self.warmup_steps < 0:
            raise ConfigError(f"training: warmup_steps is {self.warmup_steps}, must be at least 0")
        if self.window_frames < 2:
            raise ConfigError(
                f"training: window_frames is {self.window_frames}, must be at least 2: "
                "the first frame of a window is given, the others are learned"
            )
        for name, share in (
            ("action_dropout", self.action_dropout),
            ("corruption", self.corruption),
        ):
            if not 0 <= share <= 1:
                raise ConfigError(f"training: {name} is {share}, must be in [0, 1]")
        for name, value in (
            ("learning_rate", self.learning_rate),
            ("weight_decay", self.weight_decay),
        ):
            if not 0 <= value < float("inf"):
                raise ConfigError(f"training: {name} is {value}, must be a number, 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamConfig:
    """Where the tars of token shards are, if not in their folder, and how they are shuffled."""

    url: str
    """As webdataset opens it: a path, https://HOST/{file}, pipe:COMMAND {file}."""
    lanes: int = 4
    """Streams that are open at once; a multiple of the processes, a divisor of the batch."""
    buffer_windows: int = 4096
    """Windows held back for shuffling, over all lanes."""

    def __post_init__(self) -> None:
        """Refuse an address that would give the same bytes for every shard."""
        if "{file}" not in self.url:
            raise ConfigError(
                f"stream: {self.url!r:.200} has no {{file}}, in the place of which the names of "
                "the shards are put"
            )
        for name, number in (("lanes", self.lanes), ("buffer_windows", self.buffer_windows)):
            if number < 1:
                raise ConfigError(f"stream: {name} is {number}, must be at least 1")

    def check_dealing(self, *, size: int, num_ranks: int) -> None:
        """Refuse batches and processes among which the lanes cannot be dealt evenly.

        Raises:
            ConfigError: naming what is no multiple of what.
        """
        if size % self.lanes:
            raise ConfigError(
                f"stream: a batch of {size} windows cannot be dealt to {self.lanes} lanes; choose "
                "a batch that is a multiple of the lanes"
            )
        if self.lanes % num_ranks:
            raise ConfigError(
                f"stream: {self.lanes} lanes cannot be dealt to {num_ranks} processes; choose "
                "lanes that are a multiple of the processes"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """How codes are drawn from the model's logits."""

    temperature: float = 0.5
    """Divides the logits; 0 takes the likeliest code."""
    min_p: float = 0.1
    """Drop codes less likely than this share of the likeliest (arXiv:2407.01082); 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest codes whose probabilities sum to this (arXiv:1904.09751); 1 keeps all.

    A code must pass both: each looks at the whole distribution after the temperature."""

    def __post_init__(self) -> None:
        """Refuse values outside their ranges."""
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(
                f"sampling: temperature is {self.temperature}, must be a number, 0 or more"
            )
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"sampling: min_p is {self.min_p}, must be in [0, 1]")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"sampling: top_p is {self.top_p}, must be in (0, 1]")
