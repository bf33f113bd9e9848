"""Promises of cost.py: what is counted without storage is what a real forward and update take."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from dynamics.test_training import ENVIRONMENT
from dynamics.toys import ACTIONS, STEER, TRAINING, code_spec, codebook_VZ, tokenizer_spec
from worldloom.common import ActionSpec
from worldloom.dynamics import (
    DynamicsConfig,
    DynamicsModel,
    DynamicsSpec,
    WindowBatch,
    measured_times_s,
    training_cost,
)
from worldloom.dynamics.learner import Learner
from worldloom.dynamics.objective import Objective

CODES = code_spec(height=4, width=6, vocab_size=64)
SIZES = DynamicsConfig(num_layers=3, dim=64, num_heads=2, context_frames=4, num_meta_tokens=3)
FRAMES = TRAINING.window_frames


def spec(actions: ActionSpec = STEER) -> DynamicsSpec:
    """A model's spec on a grid that is not square."""
    return DynamicsSpec(tokenizer=tokenizer_spec(CODES), actions=actions, fps=8.0, frame_skip=1)


def windows(actions: ActionSpec, count: int = 1) -> WindowBatch:
    """Windows of zeros."""
    return WindowBatch(
        codes_Bthw=torch.zeros(count, FRAMES, 4, 6, dtype=torch.int64),
        slots_BTA=torch.zeros(count, FRAMES - 1, actions.num_slots, dtype=torch.int64),
        valid_Bt=torch.ones(count, FRAMES, dtype=torch.bool),
    )


def really_kept(model: DynamicsModel, actions: ActionSpec, *, bf16: bool, z_loss: bool) -> int:
    """Bytes that a real forward of one window keeps, besides the model's own."""
    objective = Objective(model, z_loss=z_loss, bf16=bf16)
    own = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
    own |= {t.untyped_storage().data_ptr() for t in model.buffers()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = windows(actions)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        losses = objective(batch, batch)
    total = sum(size for place, size in kept.items() if place not in own)
    del losses  # it kept every storage alive, so that no two had one address
    return total


VARIANTS = {
    "the defaults": ({}, {}, "discrete"),
    "bf16": ({}, {"bf16": True}, "discrete"),
    "z-loss": ({}, {"z_loss": 1e-4}, "discrete"),
    "action head, several keys": ({"action_head": True}, {}, "keys"),
    "raster, prepended": ({"order": "raster", "action_input": "prepended"}, {}, "discrete"),
    "factorised": ({"attention": "factorised"}, {}, "none"),
    "streams, distance": ({"residual_streams": 2, "head": "distance"}, {}, "continuous"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_memory_that_is_counted_is_what_a_real_forward_keeps(name):
    sizes, settings, kind = VARIANTS[name]
    config, training = replace(SIZES, **sizes), replace(TRAINING, **settings)
    cost = training_cost(config, spec(ACTIONS[kind]), training=training)
    model = DynamicsModel(config, spec(ACTIONS[kind]), codebook_VZ(CODES)).train()
    real = really_kept(model, ACTIONS[kind], bf16=training.bf16, z_loss=training.z_loss > 0)
    assert cost.window_bytes == pytest.approx(real, rel=0.1)
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    assert cost.weight_bytes == sum(t.nbytes for t in model.state_dict().values())


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_moments_and_the_average_that_are_counted_are_those_of_a_real_update(optimizer):
    training = replace(TRAINING, optimizer=optimizer, ema_decay=0.9)
    cost = training_cost(SIZES, spec(), training=training)
    model = DynamicsModel(SIZES, spec(), codebook_VZ(CODES))
    learner = Learner(model, None, training=training, accelerator=Accelerator(cpu=True))
    learner.gradients(windows(STEER, 2), windows(STEER, 2))
    gradients = sum(p.grad.nbytes for p in model.parameters())
    learner.apply()
    tensors = learner.tensors()
    moments = sum(t.nbytes for t in tensors["optimizer"].values() if t.ndim)
    assert (cost.gradient_bytes, cost.moment_bytes) == (gradients, moments)
    assert cost.average_bytes == sum(t.nbytes for t in tensors["average"].values())
    everything = sum(t.nbytes for group in tensors.values() for t in group.values())
    assert cost.checkpoint_bytes == pytest.approx(everything, rel=0.01)  # it also has counts


def test_the_operations_are_six_a_weight_and_those_of_attention():
    config = DynamicsConfig(num_layers=4, dim=256, num_heads=4)
    cost = training_cost(config, spec(), training=TRAINING)
    tokens = config.num_meta_tokens + 24 * (FRAMES - 1)
    # Of a layer's 10 dim^2 weights and of two products over all tokens, for every token.
    layers = config.num_layers * (6 * 10 * config.dim**2 + 12 * tokens * config.dim)
    assert cost.window_operations == pytest.approx(tokens * layers, rel=0.1)


def test_recomputing_keeps_less_than_keeping_and_more_than_the_layers_inputs():
    # Deep, so that what is kept once does not hide what is kept for every layer.
    config = replace(SIZES, num_layers=12)
    kept, recomputed = (
        training_cost(config, spec(), training=replace(TRAINING, recompute=on)).window_bytes
        for on in (False, True)
    )
    inputs = 12 * (3 + 24 * (FRAMES - 1)) * config.dim * 4
    assert inputs < recomputed < kept / 3


def test_a_billion_parameters_are_counted_without_being_allocated():
    program = """
import resource, sys
sys.path.insert(0, "tests")
from dynamics.test_cost import spec, TRAINING
from worldloom.dynamics import DynamicsConfig, training_cost
small = DynamicsConfig(num_layers=1, dim=64, num_heads=1)
large = DynamicsConfig(num_layers=24, dim=2048, num_heads=32)
training_cost(small, spec(), training=TRAINING)  # what torch loads for the first time
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
cost = training_cost(large, spec(), training=TRAINING)
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
assert cost.weight_bytes > 4e9, cost
assert grown < 0.5e9, grown
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_measured_times_are_of_real_updates_and_leave_nothing_behind():
    before = torch.get_rng_state()
    one, many = [], []
    for _ in range(3):  # others may be busy with the machine: the least is what it takes
        for count, times in ((1, one), (64, many)):
            times.append(
                measured_times_s(SIZES, spec(), training=TRAINING, windows=count, cpu=True)
            )
    assert min(seconds for both in (*one, *many) for seconds in both) > 0
    assert min(gradients for gradients, _ in many) > 2 * min(gradients for gradients, _ in one)
    assert torch.equal(torch.get_rng_state(), before)
