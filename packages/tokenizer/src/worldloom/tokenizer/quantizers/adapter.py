"""What every quantizer is: (B, N, Z) vectors to codes and back, exactly.

    latents_BNZ  -> forward  -> quantized_BNZ (with gradient), codes_BN, loss     training
    latents_BNZ  -> quantize -> codes_BN int64 in [0, V)                          encoding
    codes_...    -> lookup   -> quantized_...Z                                    decoding

Libraries differ in axes, return values and dtypes (and some only round-trip in float32); the
adapter settles all three here, once. Quantizers compute in float32 whatever the network around
them does.
"""

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Quantizer(nn.Module, ABC):
    """Turns vectors into codes."""

    @abstractmethod
    def forward(self, latents_BNZ: Tensor, /) -> tuple[Tensor, Tensor, Tensor]:
        """Return quantized_BNZ with a gradient to the latents, codes_BN, and the scalar loss.

        In training the codebook may move; in evaluation nothing changes.
        """

    @abstractmethod
    def quantize(self, latents_BNZ: Tensor, /) -> Tensor:
        """Return codes_BN, int64 in [0, V); changes nothing."""

    @property
    @abstractmethod
    def codebook(self) -> Tensor:
        """The codebook vectors codebook_VZ, float32, as the decoder receives them."""

    def lookup(self, codes: Tensor, /) -> Tensor:
        """Return the codebook vectors of codes of any shape, with a last axis Z."""
        return self.codebook[codes]
