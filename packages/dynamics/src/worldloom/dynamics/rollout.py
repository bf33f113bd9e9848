"""Prompt and actions -> codes, latent frame by latent frame, without end.

    prompt_codes_Bphw, prompt_slots_BTA  ->  Rollout;   slots_BrA  ->  step  ->  codes_Bhw

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
from .model import Asked, DynamicsModel
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
        """Read the prompt.

        Args:
            model: in eval mode.
            prompt_codes_Bthw: int64, at least one latent frame.
            prompt_slots_BTA: int64 slots of the r (t - 1) steps between the prompt's frames.
            seeds: one a world; all its randomness.
            sampling: how codes are drawn; may be changed between steps.

        Raises:
            ShapeError: if grid, steps or seeds do not fit.
            FormatError: if a code is not in [0, V).
        """
        grid, vocab_size = model.grid, model.spec.tokenizer.codes.vocab_size
        bind_shape("prompt", prompt_codes_Bthw, "B t h w", h=grid.height, w=grid.width)
        batch, frames = prompt_codes_Bthw.shape[:2]
        steps = (frames - 1) * model.steps_per_frame
        bind_shape(
            "prompt actions",
            prompt_slots_BTA,
            "B T A",
            B=batch,
            T=steps,
            A=model.spec.actions.num_slots,
        )
        if frames == 0:
            raise ShapeError("prompt: there are no frames; a world starts from at least one")
        if len(seeds) != batch:
            raise ShapeError(f"seeds: {len(seeds)} for {batch} worlds, must be one each")
        if prompt_codes_Bthw.min() < 0 or prompt_codes_Bthw.max() >= vocab_size:
            raise FormatError(
                f"prompt: codes in [{prompt_codes_Bthw.min()}, {prompt_codes_Bthw.max()}], "
                f"must be in [0, {vocab_size})"
            )
        self.model = model
        self.sampling = sampling
        self._seeds_B = torch.tensor(list(seeds), dtype=torch.int64, device=model.device)
        codes_BtS = prompt_codes_Bthw.to(model.device).flatten(2)
        slots_BfrA = rearrange(
            prompt_slots_BTA.to(model.device), "B (f r) A -> B f r A", r=model.steps_per_frame
        )
        self._cache = model.start_cache(batch=batch)
        for frame in range(grid.first_frame, frames):
            before_BS = codes_BtS[:, max(0, frame - 1)]
            slots_BrA = slots_BfrA[:, frame - 1] if frame else None
            every = slice(0, grid.cells)
            model.cached_logits(
                Asked(frame, every, before_BS, codes_BtS[:, frame], slots_BrA), self._cache
            )
        self._last_BS = codes_BtS[:, -1]
        self.frame = frames
        """Index of the latent frame that the next step generates."""

    @torch.inference_mode()
    def step(self, slots_BrA: Tensor, /) -> Tensor:
        """Generate the next latent frame under these actions; return codes_Bhw, int64.

        Args:
            slots_BrA: int64 slots of the r steps that lead to it; NULL where none is given.

        Raises:
            ShapeError, FormatError: if the actions are not of the model's spec; nothing happened.
        """
        model, grid = self.model, self.model.grid
        spec, vocab_size = model.spec.actions, model.spec.tokenizer.codes.vocab_size
        bind_shape(
            "actions", slots_BrA, "B r A",
            B=len(self._last_BS), r=model.steps_per_frame, A=spec.num_slots,
        )  # fmt: skip
        slots_BrA = slots_BrA.to(model.device)
        sizes_A = torch.tensor(spec.sizes, dtype=torch.int64, device=model.device)
        if ((slots_BrA < NULL) | (slots_BrA >= sizes_A)).any():
            raise FormatError(
                f"actions: slots {slots_BrA.tolist()!s:.80}, must be in [0, {list(spec.sizes)}) "
                f"or {NULL} for none"
            )
        codes_BS = torch.zeros_like(self._last_BS)
        for start, stop in grid.groups():
            cells = slice(start, stop)
            logits_BsV = model.cached_logits(
                Asked(self.frame, cells, self._last_BS, codes_BS, slots_BrA), self._cache
            )
            noise_BsV = keyed_gumbel(self._seeds_B, self.frame, cells, vocab_size)
            codes_BS[:, cells] = sample_codes(logits_BsV, noise_BsV, self.sampling)
        self._last_BS = codes_BS
        self.frame += 1
        return rearrange(codes_BS, "B (h w) -> B h w", h=grid.height)

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
        return self._cache.size_bytes


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
        prompt_codes_Bthw: int64, p >= 1 latent frames.
        slots_BTA: int64 slots of all r (t - 1) steps, those of the prompt first.
        seeds: one a row.
        sampling: how codes are drawn.
    """
    r, prompt_frames = model.steps_per_frame, prompt_codes_Bthw.shape[1]
    prompt_steps = (prompt_frames - 1) * r
    rollout = Rollout(
        model, prompt_codes_Bthw, slots_BTA[:, :prompt_steps], seeds=seeds, sampling=sampling
    )
    generated = [
        rollout.step(slots_BTA[:, step : step + r])
        for step in range(prompt_steps, slots_BTA.shape[1], r)
    ]
    return torch.cat([prompt_codes_Bthw.to(model.device), *(c[:, None] for c in generated)], dim=1)
