"""Sessions: the only way our tokenizer encodes and decodes, one latent frame at a time.

    frames_BTHWC in any split  ->  codes_Bthw, the same for every split
    codes_Bthw in any split    ->  frames_BTHWC, the same for every split

A fixed step of one latent frame is what makes "the same" exact: larger batches of frames may take
other kernels, and another kernel's last bit can flip a code. Memory does not grow with the video.
Speed comes from B, the streams side by side: at 32 of them this is as fast as all frames at once
(docs/log.md). For the same reason what is exact holds for one B: with another, a latent
between two codebook vectors may fall to the other side.
"""

import torch
from einops import rearrange
from torch import Tensor
from worldloom.common import FormatError, ShapeError, bind_shape

from .config import TokenizerConfig
from .decoder import Decoder
from .encoder import Encoder
from .pixels import to_frames, to_video
from .quantizers import Quantizer


class ImageEncoderSession:
    """Encodes streams whose latent frames cover one frame each; nothing is ever held back."""

    def __init__(self, encoder: Encoder, quantizer: Quantizer, config: TokenizerConfig, /) -> None:
        self._encoder = encoder
        self._quantizer = quantizer
        self._config = config
        self._device = quantizer.codebook.device
        self._num_streams = 0
        self._cache: Tensor | None = None

    @torch.no_grad()
    def push(self, frames_BTHWC: Tensor, /) -> Tensor:
        """Return codes_Bthw, int64, of uint8 frames; t = T, which may be 0.

        Raises:
            ShapeError: if the frames are not uint8 of the spec's size, or B changes on the way.
        """
        height, width = self._config.height, self._config.width
        size = bind_shape("frames", frames_BTHWC, "B T H W C", H=height, W=width, C=3)
        if frames_BTHWC.dtype != torch.uint8:
            raise ShapeError(f"frames: dtype {frames_BTHWC.dtype}, must be torch.uint8 (0 to 255)")
        self._num_streams = _admit("frames", self._num_streams, size["B"])
        frames = torch.split(frames_BTHWC, 1, dim=1) if size["T"] else ()
        return torch.cat([self._empty(), *map(self._encode, frames)], dim=1)

    def flush(self) -> Tensor:
        """Return no codes: every frame was encoded when it came."""
        return self._empty()

    def _encode(self, frames_B1HWC: Tensor) -> Tensor:
        """Return codes_Bthw of one frame of every stream, t = 1."""
        video_BC1HW = to_video(frames_B1HWC.to(self._device))
        latents_BZthw, self._cache = self._encoder(video_BC1HW, self._cache)
        codes_BN = self._quantizer.quantize(rearrange(latents_BZthw, "B Z t h w -> B (t h w) Z"))
        return rearrange(codes_BN, "B (t h w) -> B t h w", t=1, h=latents_BZthw.shape[3])

    def _empty(self) -> Tensor:
        """Return codes_Bthw of no frames."""
        spec = self._config.code_spec
        shape = (self._num_streams, 0, spec.grid_height, spec.grid_width)
        return torch.zeros(shape, dtype=torch.int64, device=self._device)


class ImageDecoderSession:
    """Decodes streams whose latent frames cover one frame each."""

    def __init__(self, decoder: Decoder, quantizer: Quantizer, config: TokenizerConfig, /) -> None:
        self._decoder = decoder
        self._quantizer = quantizer
        self._config = config
        self._device = quantizer.codebook.device
        self._num_streams = 0
        self._cache: Tensor | None = None

    @torch.no_grad()
    def push(self, codes_Bthw: Tensor, /) -> Tensor:
        """Return frames_BTHWC, uint8, of codes of any integer dtype; T = t, which may be 0.

        Raises:
            ShapeError: if the codes are not integers on the spec's grid, or B changes on the way.
            FormatError: if a code is outside the vocabulary.
        """
        spec = self._config.code_spec
        grid = {"h": spec.grid_height, "w": spec.grid_width}
        size = bind_shape("codes", codes_Bthw, "B t h w", **grid)
        if codes_Bthw.is_floating_point() or codes_Bthw.dtype == torch.bool:
            raise ShapeError(f"codes: dtype {codes_Bthw.dtype}, must be integers")
        # int64 before anything else: torch takes uint8 indices for a mask.
        codes_Bthw = codes_Bthw.to(self._device, torch.int64)
        check_codes(codes_Bthw, vocab_size=spec.vocab_size)
        self._num_streams = _admit("codes", self._num_streams, size["B"])
        shape = (self._num_streams, 0, self._config.height, self._config.width, 3)
        frames = [torch.zeros(shape, dtype=torch.uint8, device=self._device)]
        for codes_B1hw in torch.split(codes_Bthw, 1, dim=1) if size["t"] else ():
            quantized = self._quantizer.lookup(codes_B1hw)
            video_BCTHW, self._cache = self._decoder(
                rearrange(quantized, "B t h w Z -> B Z t h w"), self._cache
            )
            frames.append(to_frames(video_BCTHW))
        return torch.cat(frames, dim=1)


def check_codes(codes: Tensor, /, *, vocab_size: int) -> None:
    """Refuse codes outside [0, vocab_size).

    Raises:
        FormatError: naming the range found.
    """
    if codes.numel() == 0:
        return
    low, high = (int(value) for value in codes.aminmax())
    if low < 0 or high >= vocab_size:
        raise FormatError(
            f"codes: values in [{low}, {high}], must be in [0, {vocab_size}); "
            "were they written by another tokenizer?"
        )


def _admit(what: str, before: int, count: int) -> int:
    """Return the number of streams; refuse none, or another than the first push brought."""
    if count < 1 or before not in (0, count):
        raise ShapeError(
            f"{what}: {count} streams side by side, must be {before or 'at least 1'}; "
            "other streams need a session of their own"
        )
    return count
