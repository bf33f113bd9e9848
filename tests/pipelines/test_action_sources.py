"""Promises of action_sources.py, over every kind of action."""

import numpy as np
import pytest
from worldloom.common import FormatError
from worldloom.pipelines.action_sources import (
    random_actions,
    single_actions,
    sticky_actions,
    written_actions,
)


def test_drawn_actions_are_valid_and_reach_every_value(any_actions):
    for draw in (random_actions, sticky_actions):
        slots = draw(any_actions, 5000, rng=np.random.default_rng(0))
        any_actions.check_slots(slots)
        assert slots.shape == (5000, any_actions.num_slots)
        if any_actions.kind == "discrete":
            assert np.bincount(slots[:, 0]).min() > 5000 / 3 * 0.7


def test_sticky_actions_are_held_for_as_long_as_promised(any_actions):
    slots = sticky_actions(any_actions, 5000, rng=np.random.default_rng(0))
    kept = (slots[1:] == slots[:-1]).all(1).mean()
    assert kept >= 0.83


def test_single_actions_are_valid_and_all_different(any_actions):
    singles = single_actions(any_actions)
    for _, slots in singles:
        assert slots.shape == (1, any_actions.num_slots)
        any_actions.check_slots(slots)
    assert len({slots.tobytes() for _, slots in singles}) == len(singles)
    names = [name for name, _ in singles]
    wanted = {
        "none": [],
        "discrete": ["noop", "left", "right"],
        "keys": ["none", "left", "right", "fire", "jump"],
    }
    if any_actions.kind in wanted:
        assert names == wanted[any_actions.kind]
    else:
        # At rest, and every axis away from it.
        assert len(names) >= len(any_actions.sizes) + 1


def test_what_is_described_can_be_written_again(any_actions):
    if any_actions.kind in ("none", "continuous", "multi_discrete"):
        return
    for name, slots in single_actions(any_actions):
        assert np.array_equal(written_actions(f"{name}*3", spec=any_actions), slots.repeat(3, 0))


def test_actions_of_several_numbers_are_parted_by_semicolons(any_actions):
    if any_actions.kind != "multi_discrete":
        return
    slots = written_actions("0,1,7*2;2,0,299", spec=any_actions)
    assert slots.tolist() == [[0, 1, 7], [0, 1, 7], [2, 0, 299]]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.json", b"{}", "expected a JSON list"),
        ("a.json", b"[1, [2]]", "a.json"),
        ("a.json", b"[[0], [9]]", r"step 1 has 9"),
        ("a.json", b'["left", 3]', "a.json"),
        ("a.json", b"[", "not readable"),
        ("a.json", b"\xff", "not readable"),
        ("a.json", b"[]", "a.json"),
        ("a.npy", b"nonsense", "not an npy"),
        ("a.txt", b"# nothing\n", "holds no action"),
        ("a.txt", b"left\nup\n", "'up'.*noop, left, right"),
    ],
)
def test_a_file_that_holds_no_such_actions_is_refused(tmp_path, action_spec, name, content, says):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(FormatError, match=says):
        written_actions(str(path), spec=action_spec)
