"""What a LeRobot data set says of its actions -> ActionSpec.

    features[KEY] and the statistics of the data set  ->  action_spec  ->  ActionSpec

| dtype | actions |
|---|---|
| float16, 32, 64 | continuous: an axis a number, from the smallest to the largest value there is |
| int of shape [1] | discrete: from 0 to the largest value there is |
| int of shape [n] | multi_discrete, likewise |
| bool | keys: any of them at once |

Bounds come from meta/stats.json, or from meta/episodes_stats.jsonl over all episodes; settings come
before both. A robot's joints have no natural bounds, so bins between what was seen waste none.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from worldloom.common import ActionSpec, ConfigError, FormatError, nearest

from ..ingest_config import LerobotConfig
from .lerobot_index import Index, load_json, load_lines

_MAX_AXES = 256
_MAX_VALUES = 1 << 16
_INTEGERS = re.compile(r"u?int(8|16|32|64)")
_FLOATS = ("float16", "float32", "float64")


def action_spec(index: Index, settings: LerobotConfig, /) -> ActionSpec:
    """Return what one action of a data set is.

    Raises:
        FormatError: if the feature or its statistics are not what LeRobot writes.
        ConfigError: if there is no such feature, or no bounds and none are given.
    """
    name = settings.action
    if not name:
        return ActionSpec.none()
    if name not in index.features:
        raise ConfigError(
            f"--lerobot.action {name}: no such feature in {index.info}"
            f"{nearest(name, list(index.features))}; an empty one takes the frames alone"
        )
    about, where = index.features[name], f"{index.info}: features: {name:.60}"
    width = _width(about["shape"], where)
    names, dtype = _names(about.get("names"), width), about["dtype"]
    try:
        if dtype == "bool":
            return ActionSpec.keys(names or [f"KEY_{i}" for i in range(width)])
        if dtype in _FLOATS:
            low, high = _bounds(index, settings, width)
            return ActionSpec.continuous(
                low, high, names=names or [f"AXIS_{i}" for i in range(width)], bins=settings.bins
            )
        if _INTEGERS.fullmatch(dtype):
            sizes = _sizes(index, settings, width)
            if width == 1:
                return ActionSpec.discrete([f"ACTION_{i}" for i in range(sizes[0])])
            return ActionSpec.multi_discrete(
                sizes, names=names or [f"AXIS_{i}" for i in range(width)]
            )
    except FormatError as error:
        raise FormatError(f"{where}: {error}") from error
    raise FormatError(f"{where}: dtype {dtype!r:.60}, read are floats, integers and bool")


def _width(shape: Sequence[int], where: str) -> int:
    """Return how many numbers an action has."""
    if len(shape) > 1 or not 1 <= math.prod(shape) <= _MAX_AXES:
        raise FormatError(f"{where}: shape {list(shape)}, must be one row of 1 to {_MAX_AXES}")
    return math.prod(shape)


def _names(value: object, width: int) -> list[str] | None:
    """Return a name for each number, from the forms that LeRobot writes; None for others."""
    if isinstance(value, dict):
        inner = next(iter(value.values()), None)
        if len(value) == 1 and isinstance(inner, list):  # {"motors": ["waist", ...]}
            value = inner
        else:  # {"waist": 0, ...}
            numbered = {str(number): name for name, number in value.items()}
            value = [numbered.get(str(i)) for i in range(width)]
    if not isinstance(value, list) or any(not isinstance(name, str) for name in value):
        return None
    return value if len(value) == len(set(value)) == width else None


def _bounds(
    index: Index, settings: LerobotConfig, width: int
) -> tuple[Sequence[float], Sequence[float]]:
    """Return the smallest and the largest value of each axis."""
    given = [
        _for_all("low", settings.low, width),
        _for_all("high", settings.high, width),
    ]
    if all(bounds is not None for bounds in given):
        return given[0] or (), given[1] or ()
    seen = _statistics(index, settings.action, width)
    if seen is None:
        raise ConfigError(
            f"{index.folder}: has no statistics of {settings.action!r}, which would say how far "
            "its axes go; give --lerobot.low and --lerobot.high"
        )
    # An axis that never moved has no width to cut into bins, so it gets one around its value.
    half = np.where(seen[0] < seen[1], 0.0, np.maximum(1.0, 1e-3 * np.abs(seen[0])))
    low, high = seen[0] - half, seen[1] + half
    return given[0] or low.tolist(), given[1] or high.tolist()


def _sizes(index: Index, settings: LerobotConfig, width: int) -> Sequence[int]:
    """Return the number of values of each integer."""
    if settings.sizes:
        if len(settings.sizes) != width or not all(1 <= n <= _MAX_VALUES for n in settings.sizes):
            raise ConfigError(f"--lerobot.sizes: {width} numbers of 1 to {_MAX_VALUES} are needed")
        return settings.sizes
    seen = _statistics(index, settings.action, width)
    if seen is None:
        raise ConfigError(
            f"{index.folder}: has no statistics of {settings.action!r}, which would say how many "
            "values it has; give --lerobot.sizes"
        )
    low, high = seen
    if (low < 0).any() or (high >= _MAX_VALUES).any() or (high % 1 != 0).any():
        raise FormatError(
            f"its statistics go from {low.min():g} to {high.max():g}, but choices are whole "
            f"numbers from 0 to {_MAX_VALUES - 1}"
        )
    return [int(value) + 1 for value in high]


def _for_all(name: str, given: Sequence[float], width: int) -> list[float] | None:
    """Return a given bound of each axis, or None if none was given."""
    if not given:
        return None
    if len(given) not in (1, width):
        raise ConfigError(f"--lerobot.{name}: {len(given)} numbers, must be 1 or {width}")
    return list(given) * (width if len(given) == 1 else 1)


def _statistics(
    index: Index, feature: str, width: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]] | None:
    """Return the smallest and the largest values of a feature in all episodes, if they are kept."""
    low, high = np.full(width, np.inf), np.full(width, -np.inf)
    for where, stats in _all_statistics(index.folder / "meta"):
        about = stats.get(feature)
        if not isinstance(about, dict):
            continue
        low = np.minimum(low, _row(about.get("min"), width, f"{where}: {feature:.60}: min"))
        high = np.maximum(high, _row(about.get("max"), width, f"{where}: {feature:.60}: max"))
    return None if (low > high).any() else (low, high)


def _all_statistics(meta: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield where it stands, and the statistics of the data set or of each episode."""
    if (meta / "stats.json").is_file():
        yield str(meta / "stats.json"), load_json(meta / "stats.json")
    elif (meta / "episodes_stats.jsonl").is_file():
        for where, line in load_lines(meta / "episodes_stats.jsonl"):
            stats = line.get("stats")
            if not isinstance(stats, dict):
                raise FormatError(f"{where}: stats is {stats!r:.60}, must be an object")
            yield where, stats


def _row(value: object, width: int, where: str) -> npt.NDArray[np.float64]:
    """Return `width` finite numbers."""
    try:
        row = np.asarray(value, np.float64).reshape(-1)
    except (ValueError, TypeError, OverflowError) as error:
        raise FormatError(f"{where} is not a list of numbers ({error!s:.100})") from error
    if row.shape != (width,) or not np.isfinite(row).all():
        raise FormatError(f"{where} is {value!r:.60}, must be {width} finite numbers")
    return row
