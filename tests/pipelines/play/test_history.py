"""Promises of a session's history: everything can be brought back, and memory has an end."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worldloom.dynamics import SamplingConfig
from worldloom.pipelines.play.history import EVERY, History

SAMPLINGS = [SamplingConfig(temperature=float(t)) for t in range(3)]


def slots(value):
    return np.array([[value, 0], [1, -1]])


def walked(steps, *, budget, size=1):
    """A history of so many steps whose states are their positions."""
    history: History[int] = History(slots_shape=(2, 2), budget_bytes=budget)
    for step in range(steps + 1):
        if history.wants_state():
            history.keep(history.position, size_bytes=size)
        if step < steps:
            history.add(slots(step % 5), SAMPLINGS[0])
    return history


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    moves=st.lists(
        st.one_of(
            st.tuples(st.integers(0, 2), st.integers(0, 2)),
            st.floats(0, 1),
            st.integers(20, 60).map(lambda times: [times]),
        ),
        max_size=30,
    ),
    budget=st.integers(1, 400),
    size=st.integers(1, 100),
)
def test_whatever_was_done_every_position_is_what_led_to_it(moves, budget, size):
    """The state of a position is here all that was done until there."""
    history: History[tuple] = History(slots_shape=(2, 2), budget_bytes=budget)
    now: tuple = ()
    past = [()]

    def keep():
        if history.wants_state():
            history.keep(now, size_bytes=size)

    def step(value, number):
        nonlocal now, past
        history.add(slots(value), SAMPLINGS[number])
        now = (*now, (value, number))
        past = [now[:length] for length in range(len(now) + 1)]
        keep()

    keep()
    for move in moves:
        if isinstance(move, float):
            position = int(move * history.length)
            found, state = history.nearest(position)
            assert found <= position
            redone = list(state)
            for slots_rA, sampling in history.steps(found, position):
                redone.append((int(slots_rA[0, 0]), SAMPLINGS.index(sampling)))
                assert slots_rA.tolist() == slots(redone[-1][0]).tolist()
            assert tuple(redone) == past[position]
            now = past[position]
            history.move(position)
            keep()
        elif isinstance(move, list):
            for _ in range(move[0]):
                step(0, 0)
        else:
            step(*move)
        assert history.length >= history.position
        assert history.size_bytes <= max(budget, size)
        assert history.states[0] == 0


@pytest.mark.parametrize("room", [1, 2, 10, 100, 10**9])
def test_states_take_no_more_room_than_there_is_however_long_it_goes(room):
    history = walked(20_000, budget=room * 7, size=7)
    assert len(history.states) <= min(room, 512)
    assert len(history.states) >= min(room, 512) - 1
    assert history.states[0] == 0
    assert history.size_bytes <= room * 7


def test_a_minute_back_is_near_and_half_an_hour_back_is_not_far():
    history = walked(54_000, budget=150)
    gaps = {48: 32, 600: 120, 5_000: 330, 27_000: 800, 53_999: 1_100}
    for back, most in gaps.items():
        position = 54_000 - back
        assert position - history.nearest(position)[0] <= most, back
    widths = [after - before for before, after in pairwise(history.states)]
    assert max(widths) <= 1_200


def test_where_one_goes_back_states_gather_anew():
    history = walked(54_000, budget=150)
    found, _ = history.nearest(10_000)
    history.move(found)
    while history.position < 10_200:
        if history.wants_state():
            history.keep(history.position, size_bytes=1)
        history.move(history.position + 1)
    assert len(history.states) <= 150
    for position in range(10_100, 10_200):
        assert position - history.nearest(position)[0] <= 4 * EVERY


def test_thirty_minutes_of_steps_take_little_memory():
    import tracemalloc

    tracemalloc.start()
    history = walked(54_000, budget=150)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used < 3_000_000
    assert history.length == 54_000


def test_doing_the_same_again_forgets_nothing_and_anything_else_does():
    history = walked(40, budget=1000)
    history.move(10)
    history.add(slots(10 % 5), SAMPLINGS[0])
    assert (history.position, history.length, history.recorded) == (11, 11, 40)
    assert history.states == tuple(range(0, 41, EVERY))
    history.add(slots(11 % 5), SAMPLINGS[1])  # the same keys under other settings
    assert (history.position, history.length, history.recorded) == (12, 12, 12)
    assert history.states == (0, 8)
    assert history.sampling_at(12) == SAMPLINGS[1]
    assert history.sampling_at(10) == SAMPLINGS[0]
