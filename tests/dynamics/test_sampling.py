"""Promises of sampling.py: the right distribution, the right codes, and noise that is keyed."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from worldloom.common import ConfigError
from worldloom.dynamics import SamplingConfig, sample_codes
from worldloom.dynamics.sampling import keyed_gumbel

EVERYTHING = SamplingConfig(temperature=1.0, min_p=0.0, top_p=1.0)
CHI2_7_DEGREES = 29.9
"""What a chi-square of 7 degrees of freedom exceeds once in 10,000 times."""


def kept_codes(logits_V: torch.Tensor, sampling: SamplingConfig) -> list[bool]:
    """Which codes can be drawn: each is given noise that makes it win unless it is dropped."""
    size = len(logits_V)
    noise_BsV = torch.zeros(1, size, size)
    noise_BsV[0].fill_diagonal_(1e6)
    drawn_s = sample_codes(logits_V.expand(1, size, size), noise_BsV, sampling)[0]
    return (drawn_s == torch.arange(size)).tolist()


def reference(logits_V: np.ndarray, sampling: SamplingConfig) -> list[bool]:
    """The definitions, in float64, one code at a time."""
    scaled = logits_V / sampling.temperature
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    keep = []
    for code in range(len(probs)):
        above = probs[probs > probs[code]]
        among = not sampling.top_k or len(above) < sampling.top_k
        likely = probs[code] >= sampling.min_p * probs.max()
        keep.append(bool(likely and above.sum() < sampling.top_p and among))
    return keep


@given(
    order=st.permutations(range(9)),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.1, 0.5]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    top_k=st.integers(0, 10),
)
def test_what_is_kept_is_what_the_definitions_say(order, temperature, min_p, top_p, top_k):
    sampling = SamplingConfig(temperature=temperature, min_p=min_p, top_p=top_p, top_k=top_k)
    logits_V = np.array(order) * 0.73  # far enough apart that rounding decides nothing
    assert kept_codes(torch.tensor(logits_V), sampling) == reference(logits_V, sampling)


def test_the_likeliest_code_is_never_dropped():
    for setting in ({"min_p": 1.0}, {"min_p": 0.0, "top_p": 1e-9}, {"min_p": 0.0, "top_k": 1}):
        sampling = SamplingConfig(**setting)
        assert kept_codes(torch.tensor([0.0, 3.0, 1.0]), sampling) == [False, True, False]


def test_codes_that_tie_with_the_last_of_top_k_stay():
    logits_V = torch.tensor([1.0, 2.0, 1.0, 0.0])
    sampling = SamplingConfig(min_p=0.0, top_k=2)
    assert kept_codes(logits_V, sampling) == [True, True, True, False]


def test_temperature_0_takes_the_likeliest_code_whatever_the_noise():
    logits_BsV = torch.randn(4, 5, 9, generator=torch.Generator().manual_seed(0))
    noise_BsV = 1e6 * torch.randn(4, 5, 9, generator=torch.Generator().manual_seed(1))
    codes_Bs = sample_codes(logits_BsV, noise_BsV, SamplingConfig(temperature=0.0))
    assert torch.equal(codes_Bs, logits_BsV.argmax(-1))


@pytest.mark.parametrize("over", ["seeds", "frames", "cells", "levels"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_draws_follow_the_softmax_over_seeds_frames_and_cells(over, temperature):
    logits_V = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -2.0, 1.5, 0.2])
    number = 2_000 if over in ("frames", "levels") else 20_000
    if over == "seeds":
        noise_NV = keyed_gumbel(torch.arange(number), 5, slice(2, 3), 8)[:, 0]
    elif over == "cells":
        noise_NV = keyed_gumbel(torch.tensor([11]), 5, slice(0, number), 8)[0]
    else:
        seed = torch.tensor([11])
        places = [(n, 0) if over == "frames" else (5, n) for n in range(number)]
        noise_NV = torch.cat(
            [keyed_gumbel(seed, frame, slice(3, 4), 8, level=q)[0] for frame, q in places]
        )
    sampling = SamplingConfig(temperature=temperature, min_p=0.0)
    drawn_N = sample_codes(logits_V.expand(number, 8), noise_NV, sampling)
    found = torch.bincount(drawn_N, minlength=8)
    expected = number * (logits_V / temperature).softmax(-1)
    assert ((found - expected) ** 2 / expected).sum() < CHI2_7_DEGREES


def test_the_noise_of_neighbours_is_uncorrelated():
    noise_fBsV = torch.stack(
        [keyed_gumbel(torch.arange(-8, 8), frame, slice(0, 16), 16) for frame in range(16)]
    )
    noise_qBsV = torch.stack(
        [keyed_gumbel(torch.arange(-8, 8), 3, slice(0, 16), 16, level=q) for q in range(16)]
    )
    for noise in (noise_fBsV, noise_qBsV):
        _assert_uncorrelated(noise)


def _assert_uncorrelated(noise: torch.Tensor) -> None:
    """Refuse a mean of the ranks, or a correlation along an axis, of over four sigma."""
    uniform = torch.exp(-torch.exp(-noise.double())) - 0.5
    assert abs(uniform.mean()) < 4 * 12**-0.5 / uniform.numel() ** 0.5
    for axis in range(4):
        for lag in (1, 2, 8):
            first = uniform.narrow(axis, 0, 16 - lag)
            other = uniform.narrow(axis, lag, 16 - lag)
            correlation = 12 * (first * other).mean()
            assert abs(correlation) < 4 / first.numel() ** 0.5, (axis, lag)


def test_noise_is_a_function_of_seed_frame_cell_and_code_and_of_nothing_else():
    seeds_B = torch.tensor([5, -3, 2**62, 0])
    noise_BsV = keyed_gumbel(seeds_B, 7, slice(0, 6), 20)
    for row, seed in enumerate(seeds_B):
        alone = keyed_gumbel(seed[None], 7, slice(2, 4), 11)[0]
        assert torch.equal(alone, noise_BsV[row, 2:4, :11])
    assert torch.unique(noise_BsV.view(-1, 20), dim=0).shape[0] == 24
    assert not torch.equal(noise_BsV, keyed_gumbel(seeds_B, 8, slice(0, 6), 20))
    assert torch.equal(noise_BsV, keyed_gumbel(seeds_B, 7, slice(0, 6), 20, level=0))
    deep_BsV = keyed_gumbel(seeds_B, 7, slice(0, 6), 20, level=2)
    assert torch.equal(
        keyed_gumbel(seeds_B[1:2], 7, slice(2, 4), 11, level=2), deep_BsV[1:2, 2:4, :11]
    )
    assert not torch.equal(noise_BsV, deep_BsV)
    # A cell's level and another cell's first are no more alike than two cells.
    both = torch.cat([noise_BsV, deep_BsV, keyed_gumbel(seeds_B, 7, slice(0, 6), 20, level=1)])
    assert torch.unique(both.view(-1, 20), dim=0).shape[0] == 3 * 24
    torch.manual_seed(123)
    assert torch.equal(noise_BsV, keyed_gumbel(seeds_B, 7, slice(0, 6), 20))


@pytest.mark.parametrize("level", [0, 1])
def test_the_noise_is_the_recorded_one(level):
    """Sessions are replayed from their seeds: another generator would show another world."""
    noise_BsV = keyed_gumbel(torch.tensor([0, 42]), 3, slice(1, 3), 2, level=level)
    assert noise_BsV.flatten().tolist() == pytest.approx(RECORDED[level], abs=1e-5)


RECORDED = (
    [2.965595, 1.838133, 1.5224, 0.735171, 0.484398, 1.768866, 0.90668, -0.118033],
    [1.04356, -0.117624, -0.75266, -0.877361, 0.274048, -0.37985, 3.05955, 3.63619],
)
"""Of level 0, as before there were levels, and of level 1."""


def test_the_largest_number_is_finite_too():
    noise_BsV = keyed_gumbel(torch.tensor([61]), 0, slice(6, 7), 1024)
    assert noise_BsV[0, 0, 313].item() == pytest.approx(24 * np.log(2), abs=0.05)
    assert noise_BsV.argmax() == 313


def test_noise_is_finite_over_millions_of_draws():
    noise_BsV = keyed_gumbel(torch.arange(64), 1, slice(0, 64), 1024)
    assert noise_BsV.isfinite().all()
    assert noise_BsV.mean().item() == pytest.approx(0.57722, abs=0.003)
    assert noise_BsV.var().item() == pytest.approx(np.pi**2 / 6, rel=0.01)


@given(
    logits=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=6),
    temperature=st.sampled_from([1e-320, 1e-30, 1e-3, 1.0, 1e3, 1e30]),
    min_p=st.sampled_from([0.0, 1e-300, 0.1, 1.0]),
    top_p=st.sampled_from([1e-300, 0.5, 1.0]),
)
def test_no_logits_and_no_settings_lead_to_a_code_that_is_none(logits, temperature, min_p, top_p):
    logits_BsV = torch.tensor(logits)[None, None]
    noise_BsV = keyed_gumbel(torch.tensor([1]), 0, slice(0, 1), len(logits))
    sampling = SamplingConfig(temperature=temperature, min_p=min_p, top_p=top_p)
    (code,) = sample_codes(logits_BsV, noise_BsV, sampling).flatten().tolist()
    assert 0 <= code < len(logits)
    if min_p == 1.0 or top_p == 1e-300:
        # Closer ones have, in float32, the same probability.
        assert max(logits) - logits[code] <= 1e-5 * max(temperature, 1e-6)


def test_bfloat16_logits_are_drawn_from_in_float32():
    logits_BsV = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    noise_BsV = keyed_gumbel(torch.tensor([0, 1]), 0, slice(0, 3), 50)
    codes_Bs = sample_codes(logits_BsV, noise_BsV, EVERYTHING)
    assert torch.equal(codes_Bs, sample_codes(logits_BsV.float(), noise_BsV, EVERYTHING))


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": -0.1}, {"temperature": float("inf")}, {"temperature": float("nan")},
        {"min_p": -0.1}, {"min_p": 1.1}, {"min_p": float("nan")},
        {"top_p": 0.0}, {"top_p": 1.1}, {"top_p": float("nan")},
        {"top_k": -1}, {"top_k": 2.5}, {"top_k": float("nan")}, {"top_k": float("inf")},
        {"refinements": 0}, {"refinements": 1.5}, {"refinements": float("inf")},
        {"guidance_scale": -0.5}, {"guidance_scale": float("inf")},
        {"guidance_scale": float("nan")},
        {"parallel_keep_frac": -0.1}, {"parallel_keep_frac": 1.1},
        {"parallel_keep_frac": float("nan")}, {"decoder": "fast"},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused_by_name(setting):
    with pytest.raises(ConfigError, match=f"sampling: {next(iter(setting))} is"):
        SamplingConfig(**setting)


def test_whole_numbers_are_whole_however_a_file_says_them():
    sampling = SamplingConfig(top_k=3.0, refinements=2.0)
    assert (type(sampling.top_k), type(sampling.refinements)) == (int, int)
    assert sampling == SamplingConfig(top_k=3, refinements=2)
