"""What a tokenizer is, to everything else: pixels in, codes out, and back.

    frames_BTHWC uint8  -> encode -> codes_Bthw int64 in [0, V)  -> decode -> frames_BTHWC uint8

Any class with these members is a tokenizer; it need not inherit from anything. Sessions are the
same two translations for a stream that arrives in pieces: however it is cut, the codes are the
same. docs/tokenizers.md has a whole one in forty lines, `testing` checks every promise made here,
and `registry` tells how a class becomes known by its name.

Time: latent frame 0 covers frame 0, each later one the next r = spec.codes.frames_per_latent. So
T frames have t = 1 + ceil((T - 1) / r) latent frames. Where r does not divide T - 1, the last
frame is repeated to fill, and `num_frames` cuts what comes of that off again.

Residual levels: where Q = spec.codes.num_levels is above 1, codes are codes_BthwQ, the codebook is
codebook_QVZ, and a cell's vector is the sum over q of codebook_QVZ[q, code of level q].

Frames and codes may come on any device and in any memory layout; what is returned lies on the
tokenizer's own. What does not fit is refused with a ShapeError, a FormatError or a ValueError.
"""

from typing import Protocol, runtime_checkable

from torch import Tensor
from worldloom.common import TokenizerSpec


class EncoderSession(Protocol):
    """Encodes a batch of streams that arrive in pieces."""

    def push(self, frames_BTHWC: Tensor, /) -> Tensor:
        """Return the codes_Bthw that became certain with these frames; T and t may be 0.

        B is that of the first push. The frames of a latent frame that is not full are held back.
        """
        ...

    def flush(self) -> Tensor:
        """Return the codes_Bthw of frames still held back, the last one repeated to fill.

        t is 1, or 0 where nothing was held back. The session ends with it.
        """
        ...


class DecoderSession(Protocol):
    """Decodes a batch of code streams that arrive in pieces."""

    def push(self, codes_Bthw: Tensor, /) -> Tensor:
        """Return frames_BTHWC uint8: 1 for the first latent frame, r for each later one."""
        ...


@runtime_checkable
class VideoTokenizer(Protocol):
    """Pixels to codes and back. Codes are the same every time, and do not change it."""

    @property
    def spec(self) -> TokenizerSpec:
        """What its codes mean, the frames it takes, and its fingerprint."""
        ...

    @property
    def codebook(self) -> Tensor:
        """The vectors codebook_VZ (or codebook_QVZ), float32, as the decoder receives them."""
        ...

    def fingerprint(self) -> str:
        """Return spec.fingerprint: 64 hexadecimal digits that change with any code's meaning.

        `worldloom.common.fingerprint` makes one of a config and weights.
        """
        ...

    def encode(self, frames_BTHWC: Tensor, /) -> Tensor:
        """Return codes_Bthw (or codes_BthwQ), int64 in [0, V), of uint8 frames of the spec's size.

        No code depends on a later frame, nor on the other videos of the batch.
        """
        ...

    def decode(self, codes_Bthw: Tensor, /, *, num_frames: int) -> Tensor:
        """Return frames_BTHWC, uint8, the first `num_frames` of the 1 + (t - 1) r they cover.

        Args:
            codes_Bthw: integers of any width in [0, V); codes_BthwQ where Q is above 1.
            num_frames: at least 1, at most what they cover. No frame depends on a later code.
        """
        ...

    def open_encoder(self) -> EncoderSession:
        """Return a session that encodes streams from their first frame on."""
        ...

    def open_decoder(self) -> DecoderSession:
        """Return a session that decodes streams from their first latent frame on."""
        ...
