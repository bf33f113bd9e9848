"""One recording process: the number of an episode -> a file that depends on (seed, number) alone.

    RecordingJob -> open_recorder -> Recorder.answer(7) -> episode-000007.npz, EpisodeReport

`actions[i]` is chosen on seeing frame i and leads to frame i + 1. An environment that ends on a
blank placeholder (VizDoom does) loses that last frame and the action before it; its reward still
counts in the metadata's `total_reward`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from worldloom.common import (
    ActionArray,
    ActionSpec,
    ConfigError,
    EpisodesSpec,
    EpisodeWriter,
    Frames,
    ResizeRule,
    derive_seed,
    numpy_stream,
)

from .environments import Game, GameConfig, draw_into_memory, open_game
from .policies import PolicyConfig, make_policy

_BATCH_FRAMES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordingJob:
    """What every recording process needs to know."""

    folder: Path
    """Where the episodes go, absolute: games run in a temporary folder."""
    game: GameConfig
    policy: PolicyConfig
    height: int
    width: int
    resize: ResizeRule
    max_frames: int
    seed: int
    source: Mapping[str, Any] = field(default_factory=dict)
    """What episodes.json says of the settings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeReport:
    """What was written of one episode."""

    key: str
    num_frames: int
    size_bytes: int
    action_counts: tuple[int, ...]
    """Steps of each value (discrete) or with each key down (keys); empty for other actions."""


def episode_key(number: int, /) -> str:
    """Return the key of an episode: the order of the keys is the order of the numbers."""
    return f"episode-{number:06d}"


def open_recorder(job: RecordingJob, /) -> "Recorder":
    """Open the game and the policy.

    Raises:
        ConfigError: if the game, the policy or the frame size cannot be had.
    """
    draw_into_memory()
    return Recorder(job, open_game(job.game))


class Recorder:
    """Plays one game, episode after episode, and writes down what is seen and done."""

    def __init__(self, job: RecordingJob, game: Game) -> None:
        self._job = job
        self._game = game
        self._new_policy = make_policy(job.policy, game)
        _require_size(job, game.native_size)
        self.greeting = EpisodesSpec(
            actions=game.actions,
            height=job.height,
            width=job.width,
            fps=game.fps,
            frame_skip=game.frame_skip,
            source={
                **job.source,
                "native_height": game.native_size[0],
                "native_width": game.native_size[1],
                "packages": game.packages,
            },
        )

    def answer(self, number: int, /) -> EpisodeReport:
        """Play and write one episode."""
        job, key = self._job, episode_key(number)
        rng = numpy_stream(job.seed, "policy", number)
        env_seed = derive_seed(job.seed, "env", number) % 2**31
        policy = self._new_policy()
        actions: list[ActionArray] = []
        rewards: list[float] = []
        with EpisodeWriter(job.folder, key, spec=self.greeting) as writer:
            moment = self._game.reset(seed=env_seed)
            assert moment.frame_HWC is not None  # only a step can end in a placeholder
            waiting = [moment.frame_HWC]
            total_reward = 0.0
            while len(actions) + 1 < job.max_frames and not (moment.terminated or moment.truncated):
                action = policy.act(moment.observation, rng)
                moment = self._game.step(action)
                total_reward += moment.reward
                if moment.frame_HWC is not None:
                    waiting.append(moment.frame_HWC)
                    actions.append(action)
                    rewards.append(moment.reward)
                if len(waiting) == _BATCH_FRAMES:
                    self._flush(writer, waiting)
            self._flush(writer, waiting)
            raw = _stack(self._game.actions, actions)
            ended = moment.terminated or moment.truncated
            writer.finish(
                raw,
                rewards=np.asarray(rewards, np.float32),
                metadata={
                    "seed": env_seed,
                    "total_reward": total_reward,
                    "terminated": moment.terminated,
                    "truncated": moment.truncated or not ended,
                },
            )
        return EpisodeReport(
            key=key,
            num_frames=len(actions) + 1,
            size_bytes=(job.folder / f"{key}.npz").stat().st_size,
            action_counts=_count(self._game.actions, raw),
        )

    def close(self) -> None:
        """Close the game."""
        self._game.close()

    def _flush(self, writer: EpisodeWriter, waiting: list[Frames]) -> None:
        """Resize and write the frames that wait."""
        if waiting:
            for frame_HWC in self._resize(waiting):
                writer.append(frame_HWC)
            waiting.clear()

    def _resize(self, frames: Sequence[Frames]) -> Frames:
        job = self._job
        frames_THWC = np.stack(frames)
        if frames_THWC.shape[1:3] == (job.height, job.width):
            return frames_THWC
        import torch

        # Each process has one thread: two that resize with two threads each wait for one another.
        torch.set_num_threads(1)
        from worldloom.tokenizer import resize_frames

        return resize_frames(frames_THWC, height=job.height, width=job.width, rule=job.resize)


def _require_size(job: RecordingJob, size: tuple[int, int]) -> None:
    """Refuse, before anything is played, frames that would have to be resized without a rule."""
    height, width = size
    if job.resize == "exact" and size != (job.height, job.width):
        raise ConfigError(
            f"--env {job.game.env} draws {height}x{width} frames (height x width), not "
            f"{job.height}x{job.width}; give --height {height} --width {width}, "
            "or --resize stretch, crop or pad"
        )


def _stack(spec: ActionSpec, actions: Sequence[ActionArray]) -> ActionArray:
    """Return the raw actions of all steps; an episode of one frame has none."""
    dtype = np.float32 if spec.kind == "continuous" else np.int64
    shape = (len(actions),) if spec.kind == "discrete" else (len(actions), spec.raw_width)
    return np.asarray(actions, dtype).reshape(shape)


def _count(spec: ActionSpec, raw: ActionArray) -> tuple[int, ...]:
    if spec.kind == "discrete":
        return tuple(np.bincount(raw, minlength=len(spec.names)).tolist())
    return tuple(raw.sum(0).tolist()) if spec.kind == "keys" else ()
