"""Promises of dynamics_pictures.py: truth above what was made of it, with what was pressed."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from worldloom.common import ActionSpec, TokenShards
from worldloom.dynamics import NULL, open_held_out
from worldloom.pipelines.dynamics_pictures import action_labels, painter
from worldloom.pipelines.pictures import enlarge, fitting_scale
from worldloom.tokenizer import load_tokenizer


def picture(chain, folder, step: int) -> np.ndarray:
    """What is drawn of the tiny chain's model."""
    draw = painter(
        [TokenShards(chain.folder / "shards")],
        folder,
        decoder=load_tokenizer(chain.folder / "tokenizer"),
        window_frames=8,
        seed=3,
        stream=None,
    )
    draw(chain.model, step)
    return np.asarray(Image.open(io.BytesIO((folder / f"step-{step:08d}.png").read_bytes())))


def places(sheet: np.ndarray, tile: np.ndarray) -> list[tuple[int, int]]:
    """Where a tile stands in a sheet, pixel by pixel."""
    windows = np.lib.stride_tricks.sliding_window_view(sheet, tile.shape)[:, :, 0]
    first = windows[:, :, 0, 0] == tile[0, 0]  # most places differ in their first pixel already
    return [
        (int(y), int(x))
        for y, x in np.argwhere(first.all(-1))
        if np.array_equal(windows[y, x], tile)
    ]


def test_the_true_frames_stand_in_a_row_above_those_that_were_given_and_made(tiny_chain, tmp_path):
    sheet = picture(tiny_chain, tmp_path, 200)
    shards = TokenShards(tiny_chain.folder / "shards")
    batch = open_held_out(shards, window_frames=8).batch(0, size=64, seed=3)
    assert batch.valid_Bt.all()
    true_THWC = tiny_chain.tokenizer.decode(batch.codes_Bthw[:1], num_frames=8)[0].numpy()
    scale = fitting_scale(*true_THWC.shape[1:3], target=136)
    rows, columns = zip(*places(sheet, enlarge(true_THWC[0], times=scale)), strict=True)
    # The first frame is given to the model, so it stands in both rows, one below the other.
    assert len(rows) >= 2
    assert columns[0] == columns[1]
    last = places(sheet, enlarge(true_THWC[7], times=scale))
    assert any(y == rows[0] and x > columns[0] for y, x in last)


def test_the_pictures_of_one_model_are_the_same_whenever_they_are_drawn(tiny_chain, tmp_path):
    first, second = (picture(tiny_chain, tmp_path / name, 1) for name in ("one", "two"))
    assert np.array_equal(first, second)


def test_an_action_that_nobody_knows_is_a_question_mark_and_none_is_empty():
    keys = ActionSpec.keys(["left", "fire"], max_keys=2)
    pressed = torch.from_numpy(keys.encode(np.array([[1, 0], [0, 0], [1, 1]])).astype("i8"))
    words = keys.describe(pressed.numpy())
    pressed[1] = NULL
    assert action_labels(keys, pressed) == [words[0], "?", words[2]]
    assert action_labels(ActionSpec.none(), torch.zeros(2, 0, dtype=torch.int64)) == ["", ""]


@pytest.mark.parametrize("count", [1, 3])
def test_several_folders_share_one_picture(tiny_chain, tmp_path, count):
    draw = painter(
        [TokenShards(tiny_chain.folder / "shards")] * count,
        tmp_path,
        decoder=load_tokenizer(tiny_chain.folder / "tokenizer"),
        window_frames=4,
        seed=0,
        stream=None,
    )
    draw(tiny_chain.model, 7)
    height = Image.open(tmp_path / "step-00000007.png").height
    rows = {1: 4, 3: 6}[count]  # two of each of three
    scale = fitting_scale(16, 16, target=136)
    assert height == pytest.approx(2 * rows * (16 * scale + 24), rel=0.05)
