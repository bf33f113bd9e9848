"""Promises of positions.py and sequence.py: differences count alone; masks are what they mean."""

import math
from dataclasses import replace

import pytest
import torch
from dynamics.toys import make_model, random_codes, random_slots
from worldloom.dynamics.positions import no_place, rotary, rotate
from worldloom.dynamics.sequence import Grid, shift_before, shift_beside, sight_mask

ORDERS = ("raster", "row", "frame")


def scores_LL(frames_L, rows_L, columns_L, *, head_dim=16):
    """What queries and keys of a fixed content score at these places."""
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, len(frames_L), 1, head_dim, generator=generator)
    rotation = rotary(frames_L, rows_L, columns_L, head_dim=head_dim).rotation()
    return rotate(query, rotation)[0, :, 0] @ rotate(key, rotation)[0, :, 0].T


@pytest.mark.parametrize("shift", [(5000, 0, 0), (0, 7, 0), (0, 0, 9), (100_000, 3, 5)])
def test_scores_depend_on_differences_of_places_alone(shift):
    places = Grid(3, 4, "raster").places(0, 3)
    moved = [place + by for place, by in zip(places, shift, strict=True)]
    assert (scores_LL(*places) - scores_LL(*moved)).abs().max() < 1e-5


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_scores_depend_on_every_axis(axis):
    places = list(Grid(3, 4, "raster").places(0, 3))
    before = scores_LL(*places)
    places[axis] = places[axis] * 2
    assert (before - scores_LL(*places)).abs().max() > 0.1


def test_a_rotation_is_the_textbooks_turn_of_every_pair():
    rotation = rotary(
        torch.tensor([3]), torch.tensor([2]), torch.tensor([1]), head_dim=8
    ).rotation()
    tokens_BLNK = torch.arange(1.0, 9.0).reshape(1, 1, 1, 8)
    turned = rotate(tokens_BLNK, rotation).flatten().tolist()
    # Head width 8: two pairs for time (speeds 1 and 1/10), one for rows, one for columns.
    for pair, angle in enumerate([3 * 1.0, 3 * 100**-0.5, 2 * 1.0, 1 * 1.0]):
        a, b = tokens_BLNK[..., pair].item(), tokens_BLNK[..., pair + 4].item()
        assert turned[pair] == pytest.approx(a * math.cos(angle) - b * math.sin(angle), abs=1e-5)
        assert turned[pair + 4] == pytest.approx(
            a * math.sin(angle) + b * math.cos(angle), abs=1e-5
        )


def test_angles_are_exact_at_frame_a_million():
    frame = 1_000_003
    turn = rotary(torch.tensor([frame]), torch.tensor([0]), torch.tensor([0]), head_dim=16)
    for pair in range(4):
        angle = math.fmod(frame * 100.0 ** (-pair / 4), 2 * math.pi)
        assert turn.cos[0, pair].item() == pytest.approx(math.cos(angle), abs=1e-6)


@pytest.mark.parametrize("order", ORDERS)
@torch.no_grad()
def test_shifting_all_frames_by_5000_changes_no_logit(order):
    model = make_model(order=order)
    slots_BTA = random_slots(model, 6)
    codes_BtSQ = random_codes(model, 6).flatten(2)[..., None]
    logits = []
    for first in (1, 5001):
        cache = replace(model.start_cache(batch=2), first_frame=first)
        for frame in range(first, first + 5):
            now = frame - first + 1
            there = model.open_frame(
                frame, codes_BtSQ[:, now - 1], slots_BTA[:, now - 1 : now], cache
            )
            last = model.cached_tokens(there, slice(0, 12), codes_BtSQ[:, now])
        logits.append(model.to_logits(last))
    assert (logits[0] - logits[1]).abs().max() < 1e-5


def test_meta_tokens_are_equally_near_to_every_frame_yet_told_apart():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 4, 1, 16, generator=generator)
    frames_L = torch.tensor([0, 1, 500, 5000])
    turned = rotate(
        query[:, :1].expand(-1, 4, -1, -1),
        rotary(frames_L, torch.ones(4), torch.ones(4), head_dim=16).rotation(),
    )
    metas = rotate(key, no_place(4, head_dim=16).rotation())
    scores = turned[0, :, 0] @ metas[0, :, 0].T
    assert (scores - scores[0]).abs().max() < 1e-5
    assert scores[0].std() > 0.1


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("num_meta", [0, 2])
def test_the_mask_is_its_definition(order, num_meta):
    grid = Grid(2, 3, order)
    frames_L, rows_L, columns_L = grid.places(grid.first_frame, 5)
    cells_L = rows_L * 3 + columns_L
    mask_LL = sight_mask(frames_L, cells_L, grid=grid, context_frames=2, num_meta=num_meta)
    group = {"raster": 1, "row": 3, "frame": 6}[order]
    tokens = list(zip(frames_L.tolist(), cells_L.tolist(), strict=True))
    for i, (frame, cell) in enumerate(tokens):
        assert mask_LL[num_meta + i, :num_meta].all()
        assert not mask_LL[:num_meta, num_meta + i].any()
        for j, (other_frame, other_cell) in enumerate(tokens):
            one_before = other_frame == frame - 1
            beside = other_frame == frame and other_cell // group <= cell // group
            assert mask_LL[num_meta + i, num_meta + j] == (one_before or beside)


def test_every_cell_of_a_window_has_a_place_of_its_own():
    places = Grid(3, 5, "raster").places(0, 4)
    assert len(set(zip(*(place.tolist() for place in places), strict=True))) == 60
    part = Grid(3, 5, "raster").places(2, 3, 4, 9)
    assert list(zip(*(place.tolist() for place in part), strict=True)) == [
        (2, 0, 4), (2, 1, 0), (2, 1, 1), (2, 1, 2), (2, 1, 3)
    ]  # fmt: skip


def test_a_token_is_fed_the_code_before_it_or_above_it_and_never_its_own():
    codes_tS, pad = torch.arange(12).reshape(2, 6), 99
    codes_BtSQ = torch.stack([codes_tS, codes_tS + 100], dim=-1)[None]
    before_BtSQ = shift_before(codes_BtSQ, pad=pad)
    assert before_BtSQ[0, ..., 0].tolist() == [[pad] * 6, [0, 1, 2, 3, 4, 5]]
    fed = {
        order: shift_beside(codes_BtSQ, before_BtSQ, Grid(2, 3, order))[0]
        for order in ("raster", "row")
    }
    beside = {order: codes_tSQ[..., 0].tolist() for order, codes_tSQ in fed.items()}
    for codes_tSQ in (before_BtSQ[0], *fed.values()):  # a cell's levels go together
        missing = codes_tSQ[..., 0] == pad
        assert torch.equal(codes_tSQ[..., 1], codes_tSQ[..., 0] + torch.where(missing, 0, 100))
    assert beside["raster"] == [[pad, 0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10]]
    assert beside["row"] == [[pad] * 3 + [0, 1, 2], [3, 4, 5, 6, 7, 8]]
