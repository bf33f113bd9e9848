"""What every quantizer is: (B, N, Z) vectors to codes and back, exactly.

    latents_BNZ  -> forward  -> quantized_BNZ (with gradient), codes_BN, loss     training
    latents_BNZ  -> quantize -> codes_BN int64 in [0, V)                          encoding
    codes_...    -> lookup   -> quantized_...Z                                    decoding

A quantizer of several levels (residual, Q > 1) gives a cell Q codes: codes_BNQ, codebook_QVZ, and
lookup takes codes_...Q and sums the levels' vectors.

Libraries differ in axes, return values and dtypes (and some only round-trip in float32); the
adapter settles all three here, once. Quantizers compute in float32 whatever the network around
them does, and whatever dtype they are given. quantize(lookup(code)) is code for every code (of
every level by itself; see `ResidualVQ`), also when the vectors were rounded to bfloat16 on the
way. Two limits follow from what a learned codebook may hold: of equal vectors the first is the
code of all, and vectors closer than bfloat16 can tell apart are only exact in float32.
"""

from abc import ABC, abstractmethod

from torch import Tensor, distributed, nn


class Quantizer(nn.Module, ABC):
    """Turns vectors into codes."""

    depth: int = 1
    """Codes per cell, Q."""

    @abstractmethod
    def forward(self, latents_BNZ: Tensor, /) -> tuple[Tensor, Tensor, Tensor]:
        """Return quantized_BNZ with a gradient to the latents, codes_BN(Q), and the scalar loss.

        In training the codebook may move; in evaluation nothing changes.
        """

    @abstractmethod
    def quantize(self, latents_BNZ: Tensor, /) -> Tensor:
        """Return codes_BN(Q), int64 in [0, V); changes nothing. A vector's code is its own."""

    @property
    @abstractmethod
    def codebook(self) -> Tensor:
        """The codebook vectors codebook_(Q)VZ, float32, as the decoder receives them."""

    def lookup(self, codes: Tensor, /) -> Tensor:
        """Return the vectors of codes of any shape (with a last axis Q if depth is above 1)."""
        return self.codebook[codes]


def num_processes() -> int:
    """Return how many processes train together; 1 where there is no group."""
    there_is = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if there_is else 1
