"""Sizes of our tokenizers. Needs no torch, so `--help` stays instant."""

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from worldloom.common import CodeSpec, ConfigError, ResizeRule

QuantizerKind = Literal["vq", "fsq", "lfq", "residual"]
"""How latents become codes.

    vq        the nearest of a learned codebook
    fsq       every channel rounded to one of a few values; nothing is learned
    lfq       the sign of every channel, one bit each; nothing is learned
    residual  several codebooks, each for what the ones before it left over: Q codes a cell
"""

Architecture = Literal["image", "video"]
"""What surrounds the quantizer.

    image  every frame by itself, and one causal convolution over time on either side
    video  causal over time throughout; may halve the frames on the way
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizerConfig:
    """How latents become codes."""

    kind: QuantizerKind = "vq"
    """vq and residual learn their codebooks; fsq and lfq have none to learn."""
    vocab_size: int = 1024
    """Number of codes, V, of every level; a power of 2 for lfq. fsq has its own: fsq_levels."""
    code_dim: int = 16
    """Length of a codebook vector, Z, of vq and residual; fsq and lfq have a channel a digit."""
    num_levels: int = 2
    """Codes per cell, Q, of residual; the others have one."""
    fsq_levels: tuple[int, ...] = (8, 5, 5, 5)
    """Values of every channel of fsq; V is their product (arXiv:2309.15505 gives good ones)."""
    cosine: bool = False
    """vq and residual: the nearest by angle, on the unit sphere, rather than by distance."""
    spherical: bool = False
    """lfq: codes on the unit sphere (arXiv:2406.07548), rather than the corners of a cube."""
    decay: float = 0.95
    """Of the moving averages that are the codebook; 0.99 for runs of many thousand steps."""
    commitment: float = 0.25
    """Weight of the loss that keeps latents near their codebook vector; of every kind."""
    entropy: float = 0.1
    """lfq: weight of the loss that asks for sure codes, and for all of them to be used."""
    dead_code_threshold: float = 0.1
    """A code that gets fewer than this share of an even share of the latents is replaced."""

    def __post_init__(self) -> None:
        """Refuse a codebook of nothing, and one that its kind cannot have."""
        at_least_one(
            "quantizer",
            vocab_size=self.vocab_size,
            code_dim=self.code_dim,
            num_levels=self.num_levels,
        )
        if self.kind not in get_args(QuantizerKind):
            raise ConfigError(
                f"quantizer: kind {self.kind!r} is unknown; there are "
                f"{', '.join(get_args(QuantizerKind))}"
            )
        if self.kind == "lfq" and (self.vocab_size & (self.vocab_size - 1) or self.vocab_size < 2):
            raise ConfigError(
                f"quantizer: vocab_size is {self.vocab_size}, must be a power of 2 for lfq, whose "
                f"code is one bit a channel; the next is {1 << self.vocab_size.bit_length()}"
            )
        if self.kind == "fsq" and (not self.fsq_levels or min(self.fsq_levels) < 2):
            raise ConfigError(
                f"quantizer: fsq_levels is {self.fsq_levels}, must be one number or more, each at "
                "least 2: a channel of one value says nothing"
            )

    @property
    def size(self) -> int:
        """Number of codes of every level, V."""
        return math.prod(self.fsq_levels) if self.kind == "fsq" else self.vocab_size

    @property
    def dim(self) -> int:
        """Length of a codebook vector, Z."""
        if self.kind == "fsq":
            return len(self.fsq_levels)
        return self.vocab_size.bit_length() - 1 if self.kind == "lfq" else self.code_dim

    @property
    def depth(self) -> int:
        """Codes per cell, Q."""
        return self.num_levels if self.kind == "residual" else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerConfig:
    """Sizes of a tokenizer. Stored in its directory, which it is enough to rebuild."""

    architecture: Architecture = "image"
    """image treats frames one by one but for one causal convolution; video is causal throughout."""
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
    """Frames that every causal convolution over time sees, k; 1 for none."""
    temporal_stride: int = 1
    """Frames per latent frame after the first, r: 1, 2 or 4; above 1 only for video."""
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    """The quantizer between the two halves."""

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit together."""
        if len(self.widths) != len(self.num_blocks) or not self.widths:
            raise ConfigError(
                f"tokenizer: widths has {len(self.widths)} entries and num_blocks "
                f"{len(self.num_blocks)}; each resolution needs one of each"
            )
        at_least_one("tokenizer", patch=self.patch, temporal_kernel=self.temporal_kernel)
        if self.temporal_stride not in (1, 2, 4):
            raise ConfigError(
                f"tokenizer: temporal_stride is {self.temporal_stride}, must be 1, 2 or 4"
            )
        if self.architecture not in get_args(Architecture):
            raise ConfigError(
                f"tokenizer: architecture {self.architecture!r} is unknown; there are "
                f"{', '.join(get_args(Architecture))}"
            )
        if self.architecture == "image" and self.temporal_stride > 1:
            raise ConfigError(
                f"tokenizer: temporal_stride is {self.temporal_stride}, but the image architecture "
                "has one latent frame a frame; set architecture to video, or temporal_stride to 1"
            )
        if self.temporal_stride > 1 and self.temporal_kernel < 2:
            raise ConfigError(
                f"tokenizer: temporal_kernel is {self.temporal_kernel}, but to fold "
                f"{self.temporal_stride} frames into one it must be at least 2"
            )
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
    def time_halvings(self) -> int:
        """How often frames are halved on the way to latent frames: r is 2 to this power."""
        return self.temporal_stride.bit_length() - 1

    @property
    def code_spec(self) -> CodeSpec:
        """What its codes mean."""
        return CodeSpec(
            vocab_size=self.quantizer.size,
            grid_height=self.height // self.stride,
            grid_width=self.width // self.stride,
            code_dim=self.quantizer.dim,
            frames_per_latent=self.temporal_stride,
            num_levels=self.quantizer.depth,
        )


def at_least_one(where: str, **counts: int) -> None:
    """Refuse a count below 1."""
    for name, count in counts.items():
        if count < 1:
            raise ConfigError(f"{where}: {name} is {count}, must be at least 1")
