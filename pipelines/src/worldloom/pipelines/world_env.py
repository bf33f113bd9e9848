"""A learned world as a Gymnasium environment.

    gymnasium.make("worldloom/World-v0", world="runs/demo")  ->  WorldEnv
    reset(seed=7, options={"start": 3})                      ->  frame_HWC, where it starts
    step(action of the game)                                 ->  the next frame_HWC

An action is one step of the world: where a latent frame covers r > 1 pixel frames it is held for r
of them, since the model hears r actions before it draws any of their frames; the observation is the
last frame, and all r are in info["frames"]. info["codes"] has the frame's codes_hw (or codes_hwQ),
the world's own compact account of it.
"""

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from worldloom.common import Frames

from .world_source import WorldEnvConfig, WorldSource
from .world_spaces import action_space, idle_action, keys_to_action, slots_of


def frame_space(source: WorldSource, /) -> gymnasium.Space[Frames]:
    """Return the space of one frame_HWC."""
    spec = source.spec.tokenizer
    box: Any = spaces.Box(0, 255, (spec.height, spec.width, 3), np.uint8)
    frames: gymnasium.Space[Frames] = box
    return frames


class WorldEnv(gymnasium.Env[Frames, Any]):
    """One learned world.

    There are no rewards and no ends: the data that worlds are learned from carries neither. Every
    reward is 0.0, `terminated` is never True, and `truncated` is after `max_steps`. Wrap it in a
    reward of your own, computed from the frames.

    Actions are the game's own, but for games whose actions are a Dict or a Tuple: those are one
    MultiDiscrete. The same seed, start and actions give the same frames.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012  Gymnasium's type

    def __init__(
        self, world: Path | str | None = None, *, render_mode: str | None = None, **settings: Any
    ) -> None:
        """Find a world; it is loaded at the first reset.

        Args:
            world: a folder that `worldloom demo` wrote.
            render_mode: "rgb_array", or none.
            settings: the other fields of `WorldEnvConfig`.

        Raises:
            FormatError: if there is no world.
            ConfigError: if a setting is out of range.
        """
        self._source = WorldSource(WorldEnvConfig(world=world, **settings))
        self.observation_space = frame_space(self._source)
        self.action_space = action_space(self._source.spec.actions)
        self.metadata = type(self).metadata | {"render_fps": self._source.steps_per_s}
        self.render_mode = render_mode
        self._frame_HWC: Frames | None = None
        self._steps = 0

    @property
    def noop_action(self) -> Any:
        """What gymnasium.utils.play should do while no key is held: play(env, noop=...)."""
        return idle_action(self._source.spec.actions)

    @property
    def num_starts(self) -> int:
        """How many starts there are for the reset option "start"."""
        return len(self._source.moments())

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Frames, dict[str, Any]]:
        """Begin at a start drawn by the seed, or at that of the options.

        Args:
            seed: of the start and of all that is drawn; without, it goes on from the last one.
            options: {"start": number} of a held-out start, {"episode": key} (with "start_frame"),
                or {"picture": path, bytes or frame_HWC uint8}.

        Raises:
            ConfigError, FormatError: if the options name no start.
        """
        super().reset(seed=seed)
        start, world_seed = self._source.draw(self.np_random, options)
        frames_THWC = self._source.world.reset(start.codes_thw, start.slots_TA, seed=world_seed)
        self._steps = 0
        self._frame_HWC = frames_THWC[-1].copy()
        codes_hw = start.codes_thw[-1].numpy().copy()
        about = {"start": start.source, "seed": world_seed, "codes": codes_hw}
        return self._frame_HWC.copy(), about

    def step(self, action: Any) -> tuple[Frames, float, bool, bool, dict[str, Any]]:
        """Hold an action for one latent frame.

        Raises:
            FormatError: if it is none of the action space's; nothing happened.
            ValueError: before the first reset.
        """
        if self._frame_HWC is None:
            raise ValueError("a world has no state before its first reset")
        world, spec = self._source.world, self._source.spec.actions
        slots_rA = np.repeat(slots_of(action, spec)[None], world.steps_per_latent, axis=0)
        frames_rHWC, codes_hw = world.step(slots_rA)
        self._steps += 1
        self._frame_HWC = frames_rHWC[-1].copy()
        truncated = self._steps >= self._source.config.max_steps
        info = {"codes": codes_hw.numpy().copy()}
        if len(frames_rHWC) > 1:
            info["frames"] = frames_rHWC
        return self._frame_HWC.copy(), 0.0, False, truncated, info

    def render(self) -> Frames | None:
        """Return the frame seen last, if the render mode is "rgb_array"."""
        if self.render_mode != "rgb_array" or self._frame_HWC is None:
            return None
        return self._frame_HWC.copy()

    def get_keys_to_action(self) -> dict[tuple[int, ...], Any]:
        """Return which keys press which action, for gymnasium.utils.play."""
        return keys_to_action(self._source.spec.actions)
