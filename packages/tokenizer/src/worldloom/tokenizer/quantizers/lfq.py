"""Lookup-free quantization: one bit a channel, its sign.

    latents_BNZ  ->  codes_BN, the number whose bits (the first channel's the highest) are the signs

Z = log2 V. The vectors are the corners of a cube, (+-1, ..., +-1); with spherical, latents and
vectors lie on the unit sphere, (+-1, ..., +-1) / sqrt(Z). Nothing is learned; the gradient passes
straight through. Two losses keep the codes in use: commitment, and an entropy loss that asks
every latent for a sure code and the batch for all codes.

Source: MAGVIT-v2 (arXiv:2310.05737) and, for spherical, BSQ (arXiv:2406.07548), through
vector-quantize-pytorch. Departs from its entropy loss, which builds N x V arrays (a latent's
bits are independent, so its entropy is a sum over bits; the batch's is taken over groups of 10
bits, which is the same to V = 1024 and an upper bound above), does not use what other processes
found, and is so cold (400 where we have 4) that latents which all have one code feel nothing:
after 100 updates by that loss alone, 200 latents use 8 of 64 codes, and 62 with ours.
"""

import torch
import vector_quantize_pytorch as library
from einops import rearrange, reduce
from torch import Tensor
from torch.nn.functional import mse_loss, softplus

from ..config import QuantizerConfig
from .adapter import Quantizer, num_processes
from .vq import on_sphere

_CORNER_LOGIT = 4.0
"""How sure a latent at a corner is of each of its bits, in the entropy loss: sigmoid(4) = 98%."""
_LEAST_PROBABILITY = 1e-5
"""Under the logarithm of the batch's entropy; the library's."""
_GROUP_BITS = 10
"""Bits whose joint distribution the batch's entropy knows."""


class LFQ(Quantizer):
    """LFQ of vector-quantize-pytorch behind the adapter."""

    places_Z: Tensor
    codebook_VZ: Tensor

    def __init__(self, config: QuantizerConfig) -> None:
        """Build the cube's corners of config.vocab_size."""
        super().__init__()
        self.commitment = config.commitment
        self.entropy = config.entropy
        self.spherical = config.spherical
        lfq = library.LFQ(codebook_size=config.vocab_size, spherical=config.spherical)
        # Functions of the settings, hence in no file.
        self.register_buffer("places_Z", lfq.mask, persistent=False)
        self.register_buffer("codebook_VZ", lfq.maybe_l2norm(lfq.codebook), persistent=False)

    def forward(self, latents_BNZ: Tensor, /) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize one batch."""
        with torch.autocast(latents_BNZ.device.type, enabled=False):
            latents_BNZ = latents_BNZ.float()
            if self.spherical:
                latents_BNZ = on_sphere(latents_BNZ)
            codes_BN = self.quantize(latents_BNZ)
            quantized_BNZ = self.lookup(codes_BN)
            loss = self.commitment * mse_loss(latents_BNZ, quantized_BNZ)
            if self.training:
                loss = loss + self.entropy * self.entropy_loss(latents_BNZ)
                quantized_BNZ = latents_BNZ + (quantized_BNZ - latents_BNZ).detach()
        return quantized_BNZ, codes_BN, loss

    @torch.no_grad()
    def quantize(self, latents_BNZ: Tensor, /) -> Tensor:
        """Return the code whose bits are the signs; zero counts as negative."""
        codes_BN: Tensor = reduce((latents_BNZ > 0) * self.places_Z, "B N Z -> B N", "sum")
        return codes_BN

    @property
    def codebook(self) -> Tensor:
        """The codebook vectors codebook_VZ, float32, all of them corners of one cube."""
        return self.codebook_VZ.float()

    def entropy_loss(self, latents_BNZ: Tensor, /) -> Tensor:
        """Return the mean entropy of a latent's code less that of the batch's, in nats.

        A latent chooses among all codes by a softmax over negative squared distances, which is a
        sigmoid of every channel by itself.
        """
        corner = self.codebook_VZ[-1, 0].float()
        logits_NZ = _CORNER_LOGIT / corner * rearrange(latents_BNZ, "B N Z -> (B N) Z")
        of_a_latent = (softplus(logits_NZ) - logits_NZ * logits_NZ.sigmoid()).sum(-1).mean()
        of_the_batch = torch.stack(
            [_entropy(bits) for bits in torch.split(logits_NZ, _GROUP_BITS, -1)]
        )
        return of_a_latent - of_the_batch.sum()


def _entropy(logits_NZ: Tensor, /) -> Tensor:
    """Return the entropy of the mean, over all latents of all processes, of bits' joint choice."""
    bits = torch.arange(logits_NZ.shape[-1], device=logits_NZ.device)
    corners_VZ = torch.arange(2 ** len(bits), device=logits_NZ.device)[:, None] >> bits & 1
    probs_V = (logits_NZ @ corners_VZ.mT.to(logits_NZ)).softmax(-1).mean(0)
    if num_processes() > 1:
        from torch.distributed.nn.functional import all_reduce  # absent where torch has no gloo

        probs_V = all_reduce(probs_V) / num_processes()  # type: ignore[no-untyped-call]  # torch's
    # A code that no latent would choose has probability 0, whose logarithm has no gradient.
    return -(probs_V * probs_V.clamp(min=_LEAST_PROBABILITY).log()).sum()
