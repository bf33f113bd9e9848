"""Promises of config.py: sizes follow from the settings; settings that cannot be are refused."""

from dataclasses import replace

import pytest
from tokenizer.toys import CONFIG, TRAINING
from worldloom.common import ConfigError, build, to_plain
from worldloom.tokenizer import QuantizerConfig, TokenizerConfig, TokenizerTrainingConfig


def test_a_cell_covers_patch_times_the_halvings():
    config = TokenizerConfig(height=64, width=96, patch=4, widths=(8, 16, 32), num_blocks=(1, 1, 1))
    spec = config.code_spec
    assert (config.stride, spec.grid_height, spec.grid_width) == (16, 4, 6)
    assert (spec.frames_per_latent, spec.num_levels) == (1, 1)
    assert (spec.vocab_size, spec.code_dim) == (1024, 16)


@pytest.mark.parametrize("config", [CONFIG, TRAINING, TokenizerConfig(), TokenizerTrainingConfig()])
def test_plain_values_rebuild_the_config(config):
    assert build(type(config), to_plain(config), where="here") == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 25}, "width 25 is not a multiple of 4 .* the nearest that fits is 28"),
        ({"height": 0}, "height 0 is not a multiple"),
        ({"widths": (8,)}, "widths has 1 entries and num_blocks 2"),
        ({"widths": (), "num_blocks": ()}, "widths has 0 entries"),
        ({"widths": (8, 0)}, ".*a width is at least 1"),
        ({"num_blocks": (1, -1)}, ".*a number of blocks at least 0"),
        ({"patch": 0}, "patch is 0, must be at least 1"),
        ({"temporal_kernel": 0}, "temporal_kernel is 0, must be at least 1"),
    ],
)
def test_sizes_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ConfigError, match=f"tokenizer: {message}"):
        replace(CONFIG, **changes)


@pytest.mark.parametrize("name", ["vocab_size", "code_dim"])
def test_a_codebook_of_nothing_is_refused(name):
    with pytest.raises(ConfigError, match=f"quantizer: {name} is 0, must be at least 1"):
        QuantizerConfig(**{name: 0})


@pytest.mark.parametrize(
    "name",
    ["num_steps", "batch_clips", "clip_frames", "checkpoint_every", "sample_every", "log_every"],
)
def test_a_training_that_would_do_nothing_is_refused(name):
    with pytest.raises(ConfigError, match=f"training: {name} is 0, must be at least 1"):
        replace(TRAINING, **{name: 0})
