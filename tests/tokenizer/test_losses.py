"""Promises of losses.py: moving pixels weigh more, and the weight keeps the scale of the loss."""

import pytest
import torch
from tokenizer.toys import random_frames
from worldloom.tokenizer.losses import motion_weight, reconstruction_loss
from worldloom.tokenizer.metrics import clip_median, moving_pixels


def ball() -> torch.Tensor:
    """A pixel that visits a place of its own in each of five frames."""
    frames_BTHWC = torch.full((1, 5, 8, 8, 3), 90, dtype=torch.uint8)
    for t in range(5):
        frames_BTHWC[0, t, 2, t, 1] = 200
    return frames_BTHWC


@pytest.mark.parametrize("frames_BTHWC", [ball(), random_frames(3, 4, 8, 6)])
@pytest.mark.parametrize("extra", [0.0, 20.0])
def test_the_mean_weight_is_1(frames_BTHWC, extra):
    weight_B1THW = motion_weight(frames_BTHWC, extra=extra)
    assert weight_B1THW.shape == (len(frames_BTHWC), 1, *frames_BTHWC.shape[1:4])
    assert weight_B1THW.mean().item() == pytest.approx(1, abs=1e-6)


def test_a_moving_pixel_weighs_1_plus_extra_times_a_still_one():
    weight_B1THW = motion_weight(ball(), extra=20.0)
    still, moving = weight_B1THW[0, 0, 0, 0, 0], weight_B1THW[0, 0, 3, 2, 3]
    assert (moving / still).item() == pytest.approx(21)
    raised = weight_B1THW[:, 0] > 1
    assert torch.equal(raised, moving_pixels(ball()))
    assert raised.sum() == 5


def test_a_still_clip_weighs_the_same_everywhere():
    frames_BTHWC = random_frames(1, 1, 8, 8).expand(1, 5, 8, 8, 3)
    assert torch.equal(motion_weight(frames_BTHWC, extra=20.0), torch.ones(1, 1, 5, 8, 8))


@pytest.mark.parametrize("num_frames", [1, 2, 3, 7, 8, 16, 17])
def test_the_median_of_a_clip_is_torch_s_at_any_length(num_frames):
    frames_BTHWC = random_frames(2, num_frames, 5, 4, seed=num_frames)
    assert torch.equal(clip_median(frames_BTHWC), frames_BTHWC.median(dim=1).values)


def test_what_moves_is_further_than_a_tenth_of_the_range_from_the_median():
    frames_BTHWC = torch.full((1, 3, 1, 4, 3), 100, dtype=torch.uint8)
    frames_BTHWC[0, 1, 0, :, 0] = torch.tensor([125, 126, 75, 74])
    assert moving_pixels(frames_BTHWC)[0, 1, 0].tolist() == [False, True, False, True]
    float_rule = (frames_BTHWC.float() / 255 - 100 / 255).abs() > 0.1
    assert torch.equal(moving_pixels(frames_BTHWC), float_rule.any(-1))


def test_the_loss_is_the_weighted_mean_of_half_l1_plus_l2():
    true, recon = torch.zeros(1, 3, 1, 1, 2), torch.zeros(1, 3, 1, 1, 2)
    recon[..., 1] = 2.0
    weight = torch.tensor([0.5, 1.5]).reshape(1, 1, 1, 1, 2)
    loss = reconstruction_loss(true, recon, weight)
    assert loss.item() == pytest.approx((0 + 1.5 * (0.5 * 2 + 4)) / 2)


def test_the_loss_of_a_bfloat16_reconstruction_is_taken_in_float32():
    true, weight = torch.full((1, 3, 1, 1, 2), 1.0), torch.ones(1, 1, 1, 1, 2)
    recon = torch.full((1, 3, 1, 1, 2), 0.5).bfloat16()
    assert reconstruction_loss(true, recon, weight).dtype == torch.float32
