"""Every option of a training at once, and walks of which half have no actions.

python training_options.py SHARDS RUN SETTINGS     trains, for the tests that start processes;
SETTINGS is JSON: {"model": {...}, "training": {...}}
"""

import json
import sys
from pathlib import Path

import torch
from dynamics.toys import STEER, Mover, tiny, train, write_shards
from worldloom.common import TokenShards

TRAINING = {
    "optimizer": "muon",
    "schedule": "wsd",
    "decay_share": 0.5,
    "clip": 0.5,
    "ema_decay": 0.9,
    "z_loss": 1e-3,
    "action_weight": 0.5,
    "micro_windows": 3,  # of 4: one of the two parts is smaller
    "recompute": True,
}
"""Disturbances are on in toys.TRAINING already."""

MODEL = {"action_head": True}


def half_labelled_walks(folder: Path, *, episodes: int = 9) -> TokenShards:
    """Write walks of 3 to 6 frames, so that padding is uneven; nobody knows what made every other.

    The last is held out.
    """
    world = Mover(STEER)
    walks = [world.episode(3 + seed % 4, seed) for seed in range(episodes)]
    known = [(codes, None if n % 2 else slots) for n, (codes, slots) in enumerate(walks)]
    return write_shards(folder, known, world.codes, world.actions)


if __name__ == "__main__":
    torch.set_num_threads(1)
    settings = json.loads(sys.argv[3])
    try:
        train(
            Path(sys.argv[1]),
            Path(sys.argv[2]),
            model=tiny(**settings.get("model", {})),
            **settings.get("training", {}),
        )
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
