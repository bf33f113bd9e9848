"""Promises of codebook_health.py and training_pictures.py: what is counted, said and drawn."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from worldloom.common import CodeSpec
from worldloom.tokenizer import QuantizerConfig, usage
from worldloom.tokenizer.codebook_health import advice, count_codes, measure, summary
from worldloom.tokenizer.training_pictures import reconstruction_png, usage_png

BLUE, WHITE = (46, 110, 180), (255, 255, 255)


def spec(vocab_size=10, num_levels=1):
    return CodeSpec(
        vocab_size=vocab_size, grid_height=2, grid_width=3, code_dim=4, num_levels=num_levels
    )


def counts(*numbers):
    return torch.tensor([numbers])


def test_codes_are_counted_per_level():
    codes_BthwQ = torch.zeros(2, 3, 2, 3, 2, dtype=torch.int64)
    codes_BthwQ[0, ..., 1] = 7
    counts_QV = count_codes(codes_BthwQ, spec(num_levels=2))
    assert counts_QV.tolist() == [[36] + [0] * 9, [18, 0, 0, 0, 0, 0, 0, 18, 0, 0]]
    assert count_codes(codes_BthwQ[..., 1], spec()).tolist() == counts_QV[1:].tolist()


def test_health_agrees_with_the_metrics_of_the_same_codes():
    codes = torch.arange(50) % 7
    (level,) = measure(count_codes(codes.reshape(1, 1, 5, 10), spec()))
    assert (level.used, level.perplexity) == pytest.approx(usage(codes, 10))
    assert (level.num_codes, level.num_cells, level.num_used) == (10, 50, 7)


def test_several_levels_are_told_one_by_one_and_their_mean():
    levels = measure(torch.tensor([[4, 4, 0, 0], [8, 0, 0, 0]]))
    assert summary(levels) == pytest.approx(
        {
            "codes_used": 0.375, "perplexity": 1.5, "codes_used_level_1": 0.5,
            "perplexity_level_1": 2.0, "codes_used_level_2": 0.25, "perplexity_level_2": 1.0,
        }
    )  # fmt: skip
    assert summary(levels[:1]) == pytest.approx({"codes_used": 0.5, "perplexity": 2.0})


def test_a_codebook_is_said_to_have_collapsed_below_a_fifth_of_what_could_occur():
    config = QuantizerConfig()
    fifth, less = counts(*[9] * 20, *[0] * 80), counts(*[9] * 19, *[0] * 81)
    assert advice(measure(fifth), config) is None
    assert "19 of 100 codes occur in 171 held-out cells" in advice(measure(less), config)
    # In 12 cells at most 12 codes can occur: 3 of them are a quarter.
    assert advice(measure(counts(4, 4, 4, *[0] * 997)), config) is None
    assert "level 2 has collapsed" in advice(
        measure(torch.tensor([[9] * 10, [90] + [0] * 9])), config
    )


@pytest.mark.parametrize(
    ("config", "cure"),
    [
        (QuantizerConfig(dead_code_threshold=0.3), "raise --model.quantizer.dead-code-threshold "
         "above 0.3"),
        (QuantizerConfig(kind="residual", vocab_size=64), "--model.quantizer.vocab-size 64"),
        (QuantizerConfig(kind="fsq", fsq_levels=(8, 5)), "shorten --model.quantizer.fsq-levels "
         "(8, 5)"),
        (QuantizerConfig(kind="lfq", entropy=0.2), "raise --model.quantizer.entropy above 0.2"),
    ],
)  # fmt: skip
def test_the_cure_is_one_that_the_kind_of_quantizer_has(config, cure):
    sentence = advice(measure(counts(500, *[0] * 99)), config)
    assert cure in sentence
    assert "perplexity 1.0" in sentence


def picture(png: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(png)))


def bars(rows: np.ndarray) -> list[int]:
    """Height of the bar in every column of one level's strip."""
    return [int(n) for n in (rows == BLUE).all(-1).sum(0)]


def test_the_histogram_ranks_the_codes_and_leaves_the_unused_ones_white():
    image = picture(usage_png(counts(0, 100, 0, 10, 1, 0, 0, 0)))
    heights = bars(image)[6 : 6 + 512]
    assert heights == sorted(heights, reverse=True)
    assert [heights[64 * code] for code in range(8)] == [96, 50, 15, 0, 0, 0, 0, 0]
    assert heights.count(0) == 5 * 64
    assert (image[0, 0] == WHITE).all()


def test_more_codes_than_columns_are_all_in_the_histogram():
    numbers = torch.zeros(1, 5000, dtype=torch.int64)
    numbers[0, ::2] = 3
    heights = bars(picture(usage_png(numbers)))[6 : 6 + 512]
    assert heights[:256] == [96] * 256
    assert heights[257:] == [0] * 255


def test_every_level_has_a_histogram_of_its_own():
    one, two = usage_png(counts(5, 0)), usage_png(torch.tensor([[5, 0], [1, 1]]))
    first, both = picture(one), picture(two)
    assert both.shape == (2 * first.shape[0], *first.shape[1:])
    half = first.shape[0]
    assert bars(both[:half]) == bars(first)
    assert bars(both[half:])[6 : 6 + 512] == [96] * 512


def test_a_reconstruction_stands_under_its_truth():
    true = torch.randint(0, 256, (2, 3, 4, 5, 3), dtype=torch.uint8)
    recon = 255 - true
    image = picture(reconstruction_png(true, recon))
    assert image.shape == (4 * 5 + 1, 3 * 6 + 1, 3)
    assert (image[6 + 5 + 5 : 6 + 5 + 5 + 4, 7:12] == recon[1, 1].numpy()).all()
    assert (image[1:5, 13:18] == true[0, 2].numpy()).all()
    assert (image[6:10, 13:18] == recon[0, 2].numpy()).all()
