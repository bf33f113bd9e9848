"""The measurements of `worldloom evaluate`. Each takes a world and held-out episodes.

    EPISODES            -> read_held_out -> frames, codes and actions of each held-out episode
    held-out episodes   -> reconstruction, given_the_past, first_frames -> numbers
    starts              -> roll_out -> true and generated frames        -> score -> numbers
    a start             -> clock    -> frames per second

Squared errors are pooled before they become decibels; see worldloom.tokenizer.metrics.
"""

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from worldloom.common import (
    Episodes,
    FormatError,
    SlotArray,
    derive_seed,
    numpy_stream,
    progress,
    say,
)
from worldloom.dynamics import generate_codes
from worldloom.tokenizer import VideoTokenizer
from worldloom.tokenizer.metrics import decibels, squared_error

from . import evaluate_tokenizer
from .action_sources import random_actions
from .encoding import CLIP_FRAMES, batches, decode_videos, encode_videos, fit
from .world import World

_SIDE_BY_SIDE = 16
"""Videos that the tokenizer takes at once."""

_SPEED_STRETCHES, _SPEED_SECONDS, _WARM_UP_STEPS = 5, 0.6, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How rollouts are made."""

    prompt_frames: int
    """Latent frames given."""
    horizon: int
    """Latent frames generated."""
    batch: int
    """Rollouts side by side."""
    seed: int
    """Of the starts, of the random actions and of the sampling."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """One held-out episode, in every form; those without known actions can only be decoded."""

    key: str
    frames_THWC: Tensor
    """uint8, at the tokenizer's size."""
    decoded_THWC: Tensor
    """uint8, encoded and decoded."""
    codes_thw: Tensor
    slots_TA: SlotArray
    """No rows where nobody knows the actions."""
    labelled: bool = True
    """Whether somebody does."""


@dataclass(frozen=True, slots=True)
class RolloutStart:
    """A moment of a held-out episode with enough of what follows."""

    episode: HeldOut
    first: int
    """Latent frame where the prompt begins."""


@dataclass(frozen=True, slots=True)
class Rollouts:
    """True frames and what was made of the same starts, all uint8, rollouts first.

    N rollouts; every tensor covers the generated frames only, the prompt's are before them.
    """

    true_NTHWC: Tensor
    model_NTHWC: Tensor
    """Generated under the true actions."""
    random_NTHWC: Tensor
    """Generated under random actions, from the same starts and seeds."""
    copy_NTHWC: Tensor
    """The prompt's last true frame, repeated."""
    decoded_NTHWC: Tensor
    """The true frames, encoded and decoded: the most a rollout can reach."""
    prompt_NTHWC: Tensor
    slots_NTA: Tensor
    """True actions from the prompt's first frame on."""


def read_held_out(
    episodes: Episodes, keys: Sequence[str], tokenizer: VideoTokenizer, /
) -> list[HeldOut]:
    """Return the held-out episodes as frames, codes and actions.

    Raises:
        FormatError: if one is damaged, or does not fit the tokenizer's rule of sizes.
    """
    read = []
    for key in progress(keys, "reading held-out episodes"):
        frames_THWC, slots_TA = _read(episodes, key, tokenizer)
        read.append((key, frames_THWC, slots_TA))
    lengths = [len(frames_THWC) for _, frames_THWC, _ in read]
    videos = [[frames_THWC] for _, frames_THWC, _ in read]
    codes = encode_videos(videos, lengths, tokenizer, batch=_SIDE_BY_SIDE)
    decoded = decode_videos(codes, lengths, tokenizer, batch=_SIDE_BY_SIDE)
    none_TA = np.zeros((0, episodes.spec.actions.num_slots), np.int64)
    return [
        HeldOut(
            key,
            frames_THWC,
            decoded_THWC,
            codes_thw,
            none_TA if slots_TA is None else slots_TA,
            labelled=slots_TA is not None,
        )
        for (key, frames_THWC, slots_TA), codes_thw, decoded_THWC in zip(
            read, codes, decoded, strict=True
        )
    ]


def with_actions(held_out: Sequence[HeldOut], world: World, /, *, where: str) -> Sequence[HeldOut]:
    """Return the episodes whose actions are known: a model of actions is judged by no others.

    Args:
        held_out: of one folder.
        world: has the model.
        where: the folder, for errors.

    Raises:
        FormatError: if there is none.
    """
    # Video without any actions, for a model that has some, has the slots of none.
    width = world.model.spec.actions.num_slots
    known = [e for e in held_out if e.labelled and e.slots_TA.shape[1] == width]
    if not known:
        raise FormatError(
            f"{where}: of its {len(held_out)} held-out episodes none has known actions, and a "
            "model that answers actions cannot be judged without; evaluate on episodes that have, "
            "or leave out --model to judge the tokenizer alone"
        )
    if len(known) < len(held_out):
        say(
            f"{where}: {len(held_out) - len(known)} of {len(held_out)} held-out episodes have no "
            "known actions; the model is judged by the others, the tokenizer by all"
        )
    return known


def reconstruction(held_out: Sequence[HeldOut], /, *, narrower_than: int = 5) -> dict[str, Any]:
    """Return how true held-out episodes are, decoded; see `evaluate_tokenizer.reconstruction`."""
    clips = (
        pair
        for episode in held_out
        for pair in zip(
            torch.split(episode.frames_THWC, CLIP_FRAMES),
            torch.split(episode.decoded_THWC, CLIP_FRAMES),
            strict=True,
        )
    )
    return evaluate_tokenizer.reconstruction(clips, narrower_than=narrower_than)


@torch.inference_mode()
def given_the_past(world: World, held_out: Sequence[HeldOut], batch: int, /) -> dict[str, Any]:
    """Return cross-entropy and accuracy of every held-out frame's codes, given the true past.

    Windows of the model's context, end to end: every frame but an episode's first is predicted
    once, from at most context - 1 frames before it. Where cells have levels every code counts by
    itself, given the true ones below it, and "levels" has the numbers of each level.
    """
    model, r = world.model, world.steps_per_latent
    length = model.config.context_frames
    windows = defaultdict(list)
    for episode in held_out:
        for first in range(0, len(episode.codes_thw) - 1, length - 1):
            codes_thw = episode.codes_thw[first : first + length]
            stop = first + len(codes_thw) - 1
            slots_TA = _padded(episode.slots_TA, (len(episode.codes_thw) - 1) * r)
            windows[len(codes_thw)].append((codes_thw, slots_TA[first * r : stop * r]))
    depth = model.spec.tokenizer.codes.num_levels
    nats_Q, right_Q = torch.zeros(2, depth, dtype=torch.float64)
    count = 0
    for group in windows.values():
        for rows in batches(group, batch):
            codes_Bthw = torch.stack([codes for codes, _ in rows]).to(model.device)
            slots_BTA = torch.stack([slots for _, slots in rows]).to(model.device)
            logits_NV = model(codes_Bthw, slots_BTA).float().flatten(0, -2)
            targets_N = codes_Bthw[:, 1:].flatten()
            nats_N = cross_entropy(logits_NV, targets_N, reduction="none")
            right_N = logits_NV.argmax(-1) == targets_N
            nats_Q += nats_N.reshape(-1, depth).sum(0).cpu()
            right_Q += right_N.reshape(-1, depth).sum(0).cpu()
            count += targets_N.numel() // depth
    each = {
        "cross_entropy": (nats_Q / count).tolist(),
        "teacher_forced_accuracy": (right_Q / count).tolist(),
    }
    means = {name: sum(values) / depth for name, values in each.items()}
    return {**means, "levels": each} if depth > 1 else means


def first_frames(
    world: World, held_out: Sequence[HeldOut], plan: Plan, /, *, count: int
) -> dict[str, Any]:
    """Return the share of right codes in the first sampled frame, and in the frame before it.

    Where cells have levels every code counts by itself.
    """
    starts = find_starts(
        held_out,
        frames=plan.prompt_frames + 1,
        count=count,
        world=world,
        seed=plan.seed,
    )
    right, copied = [], []
    for rows in batches(starts, plan.batch):
        codes_Bthw, slots_BTA = _cut(rows, plan.prompt_frames + 1, world)
        prompt_Bthw, true_Bhw = codes_Bthw[:, :-1], codes_Bthw[:, -1]
        generated_Bthw = generate_codes(
            world.model,
            prompt_Bthw,
            slots_BTA,
            seeds=_seeds(rows, plan.seed),
            sampling=world.sampling,
        )
        right.append((generated_Bthw[:, -1].cpu() == true_Bhw).flatten())
        copied.append((prompt_Bthw[:, -1] == true_Bhw).flatten())
    return {
        "free_running_accuracy": float(torch.cat(right).float().mean()),
        "copy_accuracy": float(torch.cat(copied).float().mean()),
        "num_first_frames": len(starts),
    }


def find_starts(
    held_out: Sequence[HeldOut], /, *, frames: int, count: int, world: World, seed: int
) -> list[RolloutStart]:
    """Return at most `count` moments that are followed by enough latent frames, drawn by the seed.

    Raises:
        FormatError: if no episode is that long.
    """
    r = world.steps_per_latent
    # Only whole latent frames: the last may cover steps that the episode did not have.
    every = [
        RolloutStart(episode, first)
        for episode in held_out
        for first in range((len(episode.frames_THWC) - 1) // r + 1 - frames + 1)
    ]
    if not every:
        longest = max(len(episode.codes_thw) for episode in held_out)
        raise FormatError(
            f"no held-out episode has the {frames} latent frames of a prompt and its horizon, the "
            f"longest has {longest}; lower --horizon or --prompt-frames, or record longer episodes"
        )
    order = numpy_stream(seed, "evaluate-starts", frames).permutation(len(every))[:count]
    return [every[index] for index in order]


@torch.inference_mode()
def roll_out(world: World, starts: Sequence[RolloutStart], plan: Plan, /) -> Rollouts:
    """Generate from every start, under the true and under random actions."""
    spec, tokenizer = world.model.spec.actions, world.tokenizer
    r, prompt_frames = world.steps_per_latent, plan.prompt_frames
    frames = prompt_frames + plan.horizon
    given = 1 + (prompt_frames - 1) * r
    num_frames = 1 + (frames - 1) * r
    parts: dict[str, list[Tensor]] = defaultdict(list)
    rng = numpy_stream(plan.seed, "evaluate-random-actions")
    for rows in progress(list(batches(starts, plan.batch)), "rolling out"):
        codes_Bthw, slots_BTA = _cut(rows, frames, world)
        steps = plan.horizon * r
        drawn = [random_actions(spec, steps, rng=rng) for _ in rows]
        random_BTA = slots_BTA.clone()
        random_BTA[:, -steps:] = torch.from_numpy(np.stack(drawn))
        for name, actions_BTA in (("model", slots_BTA), ("random", random_BTA)):
            generated_Bthw = generate_codes(
                world.model,
                codes_Bthw[:, :prompt_frames],
                actions_BTA,
                seeds=_seeds(rows, plan.seed),
                sampling=world.sampling,
            )
            parts[name].append(tokenizer.decode(generated_Bthw, num_frames=num_frames).cpu())
        for start in rows:
            here = slice(start.first * r, start.first * r + num_frames)
            parts["true"].append(start.episode.frames_THWC[here][None])
            parts["decoded"].append(start.episode.decoded_THWC[here][None])
        parts["slots"].append(slots_BTA)
    whole = {name: torch.cat(part) for name, part in parts.items()}
    true_NTHWC = whole["true"]
    return Rollouts(
        true_NTHWC=true_NTHWC[:, given:],
        model_NTHWC=whole["model"][:, given:],
        random_NTHWC=whole["random"][:, given:],
        copy_NTHWC=true_NTHWC[:, given - 1 : given].expand_as(true_NTHWC[:, given:]),
        decoded_NTHWC=whole["decoded"][:, given:],
        prompt_NTHWC=true_NTHWC[:, :given],
        slots_NTA=whole["slots"],
    )


def score(rollouts: Rollouts, plan: Plan, /) -> dict[str, Any]:
    """Return the numbers of rollouts: PSNR in all and by frame, against both baselines."""
    others = {
        "model": rollouts.model_NTHWC,
        "random": rollouts.random_NTHWC,
        "copy": rollouts.copy_NTHWC,
        "reconstruction": rollouts.decoded_NTHWC,
    }
    errors_T = {
        name: squared_error(rollouts.true_NTHWC, other).double().mean((0, 2, 3))
        for name, other in others.items()
    }
    psnr = {name: decibels(float(error.mean())) for name, error in errors_T.items()}
    curves = {name: [decibels(float(value)) for value in error] for name, error in errors_T.items()}
    steps = np.arange(len(curves["model"]))
    slope = float(np.polyfit(steps, curves["model"], 1)[0]) if len(steps) > 1 else 0.0
    return {
        "psnr_db": psnr["model"],
        "copy_psnr_db": psnr["copy"],
        "random_psnr_db": psnr["random"],
        "reconstruction_psnr_db": psnr["reconstruction"],
        "psnr_over_copy_db": psnr["model"] - psnr["copy"],
        "delta_psnr_db": psnr["model"] - psnr["random"],
        "drift_db_per_frame": slope,
        "prompt_frames": plan.prompt_frames,
        "horizon_frames": len(steps),
        "num_rollouts": len(rollouts.true_NTHWC),
        "per_frame": {f"{name}_db": curve for name, curve in curves.items()},
    }


def clock(world: World, start: RolloutStart, plan: Plan, /) -> dict[str, Any]:
    """Return how fast one world runs: the median over stretches, and times of single frames."""
    r = world.steps_per_latent
    codes_Bthw, slots_BTA = _cut([start], plan.prompt_frames + 1, world)
    prompt_steps = (plan.prompt_frames - 1) * r
    slots_TA = slots_BTA[0].numpy()
    world.reset(codes_Bthw[0, :-1], slots_TA[:prompt_steps], seed=plan.seed)
    slots_rA = slots_TA[prompt_steps:]
    for _ in range(_WARM_UP_STEPS):
        world.step(slots_rA)
    speeds: list[float] = []
    seconds: list[float] = []
    for _ in range(_SPEED_STRETCHES):
        began, done = time.perf_counter(), 0
        while time.perf_counter() - began < _SPEED_SECONDS:
            before = time.perf_counter()
            world.step(slots_rA)
            seconds.append((time.perf_counter() - before) / r)
            done += r
        speeds.append(done / (time.perf_counter() - began))
    return {
        "frames_per_s": float(np.median(speeds)),
        "p50_ms": 1000 * float(np.percentile(seconds, 50)),
        "p95_ms": 1000 * float(np.percentile(seconds, 95)),
    }


def _read(
    episodes: Episodes, key: str, tokenizer: VideoTokenizer
) -> tuple[Tensor, SlotArray | None]:
    """Return one episode's frames_THWC at the tokenizer's size, and its slots_TA, if known."""
    with episodes.open(key) as episode:
        frames = fit(episode.frames(), tokenizer.spec)
        slots_TA = episode.slots_TA
    return torch.from_numpy(np.ascontiguousarray(frames)), slots_TA


def _cut(starts: Sequence[RolloutStart], frames: int, world: World) -> tuple[Tensor, Tensor]:
    """Return codes_Bthw of `frames` latent frames from each start, slots_BTA between them."""
    r = world.steps_per_latent
    codes = [s.episode.codes_thw[s.first : s.first + frames] for s in starts]
    slots = [
        torch.from_numpy(s.episode.slots_TA[s.first * r : (s.first + frames - 1) * r])
        for s in starts
    ]
    return torch.stack(codes), torch.stack(slots)


def _seeds(starts: Sequence[RolloutStart], seed: int) -> list[int]:
    """Return one seed a start, which does not depend on the batch it is in."""
    return [derive_seed(seed, "evaluate", s.episode.key, s.first) for s in starts]


def _padded(slots_TA: SlotArray, steps: int) -> Tensor:
    """Return slots of `steps` steps: those of a last latent frame that is not full are null."""
    missing = steps - len(slots_TA)
    padded: npt.NDArray[np.int64] = np.pad(slots_TA, ((0, missing), (0, 0)), constant_values=-1)
    return torch.from_numpy(padded)
