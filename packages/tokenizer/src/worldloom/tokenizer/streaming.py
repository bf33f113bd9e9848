"""Sessions: the only way our tokenizers encode and decode, one latent frame at a time.

    frames_BTHWC in any split  ->  codes_Bthw, the same for every split
    codes_Bthw in any split    ->  frames_BTHWC, the same for every split

A fixed step of one latent frame (1 frame, then r at a time) is what makes "the same" exact: larger
batches of frames may take other kernels, and another kernel's last bit can flip a code. Memory does
not grow with the video. Speed comes from B, the streams side by side: at 32 of them this is as fast
as all frames at once (docs/log.md). For the same reason what is exact holds for one B: with
another, a latent between two codebook vectors may fall to the other side.
"""

from collections.abc import Iterator

import torch
from einops import rearrange
from torch import Tensor
from worldloom.common import FormatError, ShapeError, bind_shape

from .config import TokenizerConfig
from .conv3d import Caches
from .decoder import ImageDecoder, VideoDecoder
from .encoder import ImageEncoder, VideoEncoder
from .pixels import to_frames, to_video
from .quantizers import Quantizer


class ConvEncoderSession:
    """Encodes streams; holds at most r - 1 frames back, until a latent frame is full."""

    def __init__(
        self, encoder: ImageEncoder | VideoEncoder, quantizer: Quantizer, config: TokenizerConfig, /
    ) -> None:
        self._encoder = encoder
        self._quantizer = quantizer
        self._config = config
        self._device = quantizer.codebook.device
        self._num_streams = 0
        self._held_BTHWC: Tensor | None = None
        self._caches: Caches | None = None
        self._ended = False

    @torch.no_grad()
    def push(self, frames_BTHWC: Tensor, /) -> Tensor:
        """Return codes_Bthw, int64, that became certain with these uint8 frames; T may be 0.

        Raises:
            ShapeError: if the frames are not uint8 of the spec's size, or B changes on the way.
            ValueError: after `flush`.
        """
        if self._ended:
            raise ValueError("this session was flushed, so its videos are over; open another")
        height, width = self._config.height, self._config.width
        size = bind_shape("frames", frames_BTHWC, "B T H W C", H=height, W=width, C=3)
        if frames_BTHWC.dtype != torch.uint8:
            raise ShapeError(f"frames: dtype {frames_BTHWC.dtype}, must be torch.uint8 (0 to 255)")
        self._num_streams = _admit("frames", self._num_streams, size["B"])
        return torch.cat([self._empty(), *map(self._encode, self._full(frames_BTHWC))], dim=1)

    @torch.no_grad()
    def flush(self) -> Tensor:
        """Return the codes of the frames held back, the last repeated to fill; t is 0 or 1."""
        self._ended = True
        held_BTHWC, self._held_BTHWC = self._held_BTHWC, None
        if held_BTHWC is None:
            return self._empty()
        missing = self._config.temporal_stride - held_BTHWC.shape[1]
        last_BTHWC = held_BTHWC[:, -1:].expand(-1, missing, -1, -1, -1)
        return self._encode(torch.cat([held_BTHWC, last_BTHWC], dim=1))

    def _full(self, frames_BTHWC: Tensor) -> Iterator[Tensor]:
        """Yield the frames of each latent frame that is full now; keep the rest for later."""
        if self._held_BTHWC is not None:
            frames_BTHWC = torch.cat([self._held_BTHWC, frames_BTHWC], dim=1)
        start, total = 0, frames_BTHWC.shape[1]
        while start < total:
            stop = start + (1 if self._caches is None else self._config.temporal_stride)
            if stop > total:
                break
            yield frames_BTHWC[:, start:stop]
            start = stop
        # A copy: a slice would keep all that was pushed alive.
        self._held_BTHWC = frames_BTHWC[:, start:].clone() if start < total else None

    def _encode(self, frames_BTHWC: Tensor) -> Tensor:
        """Return codes_Bthw of one latent frame of every stream, t = 1."""
        video_BCTHW = to_video(frames_BTHWC.to(self._device))
        latents_BZthw, self._caches, _ = self._encoder(video_BCTHW, self._caches)
        codes = self._quantizer.quantize(rearrange(latents_BZthw, "B Z t h w -> B (t h w) Z"))
        return rearrange(codes, "B (t h w) ... -> B t h w ...", t=1, h=latents_BZthw.shape[3])

    def _empty(self) -> Tensor:
        """Return codes_Bthw of no frames."""
        shape = (self._num_streams, *self._config.code_spec.codes_shape(0))
        return torch.zeros(shape, dtype=torch.int64, device=self._device)


class ConvDecoderSession:
    """Decodes streams: 1 frame for the first latent frame, r for every later one."""

    def __init__(
        self, decoder: ImageDecoder | VideoDecoder, quantizer: Quantizer, config: TokenizerConfig, /
    ) -> None:
        self._decoder = decoder
        self._quantizer = quantizer
        self._config = config
        self._device = quantizer.codebook.device
        self._num_streams = 0
        self._caches: Caches | None = None

    @torch.no_grad()
    def push(self, codes_Bthw: Tensor, /) -> Tensor:
        """Return frames_BTHWC, uint8, of codes of any integer dtype; t may be 0.

        Raises:
            ShapeError: if the codes are not integers on the spec's grid, or B changes on the way.
            FormatError: if a code is outside the vocabulary.
        """
        spec = self._config.code_spec
        size = bind_shape("codes", codes_Bthw, codes_letters(spec.num_levels), **grid(self._config))
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
            video_BCTHW, self._caches, _ = self._decoder(
                rearrange(quantized, "B t h w Z -> B Z t h w"), self._caches
            )
            frames.append(to_frames(video_BCTHW))
        return torch.cat(frames, dim=1)


def codes_letters(num_levels: int, /) -> str:
    """Return the shape letters of codes of that many levels."""
    return "B t h w" if num_levels == 1 else "B t h w Q"


def grid(config: TokenizerConfig, /) -> dict[str, int]:
    """Return the sizes that the codes' axes must have, by letter."""
    spec = config.code_spec
    levels = {"Q": spec.num_levels} if spec.num_levels > 1 else {}
    return {"h": spec.grid_height, "w": spec.grid_width, **levels}


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
