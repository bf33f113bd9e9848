"""Prompt and actions -> codes, latent frame by latent frame, without end.

    prompt_codes_Bthw, prompt_slots_BTA  ->  Rollout;   slots_BrA  ->  step  ->  codes_Bhw

Where cells have levels, prompts are (B, t, h, w, Q) and steps give codes_BhwQ: of the cells that
are decided together level 0 is drawn first, then level 1 given it, and so on. The state is a
preallocated cache, the codes of the last frames and the frame's index: a step's cost does not
depend on how long the rollout has been going. `snapshot`, `restore` and `fork` branch it.

While it is guided the cache has 2 B rows: the worlds under their actions, then the same worlds
under none. The latter know the last `context_frames` frames before guidance was switched on, and
all since, as a window of that length does in training.
"""

from collections.abc import Sequence
from copy import copy, deepcopy
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from torch import Tensor
from worldloom.common import ConfigError, FormatError, ShapeError, bind_shape

from .actions import NULL
from .decoders import Decoder, FrameDraw, open_decoder
from .kv_cache import KVCache
from .linear import pack_linears, packed_weights
from .model import DynamicsModel
from .sampling_config import SamplingConfig, named_decoder
from .sequence import flatten_codes, unflatten_codes


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A rollout's state, to go back to: all that its next frames depend on but `sampling`."""

    frame: int
    past: tuple[Tensor, ...]
    tokens_BSD: Tensor | None
    cache: KVCache
    decoder: Decoder
    seeds_B: Tensor


class Rollout:
    """A batch of worlds in motion."""

    @torch.inference_mode()
    @packed_weights()
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
            ConfigError: if guidance is asked of a model without actions, or a decoder that is not
                for its order.
        """
        r = model.steps_per_frame
        codes_BtSQ = flatten_codes("prompt", prompt_codes_Bthw, model.spec.tokenizer.codes)
        batch, frames = codes_BtSQ.shape[:2]
        if batch == 0 or frames == 0:
            raise ShapeError(
                f"prompt: {batch} worlds of {frames} latent frames; there must be one at least, "
                "and a world starts from at least one frame"
            )
        self.model = model
        self._seeds_B = _check_seeds(seeds, model, batch=batch)
        self._sampling = fit_sampling(sampling, model)
        self._decoder = open_decoder(self._sampling.decoder, model.config.order)
        codes_BtSQ = _check_codes(codes_BtSQ, model)
        slots_BTA = _check_slots(
            "prompt actions", prompt_slots_BTA, model, batch=batch, steps=(frames - 1) * r
        )
        slots_BfrA = rearrange(slots_BTA, "B (f r) A -> B f r A", r=r)
        pack_linears(model)
        self._cache = model.start_cache(batch=batch)
        self._tokens_BSD: Tensor | None = None
        for frame in range(model.grid.first_frame, frames):
            slots_BrA = slots_BfrA[:, frame - 1] if frame else None
            before_BSQ = codes_BtSQ[:, max(0, frame - 1)]
            there = model.open_frame(frame, before_BSQ, slots_BrA, self._cache)
            tokens_BSD = model.remember(there, codes_BtSQ[:, frame])
            # The action head learned to take none for the first frame of a window.
            if frame and model.action_head is not None:
                self._tokens_BSD = tokens_BSD
        kept = min(frames, model.config.context_frames)
        self._past = tuple(codes_BtSQ[:, frames - kept :].unbind(1))
        self.frame = frames
        """Index of the latent frame that the next step generates."""
        self.forwards = 0
        """How many the last step needed."""

    @property
    def batch(self) -> int:
        """How many worlds there are, B."""
        return len(self._seeds_B)

    @property
    def sampling(self) -> SamplingConfig:
        """How codes are drawn; all of it may be changed between steps.

        Its decoder is named: in the place of `own` stands what that is for this model.
        """
        return self._sampling

    @sampling.setter
    def sampling(self, sampling: SamplingConfig, /) -> None:
        """Draw what follows in another way.

        Raises:
            ConfigError: if guidance is asked of a model without actions, or a decoder that is not
                for its order; nothing changed.
        """
        sampling = fit_sampling(sampling, self.model)
        if sampling.decoder != self._sampling.decoder:
            self._decoder = open_decoder(sampling.decoder, self.model.config.order)
        self._sampling = sampling

    @torch.inference_mode()
    @packed_weights()
    def step(self, slots_BrA: Tensor, /) -> Tensor:
        """Generate the next latent frame under these actions; return codes_Bhw (or BhwQ), int64.

        Args:
            slots_BrA: slots of the r steps that lead to it; NULL where no action is given.

        Raises:
            ShapeError, FormatError: if the actions are not of the model's spec; nothing happened.
        """
        model, sampling = self.model, self._sampling
        slots_BrA = _check_slots(
            "actions", slots_BrA, model, batch=self.batch, steps=model.steps_per_frame
        )
        before_BSQ = self._past[-1]
        if sampling.guided:
            self._open_free_rows()
            slots_BrA = torch.cat([slots_BrA, torch.full_like(slots_BrA, NULL)])
            there = model.open_frame(
                self.frame, torch.cat([before_BSQ, before_BSQ]), slots_BrA, self._cache
            )
        else:
            self._close_free_rows()
            there = model.open_frame(self.frame, before_BSQ, slots_BrA, self._cache)
        draw = FrameDraw(
            model, there, sampling, self._seeds_B, keep_tokens=model.action_head is not None
        )
        codes_BSQ = self._decoder.decide(draw, before_BSQ)
        self._tokens_BSD, self.forwards = draw.tokens_BSD, draw.forwards
        self._past = (*self._past, codes_BSQ)[-model.config.context_frames :]
        self.frame += 1
        return unflatten_codes(codes_BSQ.clone(), model.spec.tokenizer.codes)

    @torch.inference_mode()
    @packed_weights()
    def act(self, *, temperature: float = 1.0) -> Tensor:
        """Return slots_BrA that the model itself would choose next, seeing the last frame.

        Asked twice it answers the same; nothing happens before `step` is given them.

        Args:
            temperature: divides the logits; 0 takes the likeliest action.

        Raises:
            ConfigError: if the model has no action head, or a temperature is below 0.
        """
        head = self.model.action_head
        if head is None:
            raise ConfigError(
                "act: this model has no action head, so it cannot choose actions; train one with "
                "--model.action-head on data with actions"
            )
        return head.sample(
            self._tokens_BSD,
            self._past[-1],
            seeds_B=self._seeds_B,
            frame=self.frame - 1,
            temperature=temperature,
        )

    def snapshot(self) -> Snapshot:
        """Return the state, independent of what follows."""
        return Snapshot(
            self.frame,
            self._past,
            self._tokens_BSD,
            self._cache.clone(),
            deepcopy(self._decoder),
            self._seeds_B,
        )

    def restore(self, snapshot: Snapshot, /) -> None:
        """Go back to a snapshot of this rollout, or of another of as many worlds of its model.

        Its seeds come with it. `sampling` stays as it is now; the decoder goes on as it was then,
        if it is the same one.

        Raises:
            ShapeError: if the snapshot has another number of worlds, or is of another model.
        """
        own, other = self._cache, snapshot.cache
        layers, _, *rest = own.keys.shape
        same_model = (layers, *rest) == (other.keys.shape[0], *other.keys.shape[2:])
        if len(snapshot.past[-1]) != self.batch or not same_model:
            raise ShapeError(
                f"restore: a snapshot of {len(snapshot.past[-1])} worlds with keys of shape "
                f"{tuple(other.keys.shape)}, must be of {self.batch} worlds and of this model; "
                "restore it in a rollout like the one it was taken from"
            )
        self.frame, self._past = snapshot.frame, snapshot.past
        self._seeds_B = snapshot.seeds_B
        self._tokens_BSD, self._cache = snapshot.tokens_BSD, snapshot.cache.clone()
        if type(snapshot.decoder) is type(self._decoder):
            self._decoder = deepcopy(snapshot.decoder)

    @torch.inference_mode()
    def fork(self, copies: int, /, *, seeds: Sequence[int]) -> "Rollout":
        """Return a rollout of so many futures of every world; this one goes on by itself.

        Args:
            copies: of each world; those of world b are b * copies .. (b + 1) * copies - 1.
            seeds: one a copy, of all that is yet to be drawn.

        Raises:
            ShapeError: if there is no copy, or seeds are not one each.
        """
        if copies < 1:
            raise ShapeError(f"fork: {copies} copies of every world, must be at least 1")
        other = copy(self)
        other._seeds_B = _check_seeds(seeds, self.model, batch=self.batch * copies)

        def each(rows: Tensor, dim: int = 0) -> Tensor:
            return rows.repeat_interleave(copies, dim=dim)

        other._past = tuple(map(each, self._past))
        other._tokens_BSD = None if self._tokens_BSD is None else each(self._tokens_BSD)
        cache = self._cache
        other._cache = replace(cache, keys=each(cache.keys, 1), values=each(cache.values, 1))
        other._decoder = deepcopy(self._decoder)
        return other

    @property
    def size_bytes(self) -> int:
        """Memory of the state."""
        tensors = [*self._past, *([] if self._tokens_BSD is None else [self._tokens_BSD])]
        codes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return self._cache.size_bytes + codes

    def _open_free_rows(self) -> None:
        """Give the cache rows of the worlds under no actions, unless it has them."""
        cache, batch = self._cache, self.batch
        if cache.keys.shape[1] == 2 * batch:
            return
        free = self._read_past_without_actions()
        both = replace(
            cache,
            keys=torch.cat([cache.keys, free.keys], dim=1),
            values=torch.cat([cache.values, free.values], dim=1),
        )
        # The ring of `free` begins elsewhere.
        for frame in range(free.first_frame, self.frame):
            there, here = (ring.places(frame, 0, ring.frame_tokens) for ring in (both, free))
            both.keys[:, batch:, :, there] = free.keys[:, :, :, here]
            both.values[:, batch:, :, there] = free.values[:, :, :, here]
        self._cache = both

    def _read_past_without_actions(self) -> KVCache:
        """Return a cache that has read the last frames as a window of their own, actions NULL."""
        model = self.model
        start, first = self.frame - len(self._past), model.grid.first_frame
        cache = replace(model.start_cache(batch=self.batch), first_frame=start + first)
        no_code_BSQ = torch.full_like(self._past[0], model.spec.tokenizer.codes.vocab_size)
        shape = (self.batch, model.steps_per_frame, model.spec.actions.num_slots)
        null_BrA = self._past[0].new_full(shape, NULL)
        for number in range(first, len(self._past)):
            before_BSQ = self._past[number - 1] if number else no_code_BSQ
            slots_BrA = null_BrA if number else None
            there = model.open_frame(start + number, before_BSQ, slots_BrA, cache)
            model.remember(there, self._past[number])
        return cache

    def _close_free_rows(self) -> None:
        """Drop the rows of the worlds under no actions, if there are any."""
        cache, batch = self._cache, self.batch
        if cache.keys.shape[1] > batch:
            keys, values = cache.keys[:, :batch].clone(), cache.values[:, :batch].clone()
            self._cache = replace(cache, keys=keys, values=values)


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


def fit_sampling(sampling: SamplingConfig, model: DynamicsModel, /) -> SamplingConfig:
    """Return it with the decoder's name for the model, in the place of `own`.

    Raises:
        ConfigError: if guidance is asked of a model without actions, or a decoder that is not
            for its order.
    """
    if sampling.guided and model.spec.actions.num_slots == 0:
        raise ConfigError(
            f"sampling: guidance_scale is {sampling.guidance_scale}, must be 1 for this model: it "
            "was trained without actions, so there is nothing to guide it by"
        )
    return replace(sampling, decoder=named_decoder(sampling.decoder, model.config.order))


def _check_seeds(seeds: Sequence[int], model: DynamicsModel, /, *, batch: int) -> Tensor:
    """Return seeds_B on the model's device; refuse another number of them than of worlds."""
    if len(seeds) != batch:
        raise ShapeError(f"seeds: {len(seeds)} for {batch} worlds, must be one each")
    # torch's integers end at 2**63; derived seeds do, too.
    plain_seeds = [int(seed) % (1 << 63) for seed in seeds]
    return torch.tensor(plain_seeds, dtype=torch.int64, device=model.device)


def _check_codes(codes_BtSQ: Tensor, model: DynamicsModel) -> Tensor:
    """Return a prompt's codes, int64, on the model's device; refuse one that is not the model's."""
    codes = model.spec.tokenizer.codes
    if codes_BtSQ.is_floating_point() or codes_BtSQ.dtype == torch.bool:
        raise FormatError(f"prompt: codes are {codes_BtSQ.dtype}, must be integers")
    # A copy: a rollout looks back at them, whatever their owner does with the memory.
    codes_BtSQ = codes_BtSQ.to(model.device, torch.int64, copy=True)
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
