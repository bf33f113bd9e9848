"""Settings of a tokenizer's training. Needs no torch, so `--help` stays instant."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from worldloom.common import ConfigError, to_plain

from .config import TokenizerConfig, at_least_one

OptimizerName = Literal["muon", "adamw"]

_WATCHED = ("checkpoint_every", "sample_every", "log_every")
"""Settings of how it is watched: a run may go on with others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerTrainingConfig:
    """How the tokenizer is trained."""

    num_steps: int = 20_000
    """Optimizer updates."""
    batch_clips: int = 16
    """Clips per update, over all processes."""
    clip_frames: int = 8
    """Consecutive frames per clip, T: one, and then whole groups of model.temporal_stride."""
    optimizer: OptimizerName = "muon"
    """muon moves kernels along orthogonal matrices: better in half the updates (docs/log.md)."""
    learning_rate: float = 2e-3
    """Peak of the schedule: linear warmup, then a cosine to a hundredth."""
    warmup_steps: int = 40
    """Updates of linear warmup."""
    weight_decay: float = 1e-4
    """Share of matrices and kernels, times the learning rate, lost per update."""
    accumulate: int = 1
    """Parts of a batch that follow one another, for less memory; a codebook moves at each part."""
    ema_decay: float = 0.0
    """Share of the averaged weights that stays at each update; the average is saved. 0 for none."""
    bf16: bool = False
    """Compute in bfloat16 (the quantizer stays in float32); faster on GPUs and some CPUs."""
    motion_weight: float = 20.0
    """Extra weight of pixels that differ from their clip's median, so that small things survive."""
    hard_pixel_power: float = 0.5
    """Power of a pixel's present squared error in its weight: rare things survive. 0 for none."""
    temporal_weight: float = 0.0
    """Of the error that the convolutions over time leave in the latents; 0.2 in genie2-pytorch."""
    gradient_weight: float = 0.0
    """Of the error in differences of neighbouring pixels: sharper edges."""
    multiscale_weight: float = 0.0
    """Of the error at half and at quarter size: brightness and colour of whole areas."""
    discriminator_weight: float = 0.0
    """Of the loss that asks for patches a second network takes for true; 0 for no such network."""
    discriminator_start: float = 0.5
    """Share of the updates after which the discriminator begins, in [0, 1)."""
    discriminator_learning_rate: float = 2e-4
    """Peak of its schedule, which is that of learning_rate."""
    checkpoint_every: int = 200
    """Updates between checkpoints; a killed run continues from the last."""
    sample_every: int = 200
    """Updates between scores and pictures of held-out clips."""
    log_every: int = 20
    """Updates between lines of the log."""
    seed: int = 0
    """Of the weights, the order of the clips and the codebook's draws."""

    def __post_init__(self) -> None:
        """Refuse a training that would do nothing, and weights that would turn it around."""
        at_least_one(
            "training",
            num_steps=self.num_steps,
            batch_clips=self.batch_clips,
            clip_frames=self.clip_frames,
            accumulate=self.accumulate,
            checkpoint_every=self.checkpoint_every,
            sample_every=self.sample_every,
            log_every=self.log_every,
        )
        if self.optimizer not in get_args(OptimizerName):
            raise ConfigError(
                f"training: optimizer {self.optimizer!r} is unknown; there are "
                f"{', '.join(get_args(OptimizerName))}"
            )
        for name in ("motion_weight", "hard_pixel_power", "temporal_weight", "gradient_weight",
                     "multiscale_weight", "discriminator_weight"):  # fmt: skip
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ConfigError(f"training: {name} is {value}, must be 0 (off) or more")
        for name in ("ema_decay", "discriminator_start"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(
                    f"training: {name} is {getattr(self, name)}, must be at least 0 and below 1"
                )
        if self.batch_clips < self.accumulate:
            raise ConfigError(
                f"training: batch_clips is {self.batch_clips}, but accumulate cuts a batch into "
                f"{self.accumulate} parts, each of which needs a clip; lower accumulate"
            )

    @property
    def discriminator_step(self) -> int:
        """The first update, counted from 0, in which the discriminator takes part."""
        return int(self.num_steps * self.discriminator_start)

    def what(self) -> dict[str, Any]:
        """Return the settings on which the trained weights depend: those a run must go on with."""
        return {name: value for name, value in to_plain(self).items() if name not in _WATCHED}


def check_fit(
    model: TokenizerConfig, training: TokenizerTrainingConfig, /, *, num_processes: int = 1
) -> None:
    """Refuse a training that does not fit the tokenizer, or the processes that share it.

    Raises:
        ConfigError: if clips do not fill latent frames, or a process would have no clip.
    """
    stride, frames = model.temporal_stride, training.clip_frames
    over = (frames - 1) % stride
    if over:
        below, above = frames - over, frames - over + stride
        raise ConfigError(
            f"training: clip_frames is {frames}, but with a temporal_stride of {stride} a clip is "
            f"one frame and then groups of {stride}; the nearest that fit are {below} and {above}"
        )
    needed = num_processes * training.accumulate
    if training.batch_clips < needed:
        raise ConfigError(
            f"training: batch_clips is {training.batch_clips}, but {num_processes} processes with "
            f"{training.accumulate} part(s) each need {needed} clips, one for every part; raise "
            "batch_clips, or start fewer processes"
        )
