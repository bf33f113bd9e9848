"""Settings of our tokenizer and of its training. Needs no torch, so `--help` stays instant."""

import math
from dataclasses import dataclass, field

from worldloom.common import CodeSpec, ConfigError, ResizeRule


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizerConfig:
    """Vector quantization: a learned codebook, trained by moving averages."""

    vocab_size: int = 1024
    """Number of codes, V."""
    code_dim: int = 16
    """Length of a codebook vector, Z."""
    decay: float = 0.95
    """Of the moving averages that are the codebook; 0.99 for runs of many thousand steps."""
    commitment: float = 0.25
    """Weight of the loss that keeps latents near their codebook vector."""
    dead_code_threshold: float = 0.1
    """A code that gets fewer than this share of an even share of the latents is replaced."""

    def __post_init__(self) -> None:
        """Refuse a codebook of nothing."""
        _at_least_one("quantizer", vocab_size=self.vocab_size, code_dim=self.code_dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerConfig:
    """Sizes of the image tokenizer. Stored in its directory, which it is enough to rebuild."""

    height: int = 64
    """Frame height H in pixels; other frames are resized by the rule."""
    width: int = 64
    """Frame width W in pixels."""
    resize: ResizeRule = "exact"
    """How frames of another size are made to fit; exact refuses them."""
    patch: int = 4
    """Pixels per side that the first layer folds into channels."""
    widths: tuple[int, ...] = (64, 128)
    """Channels at each resolution; each entry after the first halves height and width."""
    num_blocks: tuple[int, ...] = (1, 2)
    """Residual blocks at each resolution, in the encoder and in the decoder."""
    temporal_kernel: int = 3
    """Frames that the causal convolutions around the quantizer see, k; 1 for none."""
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    """The quantizer between the two halves."""

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit together."""
        if len(self.widths) != len(self.num_blocks) or not self.widths:
            raise ConfigError(
                f"tokenizer: widths has {len(self.widths)} entries and num_blocks "
                f"{len(self.num_blocks)}; each resolution needs one of each"
            )
        _at_least_one("tokenizer", patch=self.patch, temporal_kernel=self.temporal_kernel)
        if min(self.widths) < 1 or min(self.num_blocks) < 0:
            raise ConfigError(
                f"tokenizer: widths {self.widths} and num_blocks {self.num_blocks}; "
                "a width is at least 1 and a number of blocks at least 0"
            )
        for name, pixels in (("height", self.height), ("width", self.width)):
            if pixels < 1 or pixels % self.stride:
                raise ConfigError(
                    f"tokenizer: {name} {pixels} is not a multiple of {self.stride} "
                    f"(patch {self.patch} times {len(self.widths) - 1} halvings); "
                    f"the nearest that fits is {math.ceil(pixels / self.stride) * self.stride}"
                )

    @property
    def stride(self) -> int:
        """Pixels per side of a cell."""
        return int(self.patch * 2 ** (len(self.widths) - 1))

    @property
    def code_spec(self) -> CodeSpec:
        """What its codes mean."""
        return CodeSpec(
            vocab_size=self.quantizer.vocab_size,
            grid_height=self.height // self.stride,
            grid_width=self.width // self.stride,
            code_dim=self.quantizer.code_dim,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerTrainingConfig:
    """How the tokenizer is trained."""

    num_steps: int = 20_000
    """Optimizer updates."""
    batch_clips: int = 16
    """Clips per update."""
    clip_frames: int = 8
    """Consecutive frames per clip, T."""
    learning_rate: float = 2e-3
    """Peak of the schedule: linear warmup, then a cosine to a hundredth."""
    warmup_steps: int = 40
    """Updates of linear warmup."""
    weight_decay: float = 1e-4
    """Of AdamW, on matrices and kernels only."""
    motion_weight: float = 20.0
    """Extra weight of pixels that differ from their clip's median, so that small things survive."""
    bf16: bool = False
    """Compute in bfloat16 (the quantizer stays in float32); faster on GPUs and some CPUs."""
    checkpoint_every: int = 200
    """Updates between checkpoints; a killed run continues from the last."""
    sample_every: int = 200
    """Updates between scores and pictures of held-out clips."""
    log_every: int = 20
    """Updates between lines of the log."""
    seed: int = 0
    """Of the weights, the order of the clips and the codebook's draws."""

    def __post_init__(self) -> None:
        """Refuse a training that would do nothing."""
        _at_least_one(
            "training",
            num_steps=self.num_steps,
            batch_clips=self.batch_clips,
            clip_frames=self.clip_frames,
            checkpoint_every=self.checkpoint_every,
            sample_every=self.sample_every,
            log_every=self.log_every,
        )


def _at_least_one(where: str, **counts: int) -> None:
    """Refuse a count below 1."""
    for name, count in counts.items():
        if count < 1:
            raise ConfigError(f"{where}: {name} is {count}, must be at least 1")
