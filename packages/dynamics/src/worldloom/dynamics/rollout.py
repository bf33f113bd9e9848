"""Prompt and actions -> codes, latent frame by latent frame, without end.

    prompt_codes_Bthw, prompt_slots_BTA  ->  Rollout;   slots_BrA  ->  step  ->  codes_Bhw

Where cells have levels, prompts are (B, t, h, w, Q) and steps give codes_BhwQ: of the cells that
are decided together level 0 is drawn first, then level 1 given it, and so on. The state is a
preallocated cache, the last frame's codes and the frame's index: a step's cost does not depend on
how long the rollout has been going. `snapshot` and `restore` branch it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from worldloom.common import FormatError, ShapeError, bind_shape

from .actions import NULL
from .kv_cache import KVCache
from .model import DynamicsModel
from .sampling import keyed_gumbel, sample_codes
from .sampling_config import SamplingConfig
from .sequence import flatten_codes, unflatten_codes


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A rollout's state, to go back to."""

    frame: int
    last_BSQ: Tensor
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
            prompt_codes_Bthw: integers in [0, V), at least one latent frame; (B, t, h, w, Q) where
                cells have levels.
            prompt_slots_BTA: slots of the r (t - 1) steps between the prompt's frames, or NULL.
            seeds: one a world; all its randomness.
            sampling: how codes are drawn; may be changed between steps.

        Raises:
            ShapeError: if grid, levels, steps or seeds do not fit.
            FormatError: if a code or an action is not one of the model's.
        """
        r = model.steps_per_frame
        codes_BtSQ = flatten_codes("prompt", prompt_codes_Bthw, model.spec.tokenizer.codes)
        batch, frames = codes_BtSQ.shape[:2]
        if batch == 0 or frames == 0:
            raise ShapeError(
                f"prompt: {batch} worlds of {frames} latent frames; there must be one at least, "
                "and a world starts from at least one frame"
            )
        if len(seeds) != batch:
            raise ShapeError(f"seeds: {len(seeds)} for {batch} worlds, must be one each")
        self.model = model
        self.sampling = sampling
        codes_BtSQ = _check_codes(codes_BtSQ, model)
        slots_BTA = _check_slots(
            "prompt actions", prompt_slots_BTA, model, batch=batch, steps=(frames - 1) * r
        )
        slots_BfrA = rearrange(slots_BTA, "B (f r) A -> B f r A", r=r)
        # torch's integers end at 2**63; derived seeds do, too.
        plain_seeds = [int(seed) % (1 << 63) for seed in seeds]
        self._seeds_B = torch.tensor(plain_seeds, dtype=torch.int64, device=model.device)
        self._cache = model.start_cache(batch=batch)
        for frame in range(model.grid.first_frame, frames):
            slots_BrA = slots_BfrA[:, frame - 1] if frame else None
            before_BSQ = codes_BtSQ[:, max(0, frame - 1)]
            there = model.open_frame(frame, before_BSQ, slots_BrA, self._cache)
            model.remember(there, codes_BtSQ[:, frame])
        self._last_BSQ = codes_BtSQ[:, -1]
        self.frame = frames
        """Index of the latent frame that the next step generates."""

    @torch.inference_mode()
    def step(self, slots_BrA: Tensor, /) -> Tensor:
        """Generate the next latent frame under these actions; return codes_Bhw (or BhwQ), int64.

        Args:
            slots_BrA: slots of the r steps that lead to it; NULL where no action is given.

        Raises:
            ShapeError, FormatError: if the actions are not of the model's spec; nothing happened.
        """
        model, codes = self.model, self.model.spec.tokenizer.codes
        slots_BrA = _check_slots(
            "actions", slots_BrA, model, batch=len(self._last_BSQ), steps=model.steps_per_frame
        )
        there = model.open_frame(self.frame, self._last_BSQ, slots_BrA, self._cache)
        codes_BSQ = torch.zeros_like(self._last_BSQ)
        for start, stop in model.grid.groups():
            cells = slice(start, stop)
            tokens_BsD = model.cached_tokens(there, cells, codes_BSQ)
            for level in range(codes.num_levels):
                logits_BsV = model.level_logits(tokens_BsD, codes_BSQ[:, cells, :level])
                noise_BsV = keyed_gumbel(
                    self._seeds_B, self.frame, cells, codes.vocab_size, level=level
                )
                codes_BSQ[:, cells, level] = sample_codes(logits_BsV, noise_BsV, self.sampling)
        self._last_BSQ = codes_BSQ
        self.frame += 1
        return unflatten_codes(codes_BSQ.clone(), codes)

    def snapshot(self) -> Snapshot:
        """Return the state, independent of what follows."""
        return Snapshot(self.frame, self._last_BSQ.clone(), self._cache.clone())

    def restore(self, snapshot: Snapshot, /) -> None:
        """Go back to a snapshot of this rollout."""
        self.frame = snapshot.frame
        self._last_BSQ = snapshot.last_BSQ.clone()
        self._cache = snapshot.cache.clone()

    @property
    def size_bytes(self) -> int:
        """Memory of the state."""
        return self._cache.size_bytes + self._last_BSQ.numel() * self._last_BSQ.element_size()


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
        prompt_codes_Bthw: integers in [0, V), at least one latent frame. Where cells have levels,
            (B, t, h, w, Q), and so is what is returned.
        slots_BTA: slots of all r (t - 1) steps, those of the prompt first, or NULL.
        seeds: one a row.
        sampling: how codes are drawn.

    Raises:
        ShapeError: if grid, levels, steps or seeds do not fit.
        FormatError: if a code or an action is not one of the model's.
    """
    r = model.steps_per_frame
    flatten_codes("prompt", prompt_codes_Bthw, model.spec.tokenizer.codes)
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


def _check_codes(codes_BtSQ: Tensor, model: DynamicsModel) -> Tensor:
    """Return a prompt's codes, int64, on the model's device; refuse one that is not the model's."""
    codes = model.spec.tokenizer.codes
    if codes_BtSQ.is_floating_point() or codes_BtSQ.dtype == torch.bool:
        raise FormatError(f"prompt: codes are {codes_BtSQ.dtype}, must be integers")
    codes_BtSQ = codes_BtSQ.to(model.device, torch.int64)
    for level, codes_BtS in enumerate(codes_BtSQ.unbind(-1)):
        least, most = int(codes_BtS.min()), int(codes_BtS.max())
        if least < 0 or most >= codes.vocab_size:
            which = f"codes of level {level}" if codes.num_levels > 1 else "codes"
            raise FormatError(
                f"prompt: {which} in [{least}, {most}], must be in [0, {codes.vocab_size}): "
                "another tokenizer's, it seems"
            )
    return codes_BtSQ


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
