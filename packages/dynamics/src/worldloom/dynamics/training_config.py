"""How a dynamics model is trained, and from where its shards come. Needs no torch."""

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from worldloom.common import ConfigError, to_plain

OptimizerKind = Literal["muon", "adamw"]
"""What moves the hidden matrices; tables, heads and vectors move by AdamW in either case."""

Schedule = Literal["cosine", "wsd"]
"""How the learning rate goes after its warmup.

    cosine  falls along a cosine until the last update
    wsd     stays level, and falls exponentially in the last decay_share of the updates
"""

TRACKERS = ("tensorboard", "wandb", "trackio")
"""Names of the extras under which their libraries are installed."""

_HOW = (
    "micro_windows", "recompute", "compile", "sharded",
    "validate_every", "checkpoint_every", "log_every", "trackers",
)  # fmt: skip
"""Settings of how it is computed and watched: a run may go on with others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicsTrainingConfig:
    """How the dynamics model is trained."""

    num_steps: int = 50_000
    """Optimizer updates."""
    batch_windows: int = 32
    """Windows per update, over all processes."""
    window_frames: int = 24
    """Latent frames per window: more than the model's context, so that it learns how that slides.
    A rollout's memory goes back further than its context, and shorter windows never show that."""
    learning_rate: float = 2e-3
    """Peak of the schedule, of muon and of adamw."""
    optimizer: OptimizerKind = "muon"
    """muon (orthogonal steps for hidden matrices, AdamW for the rest) or adamw (for all)."""
    schedule: Schedule = "cosine"
    """After the warmup: cosine down to a hundredth, or wsd (level, then a fall at the end)."""
    warmup_steps: int = 50
    """Updates of linear warmup."""
    decay_share: float = 0.2
    """Share of the updates, at the end, in which schedule wsd falls."""
    weight_decay: float = 0.05
    """Share of every matrix, times the learning rate, lost per update."""
    clip: float = 1.0
    """Longest gradient: longer ones are scaled down to it; 0 leaves them as they are."""
    ema_decay: float = 0.0
    """Share of averaged weights that stays at each update, 0 for none. Where there is an average,
    it is what is validated, drawn and kept; 0.999 follows the last thousand updates."""
    z_loss: float = 0.0
    """Weight of the squared logarithm of the softmax's denominator; 1e-4 steadies bf16."""
    action_weight: float = 0.1
    """Weight of the action head's nats per action beside nats per code."""
    action_dropout: float = 0.05
    """Share of windows whose actions become null, so that the model also knows none."""
    corruption: float = 0.1
    """Largest share of input codes replaced at random; it grows along the window. Against drift."""
    bf16: bool = False
    """Compute in bfloat16, the loss in float32; faster on GPUs and some CPUs."""
    micro_windows: int = 0
    """Windows that one process computes at once, so that they fit its memory: their gradients add
    up. 0 for all of its share of a batch, -1 to find the most that fit."""
    recompute: bool = False
    """Compute layers again for their gradients rather than keep them: far less memory, one forward
    more."""
    compile: bool = False
    """Compile every layer with torch.compile; on CUDA only."""
    sharded: bool = False
    """Deal weights, gradients and optimizer out over the processes (FSDP2), for large models."""
    validate_every: int = 200
    """Updates between free-running validations."""
    checkpoint_every: int = 200
    """Updates between checkpoints; a killed run continues from the last."""
    log_every: int = 20
    """Updates between lines of the log."""
    trackers: tuple[str, ...] = ()
    """Where numbers go besides metrics.jsonl: tensorboard, wandb, trackio."""
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
        if self.micro_windows < -1:
            raise ConfigError(
                f"training: micro_windows is {self.micro_windows}, must be a count, 0 for all, or "
                "-1 to find the most that fit"
            )
        if self.micro_windows > self.batch_windows:
            raise ConfigError(
                f"training: micro_windows is {self.micro_windows}, but a batch has "
                f"{self.batch_windows} windows; choose at most as many, or 0 for all at once"
            )
        if self.micro_windows < 0 and self.sharded:
            raise ConfigError(
                "training: micro_windows -1 with sharded: a process that runs out of memory while "
                "trying would leave the others waiting for its weights; name a number"
            )
        if self.window_frames < 2:
            raise ConfigError(
                f"training: window_frames is {self.window_frames}, must be at least 2: "
                "the first frame of a window is given, the others are learned"
            )
        self._check_numbers()
        self._check_choices()

    def _check_numbers(self) -> None:
        """Refuse shares and weights that are none."""
        for name in ("action_dropout", "corruption", "decay_share"):
            share = getattr(self, name)
            if not 0 <= share <= 1:
                raise ConfigError(f"training: {name} is {share}, must be in [0, 1]")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(
                f"training: ema_decay is {self.ema_decay}, must be 0 for none, or below 1"
            )
        for name in ("learning_rate", "weight_decay", "clip", "z_loss", "action_weight"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ConfigError(f"training: {name} is {value}, must be a number, 0 or more")

    def _check_choices(self) -> None:
        """Refuse words that name nothing."""
        choices: dict[str, Any] = {"optimizer": OptimizerKind, "schedule": Schedule}
        for name, kind in choices.items():
            value = getattr(self, name)
            if value not in get_args(kind):
                known = ", ".join(get_args(kind))
                raise ConfigError(f"training: {name} is {value!r:.40}, must be one of {known}")
        for tracker in self.trackers:
            if tracker not in TRACKERS:
                raise ConfigError(
                    f"training: trackers names {tracker!r:.40}, must be of {', '.join(TRACKERS)}"
                )

    def what(self) -> dict[str, Any]:
        """Return the settings on which the trained weights depend: those a run must go on with."""
        names = [field.name for field in fields(self) if field.name not in _HOW]
        plain = to_plain(self)
        return {name: plain[name] for name in names}


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
