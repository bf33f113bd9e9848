"""Space descriptions in JSON, as Minari writes them -> Gymnasium spaces and the pictures inside.

    {"type": "Discrete", "n": 4, "start": 0}  -> read_space  -> gymnasium.spaces.Discrete(4)
    {"type": "Dict", "subspaces": {...}}      -> find_images -> {"camera/left": (64, 64, 3)}

Nothing is imported by a name out of the file: the types are this list and no other. Sizes are
bounded before a space is built.

Source: `minari/serialization.py` of Minari 0.5.4, which writes what is read here.
"""

import json
from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from worldloom.common import FormatError

_MAX_DEPTH = 32
_MAX_VALUES = 1 << 16
"""More choices than any slot holds."""
_MAX_AXES = 256
"""More axes than any action has slots."""
_FLOATS = ("float16", "float32", "float64")
_INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


def parse_object(text: object, /, *, where: str) -> Mapping[str, Any]:
    """Return the JSON object that a metadata entry holds as a string: a space, an environment.

    Raises:
        FormatError: if it is no JSON object.
    """
    if not isinstance(text, str):
        raise FormatError(f"{where}: expected a string of JSON, got {text!r:.60}")
    try:
        # Not `parse_json`: Minari writes bounds that are infinite as Infinity.
        space = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: cannot be read as JSON ({error})") from error
    if not isinstance(space, dict):
        raise FormatError(f"{where}: expected a JSON object, got {space!r:.60}")
    return space


def read_space(data: object, /, *, where: str, depth: int = _MAX_DEPTH) -> "gymnasium.Space[Any]":
    """Return the Gymnasium space of an action's description.

    Raises:
        FormatError: naming the field that is missing, of the wrong type or out of bounds.
    """
    kind = data.get("type") if isinstance(data, dict) else None
    if not isinstance(data, dict) or depth == 0:
        raise FormatError(f"{where}: expected a space, a JSON object, got {data!r:.60}")
    if kind == "Discrete":
        n, start = _integer(data, "n", where), _integer(data, "start", where)
        if not 1 <= n <= _MAX_VALUES:
            raise FormatError(f"{where}: Discrete of {n} values, must be 1 to {_MAX_VALUES}")
        return spaces.Discrete(n, start=start)
    if kind == "MultiBinary":
        count: Any = data.get("n")
        lengths = count if isinstance(count, list) else [count]
        if any(type(length) is not int or length < 1 for length in lengths):
            raise FormatError(f"{where}: MultiBinary of n {count!r:.60}")
        _few(lengths, where)
        return spaces.MultiBinary(count)
    if kind == "MultiDiscrete":
        nvec = _numbers(data, "nvec", where, np.int64)
        start = _numbers(data, "start", where, np.int64) if "start" in data else np.zeros_like(nvec)
        _few(nvec.shape, where)
        if start.shape != nvec.shape or (nvec < 1).any() or (nvec > _MAX_VALUES).any():
            raise FormatError(f"{where}: MultiDiscrete with nvec {nvec.tolist()!s:.60}")
        if data.get("dtype") not in _INTEGERS:
            raise FormatError(f"{where}: MultiDiscrete of dtype {data.get('dtype')!r:.60}")
        return spaces.MultiDiscrete(nvec, dtype=np.dtype(data["dtype"]).type, start=start)
    if kind == "Box":
        return _box(data, where)
    if kind in ("Dict", "Tuple"):
        return _several(data, where, depth)
    raise FormatError(
        f"{where}: a space of type {kind!r:.60}; read are Discrete, MultiBinary, MultiDiscrete, "
        "Box, Dict and Tuple"
    )


def _box(data: Mapping[str, Any], where: str) -> spaces.Box:
    shape, dtype = _shape(data, where), data.get("dtype")
    if dtype not in (*_FLOATS, *_INTEGERS):
        raise FormatError(f"{where}: Box of dtype {dtype!r:.60}")
    _few(shape, where)
    low, high = (_numbers(data, name, where, np.float64) for name in ("low", "high"))
    if not low.shape == high.shape == shape:
        raise FormatError(f"{where}: Box of shape {shape} with bounds of {low.shape}, {high.shape}")
    kind = np.dtype(dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        return spaces.Box(low.astype(kind), high.astype(kind), shape, kind.type)


def _several(data: Mapping[str, Any], where: str, depth: int) -> "gymnasium.Space[Any]":
    parts = data.get("subspaces")
    if data["type"] == "Dict" and isinstance(parts, dict) and 0 < len(parts) <= _MAX_AXES:
        return spaces.Dict(
            {
                key: read_space(part, where=f"{where}.{key:.40}", depth=depth - 1)
                for key, part in parts.items()
            }
        )
    if data["type"] == "Tuple" and isinstance(parts, list) and 0 < len(parts) <= _MAX_AXES:
        return spaces.Tuple(
            [
                read_space(part, where=f"{where}[{i}]", depth=depth - 1)
                for i, part in enumerate(parts)
            ]
        )
    raise FormatError(f"{where}: a {data['type']} with 1 to {_MAX_AXES} subspaces is read")


def find_images(
    data: object, /, *, where: str, depth: int = _MAX_DEPTH
) -> dict[str, tuple[int, ...]]:
    """Return path -> shape of every entry of an observation that can be a frame.

    A frame is a Box of uint8 of (H, W), (H, W, 1) or (H, W, 3); its path has the names of the
    groups in a Minari file, joined by `/`, and is empty where the observation is the frame.
    """
    if not isinstance(data, dict) or depth == 0:
        raise FormatError(f"{where}: expected a space, a JSON object, got {data!r:.60}")
    parts = data.get("subspaces")
    named: Mapping[str, object] = {}
    if data.get("type") == "Dict" and isinstance(parts, dict):
        named = parts
    elif data.get("type") == "Tuple" and isinstance(parts, list):
        named = {f"_index_{i}": part for i, part in enumerate(parts)}
    elif data.get("type") == "Box" and data.get("dtype") == "uint8":
        shape = _shape(data, where)
        frame = len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3))
        return {"": shape} if frame and min(shape) > 0 else {}
    return {
        f"{name}/{path}" if path else name: shape
        for name, part in named.items()
        for path, shape in find_images(part, where=where, depth=depth - 1).items()
    }


def _integer(data: Mapping[str, Any], name: str, where: str) -> int:
    value = data.get(name)
    if type(value) is not int or abs(value) > 1 << 62:
        raise FormatError(f"{where}: {name} is {value!r:.60}, must be an integer")
    return value


def _shape(data: Mapping[str, Any], where: str) -> tuple[int, ...]:
    shape = data.get("shape")
    if not isinstance(shape, list) or any(
        type(n) is not int or not 0 <= n < 1 << 31 for n in shape
    ):
        raise FormatError(f"{where}: shape is {shape!r:.60}, must be a list of sizes")
    return tuple(shape)


def _few(lengths: Any, where: str) -> None:
    """Refuse more axes than an action can have."""
    count = 1
    for length in lengths:
        count *= int(length)
    if count > _MAX_AXES:
        raise FormatError(f"{where}: {count} axes, at most {_MAX_AXES}")


def _numbers(data: Mapping[str, Any], name: str, where: str, dtype: Any) -> Any:
    """Return an entry that is a list of numbers, or of lists of them."""
    try:
        numbers = np.asarray(data.get(name))
    except (ValueError, OverflowError) as error:
        raise FormatError(f"{where}: {name} is not a list of numbers ({error!s:.100})") from error
    if numbers.dtype.kind not in ("iu" if dtype is np.int64 else "iuf"):
        raise FormatError(f"{where}: {name} is not a list of {np.dtype(dtype)} numbers")
    return numbers.astype(dtype)
