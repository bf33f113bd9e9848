from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from worldloom.common import ActionSpec, ConfigError
from worldloom.pipelines.policies import PolicyConfig, check_policy, make_policy


@dataclass
class Console:
    """A game of which only the actions matter."""

    actions: ActionSpec
    action_space: Any = field(default_factory=lambda: spaces.Discrete(4))
    raw_action: Callable[[Any], Any] = np.asarray


FOUR = Console(ActionSpec.discrete(["A", "B", "C", "D"]))


def play(console: Console, steps: int, seed: int = 0, **settings: Any) -> np.ndarray:
    policy = make_policy(PolicyConfig(**settings), console)()
    rng = np.random.default_rng(seed)
    return np.stack([policy.act(None, rng) for _ in range(steps)])


def test_random_draws_every_action_alike():
    counts = np.bincount(play(FOUR, 4000, policy="random"), minlength=4)
    assert (np.abs(counts - 1000) < 120).all()


def test_sticky_repeats_as_often_as_it_says_and_draws_all_actions():
    actions = play(FOUR, 8000, policy="sticky", stickiness=0.85)
    repeated = (actions[1:] == actions[:-1]).mean()
    assert repeated == pytest.approx(0.85 + 0.15 / 4, abs=0.02)  # a new draw may be the old action
    assert set(actions.tolist()) == {0, 1, 2, 3}


def test_the_same_generator_gives_the_same_actions():
    assert np.array_equal(play(FOUR, 100, seed=5), play(FOUR, 100, seed=5))
    assert not np.array_equal(play(FOUR, 100, seed=5), play(FOUR, 100, seed=6))


def test_a_new_episode_does_not_remember_the_last_action_of_the_one_before():
    new_policy = make_policy(PolicyConfig(stickiness=0.999), FOUR)
    firsts = {int(new_policy().act(None, np.random.default_rng(k))) for k in range(40)}
    assert firsts == {0, 1, 2, 3}


def test_weights_count_against_one():
    actions = play(FOUR, 8000, policy="random", action_weights={"B": 3, "C": 0})
    counts = np.bincount(actions, minlength=4) / 8000
    assert counts == pytest.approx([0.2, 0.6, 0.0, 0.2], abs=0.02)


def test_keys_are_pressed_independently_with_their_probabilities():
    keys = Console(ActionSpec.keys(["left", "right", "fire"]))
    pressed = play(keys, 4000, policy="random", action_weights={"fire": 0.1})
    assert pressed.mean(0) == pytest.approx([0.5, 0.5, 0.1], abs=0.03)
    assert np.corrcoef(pressed.T)[0, 1] == pytest.approx(0, abs=0.06)


@pytest.mark.parametrize(
    "spec",
    [
        ActionSpec.multi_discrete([2, 5], names=["gear", "lane"]),
        ActionSpec.continuous([-2, 0], [2, 1], names=["steer", "gas"]),
    ],
)
def test_other_kinds_of_actions_fill_their_range_and_stay_inside(spec):
    actions = play(Console(spec), 2000, policy="random")
    slots = spec.encode(actions)  # refuses what is outside
    for slot, size in enumerate(spec.sizes):
        assert set(slots[:, slot].tolist()) == set(range(size))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"policy": "stiky"}, "did you mean 'sticky'"),
        ({"stickiness": 1.0}, r"--stickiness must be in \[0, 1\)"),
        ({"policy": "worlds:in_turn", "action_weights": {"A": 1}}, "--action-weights"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_a_game_is_opened(settings, said):
    with pytest.raises(ConfigError, match=said):
        check_policy(PolicyConfig(**settings))


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"a": 1}, "no action 'a'"),
        ({"A": -1}, "A must be in"),
        ({"A": "x"}, "A must be in"),
        (dict.fromkeys("ABCD", 0), "every action has weight 0"),
    ],
)
def test_weights_that_no_action_can_have_are_refused(weights, said):
    with pytest.raises(ConfigError, match=said):
        make_policy(PolicyConfig(action_weights=weights), FOUR)


@pytest.mark.parametrize(
    ("name", "said"),
    [("no_such_module:f", "ModuleNotFoundError"), ("math:nothing", "no attribute"),
     ("math:pi", "must be callable")],
)  # fmt: skip
def test_a_policy_that_cannot_be_had_is_named(name, said):
    with pytest.raises(ConfigError, match=said):
        make_policy(PolicyConfig(policy=name), FOUR)
