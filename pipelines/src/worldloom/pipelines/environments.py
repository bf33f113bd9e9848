"""Gymnasium ids -> games that show frames and name their actions.

    GameConfig(env="VizdoomBasic-v1", ...)  -> open_game -> Game
    Game.reset(seed)                        -> Moment(frame_HWC uint8, observation)
    Game.step(raw action)                   -> Moment, after `frame_skip` game frames

The frame is the observation, one entry of it, or what the game renders; never a symbolic grid,
an automap or a depth image. Three families of games get settings that make a recording exact:
VizDoom (160x120, no status bar, a weapon that does not bob; its own frame skip), the Atari games
of ale-py (their own frame skip; no random repeats, or actions[i] would not lead to frame i + 1) and
MiniGrid (rendered). All can be set otherwise through `env_kwargs`, but for the frame skip, which
has a flag of its own.
"""

import difflib
import importlib
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from worldloom.common import ActionArray, ActionSpec, ConfigError, Frames, WorldloomError

from .action_spaces import map_actions

_IMAGE_KEYS = ("screen", "image", "rgb", "pixels", "obs")
_NOT_PICTURES = ("automap", "depth", "labels")
_SMALLEST_PICTURE = 8

_PACKAGES = {
    "vizdoom.gymnasium_wrapper": ("vizdoom", ("vizdoom",)),
    "ale_py": ("ale-py", ("ale/", "noframeskip", "deterministic-v")),
    "minigrid": ("minigrid", ("minigrid-", "babyai-")),
}
"""Module that registers the ids -> (what to install, how its ids begin or what they contain)."""

_FAMILIES: dict[str, tuple[dict[str, Any], str, float]] = {
    "vizdoom": ({"screen_resolution": "RES_160X120", "render_hud": False}, "frame_skip", 35.0),
    "ale_py": ({"repeat_action_probability": 0.0}, "frameskip", 60.0),
}
"""Package of a game -> (settings unless the person says otherwise, its frame skip, frames/s)."""

_NAMES: dict[str, tuple[str, ...]] = {
    "Acrobot": ("TORQUE_MINUS", "NOOP", "TORQUE_PLUS"),
    "CarRacing": ("STEER", "GAS", "BRAKE"),
    "CartPole": ("LEFT", "RIGHT"),
    "CliffWalking": ("UP", "RIGHT", "DOWN", "LEFT"),
    "FrozenLake": ("LEFT", "DOWN", "RIGHT", "UP"),
    "LunarLander": ("NOOP", "LEFT_ENGINE", "MAIN_ENGINE", "RIGHT_ENGINE"),
    "MountainCar": ("LEFT", "NOOP", "RIGHT"),
    "MountainCarContinuous": ("FORCE",),
    "Pendulum": ("TORQUE",),
    "Taxi": ("DOWN", "UP", "RIGHT", "LEFT", "PICKUP", "DROPOFF"),
}
"""Actions of Gymnasium's own games, which say so only in their documentation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GameConfig:
    """Which game, and how it is shown."""

    env: str
    """Gymnasium id; `module:id` imports the module that registers it first."""
    env_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Handed to the environment as they are."""
    image_key: str = ""
    """Which entry of a Dict observation is the frame; found by its name if empty."""
    frame_skip: int = 1
    """Game frames per step; the action is held, the rewards are summed, the last frame is kept."""
    fps: float | None = None
    """Steps per second; the game's own frames per second over frame_skip if not given."""
    action_bins: int = 11
    """Bins per continuous axis."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """What a game shows after a reset or a step."""

    frame_HWC: Frames | None
    """The frame; none, where the game ended and shows a blank placeholder (as VizDoom does)."""
    observation: Any
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False


class Game:
    """An open environment: frames instead of observations, raw actions of a spec."""

    def __init__(
        self, env: "gymnasium.Env[Any, Any]", config: GameConfig, family: str, image_key: str | None
    ) -> None:
        _, skip_name, family_fps = _FAMILIES.get(family, ({}, "", 0.0))
        self._env = env
        self._image_key = image_key
        self._repeats = 1 if skip_name else config.frame_skip
        self._actions = map_actions(
            env.action_space,
            names=_action_names(env, config.env),
            bins=config.action_bins,
            where=config.env,
        )
        self.name = config.env
        self.packages = _versions("gymnasium", family)
        """Versions of what plays: another version may show other frames."""
        self.frame_skip = config.frame_skip
        """Game frames per step."""
        game_fps = family_fps or float(env.metadata.get("render_fps") or 30)
        self.fps: float = config.fps or game_fps / config.frame_skip
        """Steps per second of play at its natural speed."""
        with _foreign(f"{config.env}: reset"):
            first = self._show(env.reset(seed=0)[0])
        self.native_size: tuple[int, int] = first.shape[:2]
        """Height and width of the frames as the game shows them."""

    @property
    def actions(self) -> ActionSpec:
        """What a raw action is."""
        return self._actions.spec

    @property
    def action_space(self) -> "gymnasium.Space[Any]":
        """The game's own action space."""
        return self._env.action_space

    def raw_action(self, action: Any, /) -> ActionArray:
        """Return one step's raw action for what env.step takes."""
        return self._actions.to_raw(action)

    def reset(self, *, seed: int) -> Moment:
        """Begin an episode that depends on the seed alone."""
        with _foreign(f"{self.name}: reset"):
            observation, _ = self._env.reset(seed=seed)
            return Moment(frame_HWC=self._frame(observation), observation=observation)

    def step(self, raw: ActionArray, /) -> Moment:
        """Hold one action for `frame_skip` game frames, or until the episode ends."""
        action = self._actions.to_env(raw)
        total = 0.0
        with _foreign(f"{self.name}: step with action {action}"):
            for _ in range(self._repeats):
                observation, reward, terminated, truncated, _ = self._env.step(action)
                total += float(reward)
                if terminated or truncated:
                    break
            frame_HWC = self._frame(observation)
        ended = bool(terminated or truncated)
        blank = ended and not frame_HWC.any()
        return Moment(
            frame_HWC=None if blank else frame_HWC,
            observation=observation,
            reward=total,
            terminated=bool(terminated),
            truncated=bool(truncated),
        )

    def close(self) -> None:
        """Close the environment."""
        self._env.close()

    def _frame(self, observation: Any) -> Frames:
        """Return the frame, of the size the first one had."""
        frame_HWC = self._show(observation)
        if frame_HWC.shape[:2] != self.native_size:
            raise WorldloomError(
                f"{self.name}: a frame is {frame_HWC.shape[:2]} (height, width) after frames of "
                f"{self.native_size}; a recording needs one size"
            )
        return frame_HWC

    def _show(self, observation: Any) -> Frames:
        """Return a copy of the frame, RGB: games reuse their buffers."""
        if self._image_key is None:
            picture = self._env.render()
        else:
            picture = observation[self._image_key] if self._image_key else observation
        frame = np.array(picture)
        if frame.ndim == 2:
            frame = frame[:, :, None]
        if frame.ndim != 3 or frame.dtype != np.uint8 or frame.shape[2] not in (1, 3):
            raise ConfigError(
                f"{self.name}: shows {frame.dtype} {frame.shape}, "
                "a frame must be uint8 of (height, width, 3)"
            )
        return np.repeat(frame, 3, axis=2) if frame.shape[2] == 1 else frame


def open_game(config: GameConfig, /) -> Game:
    """Open a game by its Gymnasium id.

    Raises:
        ConfigError: if the id is unknown, a setting is not one of the game's, it shows no picture,
            or its actions are of no kind that an ActionSpec describes.
    """
    spec = find_game(config.env)
    family = _family(spec)
    settings, skip_name, _ = _FAMILIES.get(family, ({}, "", 0.0))
    if skip_name and skip_name in config.env_kwargs:
        raise ConfigError(
            f"{config.env}: {skip_name!r} stands in the environment's settings, but the frame skip "
            f"must be recorded too; pass --frame-skip {config.env_kwargs[skip_name]} instead"
        )
    settings = settings | ({skip_name: config.frame_skip} if skip_name else {})
    settings = settings | dict(config.env_kwargs)
    env = _make(spec, config.env, settings)
    try:
        image_key = _image_key(env, config)
        if image_key is None:
            _require_rendering(env, config.env)
            if env.render_mode != "rgb_array":
                env.close()
                env = _make(spec, config.env, settings | {"render_mode": "rgb_array"})
        return Game(env, config, family, image_key)
    except BaseException:
        env.close()
        raise


def draw_into_memory() -> None:
    """Have games draw into memory: else their window library complains of no screen, or greets."""
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")


def find_game(env_id: str, /) -> EnvSpec:
    """Return the registered spec of an id, importing what registers ids until one does.

    Raises:
        ConfigError: naming what to install, or the nearest ids, if there is none.
    """
    module, colon, name = env_id.rpartition(":")
    if colon:
        try:
            importlib.import_module(module)
        except Exception as error:
            raise ConfigError(
                f"{env_id}: module {module!r} cannot be imported ({type(error).__name__}: {error})"
            ) from error
    for package in ("", *_PACKAGES):
        if package and _installed(package):
            importlib.import_module(package)
        try:
            return gymnasium.spec(name)
        except gymnasium.error.Error:
            continue
    raise ConfigError(f"{env_id}: no environment of this id is known{_advice(name)}")


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package.partition(".")[0]) is not None


def _advice(name: str) -> str:
    """Return what to install, or the nearest ids."""
    lower = name.lower()
    for package, (install, marks) in _PACKAGES.items():
        if any(mark in lower for mark in marks) and not _installed(package):
            return (
                f"; it looks like a game of {install}, which is not installed: "
                f"`pip install {install}`, or `pip install 'worldloom[envs]'` for all of them"
            )
    ids = {known.lower(): known for known in gymnasium.registry}
    near = difflib.get_close_matches(lower, ids, n=3, cutoff=0.5)
    if near:
        return "; did you mean " + " or ".join(ids[word] for word in near) + "?"
    return (
        "; give an id such as CartPole-v1 or VizdoomBasic-v1, "
        "or `module:id` with the module that registers it"
    )


def _family(spec: EnvSpec) -> str:
    """Return the package a game comes from."""
    entry = spec.entry_point
    module = entry.partition(":")[0] if isinstance(entry, str) else getattr(entry, "__module__", "")
    return module.partition(".")[0]


def _versions(*modules: str) -> dict[str, str]:
    versions = {}
    for name in {module.replace("_", "-") for module in modules}:
        with suppress(PackageNotFoundError):  # a module that no distribution is named after
            versions[name] = version(name)
    return versions


def _make(spec: EnvSpec, name: str, settings: Mapping[str, Any]) -> "gymnasium.Env[Any, Any]":
    try:
        env = gymnasium.make(spec, disable_env_checker=True, **settings)
    except Exception as error:
        raise ConfigError(
            f"{name}: could not be opened with {dict(settings) or 'its own settings'} "
            f"({type(error).__name__}: {error})"
        ) from error
    if _family(spec) == "vizdoom" and "movebob" not in str(settings.get("game_args")):
        # The engine keeps the phase of the weapon's bobbing from one episode to the next, whatever
        # the seed: with it, an episode's frames would depend on what was played before.
        inner: Any = env.unwrapped
        inner.game.add_game_args("+movebob 0")
    return env


def _require_rendering(env: "gymnasium.Env[Any, Any]", name: str) -> None:
    modes = list(env.metadata.get("render_modes") or [])
    if "rgb_array" not in modes:
        raise ConfigError(
            f"{name}: shows no picture: its observation space is {env.observation_space}, and it "
            f"cannot render as 'rgb_array' (it knows {', '.join(map(str, modes)) or 'nothing'})"
        )


def _image_key(env: "gymnasium.Env[Any, Any]", config: GameConfig) -> str | None:
    """Return the entry of the observation that is the frame: "" for all of it, None to render."""
    space = env.observation_space
    if not isinstance(space, spaces.Dict):
        if config.image_key:
            raise ConfigError(
                f"{config.env}: --image-key {config.image_key} names an entry, but the observation "
                f"is not a Dict but {space}"
            )
        return "" if _is_picture(space) else None
    pictures = [key for key, part in space.spaces.items() if _is_picture(part)]
    if config.image_key:
        if config.image_key not in pictures:
            raise ConfigError(
                f"{config.env}: --image-key {config.image_key} is no picture of the observation; "
                f"its pictures are {', '.join(pictures) or 'none'}"
            )
        return config.image_key
    candidates = [key for key in pictures if key not in _NOT_PICTURES]
    if _is_symbolic(env, space):
        candidates.remove("image")
    for key in _IMAGE_KEYS:
        if key in candidates:
            return key
    if len(candidates) > 1:
        raise ConfigError(
            f"{config.env}: several entries of the observation are pictures: "
            f"{', '.join(candidates)}; choose one with --image-key"
        )
    return candidates[0] if candidates else None


def _is_picture(space: "gymnasium.Space[Any]") -> bool:
    """Return whether the space is one of uint8 images, grey or RGB."""
    if not isinstance(space, spaces.Box) or space.dtype != np.uint8:
        return False
    shape = space.shape
    flat = len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3))
    return flat and min(shape[:2]) >= _SMALLEST_PICTURE


def _is_symbolic(env: "gymnasium.Env[Any, Any]", space: spaces.Dict) -> bool:
    """Return whether "image" is MiniGrid's grid of (object, colour, state), which is uint8 too."""
    inner = env.unwrapped
    if "image" not in space.spaces or not _is_picture(space["image"]):
        return False
    if not any(cls.__module__.startswith("minigrid.") for cls in type(inner).__mro__):
        return False
    cells = {getattr(inner, name, 0) for name in ("agent_view_size", "width", "height")}
    return set((space["image"].shape or ())[:2]) <= cells


def _action_names(env: "gymnasium.Env[Any, Any]", env_id: str) -> Sequence[str] | None:
    """Return what the game calls its actions, keys or axes, if it says."""
    inner: Any = env.unwrapped
    if hasattr(inner, "get_action_meanings"):
        return [str(name) for name in inner.get_action_meanings()]
    if hasattr(inner, "game") and hasattr(inner.game, "get_available_buttons"):
        return _vizdoom_names(inner)
    enum = getattr(inner, "actions", None)
    if isinstance(enum, type) and hasattr(enum, "__members__"):
        return list(enum.__members__)
    return _NAMES.get(env_id.rpartition(":")[2].rpartition("/")[2].rpartition("-v")[0])


def _vizdoom_names(inner: Any) -> Sequence[str]:
    """Return the buttons, or the combinations of buttons that one number presses."""
    buttons = [button.name for button in inner.game.get_available_buttons()]
    if not isinstance(inner.action_space, spaces.Discrete):
        return buttons
    return [
        "+".join(name for name, down in zip(buttons, pressed, strict=True) if down) or "NOOP"
        for pressed in inner.button_map
    ]


@contextmanager
def _foreign(doing: str) -> Iterator[None]:
    """Name the game and what it did when code that is not ours fails."""
    try:
        yield
    except WorldloomError:
        raise
    except Exception as error:
        raise WorldloomError(f"{doing} failed ({type(error).__name__}: {error})") from error
