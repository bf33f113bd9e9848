"""What a tokenizer is, to everything else: pixels in, codes out, and back.

    frames_BTHWC uint8  -> encode -> codes_Bthw int64 in [0, V)  -> decode -> frames_BTHWC uint8

Any class with these members is a tokenizer; it need not inherit from anything. Sessions are the
same two translations for a stream that arrives in pieces: however it is cut, the codes are the
same. How a class becomes known by its name is told in `registry`.
"""

from typing import Protocol, runtime_checkable

from torch import Tensor
from worldloom.common import TokenizerSpec


class EncoderSession(Protocol):
    """Encodes a batch of streams that arrive in pieces."""

    def push(self, frames_BTHWC: Tensor, /) -> Tensor:
        """Return the codes_Bthw that became certain with these frames; t may be 0."""
        ...

    def flush(self) -> Tensor:
        """Return the codes_Bthw of frames still held back, the last one repeated to fill."""
        ...


class DecoderSession(Protocol):
    """Decodes a batch of code streams that arrive in pieces."""

    def push(self, codes_Bthw: Tensor, /) -> Tensor:
        """Return frames_BTHWC uint8: 1 for the first latent frame, r for each later one."""
        ...


@runtime_checkable
class VideoTokenizer(Protocol):
    """Pixels to codes and back."""

    @property
    def spec(self) -> TokenizerSpec:
        """What its codes mean, the frames it takes, and its fingerprint."""
        ...

    @property
    def codebook(self) -> Tensor:
        """The codebook vectors codebook_VZ, float32, as the decoder receives them."""
        ...

    def encode(self, frames_BTHWC: Tensor, /) -> Tensor:
        """Return codes_Bthw, int64 in [0, V), of uint8 frames of the spec's size."""
        ...

    def decode(self, codes_Bthw: Tensor, /, *, num_frames: int) -> Tensor:
        """Return frames_BTHWC, uint8, the first `num_frames` of what the codes cover."""
        ...

    def open_encoder(self) -> EncoderSession:
        """Return a session that encodes streams from their first frame on."""
        ...

    def open_decoder(self) -> DecoderSession:
        """Return a session that decodes streams from their first latent frame on."""
        ...
