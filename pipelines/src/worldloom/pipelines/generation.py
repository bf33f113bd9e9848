"""Starts and their actions -> frames and codes: all futures of all starts as one batch.

    GenerateConfig, World            -> chosen_moments   -> where it starts
    GenerateConfig, Starts           -> chosen_actions   -> slots_TA of each
    World, Jobs, seeds               -> roll             -> Futures: frames, codes, seconds
    World, Jobs, seeds, its Futures  -> compare_decoders -> a Timing of every exact decoder

A job's codes depend on its start, its actions and the seed alone, whatever else is in the batch.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from worldloom.common import (
    ActionSpec,
    ConfigError,
    FormatError,
    Frames,
    SlotArray,
    numpy_stream,
    progress,
)
from worldloom.dynamics import decoders_of

from .action_sources import actions_of_each, random_actions, sticky_actions
from .generate_config import GenerateConfig
from .starts import Moment, Start, held_out_moments
from .world import World
from .world_batch import WorldBatch

_ROUNDS = 2
"""Turns that every decoder gets; its faster one counts, as what else runs here only slows."""


@dataclass(frozen=True, slots=True)
class Job:
    """A start, and what is pressed after it."""

    start: Start
    slots_TA: SlotArray


@dataclass(frozen=True, slots=True)
class OwnFutures:
    """What became of one job, under every seed."""

    frames: list[Frames]
    """frames_THWC of each: of the prompt, and one for every action."""
    codes_Sthw: npt.NDArray[np.int64]
    """Of prompt and future, one of the S rows a seed."""


@dataclass(frozen=True, slots=True)
class Futures:
    """What became of every job under every seed."""

    jobs: list[OwnFutures]
    num_frames: int
    """Pixel frames of the futures, of all worlds together."""
    seconds: float
    """What the futures took, decoded; prompts are not counted."""
    forwards_per_frame: float
    """Of the model, over the latent frames."""

    @property
    def frames_per_s(self) -> float:
        """Pixel frames a second, of all worlds together."""
        return self.num_frames / max(self.seconds, 1e-9)


@dataclass(frozen=True, slots=True)
class Timing:
    """How one decoder did a job."""

    decoder: str
    frames_per_s: float
    forwards_per_frame: float
    same_codes: bool
    """Whether every code is that of the first decoder in the list."""


def chosen_moments(config: GenerateConfig, world: World, /) -> list[Moment]:
    """Return where the futures start, in order.

    Raises:
        ConfigError: if --num-starts asks for more than there are.
        FormatError: if there is nothing at --start.
    """
    steps = config.horizon if config.actions == "true" else 0
    if not config.num_starts:
        named = [
            Moment(
                episode=episode,
                start_frame=config.start_frame,
                prompt_frames=config.prompt_frames,
                sequel_steps=steps,
            )
            for episode in config.episodes
        ]
        return named[:1] if config.start.is_file() else named
    if config.start.is_file():
        raise ConfigError(
            f"--num-starts: {config.start} is one picture, so there is one start; leave it out, or "
            "take --num-samples for several futures of it"
        )
    codes = world.model.spec.tokenizer.codes
    apart = codes.pixel_frames(config.prompt_frames) + config.horizon
    moments = held_out_moments(
        config.start, world, prompt_frames=config.prompt_frames, apart_frames=apart
    )
    if config.num_starts > len(moments):
        raise ConfigError(
            f"--num-starts {config.num_starts}: {config.start} has {len(moments)} held-out starts "
            f"that lie {apart} frames apart (a prompt and --horizon); take at most so many, or a "
            "shorter --horizon"
        )
    return [replace(moment, sequel_steps=steps) for moment in moments[: config.num_starts]]


def chosen_actions(
    config: GenerateConfig, spec: ActionSpec, starts: Sequence[Start], /
) -> list[SlotArray]:
    """Return slots_TA of the steps to generate, of every start.

    Random and sticky actions are drawn once for all: a start alone is given the same.

    Raises:
        ConfigError, FormatError: if what is written is no action, or a start has no true ones.
    """
    if config.actions == "true":
        true = [start.true_slots_TA[: config.horizon] for start in starts]
        for start, slots_TA in zip(starts, true, strict=True):
            if len(slots_TA) == 0:
                raise FormatError(
                    f"{config.start}: no action is known after {start.source} and its prompt, so "
                    "`--actions true` has none to take; start earlier or in another --episode, or "
                    "write some"
                )
        return true
    if config.actions in ("random", "sticky"):
        draw = random_actions if config.actions == "random" else sticky_actions
        slots_TA = draw(spec, config.horizon, rng=numpy_stream(config.seed, "generate-actions"))
        return [slots_TA] * len(starts)
    return actions_of_each(config.actions, spec=spec, starts=len(starts))


def roll(world: World, jobs: Sequence[Job], /, *, seeds: Sequence[int], label: str) -> Futures:
    """Generate every job under every seed, all of them side by side.

    Args:
        world: its model, tokenizer and sampling; it keeps its own state.
        jobs: may be of different lengths; a shorter one holds its last action, and is cut.
        seeds: of the futures of each job.
        label: what a person sees it as.
    """
    r, rows = world.steps_per_latent, [(job, seed) for job in jobs for seed in seeds]
    batch = WorldBatch(
        world.model,
        world.tokenizer,
        [job.start for job, _ in rows],
        seeds=[seed for _, seed in rows],
        sampling=world.sampling,
    )
    # The last latent frame covers r steps, so the last action is held until they are full.
    longest = max(len(job.slots_TA) for job in jobs)
    longest += -longest % r
    slots_BTA = np.stack([_held(job.slots_TA, longest) for job, _ in rows])
    _, given, *pixels = batch.first_BTHWC.shape
    frames_BTHWC = np.empty((len(rows), given + longest, *pixels), np.uint8)
    frames_BTHWC[:, :given] = batch.first_BTHWC
    codes, forwards = [], 0
    began = time.perf_counter()
    for step in progress(range(0, longest, r), label):
        frames_BrHWC, codes_Bhw = batch.step(slots_BTA[:, step : step + r])
        frames_BTHWC[:, given + step : given + step + r] = frames_BrHWC
        codes.append(codes_Bhw.numpy())
        forwards += batch.forwards
    seconds = time.perf_counter() - began
    future_Bthw = np.stack(codes, axis=1)
    own = []
    for number, job in enumerate(jobs):
        mine, steps = slice(number * len(seeds), (number + 1) * len(seeds)), len(job.slots_TA)
        prompt_thw = job.start.codes_thw.numpy()
        prompt_Sthw = np.broadcast_to(prompt_thw, (len(seeds), *prompt_thw.shape))
        own_Sthw = np.concatenate([prompt_Sthw, future_Bthw[mine, : -(-steps // r)]], axis=1)
        own.append(OwnFutures(list(frames_BTHWC[mine, : given + steps]), own_Sthw))
    return Futures(
        jobs=own,
        num_frames=len(seeds) * sum(len(job.slots_TA) for job in jobs),
        seconds=seconds,
        forwards_per_frame=forwards / len(codes),
    )


def compare_decoders(world: World, jobs: Sequence[Job], /, *, seeds: Sequence[int]) -> list[Timing]:
    """Do the same jobs with every decoder of the model's order, its own one first.

    They take turns, and each one's faster turn counts.
    """
    names, before = decoders_of(world.model.config.order), world.sampling
    turns: dict[str, list[Futures]] = {name: [] for name in names}
    try:
        for _ in range(_ROUNDS):
            for name in names:
                world.sampling = replace(before, decoder=name)
                done = roll(world, jobs, seeds=seeds, label=name)
                # Codes and times are all that is compared; frames of every turn would add up.
                codes_alone = [replace(own, frames=[]) for own in done.jobs]
                turns[name].append(replace(done, jobs=codes_alone))
    finally:
        world.sampling = before
    reference = turns[names[0]][0]
    return [
        Timing(
            decoder=name,
            frames_per_s=max(futures.frames_per_s for futures in turns[name]),
            forwards_per_frame=turns[name][0].forwards_per_frame,
            same_codes=all(same_codes(futures, reference) for futures in turns[name]),
        )
        for name in names
    ]


def same_codes(these: Futures, those: Futures) -> bool:
    """Return whether every code of every job is the same in both."""
    pairs = zip(these.jobs, those.jobs, strict=True)
    return all(np.array_equal(mine.codes_Sthw, yours.codes_Sthw) for mine, yours in pairs)


def _held(slots_TA: SlotArray, steps: int) -> SlotArray:
    """Return slots_TA of so many steps: the last action is held."""
    return np.concatenate([slots_TA, np.repeat(slots_TA[-1:], steps - len(slots_TA), axis=0)])
