"""Who plays: observations -> raw actions, from a policy's name.

    PolicyConfig(policy="sticky")        -> make_policy -> Policy
    Policy.act(observation, rng)         -> raw action of one step

`random` draws every action afresh; `sticky` repeats the last one with probability `stickiness`,
so that it gets somewhere (a random walk stares at walls); `module:callable` is a person's own
`callable(observation, action_space, rng) -> action`, imported only because they typed its name.
"""

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from worldloom.common import ActionArray, ActionSpec, ConfigError, WorldloomError, nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyConfig:
    """Which policy."""

    policy: str = "sticky"
    """`random`, `sticky` or `module:callable`."""
    stickiness: float = 0.85
    """sticky: probability that the last action is repeated."""
    action_weights: Mapping[str, float] = field(default_factory=dict)
    """Action -> how often it is drawn, against 1 for each that is not named; for keys: the
    probability that it is pressed, against 0.5."""


class Policy(Protocol):
    """What plays. One episode's policy: it may remember what it did before."""

    def act(self, observation: Any, rng: np.random.Generator, /) -> ActionArray:
        """Return the raw action of one step; `rng` is the only source of randomness."""
        ...


class Playable(Protocol):
    """What a policy needs to know of a game."""

    @property
    def actions(self) -> ActionSpec:
        """What a raw action is."""
        ...

    @property
    def action_space(self) -> Any:
        """The game's own action space."""
        ...

    def raw_action(self, action: Any, /) -> ActionArray:
        """Return one step's raw action for what env.step takes."""
        ...


class RandomPolicy:
    """Draws every action independently."""

    def __init__(self, spec: ActionSpec, weights: Mapping[str, float]) -> None:
        self._spec = spec
        self._chances = _chances(spec, weights)

    def act(self, observation: Any, rng: np.random.Generator, /) -> ActionArray:
        """Return an action drawn by the weights."""
        spec = self._spec
        if spec.kind == "discrete":
            return np.asarray(rng.choice(len(spec.names), p=self._chances), np.int64)
        if spec.kind == "keys":
            return np.asarray(rng.random(len(spec.names)) < self._chances, np.int64)
        if spec.kind == "continuous":
            return np.asarray(rng.uniform(spec.low, spec.high), np.float32)
        return rng.integers(np.asarray(spec.sizes), dtype=np.int64)


class StickyPolicy:
    """Repeats its last action with a fixed probability, else draws another."""

    def __init__(self, drawn: RandomPolicy, stickiness: float) -> None:
        self._drawn = drawn
        self._stickiness = stickiness
        self._last: ActionArray | None = None

    def act(self, observation: Any, rng: np.random.Generator, /) -> ActionArray:
        """Return the last action again, or a new one."""
        if self._last is None or rng.random() >= self._stickiness:
            self._last = self._drawn.act(observation, rng)
        return self._last


class PersonsPolicy:
    """Asks a person's callable, and checks what it answers."""

    def __init__(self, name: str, function: Callable[..., Any], game: Playable) -> None:
        self._name = name
        self._function = function
        self._game = game

    def act(self, observation: Any, rng: np.random.Generator, /) -> ActionArray:
        """Return the callable's action."""
        space = self._game.action_space
        try:
            action = self._function(observation, space, rng)
        except Exception as error:
            raise WorldloomError(
                f"policy {self._name}: failed ({type(error).__name__}: {error})"
            ) from error
        if not space.contains(action):
            raise WorldloomError(
                f"policy {self._name}: returned {action!r:.80}, which is not in {space}"
            )
        return self._game.raw_action(action)


def check_policy(config: PolicyConfig, /) -> None:
    """Refuse settings that no game could use.

    Raises:
        ConfigError: naming the setting.
    """
    if config.policy not in ("random", "sticky") and ":" not in config.policy:
        raise ConfigError(
            f"--policy {config.policy} is unknown{nearest(config.policy, ['random', 'sticky'])} "
            "or give your own as module:callable"
        )
    if not 0 <= config.stickiness < 1:
        raise ConfigError(f"--stickiness must be in [0, 1), got {config.stickiness}")
    if config.action_weights and ":" in config.policy:
        raise ConfigError(f"--action-weights has no meaning for the policy {config.policy}")


def make_policy(config: PolicyConfig, game: Playable, /) -> Callable[[], Policy]:
    """Return what makes a policy for one episode.

    Raises:
        ConfigError: if there is no such policy, or a weight is not of one of the game's actions.
    """
    check_policy(config)
    if ":" in config.policy:
        function = _import(config.policy)
        return lambda: PersonsPolicy(config.policy, function, game)
    drawn = RandomPolicy(game.actions, config.action_weights)
    if config.policy == "random":
        return lambda: drawn
    return lambda: StickyPolicy(drawn, config.stickiness)


def _chances(spec: ActionSpec, weights: Mapping[str, float]) -> Any:
    """Return the probability of every choice, or of every key being down."""
    if not weights:
        return None if spec.kind == "discrete" else 0.5
    if spec.kind not in ("discrete", "keys"):
        raise ConfigError(f"--action-weights has no meaning for {spec.kind} actions")
    for name, weight in weights.items():
        if name not in spec.names:
            raise ConfigError(f"--action-weights: no action {name!r}{nearest(name, [*spec.names])}")
        top = 1.0 if spec.kind == "keys" else 1e6
        if not isinstance(weight, int | float) or not 0 <= weight <= top:
            raise ConfigError(f"--action-weights: {name} must be in [0, {top:g}], got {weight!r}")
    rest = 0.5 if spec.kind == "keys" else 1.0
    values = np.asarray([weights.get(name, rest) for name in spec.names], np.float64)
    if spec.kind == "keys":
        return values
    if not values.any():
        raise ConfigError("--action-weights: every action has weight 0, one must be drawn")
    return values / values.sum()


def _import(name: str) -> Callable[..., Any]:
    """Return the callable that a person named on the command line."""
    module, _, attribute = name.partition(":")
    # Their file lies where they stand; a console script looks only where it is installed itself.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise ConfigError(
            f"--policy {name}: cannot be imported ({type(error).__name__}: {error})"
        ) from error
    if not callable(function):
        raise ConfigError(f"--policy {name}: is {type(function).__name__}, must be callable")
    found: Callable[..., Any] = function
    return found
