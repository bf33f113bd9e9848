"""The pictures of `worldloom evaluate`: numbers are believed when they are seen.

    held-out episodes, rollouts, starts  ->  PNG and GIF files in a folder, and their names

A world model is judged by eye before any number.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from worldloom.common import Frames
from worldloom.dynamics import generate_codes

from .action_sources import single_actions
from .charts import Line, chart_png
from .measures import HeldOut, Plan, Rollouts, RolloutStart
from .pictures import (
    Strip,
    draw_movie,
    draw_sheet,
    encode_gif,
    encode_png,
    enlarge,
    fitting_scale,
)
from .world import World

_COLUMNS = 6
_ROLLOUTS = 3
_HELD_CANDIDATES = 8


def draw_reconstructions(folder: Path, held_out: list[HeldOut], /) -> str:
    """Write reconstructions.png, true above decoded, frames spread over the episodes."""
    frames = torch.cat([episode.frames_THWC for episode in held_out])
    decoded = torch.cat([episode.decoded_THWC for episode in held_out])
    places = np.linspace(0, len(frames) - 1, min(len(frames), 2 * _COLUMNS)).round().astype(int)
    strips = [
        Strip(title="true", frames_THWC=frames[places].numpy()),
        Strip(title="decoded", frames_THWC=decoded[places].numpy()),
    ]
    return _png(folder / "reconstructions.png", draw_sheet(strips, **_sheet_size(strips)))


def draw_rollouts(folder: Path, world: World, rollouts: Rollouts, /) -> list[dict[str, str]]:
    """Write rollout-N.png and rollout-N.gif, true beside generated under the same actions.

    The first is the one in which most changes: a world in which nothing happens shows nothing.
    """
    change_N = (rollouts.true_NTHWC.float() - rollouts.copy_NTHWC.float()).abs().mean((1, 2, 3, 4))
    order = change_N.argsort(descending=True, stable=True).tolist()
    # The others are drawn as they came, so that not only the liveliest are seen.
    chosen = order[:1] + [index for index in range(len(order)) if index != order[0]]
    drawn = []
    for number, index in enumerate(chosen[:_ROLLOUTS]):
        prompt = rollouts.prompt_NTHWC[index].numpy()
        true = np.concatenate([prompt, rollouts.true_NTHWC[index].numpy()])
        made = np.concatenate([prompt, rollouts.model_NTHWC[index].numpy()])
        names = world.model.spec.actions.describe(rollouts.slots_NTA[index].numpy())
        given = len(prompt)
        labels = ["given"] * given + names[given - 1 :]
        above = Strip(title="true", frames_THWC=true[given:], labels=labels[given:])
        below = Strip(title="generated", frames_THWC=made[given:])
        movie = draw_movie(
            [
                Strip(title="what happened", frames_THWC=true),
                Strip(title="generated", frames_THWC=made),
            ],
            scale=fitting_scale(*true.shape[1:3], target=320),
            captions=labels,
        )
        name = f"rollout-{number}"
        sheet = draw_sheet([above, below], **_sheet_size([above, below]))
        drawn.append(
            {
                "png": _png(folder / f"{name}.png", sheet),
                "gif": _gif(folder / f"{name}.gif", movie, world),
            }
        )
    return drawn


@torch.inference_mode()
def draw_held(
    folder: Path,
    world: World,
    starts: Sequence[RolloutStart],
    plan: Plan,
    /,
    *,
    num_frames: int,
) -> list[dict[str, str]]:
    """Write held-NAME.png and held-NAME.gif: each single action held, all from one start.

    The start is the one of the first few from which the actions lead furthest apart: held against a
    wall, every action looks alike.
    """
    actions = single_actions(world.model.spec.actions)
    if not actions:
        return []
    held = [_hold(world, start, plan, num_frames) for start in starts[:_HELD_CANDIDATES]]
    apart = [frames_BTHWC.astype(np.float32).var(axis=0).mean() for frames_BTHWC in held]
    frames_BTHWC = held[int(np.argmax(apart))]
    drawn: list[dict[str, str]] = []
    for (name, _), frames in zip(actions, frames_BTHWC, strict=True):
        strip = Strip(title=name, frames_THWC=frames)
        file = f"held-{re.sub(r'[^A-Za-z0-9_-]+', '-', name).strip('-') or 'none'}"
        if any(entry["gif"] == f"{file}.gif" for entry in drawn):
            file = f"{file}-{len(drawn)}"
        movie = enlarge(frames, times=fitting_scale(*frames.shape[1:3], target=256))
        sheet = draw_sheet([strip], **_sheet_size([strip]))
        drawn.append(
            {
                "action": name,
                "png": _png(folder / f"{file}.png", sheet),
                "gif": _gif(folder / f"{file}.gif", movie, world),
            }
        )
    return drawn


def _hold(world: World, start: RolloutStart, plan: Plan, num_frames: int, /) -> Frames:
    """Return frames_BTHWC, one row a single action: the prompt's last frame, then those held."""
    actions = single_actions(world.model.spec.actions)
    r, first = world.steps_per_latent, start.first
    steps = (plan.prompt_frames - 1) * r
    prompt_thw = start.episode.codes_thw[first : first + plan.prompt_frames]
    given_TA = torch.from_numpy(start.episode.slots_TA[first * r : first * r + steps])
    held = torch.stack(
        [torch.from_numpy(slots_1A).expand(num_frames * r, -1) for _, slots_1A in actions]
    )
    slots_BTA = torch.cat([given_TA.expand(len(actions), -1, -1), held], dim=1)
    codes_Bthw = generate_codes(
        world.model,
        prompt_thw.expand(len(actions), *prompt_thw.shape),
        slots_BTA,
        seeds=[plan.seed] * len(actions),
        sampling=world.sampling,
    )
    length = 1 + steps + num_frames * r
    frames_BTHWC: Frames = world.tokenizer.decode(codes_Bthw, num_frames=length).cpu().numpy()
    return frames_BTHWC[:, steps:]


def draw_drift(folder: Path, numbers: dict[str, Any], /) -> str:
    """Write drift.png: PSNR by frame, between its bound and its baseline."""
    steps = range(1, numbers["horizon_frames"] + 1)
    curves = numbers["per_frame"]
    lines = [
        Line(name="true actions", x=steps, y=curves["model_db"]),
        Line(name="random actions", x=steps, y=curves["random_db"]),
        Line(name="reconstruction (bound)", x=steps, y=curves["reconstruction_db"], dashed=True),
        Line(name="last frame repeated", x=steps, y=curves["copy_db"], dashed=True),
    ]
    chart = chart_png(
        lines, x_label="generated frame", y_label="PSNR to the true frame (dB)", width=8.0
    )
    (folder / "drift.png").write_bytes(chart)
    return "drift.png"


def _sheet_size(strips: list[Strip]) -> dict[str, int]:
    """Return scale and columns of a sheet that fits a page."""
    height, width = strips[0].frames_THWC.shape[1:3]
    return {"scale": fitting_scale(height, width, target=136), "columns": _COLUMNS}


def _png(path: Path, picture_HWC: Frames) -> str:
    """Write a picture; return its name."""
    path.write_bytes(encode_png(picture_HWC))
    return path.name


def _gif(path: Path, frames_THWC: Frames, world: World) -> str:
    """Write a moving picture at the world's pace; return its name."""
    path.write_bytes(encode_gif(frames_THWC, fps=world.model.spec.fps or 10.0))
    return path.name
