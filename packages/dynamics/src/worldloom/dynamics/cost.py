"""What a training costs, before it is begun: memory and arithmetic counted, time measured.

    config, spec, training  ->  training_cost     ->  Cost: bytes and operations; allocates nothing
    the same, a few windows ->  measured_times_s  ->  seconds of their gradients, and of the update

Counting runs the training's own forward on tensors that have shapes and no storage (torch's fake
tensors), so that a model of any size is counted on any machine, and with every option. It is
counted as a CPU computes it; a GPU keeps less in bf16, where attention stays narrow.

The backward pass is taken for two forwards, as it is for matrix products.
"""

import time
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator, init_empty_weights
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from .config import DynamicsConfig
from .learner import Learner, parameter_groups
from .model import DynamicsModel
from .objective import Objective
from .spec import DynamicsSpec
from .training_config import DynamicsTrainingConfig
from .windows import WindowBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one process holds that trains alone, and what it computes for every window."""

    parameters: int
    weight_bytes: int
    """Weights and buffers."""
    gradient_bytes: int
    moment_bytes: int
    """What the optimizer remembers: two moments of a parameter, one of what Muon moves."""
    average_bytes: int
    """The average of the weights, if there is one."""
    window_bytes: int
    """What the forward of one window keeps for the backward pass."""
    window_operations: int
    """Floating-point operations of forward and backward of one window, without recomputation."""

    @property
    def state_bytes(self) -> int:
        """All that does not depend on the number of windows."""
        return self.weight_bytes + self.gradient_bytes + self.moment_bytes + self.average_bytes

    @property
    def checkpoint_bytes(self) -> int:
        """One checkpoint: weights, the optimizer's moments and the average."""
        return self.state_bytes - self.gradient_bytes


def training_cost(
    config: DynamicsConfig, spec: DynamicsSpec, /, *, training: DynamicsTrainingConfig
) -> Cost:
    """Count what a training takes, without allocating its weights."""
    with init_empty_weights(include_buffers=False):
        dynamics = _fresh(config, spec, training).train()
    kept, kept_recomputed, operations = (
        _count(dynamics, training, recompute=False)[0],
        *_count(dynamics, training, recompute=True),
    )
    window_bytes = kept
    if training.recompute:
        # What torch's checkpoint holds, saved-tensor hooks do not see: each layer's input, and the
        # first values. And while a layer is computed again, it keeps what it would have kept.
        stream = config.dim * _num_tokens(dynamics, training.window_frames)
        inputs = 4 * stream * (config.num_layers * config.residual_streams + 1)
        window_bytes = kept_recomputed + inputs + (kept - kept_recomputed) // config.num_layers
    parameters = list(dynamics.parameters())
    parameter_bytes = sum(p.nbytes for p in parameters)
    moments = sum(
        p.nbytes if training.optimizer == "muon" and group["orthogonal"] else 2 * p.nbytes
        for group in parameter_groups(dynamics, weight_decay=0.0)
        for p in group["params"]
    )
    return Cost(
        parameters=sum(p.numel() for p in parameters),
        weight_bytes=sum(tensor.nbytes for tensor in dynamics.state_dict().values()),
        gradient_bytes=parameter_bytes,
        moment_bytes=moments,
        average_bytes=parameter_bytes if training.ema_decay else 0,
        window_bytes=window_bytes,
        window_operations=3 * operations,
    )


def measured_times_s(
    config: DynamicsConfig,
    spec: DynamicsSpec,
    /,
    *,
    training: DynamicsTrainingConfig,
    windows: int,
    cpu: bool,
) -> tuple[float, float]:
    """Return seconds on this device: of the gradients of so many windows, and of the update.

    Both are of the second of two updates; the first pays for what is made once. Loading windows
    goes on meanwhile in a training, so it is not in them; nor is what is drawn to disturb them.
    """
    accelerator = Accelerator(cpu=cpu, mixed_precision="no")
    dynamics = _fresh(config, spec, training).to(accelerator.device)
    alone = replace(training, batch_windows=windows, micro_windows=0, sharded=False)
    learner = Learner(dynamics, None, training=alone, accelerator=accelerator)
    batch = _nothing(config, spec, training.window_frames, windows).to(accelerator.device)
    gradients_s = update_s = 0.0
    for _ in range(2):
        began = time.monotonic()
        learner.gradients(batch, batch)
        _wait(accelerator.device)
        gradients_s = time.monotonic() - began
        learner.apply()
        _wait(accelerator.device)
        update_s = time.monotonic() - began - gradients_s
    return gradients_s, update_s


def _wait(device: torch.device) -> None:
    """Wait until a device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _fresh(
    config: DynamicsConfig, spec: DynamicsSpec, training: DynamicsTrainingConfig
) -> DynamicsModel:
    """Return a model of some codebook: what the vectors are costs nothing."""
    return DynamicsModel(config, spec, _some_codebook_VZ(spec), seed=training.seed)


def _some_codebook_VZ(spec: DynamicsSpec) -> npt.NDArray[np.float32]:
    """Return codebook vectors that are not all the same."""
    codes = spec.tokenizer.codes
    levels = (codes.num_levels,) if codes.num_levels > 1 else ()
    shape = (*levels, codes.vocab_size, codes.code_dim)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def _nothing(config: DynamicsConfig, spec: DynamicsSpec, frames: int, windows: int) -> WindowBatch:
    """Return windows of code 0 and action 0; all masked, for a model that refines."""
    codes = spec.tokenizer.codes
    shape = (windows, frames, codes.grid_height, codes.grid_width)
    steps = (frames - 1) * codes.frames_per_latent
    return WindowBatch(
        codes_Bthw=torch.zeros(windows, *codes.codes_shape(frames), dtype=torch.int64),
        slots_BTA=torch.zeros(windows, steps, spec.actions.num_slots, dtype=torch.int64),
        valid_Bt=torch.ones(windows, frames, dtype=torch.bool),
        known_Bthw=torch.zeros(shape, dtype=torch.bool) if config.order == "masked" else None,
    )


def _num_tokens(dynamics: DynamicsModel, frames: int) -> int:
    """Return how many tokens a window's sequence has, in training."""
    grid = dynamics.grid
    in_frames = (frames - grid.first_frame) * grid.tokens
    return dynamics.config.num_meta_tokens + in_frames * (2 if grid.refines else 1)


def _count(
    dynamics: DynamicsModel, training: DynamicsTrainingConfig, *, recompute: bool
) -> tuple[int, int]:
    """Return bytes kept by the forward of one window besides the model, and its operations."""
    dynamics.transformer.recompute = recompute
    objective = Objective(dynamics, z_loss=training.z_loss > 0, bf16=training.bf16)
    # What a window's forward makes once and keeps; it looks at values, which fake tensors lack.
    with torch.no_grad():
        dynamics.layout.window(training.window_frames, 1, twice=dynamics.grid.refines)
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        alive.append(tensor)  # so that no two have one address
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):
        held = {name: _fake(tensor) for name, tensor in _named_tensors(objective)}
        batch = _nothing(dynamics.config, dynamics.spec, training.window_frames, 1)
        with (
            FlopCounterMode(display=False) as counter,
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        ):
            losses = torch.func.functional_call(objective, held, (batch, batch))
    del losses
    own = {tensor.untyped_storage()._cdata for tensor in held.values()}
    total = sum(size for place, size in kept.items() if place not in own)
    return total, counter.get_total_flops()


def _named_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return parameters and buffers by name."""
    return [*module.named_parameters(), *module.named_buffers()]


def _fake(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU like this one; fake where that mode is on."""
    trained = isinstance(tensor, nn.Parameter)
    return torch.empty(tensor.shape, dtype=tensor.dtype, requires_grad=trained)
