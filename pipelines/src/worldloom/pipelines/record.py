"""Gymnasium games -> episodes: exact frames, the actions that led to them, their names.

    worldloom record --env VizdoomBasic-v1 --output runs/doom --resize stretch --frame-skip 4

reads nothing and writes EPISODES/episodes.json and one EPISODES/episode-NNNNNN.npz an episode
(docs/formats.md). Episode k depends on the settings, the seed and k alone: any number of workers,
interrupted or not, writes the same bytes.
"""

import json
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from tyro.conf import arg
from worldloom.common import ConfigError, EpisodesSpec, ResizeRule, progress, say

from .checks import require_at_least
from .episode_folder import claimed, keep_spec
from .policies import PolicyConfig, check_policy


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordConfig:
    """Record episodes of a Gymnasium game: frames, actions and what the actions are called.

    worldloom record --env VizdoomBasic-v1 --output runs/doom --resize stretch --frame-skip 4
    """

    env: str
    """Gymnasium id, as in VizdoomBasic-v1, ALE/Pong-v5, MiniGrid-Empty-8x8-v0 or CartPole-v1;
    `module:id` imports the module that registers it first."""
    output: Path
    """Folder for the episodes; the same command again continues where it stopped."""
    num_episodes: int = 100
    """How many episodes the folder has in the end; a larger number later adds the difference."""
    frame_skip: int = 1
    """Game frames per recorded frame: the action is held, rewards are summed, the last kept."""
    height: int = 64
    """Height of the recorded frames."""
    width: int = 64
    """Width of the recorded frames."""
    resize: ResizeRule = "exact"
    """How the game's frames become that size: exact refuses another one; stretch scales each axis
    by itself; crop scales until both axes cover, and cuts; pad until both fit, and adds black."""
    policy: str = "sticky"
    """Who plays: random, sticky (repeats itself), or your own module:callable, called as
    callable(observation, action_space, rng) -> action."""
    stickiness: float = 0.85
    """For the policy sticky: probability that the last action is repeated."""
    action_weights: str = ""
    """How often an action is drawn, against 1 for every other: 'ATTACK=0.3, NOOP=0.1'. For games
    with several keys at once: the probability that a key is down, against 0.5."""
    max_frames: int = 1000
    """Frames at which an episode is cut if the game does not end it."""
    seed: int = 0
    """Episode k depends on this and on k alone."""
    workers: int = 1
    """Processes that play at the same time; the files do not depend on it."""
    env_kwargs: str = ""
    """Settings of the environment, a JSON object or TOML: 'difficulty=1, mode=0'."""
    image_key: str = ""
    """Which entry of a Dict observation is the frame, if its name does not tell (screen, image,
    rgb, pixels, obs)."""
    fps: Annotated[float | None, arg(metavar="FLOAT")] = None
    """Recorded frames per second; the game's own over the frame skip if not given."""
    action_bins: int = 11
    """Bins per axis of continuous actions."""


def record(config: RecordConfig) -> Path:
    """Play until config.output has all its episodes; return that folder."""
    _check(config)
    # Here and not above: `worldloom --help` must not wait for Gymnasium.
    from .crew import Crew
    from .recorder import episode_key, open_recorder

    folder, began = config.output.absolute(), time.monotonic()
    with claimed(folder, config.output, doing="recording"):
        numbers = range(config.num_episodes)
        missing = [k for k in numbers if not (folder / f"{episode_key(k)}.npz").exists()]
        with Crew(
            open_recorder, _job(config, folder), size=min(config.workers, max(1, len(missing)))
        ) as crew:
            spec: EpisodesSpec = crew.greetings[0]
            # A newer game would record other frames, but then there is nothing left to record.
            keep_spec(folder, spec, config.output, complete=not missing)
            kept = config.num_episodes - len(missing)
            reports = list(
                progress(crew.answers(missing), "recording", total=config.num_episodes, done=kept)
            )
    _say_what_was_written(config, spec, reports, time.monotonic() - began)
    return config.output


def _check(config: RecordConfig) -> None:
    """Refuse what no game could use, before anything is started."""
    require_at_least(1, config, "num_episodes", "frame_skip", "height", "width", "max_frames",
                     "workers", "action_bins")  # fmt: skip
    if config.fps is not None and not 0 < config.fps < 1e6:
        raise ConfigError(f"--fps must be a positive number, got {config.fps}")
    check_policy(_policy(config))
    _table("--env-kwargs", config.env_kwargs)


def _table(flag: str, text: str) -> dict[str, Any]:
    """Return the values of a flag that takes a JSON object, or TOML with or without its braces."""
    if not text.strip():
        return {}
    try:
        table = json.loads(text)
    except ValueError:
        inner = text.strip().removeprefix("{").removesuffix("}")
        try:
            table = tomllib.loads(f"table = {{{inner}}}")["table"]
        except ValueError as error:
            raise ConfigError(
                f"{flag} {text!r} is neither a JSON object nor TOML such as 'name=1, other=\"x\"' "
                f"({error})"
            ) from error
    try:
        json.dumps(table, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{flag} {text!r}: {error}; the values are kept as JSON") from error
    if not isinstance(table, dict):
        raise ConfigError(f"{flag} {text!r} must be a table of names and values")
    return table


def _policy(config: RecordConfig) -> PolicyConfig:
    return PolicyConfig(
        policy=config.policy,
        stickiness=config.stickiness,
        action_weights=_table("--action-weights", config.action_weights),
    )


def _job(config: RecordConfig, folder: Path) -> Any:
    """Return what every recording process needs to know."""
    from .environments import GameConfig
    from .recorder import RecordingJob

    policy, env_kwargs = _policy(config), _table("--env-kwargs", config.env_kwargs)
    return RecordingJob(
        folder=folder,
        game=GameConfig(
            env=config.env,
            env_kwargs=env_kwargs,
            image_key=config.image_key,
            frame_skip=config.frame_skip,
            fps=config.fps,
            action_bins=config.action_bins,
        ),
        policy=policy,
        height=config.height,
        width=config.width,
        resize=config.resize,
        max_frames=config.max_frames,
        seed=config.seed,
        source={
            "kind": "gymnasium",
            "env": config.env,
            "env_kwargs": env_kwargs,
            "image_key": config.image_key,
            "policy": config.policy,
            "stickiness": config.stickiness if config.policy == "sticky" else None,
            "action_weights": dict(policy.action_weights),
            "resize": config.resize,
            "max_frames": config.max_frames,
            "seed": config.seed,
        },
    )


def _say_what_was_written(
    config: RecordConfig, spec: EpisodesSpec, reports: list[Any], seconds: float
) -> None:
    frames = sum(report.num_frames for report in reports)
    megabytes = sum(report.size_bytes for report in reports) / 1e6
    kept = config.num_episodes - len(reports)
    say(
        f"{config.output}: wrote {len(reports)} episodes, {frames} frames, {megabytes:.1f} MB "
        f"in {seconds:.1f} s" + (f"; {kept} were there before" if kept else "")
    )
    counts = np.sum([report.action_counts for report in reports], axis=0) if reports else []
    if len(counts) and np.sum(counts):
        share = counts / max(1, frames - len(reports))
        order = np.argsort(-share, kind="stable")[:12]
        say("actions: " + ", ".join(f"{spec.actions.names[i]} {share[i]:.0%}" for i in order))
    runs = config.output.parent
    say(f"next: worldloom train-tokenizer --episodes {config.output} --output {runs / 'tokenizer'}")
