"""Promises of training_config.py: what cannot train is refused, naming the number to change."""

import pytest
from worldloom.common import ConfigError
from worldloom.tokenizer import TokenizerConfig, TokenizerTrainingConfig, check_fit


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 0}, "num_steps is 0, must be at least 1"),
        ({"accumulate": 0}, "accumulate is 0, must be at least 1"),
        ({"motion_weight": -1.0}, r"motion_weight is -1\.0, must be 0 \(off\) or more"),
        ({"hard_pixel_power": -0.5}, r"hard_pixel_power is -0\.5, must be 0"),
        ({"optimizer": "sgd"}, "optimizer 'sgd' is unknown|optimizer is 'sgd'"),
        ({"gradient_weight": float("nan")}, "gradient_weight is nan, must be 0"),
        ({"multiscale_weight": float("inf")}, "multiscale_weight is inf, must be 0"),
        ({"temporal_weight": -0.2}, r"temporal_weight is -0\.2, must be 0"),
        ({"discriminator_weight": -0.1}, r"discriminator_weight is -0\.1, must be 0"),
        ({"ema_decay": 1.0}, r"ema_decay is 1\.0, must be at least 0 and below 1"),
        ({"discriminator_start": 1.0}, r"discriminator_start is 1\.0, must be at least 0"),
        ({"batch_clips": 3, "accumulate": 4}, "batch_clips is 3, but accumulate cuts .* 4 parts"),
    ],
)
def test_a_training_that_would_do_nothing_or_harm_is_refused(changes, message):
    with pytest.raises(ConfigError, match=f"training: {message}"):
        TokenizerTrainingConfig(**changes)


@pytest.mark.parametrize(
    ("stride", "frames", "nearest"),
    [(2, 2, "1 and 3"), (2, 8, "7 and 9"), (4, 6, "5 and 9"), (4, 8, "5 and 9")],
)
def test_clips_that_leave_a_latent_frame_unfilled_are_refused_naming_the_nearest(
    stride, frames, nearest
):
    model = TokenizerConfig(architecture="video", temporal_stride=stride)
    with pytest.raises(ConfigError, match=f"clip_frames is {frames}, .* that fit are {nearest}"):
        check_fit(model, TokenizerTrainingConfig(clip_frames=frames))
    for fitting in map(int, nearest.split(" and ")):
        check_fit(model, TokenizerTrainingConfig(clip_frames=fitting))


def test_any_length_fits_without_temporal_compression():
    for frames in range(1, 9):
        check_fit(TokenizerConfig(), TokenizerTrainingConfig(clip_frames=frames))


@pytest.mark.parametrize(("processes", "parts"), [(5, 1), (2, 3), (3, 2)])
def test_every_part_of_every_process_needs_a_clip(processes, parts):
    training = TokenizerTrainingConfig(batch_clips=processes * parts - 1, accumulate=parts)
    with pytest.raises(ConfigError, match=f"each need {processes * parts} clips"):
        check_fit(TokenizerConfig(), training, num_processes=processes)
    more = TokenizerTrainingConfig(batch_clips=processes * parts, accumulate=parts)
    check_fit(TokenizerConfig(), more, num_processes=processes)


def test_the_discriminator_begins_after_its_share_of_the_updates():
    training = TokenizerTrainingConfig(num_steps=10, discriminator_start=0.5)
    assert training.discriminator_step == 5
    assert TokenizerTrainingConfig(discriminator_start=0.0).discriminator_step == 0
