"""The real game beside a world: the same state to begin with, then the same actions.

    EPISODES, the model's actions  -> recorded_game -> RecordedGame: what was played there, and how
    StartPoint                     -> reset -> the frame where play begins
    slots_rA                       -> step  -> the r frames that they lead to in the game

A start is a moment of a recorded episode: the game is reset with that episode's seed and does the
recorded actions up to there. The frame that it then shows must be the recorded one, pixel for
pixel; else it is another game, or another version of it, and is refused. The game runs in a process
and a temporary folder of its own: it may crash, and it litters.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np
from worldloom.common import (
    ActionArray,
    ActionSpec,
    ConfigError,
    Episodes,
    EpisodesSpec,
    FormatError,
    Frames,
    MismatchError,
    ResizeRule,
    SlotArray,
    WorldloomError,
)

from ..crew import Crew

if TYPE_CHECKING:
    from ..environments import Game, GameConfig
    from ..world import World
    from .start_points import StartPoint

_NULL = -1
"""worldloom.dynamics.NULL, which is not imported: the game's process needs no torch."""


@dataclass(frozen=True, slots=True)
class RecordedGame:
    """A game of which there are recordings."""

    episodes: Path
    spec: EpisodesSpec
    config: "GameConfig"
    resize: ResizeRule
    """How its frames became those of the recordings."""


def recorded_game(episodes: Path, actions: ActionSpec, /) -> RecordedGame | None:
    """Return the game that was recorded, if it was one that can be played here again.

    None, where the episodes are not of a game (ingested videos), or of one whose actions are not
    those of the model.

    Raises:
        FormatError: if the description of the episodes is damaged.
        ConfigError: naming what to install, if the game is not known here.
    """
    from ..environments import GameConfig, find_game

    spec = EpisodesSpec.read(episodes)
    source = spec.source
    if source.get("kind") != "gymnasium" or spec.actions != actions:
        return None
    kinds = {"env": str, "env_kwargs": dict, "image_key": str, "resize": str}
    if any(not isinstance(source.get(name), kind) for name, kind in kinds.items()) or (
        source["resize"] not in get_args(ResizeRule)
    ):
        raise FormatError(
            f"{episodes / 'episodes.json'}: source must say env, env_kwargs, image_key and resize "
            "as `worldloom record` does, for the game to be opened again"
        )
    env = source["env"]
    module, colon, _ = env.rpartition(":")
    if colon and module not in sys.modules:
        # A file may come from a stranger: it does not choose what is imported.
        raise ConfigError(
            f"{episodes / 'episodes.json'}: names {env}, and a file does not get to import the "
            f"module {module}; import it before you play, if you trust it"
        )
    find_game(env)
    continuous = spec.actions.kind == "continuous"
    config = GameConfig(
        env=env,
        env_kwargs=source["env_kwargs"],
        image_key=source["image_key"],
        frame_skip=spec.frame_skip,
        action_bins=spec.actions.sizes[0] if continuous else 11,
    )
    return RecordedGame(episodes, spec, config, source["resize"])


class RealGame:
    """A recorded game, playing along; see `Companion`."""

    def __init__(self, game: RecordedGame, world: "World", /) -> None:
        """Open the game.

        Raises:
            WorldloomError: if it does not open, or takes other actions than were recorded.
        """
        self._game = game
        self._tokenizer = world.tokenizer.spec
        self._last_THWC: Frames | None = None
        """The frame shown last, at the world's size; None once the game is over."""
        self._crew: Crew | None = Crew(_Player, game.config, size=1)
        self._crew.__enter__()
        try:
            actions, self._packages = self._crew.greetings[0]
            self._require(actions)
        except BaseException:
            self.close()
            raise

    def _require(self, actions: ActionSpec) -> None:
        """Refuse a game in which the same number would press another key."""
        spec, env = self._game.spec, self._game.config.env
        if actions != spec.actions:
            raise MismatchError(
                f"{env}: takes {actions.kind} actions ({', '.join(actions.names)}) here, but was "
                f"recorded with {spec.actions.kind} ones ({', '.join(spec.actions.names)}); play "
                "with the version that was recorded"
            )

    def reset(self, start: "StartPoint", /) -> Frames:
        """Bring the game to a recorded moment; return the frame that it shows there.

        Raises:
            ConfigError: if the start is a picture, into which no game can be brought.
            MismatchError: if the game shows another frame there than was recorded.
            WorldloomError: if the game fails.
        """
        key, frame, seed, raw = self._recorded(start)
        self._last_THWC = None
        shown, over = self._ask(_Begin(seed, tuple(raw[:frame])))
        where = f"{self._game.config.env}: after the {frame} actions recorded in {key}"
        with Episodes(self._game.episodes).open(key) as episode:
            recorded_HWC = episode.frames(frame, frame + 1)[0]
        same = bool(shown) and np.array_equal(self._as_recorded(shown[-1])[0], recorded_HWC)
        if over or not same:
            raise MismatchError(
                f"{where}, the game {'is over' if over else 'shows another frame'}, so it would "
                f"not begin where the world does; it was recorded with {self._versions()}. Compare "
                "with the truth instead, or record and train again"
            )
        self._last_THWC = self._as_shown(self._as_recorded(shown[-1]))
        return self._last_THWC

    def step(self, slots_rA: SlotArray, /) -> Frames | None:
        """Do the actions; return the frames that they lead to, None once the game is over.

        The game waits, and shows what it showed, where no action is given: there is no such thing
        in it.

        Raises:
            WorldloomError: if the game fails.
        """
        if self._last_THWC is None:
            return None
        given_r = (slots_rA != _NULL).all(axis=1)
        raw = self._game.spec.actions.decode(slots_rA[given_r])
        shown, over = self._ask(tuple(raw)) if len(raw) else ([], False)
        fresh = [self._as_shown(self._as_recorded(frame)) for frame in shown]
        if over and not fresh:
            self._last_THWC = None
            return None
        frames_THWC = []
        last_THWC = self._last_THWC
        for given in given_r:
            last_THWC = fresh.pop(0) if given and fresh else last_THWC
            frames_THWC.append(last_THWC)
        self._last_THWC = None if over else last_THWC
        return np.concatenate(frames_THWC)

    def close(self) -> None:
        """End the game's process."""
        crew, self._crew = self._crew, None
        if crew is not None:
            crew.__exit__(None, None, None)

    def _recorded(self, start: "StartPoint") -> tuple[str, int, int, ActionArray]:
        """Return the episode of a start, its frame where play begins, its seed and its actions."""
        moment, folder = start.moment, self._game.episodes
        if moment is None:
            raise ConfigError(
                f"{start.label}: is a picture, and no game can be brought into it; start from a "
                "recorded moment to compare with the game"
            )
        key = moment.episode
        episodes = Episodes(folder)
        if key not in episodes.keys:
            raise MismatchError(
                f"{folder}: has no episode {key}, in which {start.label} is; the game can begin "
                "only where it was recorded"
            )
        frame = moment.start_frame + self._tokenizer.codes.pixel_frames(moment.prompt_frames) - 1
        with episodes.open(key) as episode:
            seed, raw, slots_TA = episode.metadata.get("seed"), episode.actions, episode.slots_TA
            length = episode.num_frames
        prompt_TA = start.start.slots_TA
        if (
            not isinstance(seed, int)
            or raw is None
            or slots_TA is None
            or frame >= length
            or not np.array_equal(slots_TA[moment.start_frame : frame], prompt_TA)
        ):
            raise MismatchError(
                f"{folder}: {key} is not the recording in which {start.label} is, or says no seed "
                "or no actions; the game can begin only where it was recorded"
            )
        return key, frame, seed, raw

    def _ask(self, task: "_Begin | tuple[ActionArray, ...]") -> "tuple[list[Frames], bool]":
        """Return what the game's process answers: native frames, and whether the game is over."""
        if self._crew is None:
            raise ConfigError("the game beside the world was closed; switch it on again")
        try:
            answer: tuple[list[Frames], bool] = next(iter(self._crew.answers([task])))
        except WorldloomError as error:
            if not isinstance(error.__cause__, EOFError | ConnectionResetError):
                raise
            raise WorldloomError(
                f"{self._game.config.env}: the game's process ended by itself; switch it off and "
                "on again to start it anew"
            ) from error
        return answer

    def _as_recorded(self, native_HWC: Frames) -> Frames:
        """Return frames_1HWC as `worldloom record` writes a frame of the game."""
        from worldloom.tokenizer import resize_frames

        spec = self._game.spec
        if native_HWC.shape[:2] == (spec.height, spec.width):
            return native_HWC[None]
        return resize_frames(
            native_HWC[None], height=spec.height, width=spec.width, rule=self._game.resize
        )

    def _as_shown(self, recorded_THWC: Frames) -> Frames:
        """Return recorded frames at the world's size."""
        from ..encoding import fit

        return fit(recorded_THWC, self._tokenizer)

    def _versions(self) -> str:
        """Return what the game was recorded with, and what is here."""
        then = self._game.spec.source.get("packages")
        if not isinstance(then, dict) or then == self._packages:
            return "the same versions, so its settings or its state differ"
        said = [", ".join(f"{name} {v}" for name, v in of.items()) for of in (then, self._packages)]
        return f"{said[0]}, and here is {said[1]}"


@dataclass(frozen=True, slots=True)
class _Begin:
    """Begin an episode, and do these raw actions."""

    seed: int
    raw: Sequence[ActionArray]

    def __repr__(self) -> str:
        return f"reset with seed {self.seed} and {len(self.raw)} actions"


class _Player:
    """The game in its process; a Worker of a crew."""

    def __init__(self, config: "GameConfig", /) -> None:
        from ..environments import draw_into_memory, open_game

        draw_into_memory()
        self._game: Game = open_game(config)
        self.greeting = (self._game.actions, self._game.packages)

    def answer(self, task: "_Begin | tuple[ActionArray, ...]", /) -> "tuple[list[Frames], bool]":
        """Return the frames that actions lead to, the last one alone after a beginning."""
        if isinstance(task, _Begin):
            moment = self._game.reset(seed=task.seed)
            for raw in task.raw:
                if moment.terminated or moment.truncated:
                    break
                moment = self._game.step(raw)
            frames = [] if moment.frame_HWC is None else [moment.frame_HWC]
            return frames, moment.terminated or moment.truncated
        frames, over = [], False
        for raw in task:
            moment = self._game.step(raw)
            over = moment.terminated or moment.truncated
            if moment.frame_HWC is not None:
                frames.append(moment.frame_HWC)
            if over:
                break
        return frames, over

    def close(self) -> None:
        """Close the game."""
        self._game.close()
