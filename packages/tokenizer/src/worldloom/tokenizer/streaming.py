"""Sessions: the only way our tokenizer encodes and decodes, one latent frame at a time.

    frames_BTHWC in any split  ->  codes_Bthw, the same for every split
    codes_Bthw in any split    ->  frames_BTHWC, the same for every split

A fixed step of one latent frame is what makes "the same" exact: larger batches of frames may take
other kernels, and another kernel's last bit can flip a code. Memory does not grow with the video.
Speed comes from B, the streams side by side.
"""

import torch
from torch import Tensor
from worldloom.common import CodeSpec, bind_shape

from .decoder import Decoder
from .encoder import Encoder
from .pixels import to_frames, to_video
from .quantizers import Quantizer


class ImageEncoderSession:
    """Encodes streams whose latent frames cover one frame each; nothing is ever held back."""

    def __init__(self, encoder: Encoder, quantizer: Quantizer, spec: CodeSpec, /) -> None:
        self._encoder = encoder
        self._quantizer = quantizer
        self._spec = spec
        self._cache: Tensor | None = None

    @torch.inference_mode()
    def push(self, frames_BTHWC: Tensor, /) -> Tensor:
        """Return codes_Bthw of the frames, t = T."""
        device = next(self._encoder.parameters()).device
        codes = []
        for frame in range(frames_BTHWC.shape[1]):
            video_BCTHW = to_video(frames_BTHWC[:, frame : frame + 1].to(device))
            latents_BZthw, self._cache = self._encoder(video_BCTHW, self._cache)
            codes.append(self._quantizer.quantize(latents_BZthw.flatten(2).mT))
        stacked = torch.stack(codes, dim=1) if codes else frames_BTHWC.new_zeros(
            (len(frames_BTHWC), 0, self._spec.cells), dtype=torch.int64
        )  # fmt: skip
        return stacked.unflatten(2, (self._spec.grid_height, self._spec.grid_width))

    def flush(self) -> Tensor:
        """Return no codes: every frame was encoded when it came."""
        return torch.zeros((0, 0, self._spec.grid_height, self._spec.grid_width), dtype=torch.int64)


class ImageDecoderSession:
    """Decodes streams whose latent frames cover one frame each."""

    def __init__(self, decoder: Decoder, quantizer: Quantizer, spec: CodeSpec, /) -> None:
        self._decoder = decoder
        self._quantizer = quantizer
        self._spec = spec
        self._cache: Tensor | None = None

    @torch.inference_mode()
    def push(self, codes_Bthw: Tensor, /) -> Tensor:
        """Return frames_BTHWC uint8 of the codes, T = t."""
        h, w = self._spec.grid_height, self._spec.grid_width
        bind_shape("codes", codes_Bthw, "B t h w", h=h, w=w)
        device = next(self._decoder.parameters()).device
        frames = []
        for frame in range(codes_Bthw.shape[1]):
            quantized_BthwZ = self._quantizer.lookup(codes_Bthw[:, frame : frame + 1].to(device))
            video_BCTHW, self._cache = self._decoder(
                quantized_BthwZ.permute(0, 4, 1, 2, 3), self._cache
            )
            frames.append(to_frames(video_BCTHW))
        return torch.cat(frames, dim=1)
