"""Worlds to play in tests of sessions: small, deaf to nothing, one of every kind that differs.

"plain" | "video" | "levels" ...  ->  write_world -> a folder laid out as demo does it
a loaded world                    ->  some_start, some_keys -> where, and what to press
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from chain_worlds import PUSHES, save_tokenizer
from worldloom.common import ActionSpec
from worldloom.dynamics import NULL, DynamicsConfig, DynamicsModel, DynamicsSpec, SamplingConfig
from worldloom.pipelines.action_sources import random_actions
from worldloom.pipelines.play.start_points import StartPoint
from worldloom.pipelines.starts import Start
from worldloom.pipelines.world import World
from worldloom.tokenizer import ConvTokenizer, QuantizerConfig, TokenizerConfig, Trained

WARM = SamplingConfig(temperature=1.0, min_p=0.0)
GUIDED = SamplingConfig(temperature=1.0, min_p=0.0, guidance_scale=2.5, parallel_keep_frac=0.5)
CONTEXT = 5


@dataclass(frozen=True)
class Kind:
    """What a world differs in."""

    actions: ActionSpec
    order: str = "raster"
    num_levels: int = 1
    frames_per_latent: int = 1


KINDS = {
    "plain": Kind(PUSHES),
    "video": Kind(ActionSpec.keys(["up", "down", "left"], max_keys=2), "row", frames_per_latent=2),
    "levels": Kind(ActionSpec.continuous([-1.0], [1.0], names=["turn"], bins=5), num_levels=2),
    "frame": Kind(ActionSpec.multi_discrete([3, 2], names=["move", "fire"]), "frame"),
    "masked": Kind(PUSHES, "masked"),
}


def write_world(folder: Path, kind: str, /, *, seed: int = 1) -> Path:
    """Write a model of random weights and its tokenizer; return the folder."""
    about = KINDS[kind]
    if about.frames_per_latent == 1:
        path = save_tokenizer(folder / "tokenizer" / "model", num_levels=about.num_levels)
        tokenizer = ConvTokenizer.from_pretrained(path)
    else:
        config = TokenizerConfig(
            height=16,
            width=16,
            architecture="video",
            temporal_stride=about.frames_per_latent,
            widths=(8,),
            num_blocks=(1,),
            quantizer=QuantizerConfig(kind="fsq", fsq_levels=(5, 3)),
        )
        tokenizer = ConvTokenizer(config, trained=Trained(fps=8.75, frame_skip=4)).eval()
        tokenizer.save(folder / "tokenizer" / "model", card="tiny")
    model = DynamicsModel(
        DynamicsConfig(
            num_layers=2,
            dim=32,
            num_heads=2,
            order=about.order,
            context_frames=CONTEXT,
            num_meta_tokens=2,
            action_head=True,
        ),
        DynamicsSpec(tokenizer=tokenizer.spec, actions=about.actions, fps=8.75, frame_skip=4),
        tokenizer.codebook.numpy(),
        seed=seed,
    ).eval()
    with torch.no_grad():  # fresh weights hardly listen; these do, at random
        model.actions.table.weight.mul_(50)
        model.cell.weight.mul_(25)
        for name, weight in model.head.named_parameters():
            if "to_logits" in name:
                weight.mul_(20)
    model.save(folder / "dynamics" / "model", card="tiny")
    return folder


def load_world(folder: Path, /) -> World:
    """Load what `write_world` wrote."""
    return World.from_pretrained(
        folder / "dynamics" / "model", str(folder / "tokenizer" / "model"), sampling=WARM
    )


def some_start(world: World, /, *, seed: int = 0, frames: int = 2) -> StartPoint:
    """A prompt of random codes, between whose frames no action is known."""
    codes = world.model.spec.tokenizer.codes
    generator = torch.Generator().manual_seed(seed)
    codes_thw = torch.randint(codes.vocab_size, codes.codes_shape(frames), generator=generator)
    shape = ((frames - 1) * world.steps_per_latent, world.model.spec.actions.num_slots)
    start = Start(codes_thw, np.full(shape, NULL), np.zeros((0, shape[1]), np.int64), None, "here")
    return StartPoint(start, np.zeros((16, 16, 3), np.uint8), f"start {seed}")


def some_keys(world: World, steps: int, /, *, seed: int = 0) -> list[np.ndarray]:
    """The slots_rA of so many steps; now and then nobody says what is pressed."""
    spec, r = world.model.spec.actions, world.steps_per_latent
    rng = np.random.default_rng(seed)
    slots_TA = random_actions(spec, steps * r, rng=rng)
    slots_TA[rng.random(len(slots_TA)) < 0.1] = NULL
    return list(slots_TA.reshape(steps, r, spec.num_slots))
