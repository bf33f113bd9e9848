"""Logits and keyed noise -> codes. Pure.

    logits_BsV, noise_BsV  ->  codes_Bs

Sampling is an argmax: log-probabilities plus Gumbel noise, which draws exactly from the
distribution (arXiv:1611.01144, section 2). The noise is a function of (seed, frame, cell, level,
code) and of nothing else, so the same seed and actions give the same codes whatever the batch, the
order of decoding or the device count.
"""

import math

import torch
from torch import Tensor

from .sampling_config import SamplingConfig

_LEAST_TEMPERATURE = 1e-6
"""Below it the likeliest code wins anyway, and dividing by it would leave float32."""


def keyed_gumbel(
    seeds_B: Tensor, frame: int, cells: slice, vocab_size: int, /, *, level: int = 0
) -> Tensor:
    """Return noise_BsV, standard Gumbel, float32.

    A counter-based generator: seed, frame, cell, level and code are mixed in, one after the other,
    by the finaliser of splitmix64 (Stafford's variant 13), on int64 lanes that wrap around. Level 0
    is not mixed in: the first level's noise is that of codes without levels.

    Args:
        seeds_B: int64, one a row; any value.
        frame: index of the latent frame in the video.
        cells: which cells of the frame.
        vocab_size: number of codes, V.
        level: which of a cell's codes.
    """
    device = seeds_B.device
    cells_s = torch.arange(cells.start, cells.stop, device=device)
    codes_V = torch.arange(vocab_size, device=device)
    # _mix(0) is 0, so every count starts elsewhere than at 0.
    key_B = _mix(seeds_B ^ _WEYL)
    key_B = _mix(key_B ^ _mix(torch.tensor(frame + 1, device=device)))
    key_Bs = _mix(key_B[:, None] ^ _mix(cells_s + (1 << 32)))
    if level:
        key_Bs = _mix(key_Bs ^ _mix(torch.tensor(level + (1 << 40), device=device)))
    bits_BsV = _mix(key_Bs[..., None] ^ _mix(codes_V + (1 << 48)))
    # 24 bits and a half: never 0. In the upper half float32 rounds to whole ones, and the last
    # would be 1, its noise infinite.
    noise_BsV = (bits_BsV & 0xFFFFFF).float().add_(0.5).mul_(2.0**-24).clamp_(max=1 - 2.0**-24)
    return noise_BsV.log_().neg_().log_().neg_()


def sample_codes(
    logits_BsV: Tensor, noise_BsV: Tensor | None, sampling: SamplingConfig, /
) -> Tensor:
    """Return codes_Bs, int64 in [0, V).

    Args:
        logits_BsV: unnormalised log-probabilities, any float dtype.
        noise_BsV: standard Gumbel noise from `keyed_gumbel`; temperature 0 needs none.
        sampling: temperature 0 takes the likeliest code and ignores the noise. Guidance and the
            decoder are no matter of one draw.
    """
    if sampling.temperature == 0:
        return logits_BsV.argmax(-1)
    assert noise_BsV is not None
    logits_BsV = logits_BsV.float()
    # Log-probabilities up to a constant: the likeliest code has 0, so that nothing can overflow.
    logits_BsV = logits_BsV - logits_BsV.amax(-1, keepdim=True)
    logits_BsV = logits_BsV / max(sampling.temperature, _LEAST_TEMPERATURE)
    scores_BsV = logits_BsV + noise_BsV
    if sampling.min_p > 0:
        scores_BsV = scores_BsV.masked_fill(logits_BsV < math.log(sampling.min_p), -torch.inf)
    if sampling.top_p < 1:
        scores_BsV = scores_BsV.masked_fill(~_nucleus(logits_BsV, sampling.top_p), -torch.inf)
    if 0 < sampling.top_k < logits_BsV.shape[-1]:
        least_Bs1 = logits_BsV.topk(sampling.top_k).values[..., -1:]
        scores_BsV = scores_BsV.masked_fill(logits_BsV < least_Bs1, -torch.inf)
    return scores_BsV.argmax(-1)


def _nucleus(logits_BsV: Tensor, top_p: float) -> Tensor:
    """Return True for the fewest codes whose probabilities sum to at least top_p."""
    probs, order = logits_BsV.softmax(-1).sort(stable=True, dim=-1, descending=True)
    # A code is dropped when the codes *above* it already reach top_p. The likeliest has none above
    # it and survives, even where float32 takes top_p for 0.
    above = probs.cumsum(-1) - probs
    keep = (above < top_p) | (above == 0)
    return torch.zeros_like(keep).scatter(-1, order, keep)


_WEYL = 0x1E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)


def _mix(lanes: Tensor) -> Tensor:
    """Return splitmix64's finaliser of every lane; a bijection of int64."""
    # torch shifts signs in; masks make the shifts logical.
    lanes = (lanes >> 30).bitwise_and_(0x3FFFFFFFF).bitwise_xor_(lanes).mul_(_FIRST)
    lanes = (lanes >> 27).bitwise_and_(0x1FFFFFFFFF).bitwise_xor_(lanes).mul_(_SECOND)
    return (lanes >> 31).bitwise_and_(0x1FFFFFFFF).bitwise_xor_(lanes)
