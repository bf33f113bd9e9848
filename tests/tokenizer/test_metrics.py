"""Promises of metrics.py: closed forms, an independent reference, and what is refused."""

import math

import numpy as np
import pytest
import torch
from worldloom.common import CodeSpec, FormatError, ShapeError
from worldloom.tokenizer.metrics import (
    LIMIT_DB,
    clip_median,
    count_codes,
    decibels,
    moving_pixels,
    moving_psnr,
    psnr,
    small_object_masks,
    small_objects,
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


@pytest.mark.parametrize("metric", [psnr, moving_psnr, ssim, squared_error, small_objects])
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


def ball_and_wall():
    """Eight frames of a ball of 2 x 2 and of a wall 12 high and 6 wide, both on the way."""
    true = torch.full((1, 8, 40, 40, 3), 30, dtype=torch.uint8)
    for t in range(8):
        true[0, t, 4:6, 4 * t : 4 * t + 2] = 200
        true[0, t, 20:32, 4 * t : 4 * t + 6] = 90
    return true


def background(true):
    return clip_median(true).unsqueeze(1).expand_as(true).contiguous()


def test_a_perfect_reconstruction_keeps_every_small_thing_and_invents_none():
    true = ball_and_wall()
    counted = small_objects(true, true)
    assert counted.small_pixels == counted.recalled_pixels == 8 * 4
    assert counted.numbers() == {
        "recall": 1, "frame_recall": 1, "false_share": 0, "false_pixels_per_frame": 0
    }  # fmt: skip


def test_of_the_background_alone_nothing_small_is_recalled():
    true = ball_and_wall()
    numbers = small_objects(true, background(true)).numbers()
    assert (numbers["recall"], numbers["frame_recall"], numbers["false_share"]) == (0, 0, 0)


def test_a_ball_in_the_wrong_place_is_lost_once_and_false_once():
    true = ball_and_wall()
    other = true.clone()
    other[:, :, 4:6] = 30
    other[:, :, 10:12] = true[:, :, 4:6]
    counted = small_objects(true, other)
    assert (counted.recalled_pixels, counted.false_pixels) == (0, 8 * 4)
    assert counted.numbers()["false_share"] == 1
    assert counted.numbers()["false_pixels_per_frame"] == 4


def test_what_large_things_look_like_changes_no_recall():
    true = ball_and_wall()
    other = true.clone()
    other[:, :, 20:32] = background(true)[:, :, 20:32]
    assert small_objects(true, other).numbers()["recall"] == 1


def test_a_wall_whose_texture_resembles_the_background_does_not_fall_to_small_pieces():
    true = ball_and_wall()
    true[:, :, 21:32:3] = 30  # rows of the background's colour across the wall
    marked = small_object_masks(true, true)
    assert marked.moving_BTHW[:, :, 20:32].any()
    assert not marked.small_BTHW[:, :, 20:32].any()
    assert int(marked.small_BTHW.sum()) == 8 * 4


def test_a_thin_part_of_a_large_thing_belongs_to_it():
    true = ball_and_wall()
    for t in range(8):
        true[0, t, 32:38, 4 * t] = 90  # a leg
    assert not small_object_masks(true, true).small_BTHW[:, :, 20:].any()


@pytest.mark.parametrize("side", [2, 3, 6])
def test_small_is_what_holds_no_square_of_the_given_size(side):
    true = torch.full((1, 8, 48, 48, 3), 30, dtype=torch.uint8)
    for t in range(8):
        true[0, t, 0:side, 5 * t : 5 * t + side] = 200  # at the border, too
    moving = int(moving_pixels(true).sum())
    assert small_objects(true, true, narrower_than=side).small_pixels == 0
    assert small_objects(true, true, narrower_than=side + 1).small_pixels == moving
    tall = true.transpose(2, 3).contiguous()
    assert small_objects(tall, tall, narrower_than=side + 1).small_pixels == moving


def test_a_small_pixel_is_recalled_where_it_is_nearer_to_the_truth_than_to_the_background():
    true = ball_and_wall()  # 200 on 30: 115 lies in the middle
    for level, recalled in ((114, 0), (115, 0), (116, 8 * 4)):
        other = true.clone()
        other[true == 200] = level
        assert small_objects(true, other).recalled_pixels == recalled


def test_a_frame_counts_as_recalled_from_half_of_its_small_pixels_on():
    true = ball_and_wall()
    half, less = true.clone(), true.clone()
    half[:, :, 4] = 30
    less[:, :, 4] = 30
    for t in range(0, 8, 2):
        less[0, t, 5, 4 * t] = 30  # one of four is left in every second frame
    assert small_objects(true, half).numbers()["frame_recall"] == 1
    counted = small_objects(true, less)
    assert (counted.small_frames, counted.recalled_frames) == (8, 4)


def test_pixels_beside_a_moving_one_and_faint_ones_are_not_false():
    true = ball_and_wall()
    other = true.clone()
    other[0, 0, 6, 0:3] = 200  # the row below the ball of frame 0, and its corner
    other[0, 0, 14, 14] = 30 + 25  # under a tenth of the range
    assert small_objects(true, other).false_pixels == 0
    other[0, 0, 7, 0] = 200  # two rows below
    other[0, 0, 14, 20, 1] = 30 + 26  # over a tenth, in one channel
    assert small_objects(true, other).false_pixels == 2


def test_counts_of_batches_added_up_are_those_of_the_whole():
    true = torch.cat([ball_and_wall(), ball_and_wall().flip(3), ball_and_wall().transpose(2, 3)])
    noise = torch.randint(0, 256, true.shape, generator=torch.Generator().manual_seed(3))
    other = torch.where(noise < 60, noise, true.long()).byte()
    whole = small_objects(true, other)
    parts = [small_objects(true[i : i + 1], other[i : i + 1]) for i in range(3)]
    assert parts[0] + parts[1] + parts[2] == whole
    assert 0 < whole.recalled_pixels < whole.small_pixels
    assert whole.false_pixels > 0


def test_where_nothing_is_small_the_shares_are_none_and_not_perfect():
    still = torch.full((1, 4, 12, 12, 3), 9, dtype=torch.uint8)
    assert small_objects(still, still + 90).numbers() == {
        "recall": None, "frame_recall": None, "false_share": None, "false_pixels_per_frame": 144
    }  # fmt: skip
    assert small_objects(still[:, :1], still[:, :1]).small_pixels == 0


def test_frames_smaller_than_the_square_hold_only_small_things():
    true = torch.zeros((1, 3, 4, 4, 3), dtype=torch.uint8)
    true[0, 0] = 200
    assert small_objects(true, true, narrower_than=5).small_pixels == 16
    with pytest.raises(ValueError, match="at least 1"):
        small_objects(true, true, narrower_than=0)


GRID = CodeSpec(vocab_size=8, grid_height=2, grid_width=2, code_dim=3)
LEVELS = CodeSpec(vocab_size=8, grid_height=2, grid_width=2, code_dim=3, num_levels=2)


def codes(*shape, seed=0):
    return torch.randint(0, 8, shape, generator=torch.Generator().manual_seed(seed))


def test_counted_codes_have_the_usage_of_all_codes_together():
    codes_Bthw = codes(3, 5, 2, 2) % 5
    numbers = count_codes(codes_Bthw, GRID).numbers()
    used, perplexity = usage(codes_Bthw, 8)
    assert numbers["codes_used_fraction"] == used
    assert numbers["perplexity"] == pytest.approx(perplexity)
    assert numbers["levels"]["perplexity"] == [pytest.approx(perplexity)]


def test_the_change_rate_is_the_share_of_cells_whose_code_changes():
    codes_Bthw = torch.zeros((1, 3, 2, 2), dtype=torch.int64)
    codes_Bthw[0, 1, 0, 0] = 1  # changes, and changes back
    codes_Bthw[0, 2, 1, 1] = 7
    assert count_codes(codes_Bthw, GRID).numbers()["code_change_rate"] == 3 / 8
    assert count_codes(codes_Bthw[:, :1], GRID).numbers()["code_change_rate"] is None


def test_a_cell_of_several_levels_changes_with_any_of_them():
    codes_BthwQ = torch.zeros((1, 2, 2, 2, 2), dtype=torch.int64)
    codes_BthwQ[0, 1, 0, 0] = torch.tensor([1, 1])
    codes_BthwQ[0, 1, 0, 1, 1] = 2
    numbers = count_codes(codes_BthwQ, LEVELS).numbers()
    assert numbers["code_change_rate"] == 2 / 4
    assert numbers["levels"]["code_change_rate"] == [1 / 4, 2 / 4]


def test_every_level_has_its_own_use_and_all_together_their_means():
    codes_BthwQ = codes(2, 4, 2, 2, 2)
    codes_BthwQ[..., 1] = 6
    numbers = count_codes(codes_BthwQ, LEVELS).numbers()
    used, perplexity = usage(codes_BthwQ[..., 0], 8)
    assert numbers["levels"]["codes_used_fraction"] == [used, 1 / 8]
    assert numbers["levels"]["perplexity"] == pytest.approx([perplexity, 1])
    assert numbers["codes_used_fraction"] == pytest.approx((used + 1 / 8) / 2)
    assert numbers["perplexity"] == pytest.approx(math.sqrt(perplexity))


@pytest.mark.parametrize(("spec", "shape"), [(GRID, (4, 6, 2, 2)), (LEVELS, (4, 6, 2, 2, 2))])
def test_counts_of_clips_added_up_have_the_numbers_of_all(spec, shape):
    every = codes(*shape)
    parts = [count_codes(every[i : i + 2], spec) for i in (0, 2)]
    assert (parts[0] + parts[1]).numbers() == count_codes(every, spec).numbers()


def test_codes_that_the_spec_does_not_speak_of_are_refused():
    with pytest.raises(FormatError, match="the vocabulary has 8"):
        count_codes(codes(1, 1, 2, 2) + 8, GRID)
    with pytest.raises(FormatError, match="the vocabulary has 8"):
        count_codes(codes(1, 1, 2, 2) - 8, GRID)
    with pytest.raises(ShapeError, match="h"):
        count_codes(codes(1, 1, 3, 2), GRID)
    with pytest.raises(ShapeError, match="codes"):
        count_codes(codes(1, 1, 2, 2), LEVELS)
