"""Promises of patch.py: mean colours on a palette, exactly; check_tokenizer tells the rest."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer.toys import random_frames
from worldloom.common import ConfigError, FormatError, MismatchError, ShapeError, save_model
from worldloom.tokenizer import load_tokenizer
from worldloom.tokenizer.patch import PatchConfig, PatchTokenizer

LEVELS = st.integers(2, 256)


def plain(colour, *, height=8, width=8):
    """Frames_BTHWC of one colour."""
    return torch.tensor(colour, dtype=torch.uint8).expand(1, 1, height, width, 3)


@settings(max_examples=25)
@given(st.tuples(LEVELS, LEVELS, LEVELS))
def test_every_code_comes_back_from_the_frame_it_decodes_to(levels):
    tokenizer = PatchTokenizer(PatchConfig(patch=2, height=16, width=32, levels=levels))
    spec = tokenizer.spec.codes
    # All of a small vocabulary, and of a large one the ends and numbers spread between them.
    codes = torch.linspace(0, spec.vocab_size - 1, 8 * spec.cells).round().long()
    codes_Bthw = codes.reshape(8, 1, 8, 16)
    assert torch.equal(tokenizer.encode(tokenizer.decode(codes_Bthw, num_frames=1)), codes_Bthw)


@pytest.mark.parametrize("levels", [(2, 2, 2), (6, 7, 6), (2, 256, 2)])
def test_a_colour_becomes_the_nearest_of_the_palette_in_every_channel(levels):
    tokenizer = PatchTokenizer(PatchConfig(height=8, width=8, levels=levels))
    generator = torch.Generator().manual_seed(0)
    for colour in torch.randint(0, 256, (40, 3), generator=generator).tolist():
        (code,) = tokenizer.encode(plain(colour)).flatten()
        apart = (tokenizer.codebook[code] + 1) * 127.5 - torch.tensor(colour)
        for distance, count in zip(apart.abs().tolist(), levels, strict=True):
            assert distance <= 127.5 / (count - 1) + 1e-3


def test_a_patch_has_the_mean_of_its_pixels_and_halves_round_up():
    tokenizer = PatchTokenizer(PatchConfig(patch=2, height=2, width=2, levels=(256, 256, 256)))
    frames = torch.tensor([[1, 0, 9], [2, 0, 9], [2, 1, 9], [1, 1, 8]], dtype=torch.uint8)
    codes_Bthw = tokenizer.encode(frames.reshape(1, 1, 2, 2, 3))
    # Means 1.5, 0.5 and 8.75.
    assert codes_Bthw.flatten().tolist() == [(2 * 256 + 1) * 256 + 9]


def test_rows_and_columns_of_frames_that_are_not_square_stay_in_their_places():
    tokenizer = PatchTokenizer(PatchConfig(patch=4, height=8, width=20))
    frames_BTHWC = torch.zeros(1, 1, 8, 20, 3, dtype=torch.uint8)
    frames_BTHWC[..., 4:8, 12:16, 0] = 255
    decoded = tokenizer.decode(tokenizer.encode(frames_BTHWC), num_frames=1)
    assert torch.equal(decoded, frames_BTHWC)


def test_a_batch_of_any_size_has_the_codes_of_its_videos_alone():
    tokenizer = PatchTokenizer()
    frames_BTHWC = random_frames(5, 3, 64, 64)
    together = tokenizer.encode(frames_BTHWC)
    for row in range(5):
        assert torch.equal(tokenizer.encode(frames_BTHWC[row : row + 1])[0], together[row])


def test_by_default_it_is_for_the_frames_of_the_demo_and_pads_others():
    spec = PatchTokenizer().spec
    assert (spec.name, spec.height, spec.width, spec.resize) == ("patch", 64, 64, "pad")
    assert (spec.codes.vocab_size, spec.codes.grid_height, spec.codes.grid_width) == (252, 8, 8)
    assert load_tokenizer("patch").spec == spec


def test_every_size_has_a_fingerprint_of_its_own_that_does_not_change_with_time():
    configs = [
        PatchConfig(), PatchConfig(patch=4), PatchConfig(height=32), PatchConfig(width=32),
        PatchConfig(resize="crop"), PatchConfig(levels=(6, 6, 7)),
    ]  # fmt: skip
    assert len({PatchTokenizer(config).fingerprint() for config in configs}) == len(configs)
    # Shards on somebody's disk say this. A change of what its codes mean must change it.
    assert PatchTokenizer().fingerprint()[:16] == "1d92f4ae0c0aca56"


def test_it_is_loaded_by_the_name_in_its_folder_and_is_the_same(tmp_path):
    tokenizer = PatchTokenizer(PatchConfig(patch=4, height=16, width=24, levels=(2, 3, 4)))
    tokenizer.save(tmp_path / "model", card="# Colours")
    loaded = load_tokenizer(tmp_path / "model")
    assert type(loaded) is PatchTokenizer
    assert (loaded.config, loaded.spec) == (tokenizer.config, tokenizer.spec)
    assert (tmp_path / "model/README.md").read_text() == "# Colours"


def save_config(folder: Path, **changes: object) -> Path:
    PatchTokenizer().save(folder, card="")
    config = json.loads((folder / "config.json").read_text())["config"]
    save_model(folder, kind="tokenizer", config={**config, **changes}, weights={}, card="")
    return folder


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokenizer": {"patch": 7}}, "height 64 is not a multiple of patch 7"),
        ({"tokenizer": {"levels": [6, 7]}}, "levels must have 3 values, got 2"),
        ({"tokenizer": {"pitch": 8}}, "unknown key 'pitch'; did you mean 'patch'"),
        ({"tokenizer": {"patch": 4}}, "it was written by another version"),
        ({"fingerprint": None}, "it was written by another version"),
        ({"extra": 1}, "a patch tokenizer has the name 'patch' and fingerprint, name, tokenizer"),
    ],
)
def test_a_folder_that_is_not_what_it_says_is_refused(tmp_path, changes, said):
    with pytest.raises(FormatError, match=said):
        load_tokenizer(save_config(tmp_path / "model", **changes))


def test_a_folder_of_another_tokenizer_or_model_is_refused(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "image", card="")
    with pytest.raises(FormatError, match="has the name 'image' and the fields"):
        PatchTokenizer.from_pretrained(tmp_path / "image")
    with pytest.raises(FormatError, match="has the name 'theirs' and the fields"):
        PatchTokenizer.from_pretrained(save_config(tmp_path / "theirs", name="theirs"))
    save_model(tmp_path / "dynamics", kind="dynamics", config={}, weights={}, card="")
    with pytest.raises(MismatchError, match="holds a dynamics model, but a tokenizer is needed"):
        PatchTokenizer.from_pretrained(tmp_path / "dynamics")


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"width": 60}, "width 60 is not a multiple of patch 8"),
        ({"patch": 0}, "height 64 is not a multiple of patch 0"),
        ({"height": 0}, "height 0 is not a multiple of patch 8"),
        ({"levels": (1, 7, 6)}, r"levels are \(1, 7, 6\), must each be in \[2, 256\]"),
        ({"levels": (6, 257, 6)}, r"levels are \(6, 257, 6\), must each be in \[2, 256\]"),
    ],
)
def test_sizes_that_leave_no_grid_or_no_colours_are_refused(sizes, said):
    with pytest.raises(ConfigError, match=said):
        PatchConfig(**sizes)


def test_a_session_serves_as_many_streams_as_it_began_with():
    tokenizer = PatchTokenizer()
    encoder, decoder = tokenizer.open_encoder(), tokenizer.open_decoder()
    decoder.push(encoder.push(random_frames(2, 1, 64, 64)))
    with pytest.raises(ShapeError, match="frames: 3 streams side by side, must be 2"):
        encoder.push(random_frames(3, 1, 64, 64))
    with pytest.raises(ShapeError, match="codes: 1 streams side by side, must be 2"):
        decoder.push(torch.zeros(1, 1, 8, 8, dtype=torch.int64))
    assert encoder.flush().shape == (2, 0, 8, 8)
