"""Gymnasium action spaces <-> ActionSpec: what a game takes, and what we write down.

    space                   -> map_actions   -> ActionMap
    raw action of one step  -> ActionMap.to_env -> what env.step takes
    what env.step takes     -> ActionMap.to_raw -> raw action of one step

Discrete, MultiBinary, MultiDiscrete, Box of one bounded axis or more, and Dict or Tuple of the
first three (they become one multi-discrete action). Anything else is refused by name.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from worldloom.common import ActionArray, ActionSpec, ConfigError, FormatError


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionMap:
    """A spec, and the two ways between its raw actions and a game's own."""

    spec: ActionSpec
    to_env: Callable[[ActionArray], Any]
    """Raw action of one step (a number for `discrete`, else a vector) -> what env.step takes."""
    to_raw: Callable[[Any], ActionArray]
    """What env.step takes -> raw action of one step."""


def map_actions(
    space: "gymnasium.Space[Any]", /, *, names: Sequence[str] | None, bins: int, where: str
) -> ActionMap:
    """Return the spec of an action space and the ways to and from it.

    Args:
        space: the game's action space.
        names: what the game calls its actions, keys or axes; numbers, if it says nothing.
        bins: bins of each continuous axis.
        where: the game, for errors.

    Raises:
        ConfigError: naming the space, if it is none that a spec can describe.
    """
    try:
        return _map(space, names, bins, where)
    except FormatError as error:
        raise ConfigError(f"{where}: cannot record the action space {space}: {error}") from error


def _map(
    space: "gymnasium.Space[Any]", names: Sequence[str] | None, bins: int, where: str
) -> ActionMap:
    if isinstance(space, spaces.Discrete):
        return _discrete(space, names)
    if isinstance(space, spaces.MultiBinary):
        return _keys(space, names)
    if isinstance(space, spaces.MultiDiscrete):
        return _multi_discrete(space, names)
    if isinstance(space, spaces.Box) and len(space.shape) == 1:
        return _continuous(space, names, bins, where)
    if isinstance(space, spaces.Dict):
        return _several(list(space.spaces.items()), dict, space, where)
    if isinstance(space, spaces.Tuple):
        parts = [(str(i), part) for i, part in enumerate(space.spaces)]
        return _several(parts, lambda values: tuple(values.values()), space, where)
    raise ConfigError(
        f"{where}: cannot record the action space {space}; known are Discrete, MultiBinary, "
        "MultiDiscrete, Box with one axis of numbers, and Dict or Tuple of the first three"
    )


def _numbered(names: Sequence[str] | None, count: int, word: str) -> Sequence[str]:
    """Return the names if there is one for each, else numbered words."""
    if names is not None and len(names) == count:
        return names
    return [f"{word}_{i}" for i in range(count)]


def _discrete(space: "spaces.Discrete[Any]", names: Sequence[str] | None) -> ActionMap:
    start = int(space.start)
    return ActionMap(
        spec=ActionSpec.discrete(_numbered(names, int(space.n), "ACTION")),
        to_env=lambda raw: int(raw) + start,
        to_raw=lambda action: np.asarray(int(action) - start, np.int64),
    )


def _keys(space: spaces.MultiBinary, names: Sequence[str] | None) -> ActionMap:
    return ActionMap(
        spec=ActionSpec.keys(_numbered(names, int(np.prod(space.shape)), "KEY")),
        to_env=lambda raw: raw.reshape(space.shape).astype(np.int8),
        to_raw=lambda action: np.asarray(action, np.int64).ravel(),
    )


def _multi_discrete(space: spaces.MultiDiscrete, names: Sequence[str] | None) -> ActionMap:
    sizes = space.nvec.ravel().tolist()
    return ActionMap(
        spec=ActionSpec.multi_discrete(sizes, names=_numbered(names, len(sizes), "AXIS")),
        to_env=lambda raw: (raw.reshape(space.shape) + space.start).astype(space.dtype),
        to_raw=lambda action: (np.asarray(action, np.int64) - space.start).ravel(),
    )


def _continuous(space: spaces.Box, names: Sequence[str] | None, bins: int, where: str) -> ActionMap:
    if not np.issubdtype(space.dtype, np.floating):
        raise ConfigError(f"{where}: cannot record the action space {space}: it is not of floats")
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    # Games write "unbounded" as infinity or as the largest float.
    if not (np.abs(np.concatenate([low, high])) < 1e30).all():
        raise ConfigError(
            f"{where}: cannot record the action space {space}: an axis without bounds cannot be "
            "cut into bins; wrap the environment in gymnasium.wrappers.RescaleAction or ClipAction"
        )
    return ActionMap(
        spec=ActionSpec.continuous(
            low.tolist(), high.tolist(), names=_numbered(names, len(low), "AXIS"), bins=bins
        ),
        to_env=lambda raw: raw.astype(space.dtype),
        to_raw=lambda action: np.asarray(action, np.float32).ravel(),
    )


def _several(
    parts: "list[tuple[str, gymnasium.Space[Any]]]",
    join: Callable[[dict[str, Any]], Any],
    space: "gymnasium.Space[Any]",
    where: str,
) -> ActionMap:
    """Return the map of a Dict or Tuple: its parts side by side, as one multi-discrete action."""
    maps: list[ActionMap] = []
    sizes: list[int] = []
    names: list[str] = []
    for key, part in parts:
        inner = _map(part, None, 0, where) if not isinstance(part, spaces.Box) else None
        if inner is None or not inner.spec.names:
            raise ConfigError(
                f"{where}: cannot record the action space {space}: its part {key!r} is {part}, and "
                "only Discrete, MultiBinary and MultiDiscrete can stand side by side"
            )
        maps.append(inner)
        if inner.spec.kind == "discrete":
            sizes.append(inner.spec.sizes[0])
            names.append(key)
        else:
            binary = inner.spec.kind == "keys"
            sizes.extend([2] * len(inner.spec.names) if binary else inner.spec.sizes)
            names.extend(f"{key}.{name}" for name in inner.spec.names)
    cuts = np.cumsum([part.spec.raw_width for part in maps])[:-1]

    def to_env(raw: ActionArray) -> Any:
        pieces = np.split(raw, cuts)
        return join(
            {
                key: part.to_env(piece[0] if part.spec.kind == "discrete" else piece)
                for (key, _), part, piece in zip(parts, maps, pieces, strict=True)
            }
        )

    def to_raw(action: Any) -> ActionArray:
        values = action if isinstance(action, dict) else dict(zip(dict(parts), action, strict=True))
        return np.concatenate(
            [
                part.to_raw(values[key]).reshape(-1)
                for (key, _), part in zip(parts, maps, strict=True)
            ]
        )

    spec = ActionSpec.multi_discrete(sizes, names=names)
    return ActionMap(spec=spec, to_env=to_env, to_raw=to_raw)
