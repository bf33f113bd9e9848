"""Promises of positions.py and sequence.py: differences count alone; masks are what they mean."""

import math
from dataclasses import replace

import pytest
import torch
from dynamics.toys import make_model, random_codes, random_slots
from worldloom.dynamics.positions import Axes, beside, in_space, in_time, no_place, rotate
from worldloom.dynamics.sequence import (
    Grid,
    earlier_frames,
    shift_before,
    shift_beside,
    sight_mask,
    space_mask,
    time_mask,
)

ORDERS = ("raster", "row", "frame", "masked")


def rotary(frames_L, rows_L, columns_L, *, head_dim, positions="axial"):
    axes = Axes.of(head_dim, positions)
    return beside(in_time(frames_L, axes), in_space(rows_L, columns_L, axes))


def places(height, width, frames):
    """frames_L, rows_L, columns_L of the cells of some frames."""
    spots = [(t, y, x) for t in range(frames) for y in range(height) for x in range(width)]
    return list(torch.tensor(spots).T)


def scores_LL(frames_L, rows_L, columns_L, *, head_dim=16):
    """What queries and keys of a fixed content score at these places."""
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, len(frames_L), 1, head_dim, generator=generator)
    rotation = rotary(frames_L, rows_L, columns_L, head_dim=head_dim).rotation()
    return rotate(query, rotation)[0, :, 0] @ rotate(key, rotation)[0, :, 0].T


@pytest.mark.parametrize("shift", [(5000, 0, 0), (0, 7, 0), (0, 0, 9), (100_000, 3, 5)])
def test_scores_depend_on_differences_of_places_alone(shift):
    here = places(3, 4, 3)
    moved = [place + by for place, by in zip(here, shift, strict=True)]
    assert (scores_LL(*here) - scores_LL(*moved)).abs().max() < 1e-5


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_scores_depend_on_every_axis(axis):
    here = places(3, 4, 3)
    before = scores_LL(*here)
    here[axis] = here[axis] * 2
    assert (before - scores_LL(*here)).abs().max() > 0.1


def test_positions_of_time_alone_do_not_tell_rows_and_columns():
    here = places(3, 4, 3)
    turn = rotary(*here, head_dim=16, positions="time")
    moved = [here[0], here[1] * 2, here[2] * 3]
    assert all(map(torch.equal, turn, rotary(*moved, head_dim=16, positions="time")))
    assert torch.equal(turn.cos[:, :4], rotary(*here, head_dim=16).cos[:, :4])  # time as ever


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
        logits.append(model.head(last))
    assert (logits[0] - logits[1]).abs().max() < 1e-5


@pytest.mark.parametrize("positions", ["axial", "time"])
def test_meta_tokens_are_equally_near_to_every_frame_yet_told_apart(positions):
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 4, 1, 16, generator=generator)
    frames_L = torch.tensor([0, 1, 500, 5000])
    turned = rotate(
        query[:, :1].expand(-1, 4, -1, -1),
        rotary(frames_L, torch.ones(4), torch.ones(4), head_dim=16, positions=positions).rotation(),
    )
    metas = rotate(key, no_place(4, Axes.of(16, positions)).rotation())
    scores = turned[0, :, 0] @ metas[0, :, 0].T
    assert (scores - scores[0]).abs().max() < 1e-5
    assert scores[0].std() > 0.1


def tokens_of(grid, frames):
    """(frame, cell) of every token of a window; actions that have tokens are cells below 0."""
    return [
        (frame, cell)
        for frame in range(grid.first_frame, frames)
        for cell in range(-grid.lead, grid.cells)
    ]


def sees_in_frame(grid, cell, other):
    """Whether a token sees another of its own frame, by the words of the docstrings."""
    group = {"raster": 1, "row": grid.width}.get(grid.order, grid.cells)
    if other < 0:
        return True
    return cell >= 0 and other // group <= cell // group


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("num_meta", [0, 2])
@pytest.mark.parametrize("lead", [0, 2])
def test_the_mask_is_its_definition(order, num_meta, lead):
    grid = Grid(2, 3, order, lead=lead)
    tokens = tokens_of(grid, 5)
    earlier_ff = earlier_frames(frames=5 - grid.first_frame, context_frames=2, twice=False)
    mask_LM = sight_mask(grid, earlier_ff, num_meta=num_meta)
    assert mask_LM.shape == (len(tokens), num_meta + len(tokens))
    for i, (frame, cell) in enumerate(tokens):
        assert mask_LM[i, :num_meta].all()
        for j, (other_frame, other) in enumerate(tokens):
            one_before = other_frame == frame - 1
            in_frame = other_frame == frame and sees_in_frame(grid, cell, other)
            assert mask_LM[i, num_meta + j] == (one_before or in_frame)


@pytest.mark.parametrize("lead", [0, 2])
def test_tokens_that_refine_see_what_the_others_see_and_nobody_of_another_frame_sees_them(lead):
    grid = Grid(2, 3, "masked", lead=lead)
    once, twice = (earlier_frames(frames=4, context_frames=2, twice=both) for both in (False, True))
    plain_LM = sight_mask(grid, once, num_meta=2)
    length = len(plain_LM)
    mask_LM = sight_mask(grid, twice, num_meta=2)
    assert mask_LM.shape == (2 * length, 2 + 2 * length)
    assert torch.equal(mask_LM[:length, : 2 + length], plain_LM)
    assert not mask_LM[:length, 2 + length :].any()
    frames_L = torch.arange(4).repeat_interleave(grid.tokens)
    same_LL = frames_L[:, None] == frames_L[None, :]
    own_LL = plain_LM[:, 2:] & same_LL
    behind_LM = mask_LM[length:]
    assert behind_LM[:, :2].all()
    assert torch.equal(behind_LM[:, 2 : 2 + length], plain_LM[:, 2:] & ~same_LL)
    assert torch.equal(behind_LM[:, 2 + length :], own_LL)
    # And so do the factors.
    along_fM = time_mask(twice, num_meta=1).int()
    assert along_fM[4:].tolist() == [
        [1, 0, 0, 0, 0, 1, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 1, 0, 0],
        [1, 0, 1, 0, 0, 0, 0, 1, 0],
        [1, 0, 0, 1, 0, 0, 0, 0, 1],
    ]
    assert torch.equal(along_fM[:4, :5], time_mask(once, num_meta=1).int())
    assert not along_fM[:4, 5:].any()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("lead", [0, 2])
def test_the_factors_of_a_mask_are_their_definitions(order, lead):
    grid = Grid(2, 3, order, lead=lead)
    within = space_mask(grid, frames=3, num_meta=4)
    # Cells that are decided together see all of their frame anyway.
    frame_before = order in ("raster", "row")
    assert within.shape == (3, 1, grid.tokens, 4 + (1 + frame_before) * grid.tokens)
    assert within[..., :4].all()
    assert torch.equal(within[0, 0, :, -grid.tokens :], grid.own_sight())
    if frame_before:
        seen_f = within[..., 4 : 4 + grid.tokens].flatten(1)
        assert seen_f.all(1).tolist() == [False, True, True]
        assert not seen_f[0].any()
    own_TT = grid.own_sight()
    for cell in range(-lead, grid.cells):
        for other in range(-lead, grid.cells):
            assert own_TT[lead + cell, lead + other] == sees_in_frame(grid, cell, other)
    along = time_mask(earlier_frames(frames=4, context_frames=2, twice=False), num_meta=1)
    assert along.int().tolist() == [
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 0, 1, 1, 0],
        [1, 0, 0, 1, 1],
    ]


@pytest.mark.parametrize("lead", [0, 2])
def test_the_first_forward_of_a_frame_brings_its_actions(lead):
    grid = Grid(2, 3, "row", lead=lead)
    spans = [grid.tokens_of(slice(*group)) for group in grid.groups()]
    assert spans == [slice(0, lead + 3), slice(lead + 3, lead + 6)]
    assert [place.tolist() for place in grid.places()] == [[0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2]]


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
