"""Promises of losses.py and discriminator.py: what moves weighs more, and what each term sees."""

import pytest
import torch
from tokenizer.toys import random_frames
from worldloom.common import stream
from worldloom.tokenizer import PatchDiscriminator
from worldloom.tokenizer.losses import (
    adversarial_loss,
    gradient_loss,
    hard_pixel_weight,
    hinge_loss,
    multiscale_loss,
    pixel_weight,
    reconstruction_loss,
)
from worldloom.tokenizer.metrics import clip_median, moving_pixels


def ball() -> torch.Tensor:
    """A pixel that visits a place of its own in each of five frames."""
    frames_BTHWC = torch.full((1, 5, 8, 8, 3), 90, dtype=torch.uint8)
    for t in range(5):
        frames_BTHWC[0, t, 2, t, 1] = 200
    return frames_BTHWC


def test_a_moving_pixel_weighs_1_plus_motion_and_a_still_one_1():
    weight_B1THW = pixel_weight(ball(), motion=20.0)
    assert weight_B1THW.shape == (1, 1, 5, 8, 8)
    assert weight_B1THW.unique().tolist() == [1, 21]
    raised = weight_B1THW[:, 0] > 1
    assert torch.equal(raised, moving_pixels(ball()))
    assert raised.sum() == 5
    assert torch.equal(pixel_weight(ball(), motion=0.0), torch.ones(1, 1, 5, 8, 8))


def test_a_still_clip_weighs_the_same_everywhere():
    frames_BTHWC = random_frames(1, 1, 8, 8).expand(1, 5, 8, 8, 3)
    assert torch.equal(pixel_weight(frames_BTHWC, motion=20.0), torch.ones(1, 1, 5, 8, 8))


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


def test_a_loss_over_parts_by_their_clips_is_that_of_the_whole():
    true, recon = torch.randn(2, 5, 3, 4, 8, 9, generator=stream(0, "videos"))
    weight = 1 + torch.rand(5, 1, 4, 8, 9, generator=stream(0, "weights"))
    for loss in (reconstruction_loss, gradient_loss, multiscale_loss):
        whole = loss(true, recon, weight)
        parts = [
            loss(true[p], recon[p], weight[p]) * n / 5 for p, n in ((slice(2), 2), (slice(2, 5), 3))
        ]
        assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-6)


def test_a_pixel_twice_as_wrong_weighs_twice_at_half_power_and_no_gradient_passes():
    true = torch.zeros(1, 3, 1, 1, 3)
    recon = torch.tensor([0.0, 0.25, 0.5]).expand(1, 3, 1, 1, 3).clone().requires_grad_()
    weight_B1THW = hard_pixel_weight(true, recon, power=0.5)
    assert weight_B1THW.shape == (1, 1, 1, 1, 3)
    assert weight_B1THW.flatten().tolist() == pytest.approx([0, 0.25, 0.5])
    assert not weight_B1THW.requires_grad
    squared = hard_pixel_weight(true, recon.bfloat16(), power=1.0)
    assert squared.dtype == torch.float32
    assert squared.flatten().tolist() == pytest.approx([0, 0.0625, 0.25])


def test_the_gradient_loss_sees_a_wrong_edge_and_not_a_wrong_brightness():
    true = torch.zeros(1, 3, 1, 4, 4)
    weight = torch.ones(1, 1, 1, 4, 4)
    assert gradient_loss(true, true + 0.5, weight).item() == 0
    edge = true.clone()
    edge[..., 2:] = 1.0  # one wrong difference across in each of 4 rows of 3
    assert gradient_loss(true, edge, weight).item() == pytest.approx(1 / 3)
    assert gradient_loss(true, edge.mT, weight).item() == pytest.approx(1 / 3)
    weight[..., 2] = 4.0  # a difference counts as its second pixel
    assert gradient_loss(true, edge, weight).item() == pytest.approx(4 / 3)


def test_the_multiscale_loss_sees_a_wrong_brightness_and_not_a_wrong_texture():
    true = torch.zeros(1, 3, 2, 8, 8)
    weight = torch.ones(1, 1, 2, 8, 8)
    checkers = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1
    assert multiscale_loss(true, true + checkers, weight).item() == 0
    assert multiscale_loss(true, true + 0.5, weight).item() == pytest.approx(0.5 * 0.5 + 0.25)
    recon = true.clone()
    recon[..., :4, :4] = 1.0  # a quarter of the pixels at either size
    weight[..., :4, :4] = 3.0
    assert multiscale_loss(true, recon, weight).item() == pytest.approx(3 * 1.5 / 4)


def test_the_two_players_want_opposite_verdicts_and_the_hinge_asks_for_no_more_than_1():
    sure = torch.tensor([1.0, 3.0])
    assert hinge_loss(sure, -sure).item() == 0
    assert hinge_loss(-sure, sure).item() == pytest.approx(0.5 * (3 + 3))
    assert adversarial_loss(sure).item() == -2
    made = torch.zeros(4, requires_grad=True)
    adversarial_loss(made).backward()
    assert (made.grad < 0).all()  # to lower its loss, the tokenizer raises the verdicts
    made.grad = None
    hinge_loss(torch.zeros(4), made).backward()
    assert (made.grad > 0).all()


def test_a_discriminator_judges_every_frame_by_itself():
    critic = PatchDiscriminator(8)
    video_BCTHW = torch.rand(2, 3, 3, 16, 24, generator=stream(0, "video")) * 2 - 1
    verdicts = critic(video_BCTHW).reshape(2, 3, 4, 6)
    alone = critic(video_BCTHW[1:, :, 2:]).reshape(4, 6)
    torch.testing.assert_close(verdicts[1, 2], alone)
    assert verdicts.std() > 0
