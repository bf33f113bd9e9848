"""Prompt and actions -> codes, latent frame by latent frame, without end.

    prompt_codes_Bthw, prompt_slots_BTA  ->  Rollout;   slots_BrA  ->  step  ->  codes_Bhw

The state is a preallocated cache, the last frame's codes and the frame's index: a step's cost
does not depend on how long the rollout has been going. `snapshot` and `restore` branch it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from worldloom.common import FormatError, ShapeError, bind_shape

from .actions import NULL
from .config import SamplingConfig
from .kv_cache import KVCache
from .model import DynamicsModel
from .sampling import keyed_gumbel, sample_codes


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A rollout's state, to go back to."""

    frame: int
    last_BS: Tensor
    cache: KVCache


class Rollout:
    """A batch of worlds in motion."""

    @torch.inference_mode()
    def __init__(
        self,
        model: DynamicsModel,
        prompt_codes_Bthw: Tensor,
        prompt_slots_BTA: Tensor,
        /,
        *,
        seeds: Sequence[int],
        sampling: SamplingConfig,
    ) -> None:
        """Read the prompt; it may be longer than the model's context.

        Args:
            model: in eval mode.
            prompt_codes_Bthw: integers in [0, V), at least one latent frame.
            prompt_slots_BTA: slots of the r (t - 1) steps between the prompt's frames, or NULL.
            seeds: one a world; all its randomness.
            sampling: how codes are drawn; may be changed between steps.

        Raises:
            ShapeError: if grid, steps or seeds do not fit.
            FormatError: if a code or an action is not one of the model's.
        """
        grid, r = model.grid, model.steps_per_frame
        bind_shape("prompt", prompt_codes_Bthw, "B t h w", h=grid.height, w=grid.width)
        batch, frames = prompt_codes_Bthw.shape[:2]
        if batch == 0 or frames == 0:
            raise ShapeError(
                f"prompt: {batch} worlds of {frames} latent frames; there must be one at least, "
                "and a world starts from at least one frame"
            )
        if len(seeds) != batch:
            raise ShapeError(f"seeds: {len(seeds)} for {batch} worlds, must be one each")
        self.model = model
        self.sampling = sampling
        codes_BtS = _check_codes(prompt_codes_Bthw, model).flatten(2)
        slots_BTA = _check_slots(
            "prompt actions", prompt_slots_BTA, model, batch=batch, steps=(frames - 1) * r
        )
        slots_BfrA = rearrange(slots_BTA, "B (f r) A -> B f r A", r=r)
        # torch's integers end at 2**63; derived seeds do, too.
        plain_seeds = [int(seed) % (1 << 63) for seed in seeds]
        self._seeds_B = torch.tensor(plain_seeds, dtype=torch.int64, device=model.device)
        self._cache = model.start_cache(batch=batch)
        for frame in range(grid.first_frame, frames):
            slots_BrA = slots_BfrA[:, frame - 1] if frame else None
            there = model.open_frame(frame, codes_BtS[:, max(0, frame - 1)], slots_BrA, self._cache)
            model.remember(there, codes_BtS[:, frame])
        self._last_BS = codes_BtS[:, -1]
        self.frame = frames
        """Index of the latent frame that the next step generates."""

    @torch.inference_mode()
    def step(self, slots_BrA: Tensor, /) -> Tensor:
        """Generate the next latent frame under these actions; return codes_Bhw, int64.

        Args:
            slots_BrA: slots of the r steps that lead to it; NULL where no action is given.

        Raises:
            ShapeError, FormatError: if the actions are not of the model's spec; nothing happened.
        """
        model, grid = self.model, self.model.grid
        batch, vocab_size = len(self._last_BS), model.spec.tokenizer.codes.vocab_size
        slots_BrA = _check_slots(
            "actions", slots_BrA, model, batch=batch, steps=model.steps_per_frame
        )
        there = model.open_frame(self.frame, self._last_BS, slots_BrA, self._cache)
        codes_BS = torch.zeros_like(self._last_BS)
        for start, stop in grid.groups():
            cells = slice(start, stop)
            logits_BsV = model.cached_logits(there, cells, codes_BS)
            noise_BsV = keyed_gumbel(self._seeds_B, self.frame, cells, vocab_size)
            codes_BS[:, cells] = sample_codes(logits_BsV, noise_BsV, self.sampling)
        self._last_BS = codes_BS
        self.frame += 1
        return rearrange(codes_BS.clone(), "B (h w) -> B h w", h=grid.height)

    def snapshot(self) -> Snapshot:
        """Return the state, independent of what follows."""
        return Snapshot(self.frame, self._last_BS.clone(), self._cache.clone())

    def restore(self, snapshot: Snapshot, /) -> None:
        """Go back to a snapshot of this rollout."""
        self.frame = snapshot.frame
        self._last_BS = snapshot.last_BS.clone()
        self._cache = snapshot.cache.clone()

    @property
    def size_bytes(self) -> int:
        """Memory of the state."""
        return self._cache.size_bytes + self._last_BS.numel() * self._last_BS.element_size()


def generate_codes(
    model: DynamicsModel,
    prompt_codes_Bthw: Tensor,
    slots_BTA: Tensor,
    /,
    *,
    seeds: Sequence[int],
    sampling: SamplingConfig,
) -> Tensor:
    """Return codes_Bthw: the prompt untouched, then one latent frame for every r actions after it.

    Args:
        model: in eval mode.
        prompt_codes_Bthw: integers in [0, V), at least one latent frame.
        slots_BTA: slots of all r (t - 1) steps, those of the prompt first, or NULL.
        seeds: one a row.
        sampling: how codes are drawn.

    Raises:
        ShapeError: if grid, steps or seeds do not fit.
        FormatError: if a code or an action is not one of the model's.
    """
    r = model.steps_per_frame
    bind_shape("prompt", prompt_codes_Bthw, "B t h w")
    bind_shape("actions", slots_BTA, "B T A", B=len(prompt_codes_Bthw))
    prompt_steps, steps = (prompt_codes_Bthw.shape[1] - 1) * r, slots_BTA.shape[1]
    if steps < prompt_steps or steps % r:
        raise ShapeError(
            f"actions: {steps} steps, must be {prompt_steps} for the prompt and then {r} for every "
            "latent frame to generate"
        )
    rollout = Rollout(
        model, prompt_codes_Bthw, slots_BTA[:, :prompt_steps], seeds=seeds, sampling=sampling
    )
    prompt = prompt_codes_Bthw.to(model.device, torch.int64)
    generated = [
        rollout.step(slots_BTA[:, step : step + r])[:, None]
        for step in range(prompt_steps, steps, r)
    ]
    return torch.cat([prompt, *generated], dim=1)


def _check_codes(codes_Bthw: Tensor, model: DynamicsModel) -> Tensor:
    """Return a prompt's codes, int64, on the model's device; refuse one that is not the model's."""
    vocab_size = model.spec.tokenizer.codes.vocab_size
    if codes_Bthw.is_floating_point() or codes_Bthw.dtype == torch.bool:
        raise FormatError(f"prompt: codes are {codes_Bthw.dtype}, must be integers")
    codes_Bthw = codes_Bthw.to(model.device, torch.int64)
    least, most = int(codes_Bthw.min()), int(codes_Bthw.max())
    if least < 0 or most >= vocab_size:
        raise FormatError(
            f"prompt: codes in [{least}, {most}], must be in [0, {vocab_size}): "
            "another tokenizer's, it seems"
        )
    return codes_Bthw


def _check_slots(
    name: str, slots_BTA: Tensor, model: DynamicsModel, /, *, batch: int, steps: int
) -> Tensor:
    """Return slots, int64, on the model's device; refuse what is not an action of the model."""
    spec = model.spec.actions
    bind_shape(name, slots_BTA, "B T A", B=batch, T=steps, A=spec.num_slots)
    if slots_BTA.is_floating_point() or slots_BTA.dtype == torch.bool:
        raise FormatError(f"{name}: slots are {slots_BTA.dtype}, must be integers")
    slots_BTA = slots_BTA.to(model.device, torch.int64)
    bad = (slots_BTA < NULL) | (slots_BTA >= model.actions.sizes_A)
    if bad.any():
        row, step, slot = bad.nonzero()[0].tolist()
        raise FormatError(
            f"{name}: slot {slot} of step {step} of world {row} is "
            f"{int(slots_BTA[row, step, slot])}, must be in [0, {spec.sizes[slot]}), or {NULL} "
            "where no action is given"
        )
    return slots_BTA
