"""Actions under a frame skip: the k raw actions between two kept frames -> one.

    raw actions of n * k steps  ->  combine_actions  ->  raw actions of n steps

| kind | the k actions become |
|---|---|
| discrete, multi_discrete | the last of them, which led to the kept frame |
| keys | every key that was down in any of them |
| continuous | the mean of each axis; the sum, clipped to its range, where an axis is a change |
"""

from collections.abc import Sequence

import numpy as np
from worldloom.common import ActionArray, ActionSpec


def combine_actions(
    spec: ActionSpec, raw: ActionArray, frame_skip: int, /, *, relative: Sequence[bool] = ()
) -> ActionArray:
    """Return the raw actions of the kept frames; what is over at the end is left out.

    Args:
        spec: of the actions.
        raw: one action a step.
        frame_skip: steps that become one, k.
        relative: continuous: which axes are changes (a mouse, a camera), which add up; none, if
            not given.
    """
    if frame_skip == 1:
        return raw
    steps = len(raw) // frame_skip
    grouped = raw[: steps * frame_skip].reshape(steps, frame_skip, *raw.shape[1:])
    if spec.kind == "keys":
        return np.asarray(grouped.max(1))
    if spec.kind != "continuous":
        return np.asarray(grouped[:, -1])
    mean, total = grouped.mean(1), grouped.sum(1)
    if not relative:
        return np.asarray(mean, np.float32)
    summed = np.clip(total, np.asarray(spec.low), np.asarray(spec.high))
    return np.asarray(np.where(np.asarray(relative), summed, mean), np.float32)


def combining_rule(spec: ActionSpec, /, *, relative: Sequence[bool] = ()) -> str:
    """Return in words what `combine_actions` does for this spec."""
    if spec.kind == "none":
        return "there are no actions"
    if spec.kind == "keys":
        return "a key is down if it was down in any of the steps"
    if spec.kind != "continuous":
        return "the last action of the steps"
    summed = [name for name, adds in zip(spec.names, relative, strict=False) if adds]
    if not summed:
        return "the mean of the steps"
    return f"the mean of the steps; their sum, clipped to the range, for {', '.join(summed)}"
