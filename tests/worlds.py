"""Worlds whose frames say what was done: the tests' games, where the right answer is known.

    worlds:LastAction-v0   top left: the last action; top right: the step; below: from the seed
    worlds:Spaces-v0       any observation and action space, given as keyword arguments

This folder is on pytest's `pythonpath`; recording processes inherit sys.path. A command line of
its own needs it in PYTHONPATH.
"""

import time
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium import spaces

ACTION_COLOURS = ((200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0))
NO_ACTION = (40, 40, 40)


class LastActionWorld(gymnasium.Env):
    """16x16 frames that show the last action, the step number and a colour drawn at reset."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": [], "render_fps": 20}

    def __init__(
        self,
        length: int = 10,
        start: int = 0,
        blank_end: bool = False,
        pause_s: float = 0.0,
        fail_at: int = -1,
        render_mode: str | None = None,
    ) -> None:
        self.render_mode = render_mode
        self.action_space = spaces.Discrete(len(ACTION_COLOURS), start=start)
        self.observation_space = spaces.Box(0, 255, (16, 16, 3), np.uint8)
        self._length, self._blank_end, self._pause_s = length, blank_end, pause_s
        self._fail_at = fail_at
        # One buffer for every frame, as fast games do: who keeps a frame must copy it.
        self._screen = np.zeros((16, 16, 3), np.uint8)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._step = 0
        self._drawn = self.np_random.integers(0, 256, 3)
        return self._draw(NO_ACTION), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), action
        time.sleep(self._pause_s)
        if self._step == self._fail_at:
            raise RuntimeError("the floor gave way")
        self._step += 1
        value = int(action) - int(self.action_space.start)
        ended = self._step >= self._length
        frame = self._draw(ACTION_COLOURS[value])
        if ended and self._blank_end:
            frame[:] = 0
        return frame, float(value), ended, False, {}

    def _draw(self, colour: tuple[int, int, int]) -> Any:
        self._screen[:8, :8] = colour
        self._screen[:8, 8:] = self._step % 256, self._step // 256, 128
        self._screen[8:] = self._drawn
        return self._screen


def shown_action(frame_HWC: Any) -> int | None:
    """Return the action that led to a frame; None for the first."""
    colour = tuple(frame_HWC[3, 3].tolist())
    return None if colour == NO_ACTION else ACTION_COLOURS.index(colour)


def shown_step(frame_HWC: Any) -> int:
    """Return how many game steps led to a frame."""
    low, high, _ = frame_HWC[3, 12].tolist()
    return low + 256 * high


class SpacesWorld(gymnasium.Env):
    """Any spaces: observations are filled with 7, actions are kept in `last`."""

    def __init__(
        self,
        observation: Any,
        action: Any,
        render_modes: tuple[str, ...] = (),
        render_mode: str | None = None,
    ) -> None:
        self.observation_space, self.action_space = observation, action
        self.metadata = {"render_modes": list(render_modes)}
        self.render_mode = render_mode
        self.last: Any = None

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return _filled(self.observation_space), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), action
        self.last = action
        return _filled(self.observation_space), 1.0, False, False, {}

    def render(self) -> Any:
        return np.full((24, 32, 3), 9, np.uint8)


def _filled(space: Any) -> Any:
    if isinstance(space, spaces.Dict):
        return {key: _filled(part) for key, part in space.spaces.items()}
    return np.full(space.shape, 7, space.dtype) if isinstance(space, spaces.Box) else space.sample()


def in_turn(observation: Any, action_space: Any, rng: Any) -> int:
    """A person's policy: the action after the one that is shown."""
    last = shown_action(observation)
    return 0 if last is None else (last + 1) % len(ACTION_COLOURS)


def out_of_range(observation: Any, action_space: Any, rng: Any) -> int:
    """A person's policy with a mistake."""
    return 99


def broken(observation: Any, action_space: Any, rng: Any) -> int:
    """A person's policy that fails."""
    raise KeyError("left")


gymnasium.register("LastAction-v0", entry_point=LastActionWorld)
gymnasium.register("Spaces-v0", entry_point=SpacesWorld)
