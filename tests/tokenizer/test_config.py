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
        ({"architecture": "best"}, "architecture 'best' is unknown; there are image, video"),
        ({"temporal_stride": 3}, "temporal_stride is 3, must be 1, 2 or 4"),
        ({"temporal_stride": 2}, "temporal_stride is 2, but the image architecture"),
        (
            {"temporal_stride": 2, "architecture": "video", "temporal_kernel": 1},
            "temporal_kernel is 1, but to fold 2 frames into one it must be at least 2",
        ),
    ],
)
def test_sizes_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ConfigError, match=f"tokenizer: {message}"):
        replace(CONFIG, **changes)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (QuantizerConfig(kind="vq", vocab_size=100, code_dim=7), (100, 7, 1)),
        (QuantizerConfig(kind="fsq", fsq_levels=(8, 6, 5)), (240, 3, 1)),
        (QuantizerConfig(kind="lfq", vocab_size=1 << 12), (1 << 12, 12, 1)),
        (QuantizerConfig(kind="lfq", vocab_size=2), (2, 1, 1)),
        (QuantizerConfig(kind="residual", vocab_size=64, code_dim=5, num_levels=3), (64, 5, 3)),
    ],
)
def test_every_kind_says_what_its_codes_are(config, expected):
    assert (config.size, config.dim, config.depth) == expected
    spec = replace(CONFIG, quantizer=config).code_spec
    assert (spec.vocab_size, spec.code_dim, spec.num_levels) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "best"}, "kind 'best' is unknown; there are vq, fsq, lfq, residual"),
        ({"kind": "lfq", "vocab_size": 1000}, "vocab_size is 1000, must be a power of 2 .* 1024"),
        ({"kind": "lfq", "vocab_size": 1}, "vocab_size is 1, must be a power of 2 .* is 2"),
        ({"kind": "fsq", "fsq_levels": ()}, "fsq_levels is (), must be one number or more"),
        ({"kind": "fsq", "fsq_levels": (8, 1)}, "fsq_levels is (8, 1), must be"),
        ({"num_levels": 0}, "num_levels is 0, must be at least 1"),
    ],
)
def test_a_codebook_that_its_kind_cannot_have_is_refused(changes, message):
    pattern = message.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ConfigError, match=f"quantizer: {pattern}"):
        QuantizerConfig(**changes)


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
