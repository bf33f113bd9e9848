"""It learns: on worlds whose rule is known, every next frame is right, and actions are why."""

from pathlib import Path

import numpy as np
import pytest
import torch
from dynamics.toys import KEYS, STEER, Mover, tiny, train
from worldloom.dynamics import NULL, DynamicsModel, SamplingConfig, generate_codes

UPDATES = 1000
"""Most updates that learning a world may take; looked at every hundred."""


class Learned(Exception):  # noqa: N818 (no error: how a training is left early)
    """Every frame of every walk is right."""


def learn(world: Mover, folder: Path, *, window_frames: int, **sizes: object) -> DynamicsModel:
    """Train until the world is learned; return the model."""
    models = []

    def on_validation(model: DynamicsModel, _step: int) -> None:
        models[:] = [model]
        if right_frames(world, model) == 1:
            raise Learned

    with pytest.raises(Learned):
        train(
            world.write(folder / "shards", episodes=64, num_frames=16).folder,
            folder / "run",
            model=tiny(**sizes),
            on_validation=on_validation,
            num_steps=UPDATES,
            batch_windows=32,
            window_frames=window_frames,
            learning_rate=1e-2,
            warmup_steps=20,
            corruption=0.0,
            action_dropout=0.1,
            validate_every=100,
            checkpoint_every=UPDATES,
            log_every=100,
        )
    return models[0]


def right_frames(world: Mover, model: DynamicsModel, *, null: bool = False) -> float:
    """Share of frames, of walks never seen, that a free-running rollout of 12 gets wholly right."""
    walks = [world.episode(13, 1000 + number) for number in range(32)]
    codes_Bthw = torch.from_numpy(np.stack([codes for codes, _ in walks]).astype(np.int64))
    slots_BTA = torch.from_numpy(np.stack([slots for _, slots in walks]))
    if null:
        slots_BTA = torch.full_like(slots_BTA, NULL)
    made_Bthw = generate_codes(
        model,
        codes_Bthw[:, :1],
        slots_BTA,
        seeds=range(32),
        sampling=SamplingConfig(temperature=0.0),
    )
    return (made_Bthw == codes_Bthw)[:, 1:].flatten(2).all(-1).float().mean().item()


@pytest.mark.slow
@pytest.mark.parametrize(
    "world", [Mover(STEER), Mover(KEYS, height=2, width=3)], ids=["one action", "several keys"]
)
def test_a_cell_moved_by_actions_is_wholly_right_within_1000_updates(world, tmp_path):
    """One frame and the actions are enough to know the next twelve, past the context of four."""
    model = learn(world, tmp_path, window_frames=4)
    # Without actions the cell may be anywhere near: what is learned is not a guess.
    assert right_frames(world, model, null=True) < 0.4


@pytest.mark.slow
@pytest.mark.parametrize("order", ["raster", "row"])
def test_the_other_orders_learn_it_too(order, tmp_path):
    """Windows longer than the context teach how it slides."""
    world = Mover(STEER, height=2, width=3)
    model = learn(world, tmp_path, window_frames=6, order=order)
    assert right_frames(world, model, null=True) < 0.4


def test_a_toy_worlds_actions_lead_to_the_next_frame():
    """The answer that the learning tests rely on, by hand."""
    moves = {
        STEER: {(0,): (0, 0), (1,): (-1, 0), (2,): (1, 0), (3,): (0, -1), (4,): (0, 1)},
        KEYS: {(0, 0): (0, 0), (1, 0): (1, 0), (2, 0): (0, 1), (1, 2): (1, 1)},
    }
    for actions in (STEER, KEYS):
        codes_thw, slots_TA = Mover(actions).episode(50, 0)
        places = np.argwhere(codes_thw)[:, 1:]
        assert len(places) == 50
        assert {tuple(slots) for slots in slots_TA.tolist()} == moves[actions].keys()
        for step, slots_A in enumerate(slots_TA.tolist()):
            moved = places[step] + moves[actions][tuple(slots_A)]
            assert (moved % 4 == places[step + 1]).all()
