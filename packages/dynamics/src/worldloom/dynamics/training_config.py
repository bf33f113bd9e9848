"""How a dynamics model is trained, and from where its shards come. Needs no torch."""

from dataclasses import dataclass

from worldloom.common import ConfigError


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
