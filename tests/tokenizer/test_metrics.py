"""Promises of metrics.py: closed forms, an independent reference, and what is refused."""

import math

import numpy as np
import pytest
import torch
from worldloom.common import ShapeError
from worldloom.tokenizer.metrics import (
    LIMIT_DB,
    decibels,
    moving_pixels,
    moving_psnr,
    psnr,
    squared_error,
    ssim,
    usage,
)


def frames(*shape, seed=0):
    return torch.randint(
        0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def test_psnr_of_a_known_difference_is_its_closed_form():
    true = torch.full((2, 3, 12, 12, 3), 100, dtype=torch.uint8)
    assert psnr(true, true + 25) == pytest.approx(20 * math.log10(255 / 25), abs=1e-5)


def test_a_difference_counts_the_same_in_both_directions_and_does_not_wrap():
    dark, light = torch.zeros((1, 1, 4, 4, 3)).byte(), torch.full((1, 1, 4, 4, 3), 255).byte()
    assert psnr(dark, light) == psnr(light, dark) == pytest.approx(0, abs=1e-6)


def test_equal_frames_have_the_limit_not_infinity():
    true = frames(1, 2, 12, 12, 3)
    assert psnr(true, true) == LIMIT_DB
    assert decibels(0.0) == LIMIT_DB


def test_psnr_is_of_the_pooled_error_not_a_mean_of_decibels():
    true = torch.zeros((2, 1, 4, 4, 3), dtype=torch.uint8)
    other = true.clone()
    other[1] = 51  # a fifth of the range
    assert psnr(true, other) == pytest.approx(-10 * math.log10(0.04 / 2), abs=1e-5)


def test_squared_errors_pool_over_batches_to_the_same_psnr():
    true, other = frames(6, 4, 12, 12, 3), frames(6, 4, 12, 12, 3, seed=1)
    parts = [squared_error(true[i : i + 2], other[i : i + 2]).double() for i in (0, 2, 4)]
    pooled = sum(float(part.sum()) for part in parts) / sum(part.numel() for part in parts)
    assert decibels(pooled) == pytest.approx(psnr(true, other), abs=1e-6)


def moving_dot():
    """A grey clip in which one pixel a frame is light: frame t at column t."""
    true = torch.full((1, 5, 12, 12, 3), 100, dtype=torch.uint8)
    for t in range(5):
        true[0, t, 6, t] = 200
    return true


def test_moving_pixels_are_those_far_from_their_clips_median_in_any_channel():
    true = moving_dot()
    true[0, 2, 0, 0, 1] = 100 + 27  # over a tenth of the range, in one channel
    true[0, 2, 0, 1, 1] = 100 + 25  # under it
    moving = moving_pixels(true)
    wanted = {(t, 6, t) for t in range(5)} | {(2, 0, 0)}
    assert {tuple(place) for place in moving[0].nonzero().tolist()} == wanted


def test_moving_psnr_sees_only_what_moves():
    true = moving_dot()
    erased = torch.full_like(true, 100)
    assert moving_psnr(true, erased) == pytest.approx(20 * math.log10(255 / 100), abs=1e-5)
    assert psnr(true, erased) > 28  # and this is why it is measured
    noisy = true.clone()
    noisy[:, :, 0] = 0
    assert moving_psnr(true, noisy) == LIMIT_DB


def test_moving_psnr_of_a_still_clip_is_the_limit():
    still = torch.full((1, 4, 12, 12, 3), 9, dtype=torch.uint8)
    assert moving_psnr(still, still + 50) == LIMIT_DB


@pytest.mark.parametrize("shape", [(1, 2, 16, 16, 3), (2, 3, 33, 20, 3), (1, 1, 11, 11, 3)])
def test_ssim_agrees_with_scikit_image(shape):
    reference = pytest.importorskip("skimage.metrics", reason="scikit-image is not installed")
    true = frames(*shape)
    noise = frames(*shape, seed=1).float() - 128
    other = (true.float() * 0.8 + noise * 0.2).clamp(0, 255).byte()
    wanted = [
        reference.structural_similarity(
            a.numpy(),
            b.numpy(),
            channel_axis=-1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=255,
        )
        for a, b in zip(true.flatten(0, 1), other.flatten(0, 1), strict=True)
    ]
    assert ssim(true, other) == pytest.approx(np.mean(wanted), abs=1e-9)


def test_ssim_of_two_flat_frames_is_its_closed_form():
    a, b = 51 / 255, 102 / 255
    first = torch.full((1, 1, 16, 16, 3), 51, dtype=torch.uint8)
    wanted = (2 * a * b + 1e-4) / (a * a + b * b + 1e-4)
    assert ssim(first, first * 2) == pytest.approx(wanted, abs=1e-9)
    assert ssim(first, first) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("metric", [psnr, moving_psnr, ssim, squared_error])
def test_frames_of_other_shapes_or_dtypes_are_refused(metric):
    with pytest.raises(ShapeError, match="shapes"):
        metric(frames(1, 2, 12, 12, 3), frames(1, 1, 12, 12, 3))
    with pytest.raises(ShapeError, match="uint8"):
        metric(frames(1, 2, 12, 12, 3), frames(1, 2, 12, 12, 3).float())


def test_ssim_of_frames_smaller_than_its_window_is_refused():
    with pytest.raises(ShapeError, match="11 x 11"):
        ssim(frames(1, 1, 8, 16, 3), frames(1, 1, 8, 16, 3))


def test_usage_of_known_counts_is_its_closed_form():
    codes = torch.tensor([[0, 0, 0, 0], [3, 3, 5, 5]])
    used, perplexity = usage(codes, 8)
    assert used == 3 / 8
    assert perplexity == pytest.approx(math.exp(0.5 * math.log(2) + 0.5 * math.log(4)))
    assert usage(torch.arange(8).repeat(5), 8) == (1.0, pytest.approx(8))
    assert usage(torch.zeros(9, dtype=torch.int64), 8) == (1 / 8, pytest.approx(1))
