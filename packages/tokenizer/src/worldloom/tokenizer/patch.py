"""A tokenizer with nothing to learn: the mean colour of every patch, snapped to a palette.

    frames_BTHWC uint8  ->  means of patches  ->  nearest levels of red, green, blue  ->  codes_Bthw
    codes_Bthw  ->  colours of the palette  ->  all pixels of their patches  ->  frames_BTHWC uint8

The smallest example of `VideoTokenizer`, and the baseline that a learned one must beat. r = 1, and
no frame knows another. Means and levels are computed in integers, so codes are the same on every
machine, at every batch size, always.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from einops import reduce, repeat
from torch import Tensor
from worldloom.common import (
    CodeSpec,
    ConfigError,
    FormatError,
    ResizeRule,
    ShapeError,
    TokenizerSpec,
    bind_shape,
    build,
    fingerprint,
    load_model,
    save_model,
    to_plain,
)

from .streaming import check_codes

NAME = "patch"


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchConfig:
    """Sizes of the tokenizer named "patch"."""

    patch: int = 8
    """Pixels per side of a cell."""
    height: int = 64
    """Frame height H in pixels, a multiple of patch."""
    width: int = 64
    """Frame width W in pixels, a multiple of patch."""
    resize: ResizeRule = "pad"
    """How frames of another size are made to fit."""
    levels: tuple[int, int, int] = (6, 7, 6)
    """Values of red, green and blue, evenly spaced from 0 to 255; V is their product. The eye sees
    green best, so it gets the most."""

    def __post_init__(self) -> None:
        """Refuse sizes that leave no grid, and channels of one value."""
        for name, pixels in (("height", self.height), ("width", self.width)):
            if self.patch < 1 or pixels < 1 or pixels % self.patch:
                raise ConfigError(
                    f"patch tokenizer: {name} {pixels} is not a multiple of patch {self.patch}, "
                    "so its cells would not cover the frame; choose another of the two"
                )
        if min(self.levels) < 2 or max(self.levels) > 256:
            raise ConfigError(
                f"patch tokenizer: levels are {self.levels}, must each be in [2, 256]: one value "
                "says nothing, and a pixel has no more than 256"
            )

    @property
    def code_spec(self) -> CodeSpec:
        """What its codes mean."""
        red, green, blue = self.levels
        return CodeSpec(
            vocab_size=red * green * blue,
            grid_height=self.height // self.patch,
            grid_width=self.width // self.patch,
            code_dim=3,
        )


DEFAULT = PatchConfig()
"""64x64 frames, 8x8 cells, 252 colours."""


class PatchTokenizer:
    """The tokenizer named "patch". Implements VideoTokenizer."""

    def __init__(self, config: PatchConfig = DEFAULT, *, device: str = "cpu") -> None:
        """Build its palette on a device."""
        self.config = config
        self.spec = TokenizerSpec(
            name=NAME,
            codes=config.code_spec,
            height=config.height,
            width=config.width,
            resize=config.resize,
            fps=0,
            frame_skip=0,
            compute_dtype="float32",
            fingerprint=fingerprint({"name": NAME, **to_plain(config)}, []),
        )
        # codebook_VZ: the palette's colours in [-1, 1], the last channel counting fastest.
        axes = [torch.linspace(-1, 1, count) for count in config.levels]
        self.codebook = torch.cartesian_prod(*axes).to(device)

    def fingerprint(self) -> str:
        """Return the SHA-256 of the config; there are no weights."""
        return self.spec.fingerprint

    def encode(self, frames_BTHWC: Tensor, /) -> Tensor:
        """Return codes_Bthw, int64 in [0, V), of uint8 frames of the spec's size.

        Raises:
            ShapeError: if the frames are of another size, dtype or number.
        """
        if bind_shape("frames", frames_BTHWC, "B T H W C")["T"] == 0:
            raise ShapeError("frames: there are none; a video has at least one frame")
        return self.open_encoder().push(frames_BTHWC)

    def decode(self, codes_Bthw: Tensor, /, *, num_frames: int) -> Tensor:
        """Return the first `num_frames` of frames_BTHWC, uint8.

        Raises:
            ShapeError: if the grid or the dtype is another, or there are fewer codes.
            FormatError: if a code is outside the vocabulary.
        """
        t = bind_shape("codes", codes_Bthw, "B t h w")["t"]
        if not 1 <= num_frames <= t:
            raise ShapeError(
                f"codes: {t} latent frames cover {t} frames, asked for {num_frames}; "
                f"ask for 1 to {t}"
            )
        return self.open_decoder().push(codes_Bthw)[:, :num_frames]

    def open_encoder(self) -> "PatchEncoderSession":
        """Return a session that encodes streams from their first frame on."""
        return PatchEncoderSession(self)

    def open_decoder(self) -> "PatchDecoderSession":
        """Return a session that decodes streams from their first latent frame on."""
        return PatchDecoderSession(self)

    def save(self, folder: Path, /, *, card: str) -> None:
        """Write a model directory that `from_pretrained` reads."""
        config = {
            "name": NAME,
            "tokenizer": to_plain(self.config),
            "fingerprint": self.spec.fingerprint,
        }
        save_model(folder, kind="tokenizer", config=config, weights={}, card=card)

    @classmethod
    def from_pretrained(cls, folder: Path, /, *, device: str = "cpu") -> Self:
        """Load a model directory.

        Raises:
            FormatError: if a file is missing, altered, or written by another version.
            MismatchError: if it holds another kind of model.
        """
        config, _ = load_model(folder, kind="tokenizer")
        where = str(folder / "config.json")
        if set(config) != {"name", "tokenizer", "fingerprint"} or config["name"] != NAME:
            raise FormatError(
                f"{where}: has the name {config.get('name')!r:.60} and the fields "
                f"{', '.join(sorted(config))}; a patch tokenizer has the name {NAME!r} and "
                "fingerprint, name, tokenizer"
            )
        sizes = build(PatchConfig, config["tokenizer"], where=where, error=FormatError)
        tokenizer = cls(sizes, device=device)
        if tokenizer.spec.fingerprint != config["fingerprint"]:
            raise FormatError(
                f"{where}: these sizes have fingerprint {tokenizer.spec.fingerprint[:16]}, but it "
                f"says {str(config['fingerprint'])[:16]}; it was written by another version"
            )
        return tokenizer


class PatchEncoderSession:
    """Encodes streams; nothing is ever held back, and nothing remembered but their number."""

    def __init__(self, tokenizer: PatchTokenizer, /) -> None:
        self._config = tokenizer.config
        self._device = tokenizer.codebook.device
        self._num_streams = 0

    def push(self, frames_BTHWC: Tensor, /) -> Tensor:
        """Return codes_Bthw, int64, of uint8 frames; t = T, which may be 0.

        Raises:
            ShapeError: if the frames are not uint8 of the spec's size, or B changes on the way.
        """
        height, width = self._config.height, self._config.width
        size = bind_shape("frames", frames_BTHWC, "B T H W C", H=height, W=width, C=3)
        if frames_BTHWC.dtype != torch.uint8:
            raise ShapeError(f"frames: dtype {frames_BTHWC.dtype}, must be torch.uint8 (0 to 255)")
        self._num_streams = _same_streams("frames", self._num_streams, size["B"])
        area = self._config.patch**2
        sums_BThwC = reduce(
            frames_BTHWC.to(self._device, torch.int32),
            "B T (h p) (w q) C -> B T h w C",
            "sum",
            p=self._config.patch,
            q=self._config.patch,
        )
        codes_Bthw = torch.zeros(sums_BThwC.shape[:-1], dtype=torch.int64, device=self._device)
        for channel, count in enumerate(self._config.levels):
            # round(mean / 255 * (count - 1)), halves up, without leaving the integers.
            digit = (2 * sums_BThwC[..., channel] * (count - 1) + 255 * area) // (510 * area)
            codes_Bthw = codes_Bthw * count + digit
        return codes_Bthw

    def flush(self) -> Tensor:
        """Return no codes: every frame was encoded when it came."""
        shape = (self._num_streams, *self._config.code_spec.codes_shape(0))
        return torch.zeros(shape, dtype=torch.int64, device=self._device)


class PatchDecoderSession:
    """Decodes streams whose latent frames cover one frame each."""

    def __init__(self, tokenizer: PatchTokenizer, /) -> None:
        self._config = tokenizer.config
        self._colours_VC = ((tokenizer.codebook + 1) * 127.5).round().to(torch.uint8)
        self._num_streams = 0

    def push(self, codes_Bthw: Tensor, /) -> Tensor:
        """Return frames_BTHWC, uint8, of codes of any integer dtype; t may be 0.

        Raises:
            ShapeError: if the codes are not integers on the spec's grid, or B changes on the way.
            FormatError: if a code is outside the vocabulary.
        """
        spec, patch = self._config.code_spec, self._config.patch
        grid = {"h": spec.grid_height, "w": spec.grid_width}
        size = bind_shape("codes", codes_Bthw, "B t h w", **grid)
        if codes_Bthw.is_floating_point() or codes_Bthw.dtype == torch.bool:
            raise ShapeError(f"codes: dtype {codes_Bthw.dtype}, must be integers")
        # int64 before anything else: torch takes uint8 indices for a mask.
        codes_Bthw = codes_Bthw.to(self._colours_VC.device, torch.int64)
        check_codes(codes_Bthw, vocab_size=spec.vocab_size)
        self._num_streams = _same_streams("codes", self._num_streams, size["B"])
        colours_BthwC = self._colours_VC[codes_Bthw]
        return repeat(colours_BthwC, "B t h w C -> B t (h p) (w q) C", p=patch, q=patch)


def _same_streams(what: str, before: int, count: int) -> int:
    """Return the number of streams; refuse none, or another than the first push brought."""
    if count < 1 or before not in (0, count):
        raise ShapeError(
            f"{what}: {count} streams side by side, must be {before or 'at least 1'}; "
            "other streams need a session of their own"
        )
    return count


if TYPE_CHECKING:
    from .protocol import VideoTokenizer

    _conforms: type[VideoTokenizer] = PatchTokenizer  # mypy holds the class to the protocol
