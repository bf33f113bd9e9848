"""A learned world: start it, press actions, see frames.

    codes_thw, slots_TA  -> reset -> frames_THWC;    slots_rA  -> step  -> the next r frames

The tokenizer, the dynamics model, a rollout and a streaming decoder, held together. One world at a
time: what play shows, and what evaluate clocks. `snapshot` and `restore` branch it.
"""

from collections import deque
from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import nn
from worldloom.common import Frames, SlotArray
from worldloom.dynamics import (
    DynamicsModel,
    Rollout,
    SamplingConfig,
    Snapshot,
    fit_sampling,
)
from worldloom.tokenizer import DecoderSession, VideoTokenizer, load_tokenizer


@dataclass(frozen=True, slots=True)
class WorldSnapshot:
    """A world's state, to go back to: what was generated, and what the decoder saw of it."""

    rollout: Snapshot
    decoder: DecoderSession
    size_bytes: int
    """Memory it takes."""


class World:
    """One world, played at batch 1."""

    def __init__(
        self, model: DynamicsModel, tokenizer: VideoTokenizer, /, *, sampling: SamplingConfig
    ) -> None:
        """Hold a model and the tokenizer it was trained on.

        Raises:
            MismatchError: if it was trained on another tokenizer.
            ConfigError: if the model cannot be sampled in this way.
        """
        fit_sampling(sampling, model)
        tokenizer.spec.require(model.spec.tokenizer, here="this tokenizer", there="this model")
        self.model = model
        self.tokenizer = tokenizer
        self._sampling = sampling
        self._rollout: Rollout | None = None
        self._decoder: DecoderSession | None = None

    @classmethod
    def from_pretrained(
        cls, model: Path, tokenizer: Path | str, /, *, sampling: SamplingConfig, device: str = "cpu"
    ) -> Self:
        """Load a model directory and its tokenizer, named as `load_tokenizer` takes it.

        Raises:
            FormatError: if one is missing or damaged.
            MismatchError: if the model was trained on another tokenizer.
        """
        dynamics = DynamicsModel.from_pretrained(model, device=device)
        codec = load_tokenizer(tokenizer, device=device)
        codec.spec.require(dynamics.spec.tokenizer, here=str(tokenizer), there=str(model))
        return cls(dynamics, codec, sampling=sampling)

    @property
    def steps_per_latent(self) -> int:
        """Actions that `step` takes and frames that it returns, r."""
        return self.model.spec.tokenizer.codes.frames_per_latent

    @property
    def sampling(self) -> SamplingConfig:
        """How codes are drawn; may be changed between steps.

        Raises:
            ConfigError: on setting it, if the model cannot be sampled in this way; nothing changed.
        """
        return self._sampling

    @sampling.setter
    def sampling(self, sampling: SamplingConfig, /) -> None:
        fit_sampling(sampling, self.model)
        if self._rollout is not None:
            self._rollout.sampling = sampling
        self._sampling = sampling

    @property
    def forwards(self) -> int:
        """How many the last step needed; 0 before the first."""
        return self._state()[0].forwards

    @property
    def visible_frames(self) -> int:
        """Latent frames that the next step sees: the prompt's and those since, to the context's."""
        return min(self._state()[0].frame, self.model.config.context_frames)

    def reset(self, codes_thw: torch.Tensor, slots_TA: SlotArray, /, *, seed: int) -> Frames:
        """Start from a prompt; return its frames_THWC as the decoder sees them.

        Args:
            codes_thw: int64, one latent frame or more; (t, h, w, Q) where cells have levels.
            slots_TA: the r (t - 1) actions between them.
            seed: all randomness of what follows.
        """
        rollout = Rollout(
            self.model,
            codes_thw[None],
            torch.from_numpy(np.ascontiguousarray(slots_TA))[None],
            seeds=[seed],
            sampling=self.sampling,
        )
        decoder = self.tokenizer.open_decoder()
        frames_THWC: Frames = decoder.push(codes_thw[None])[0].cpu().numpy()
        self._rollout, self._decoder = rollout, decoder
        return frames_THWC

    def step(self, slots_rA: SlotArray, /) -> tuple[Frames, torch.Tensor]:
        """Do these r actions; return the r frames_THWC they lead to, and their codes_hw (or hwQ).

        Raises:
            FormatError: if an action is not one of the model's; nothing happened.
        """
        rollout, decoder = self._state()
        codes_Bhw = rollout.step(torch.from_numpy(np.ascontiguousarray(slots_rA))[None])
        frames_BTHWC = decoder.push(codes_Bhw[:, None])
        return frames_BTHWC[0].cpu().numpy(), codes_Bhw[0].cpu()

    def act(self, *, temperature: float = 1.0) -> SlotArray:
        """Return slots_rA that the model itself would choose next.

        Raises:
            ConfigError: if it has no action head.
        """
        rollout, _ = self._state()
        slots_rA: SlotArray = rollout.act(temperature=temperature)[0].cpu().numpy()
        return slots_rA

    def snapshot(self) -> WorldSnapshot:
        """Return the state, independent of what follows."""
        rollout, decoder = self._state()
        kept, copied = rollout.snapshot(), self._copy(decoder)
        past_bytes = sum(codes_BSQ.nbytes for codes_BSQ in kept.past)
        size_bytes = kept.cache.size_bytes + past_bytes + _held_bytes(copied, self._shared())
        return WorldSnapshot(kept, copied, size_bytes)

    def restore(self, snapshot: WorldSnapshot, /) -> None:
        """Go back to a snapshot of this world; `sampling` stays as it is now."""
        rollout, _ = self._state()
        rollout.restore(snapshot.rollout)
        self._decoder = self._copy(snapshot.decoder)

    def _state(self) -> tuple[Rollout, DecoderSession]:
        """Return what reset began."""
        if self._rollout is None or self._decoder is None:
            raise ValueError("a world has no state before its first reset")
        return self._rollout, self._decoder

    def _copy(self, decoder: DecoderSession) -> DecoderSession:
        """Return a session in the same state.

        Sessions are anybody's, so nothing is known of what they keep: all of it is copied but the
        tokenizer and its parts, which hold the weights and which decoding leaves as they are.
        """
        return deepcopy(decoder, {id(part): part for part in self._shared()})

    def _shared(self) -> list[object]:
        """Return the tokenizer and its parts."""
        tokenizer = self.tokenizer
        modules = tokenizer.modules() if isinstance(tokenizer, nn.Module) else ()
        return [tokenizer, *modules]


def _held_bytes(thing: object, shared: Collection[object]) -> int:
    """Return the memory of the tensors and arrays that anybody's object holds but does not share.

    An estimate: what its own code hides from Python (slots, closures) is not seen.
    """
    seen = {id(part) for part in shared}
    total, waiting = 0, [thing]
    while waiting:
        part = waiting.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, torch.Tensor | np.ndarray):
            total += part.nbytes
        elif isinstance(part, Mapping):
            waiting += part.values()
        elif isinstance(part, list | tuple | set | deque):
            waiting += part
        else:
            waiting += getattr(part, "__dict__", {}).values()
    return total
