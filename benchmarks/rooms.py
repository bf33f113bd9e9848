"""A game of codes that any grid can play, and models of the demo's size that learned it.

grid, seed             ->  write_rooms  ->  token shards
shards, settings       ->  learned      ->  DynamicsModel that knows the game
shards, order          ->  fresh        ->  DynamicsModel that knows nothing, and takes as long

Rooms of codes that scroll with two of four actions, a sprite that moves with the others, and cells
that flicker at random. People hold their keys: an action stays three times out of four.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from worldloom.common import (
    ActionSpec,
    CodeSpec,
    TokenEpisode,
    TokenizerSpec,
    TokenShards,
    write_manifest,
    write_shard,
)
from worldloom.dynamics import (
    DynamicsConfig,
    DynamicsModel,
    DynamicsSpec,
    DynamicsTrainingConfig,
    train_dynamics_model,
)

ACTIONS = ActionSpec.discrete(["left", "right", "up", "down"])
DEMO: Mapping[str, Any] = {"num_layers": 4, "dim": 192, "num_heads": 6, "num_meta_tokens": 16}
TINY: Mapping[str, Any] = {"num_layers": 2, "dim": 32, "num_heads": 2, "num_meta_tokens": 4}
CONTEXT_FRAMES = 8
VOCABULARY, ROOMS, FLICKER = 1024, 4, 0.05


def walk(grid: int, frames: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return codes_thw and slots_TA of a walk through rooms that all walks share."""
    rooms = np.random.default_rng(grid).integers(16, VOCABULARY, (ROOMS, grid, 3 * grid))
    rng = np.random.default_rng([seed, grid])
    room = rooms[rng.integers(ROOMS)]
    size = max(1, grid // 4)
    view, height = rng.integers(3 * grid), rng.integers(grid - size + 1)
    slots_TA, codes = rng.integers(0, 4, (frames - 1, 1)), []
    for step in range(1, frames - 1):
        if rng.random() < 0.75:
            slots_TA[step] = slots_TA[step - 1]
    for frame in range(frames):
        if frame:
            action = int(slots_TA[frame - 1, 0])
            view += {0: -1, 1: 1}.get(action, 0)
            height = np.clip(height + {2: -1, 3: 1}.get(action, 0), 0, grid - size)
        codes_hw = np.roll(room, -view, axis=1)[:, :grid].copy()
        flickers = rng.random(codes_hw.shape) < FLICKER
        codes_hw[flickers] = rng.integers(0, 4, int(flickers.sum()))
        middle = (grid - size) // 2
        codes_hw[height : height + size, middle : middle + size] = 4
        codes.append(codes_hw)
    return np.stack(codes), slots_TA


def write_rooms(folder: Path, grid: int, *, episodes: int, seed: int) -> TokenShards:
    """Write shards of walks, if they are not there; the last four are held out."""
    if (folder / "manifest.json").exists():
        return TokenShards(folder)
    folder.mkdir(parents=True, exist_ok=True)
    codes = CodeSpec(vocab_size=VOCABULARY, grid_height=grid, grid_width=grid, code_dim=16)
    walks = [walk(grid, 40, 1000 * seed + number) for number in range(episodes)]
    rows = [
        TokenEpisode(
            key=f"walk{number}",
            codes_thw=codes_thw,
            slots_TA=slots_TA,
            num_frames=len(codes_thw),
            split="validation" if number >= episodes - 4 else "train",
        )
        for number, (codes_thw, slots_TA) in enumerate(walks)
    ]
    record = write_shard(folder, 0, rows, codes=codes, actions=ACTIONS)
    write_manifest(
        folder,
        [record],
        tokenizer=TokenizerSpec(
            name="rooms", codes=codes, height=8 * grid, width=8 * grid, resize="exact", fps=10.0,
            frame_skip=1, compute_dtype="float32", fingerprint="0" * 64,
        ),
        actions=ACTIONS,
        codebook_VZ=np.random.default_rng(0).normal(size=(VOCABULARY, 16)).astype("f4"),
        fps=10.0,
        frame_skip=1,
        metrics={},
        source={"game": "rooms"},
    )  # fmt: skip
    return TokenShards(folder)


def learned(
    shards: TokenShards, run: Path, *, sizes: Mapping[str, Any], updates: int, seed: int
) -> DynamicsModel:
    """Return a model of order raster, trained unless it lies there already.

    Large grids get fewer windows an update, so that every update takes about as long.
    """
    folder = run / "model"
    if not folder.exists():
        folder = train_dynamics_model(
            shards,
            run,
            model=DynamicsConfig(order="raster", context_frames=CONTEXT_FRAMES, **sizes),
            training=DynamicsTrainingConfig(
                num_steps=updates,
                batch_windows=max(2, min(16, 384 // _cells(shards))),
                # Longer than the context: what slides out has to be missed in training, too.
                window_frames=CONTEXT_FRAMES + 2,
                warmup_steps=min(20, updates - 1),
                validate_every=updates,
                checkpoint_every=max(1, updates // 4),
                log_every=max(1, updates // 10),
                seed=seed,
                bf16=True,
            ),
            cpu=True,
        )
    return DynamicsModel.from_pretrained(folder)


def fresh(shards: TokenShards, order: str, *, sizes: Mapping[str, Any], seed: int) -> DynamicsModel:
    """Return a model of an order with the weights it begins with."""
    config = DynamicsConfig(order=order, context_frames=CONTEXT_FRAMES, **sizes)
    model = DynamicsModel(config, DynamicsSpec.of(shards), shards.codebook_VZ(), seed=seed)
    return model.eval().requires_grad_(requires_grad=False)


def with_context(model: DynamicsModel, shards: TokenShards, frames: int) -> DynamicsModel:
    """Return the same weights with another context."""
    config = replace(model.config, context_frames=frames)
    other = DynamicsModel(config, model.spec, shards.codebook_VZ())
    other.load_state_dict(model.state_dict())
    return other.eval().requires_grad_(requires_grad=False)


def _cells(shards: TokenShards) -> int:
    return shards.codes.grid_height * shards.codes.grid_width
