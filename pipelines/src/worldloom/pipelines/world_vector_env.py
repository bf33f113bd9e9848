"""Many learned worlds as one Gymnasium vector environment: one batch of one model.

    gymnasium.make_vec("worldloom/World-v0", num_envs=16, world="runs/demo")  ->  WorldVectorEnv

The codes that SyncVectorEnv gives with as many WorldEnvs, several times faster. (A pixel may differ
by one grey level: the decoder's arithmetic rounds otherwise in a batch of another size.)
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space, iterate
from worldloom.common import ConfigError, Frames

from .world_batch import WorldBatch
from .world_env import WorldEnv, frame_space
from .world_source import WorldEnvConfig, WorldSource
from .world_spaces import action_space, slots_of

_Flags = npt.NDArray[np.bool_]


class WorldVectorEnv(VectorEnv[Frames, Any, npt.NDArray[Any]]):
    """As many worlds as you like, in lockstep: all start together and are truncated together.

    World i is seeded with seed + i, as in SyncVectorEnv. After the last step of an episode the next
    step ignores its actions and starts all worlds anew (AutoresetMode.NEXT_STEP). As in WorldEnv
    rewards are 0.0 and nothing terminates.
    """

    def __init__(
        self,
        num_envs: int = 1,
        world: Path | str | None = None,
        *,
        render_mode: str | None = None,
        **settings: Any,
    ) -> None:
        """Find a world; it is loaded at the first reset.

        Args:
            num_envs: how many run side by side.
            world: a folder that `worldloom demo` wrote.
            render_mode: "rgb_array", or none.
            settings: the other fields of `WorldEnvConfig`.

        Raises:
            FormatError: if there is no world.
            ConfigError: if a setting is out of range.
        """
        if num_envs < 1:
            raise ConfigError(f"num_envs must be at least 1, got {num_envs}")
        self._source = WorldSource(WorldEnvConfig(world=world, **settings))
        self.num_envs = num_envs
        self.single_observation_space = frame_space(self._source)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.single_action_space = action_space(self._source.spec.actions)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.render_mode = render_mode
        self.metadata = WorldEnv.metadata | {
            "render_fps": self._source.steps_per_s,
            "autoreset_mode": AutoresetMode.NEXT_STEP,
        }
        self._rngs: list[np.random.Generator] = []
        self._batch: WorldBatch | None = None
        self._frames_BHWC: Frames | None = None
        self._steps = 0

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Frames, dict[str, Any]]:
        """Begin anew in all worlds, each at a start of its own, or all at that of the options.

        Args:
            seed: world i takes seed + i; or one for each; without, they go on from the last ones.
            options: as `WorldEnv.reset` takes them.

        Raises:
            ConfigError, FormatError: if the options name no start, or only some of the worlds.
        """
        options = dict(options or {})
        if not np.all(options.pop("reset_mask", True)):
            raise ConfigError(
                "reset_mask: these worlds run in lockstep, so all of them start anew or none; "
                "gymnasium.make_vec(..., vectorization_mode='sync') makes worlds that do not"
            )
        self._seed(seed)
        drawn = [self._source.draw(rng, options) for rng in self._rngs]
        world = self._source.world
        self._batch = WorldBatch(
            world.model,
            world.tokenizer,
            [start for start, _ in drawn],
            seeds=[seed for _, seed in drawn],
            sampling=self._source.sampling,
        )
        self._steps = 0
        self._frames_BHWC = self._batch.first_BTHWC[:, -1].copy()
        infos: dict[str, Any] = {}
        for number, (start, world_seed) in enumerate(drawn):
            codes_hw = start.codes_thw[-1].numpy()
            about = {"start": start.source, "seed": world_seed, "codes": codes_hw}
            infos = self._add_info(infos, about, number)
        return self._frames_BHWC.copy(), infos

    def step(
        self, actions: Any
    ) -> tuple[Frames, npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any], dict[str, Any]]:
        """Hold an action in each world for one latent frame; start anew where episodes are over.

        Raises:
            FormatError: if an action is none of the action space's; nothing happened.
            ValueError: before the first reset.
        """
        if self._batch is None:
            raise ValueError("worlds have no state before their first reset")
        count, limit = self.num_envs, self._source.config.max_steps
        rewards, never = np.zeros(count), np.zeros(count, np.bool_)
        if self._steps >= limit:
            frames_BHWC, infos = self.reset()
            return frames_BHWC, rewards, never, never.copy(), infos
        spec, r = self._source.spec.actions, self._source.world.steps_per_latent
        each = iterate(self.action_space, actions)
        slots_BA = np.stack([slots_of(action, spec) for action in each])
        frames_BrHWC, codes_Bhw = self._batch.step(np.repeat(slots_BA[:, None], r, axis=1))
        self._steps += 1
        self._frames_BHWC = frames_BrHWC[:, -1].copy()
        infos = {"codes": codes_Bhw.numpy().copy(), "_codes": np.ones(count, np.bool_)}
        if r > 1:
            infos |= {"frames": frames_BrHWC, "_frames": np.ones(count, np.bool_)}
        truncated: _Flags = np.full(count, self._steps >= limit)
        return self._frames_BHWC.copy(), rewards, never, truncated, infos

    def render(self) -> tuple[Frames, ...] | None:
        """Return the frames seen last, if the render mode is "rgb_array"."""
        if self.render_mode != "rgb_array" or self._frames_BHWC is None:
            return None
        return tuple(self._frames_BHWC.copy())

    def _seed(self, seed: int | Sequence[int | None] | None) -> None:
        """Give every world its generator, where a seed is given or there is none yet."""
        count = self.num_envs
        seeds = [seed + i for i in range(count)] if isinstance(seed, int) else seed
        if seeds is not None and len(seeds) != count:
            raise ConfigError(f"seed: {len(seeds)} for {count} worlds, must be one each")
        for number, own in enumerate(seeds or [None] * count):
            if own is not None or len(self._rngs) <= number:
                rng, _ = seeding.np_random(own)
                self._rngs[number : number + 1] = [rng]
