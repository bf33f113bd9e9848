"""Logits and keyed noise -> codes. Pure.

    logits_BsV, noise_BsV  ->  codes_Bs

Sampling is an argmax: log-probabilities plus Gumbel noise, which draws exactly from the
distribution (arXiv:1611.01144, section 2). The noise is a function of (seed, frame, cell, code)
and of nothing else, so the same seed and actions give the same codes whatever the batch, the
order of decoding or the device count.
"""

import torch
from torch import Tensor

from .config import SamplingConfig

_MASK = 0xFFFFFFFF


def keyed_gumbel(seeds_B: Tensor, frame: int, cells: slice, vocab_size: int, /) -> Tensor:
    """Return noise_BsV, standard Gumbel, float32.

    A counter-based generator: the counter (frame, cell, code) is mixed with the seed by three
    rounds of murmur3's finaliser on 32-bit lanes, held in int64.

    Args:
        seeds_B: int64, one a row; any value.
        frame: index of the latent frame in the video.
        cells: which cells of the frame.
        vocab_size: number of codes, V.
    """
    device = seeds_B.device
    cells_s = torch.arange(cells.start, cells.stop, device=device)
    codes_V = torch.arange(vocab_size, device=device)
    key_B = _mix(_mix(seeds_B & _MASK) ^ ((seeds_B >> 32) & _MASK))
    key_B = _mix(key_B ^ _mix(torch.as_tensor(frame & _MASK, device=device)))
    key_Bs = _mix(key_B[:, None] ^ _mix(cells_s + 0x9E3779B9))
    bits_BsV = _mix(key_Bs[..., None] ^ _mix(codes_V + 0x85EBCA6B))
    # 24 bits, half-way between neighbours: never 0 or 1, exact in float32.
    uniform = ((bits_BsV >> 8).float() + 0.5) * 2.0**-24
    return -torch.log(-torch.log(uniform))


def sample_codes(logits_BsV: Tensor, noise_BsV: Tensor, sampling: SamplingConfig, /) -> Tensor:
    """Return codes_Bs, int64 in [0, V).

    Args:
        logits_BsV: unnormalised log-probabilities, any float dtype.
        noise_BsV: standard Gumbel noise from `keyed_gumbel`.
        sampling: temperature 0 takes the likeliest code and ignores the noise.
    """
    logits_BsV = logits_BsV.float()
    if sampling.temperature == 0:
        return logits_BsV.argmax(-1)
    logits_BsV = logits_BsV / sampling.temperature
    keep = torch.ones_like(logits_BsV, dtype=torch.bool)
    if sampling.min_p > 0:
        best = logits_BsV.amax(-1, keepdim=True)
        keep &= logits_BsV >= best + torch.log(torch.tensor(sampling.min_p))
    if sampling.top_p < 1:
        keep &= _nucleus(logits_BsV, sampling.top_p)
    return (logits_BsV + noise_BsV).masked_fill(~keep, -torch.inf).argmax(-1)


def _nucleus(logits_BsV: Tensor, top_p: float) -> Tensor:
    """Return True for the fewest codes whose probabilities sum to at least top_p."""
    probs, order = logits_BsV.softmax(-1).sort(-1, descending=True)
    # A code is dropped when the codes *above* it already reach top_p, so the likeliest survives.
    above = probs.cumsum(-1) - probs
    return torch.zeros_like(above, dtype=torch.bool).scatter(-1, order, above < top_p)


def _mix(lanes: Tensor) -> Tensor:
    """Return murmur3's 32-bit finaliser of every lane (int64 holding 32 bits)."""
    lanes = lanes & _MASK
    lanes = ((lanes ^ (lanes >> 16)) * 0x85EBCA6B) & _MASK
    lanes = ((lanes ^ (lanes >> 13)) * 0xC2B2AE35) & _MASK
    return lanes ^ (lanes >> 16)
