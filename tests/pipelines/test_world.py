"""Promises of World: it can be branched, and how it is drawn can change on the way."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from worldloom.common import ConfigError
from worldloom.dynamics import SamplingConfig
from worldloom.pipelines.world import World


@pytest.fixture
def world(tiny_chain):
    """A world that was started."""
    world = World(
        tiny_chain.model, tiny_chain.tokenizer, sampling=SamplingConfig(temperature=1.0, min_p=0.0)
    )
    generator = torch.Generator().manual_seed(0)
    codes = tiny_chain.model.spec.tokenizer.codes
    codes_thw = torch.randint(codes.vocab_size, codes.codes_shape(3), generator=generator)
    world.reset(codes_thw, np.zeros((2 * world.steps_per_latent, 1), np.int64), seed=7)
    return world


def go(world, actions):
    """Frames and codes of holding each action for one latent frame."""
    steps = [world.step(np.full((world.steps_per_latent, 1), action)) for action in actions]
    return np.concatenate([frames for frames, _ in steps]), torch.stack([c for _, c in steps])


def test_a_snapshot_brings_back_codes_and_pixels_more_than_once(world):
    go(world, [0, 1])
    snapshot = world.snapshot()
    frames, codes = go(world, [2, 2, 1, 0])
    for _ in range(2):
        world.restore(snapshot)
        go(world, [1, 1, 1])
        world.restore(snapshot)
        again, codes_again = go(world, [2, 2, 1, 0])
        assert torch.equal(codes, codes_again)
        assert np.array_equal(frames, again)


def test_a_snapshot_copies_no_weights(world):
    held = world._state()[1].__dict__
    copied = world.snapshot().decoder.__dict__
    modules = [name for name, part in held.items() if isinstance(part, torch.nn.Module)]
    assert modules
    assert all(copied[name] is held[name] for name in modules)


def test_how_codes_are_drawn_may_change_between_steps(world):
    snapshot = world.snapshot()
    drawn = go(world, [2] * 4)[1]
    world.restore(snapshot)
    world.sampling = replace(world.sampling, temperature=0.0, guidance_scale=4.0)
    assert not torch.equal(go(world, [2] * 4)[1], drawn)
    world.sampling = replace(world.sampling, temperature=1.0, guidance_scale=1.0)
    world.restore(snapshot)
    assert torch.equal(go(world, [2] * 4)[1], drawn)


def test_before_a_reset_there_is_nothing_to_step_keep_or_ask(tiny_chain):
    world = World(tiny_chain.model, tiny_chain.tokenizer, sampling=SamplingConfig())
    for ask in (world.snapshot, world.act, lambda: world.step(np.zeros((1, 1), np.int64))):
        with pytest.raises(ValueError, match="before its first reset"):
            ask()


def test_a_world_without_an_action_head_says_so(world):
    with pytest.raises(ConfigError, match="no action head"):
        world.act()
