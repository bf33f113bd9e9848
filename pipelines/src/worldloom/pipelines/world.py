"""A learned world: start it, press actions, see frames.

    codes_thw, slots_TA  -> reset -> frames_THWC;    slots_rA  -> step  -> the next r frames

The tokenizer, the dynamics model, a rollout and a streaming decoder, held together. One world at a
time: what generate and play show, and what evaluate clocks.
"""

from pathlib import Path
from typing import Self

import numpy as np
import torch
from worldloom.common import Frames, SlotArray
from worldloom.dynamics import DynamicsModel, Rollout, SamplingConfig
from worldloom.tokenizer import DecoderSession, VideoTokenizer, load_tokenizer


class World:
    """One world, played at batch 1."""

    def __init__(
        self, model: DynamicsModel, tokenizer: VideoTokenizer, /, *, sampling: SamplingConfig
    ) -> None:
        """Hold a model and the tokenizer it was trained on.

        Raises:
            MismatchError: if it was trained on another tokenizer.
        """
        tokenizer.spec.require(model.spec.tokenizer, here="this tokenizer", there="this model")
        self.model = model
        self.tokenizer = tokenizer
        self.sampling = sampling
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

    def reset(self, codes_thw: torch.Tensor, slots_TA: SlotArray, /, *, seed: int) -> Frames:
        """Start from a prompt; return its frames_THWC as the decoder sees them.

        Args:
            codes_thw: int64, one latent frame or more; (t, h, w, Q) where cells have levels.
            slots_TA: the r (t - 1) actions between them.
            seed: all randomness of what follows.
        """
        self._rollout = Rollout(
            self.model,
            codes_thw[None],
            torch.from_numpy(np.ascontiguousarray(slots_TA))[None],
            seeds=[seed],
            sampling=self.sampling,
        )
        self._decoder = self.tokenizer.open_decoder()
        return self._decoder.push(codes_thw[None])[0].cpu().numpy()

    def step(self, slots_rA: SlotArray, /) -> tuple[Frames, torch.Tensor]:
        """Do these r actions; return the r frames_THWC they lead to, and their codes_hw (or hwQ).

        Raises:
            FormatError: if an action is not one of the model's; nothing happened.
        """
        if self._rollout is None or self._decoder is None:
            raise ValueError("a world has no state before its first reset")
        codes_Bhw = self._rollout.step(torch.from_numpy(np.ascontiguousarray(slots_rA))[None])
        frames_BTHWC = self._decoder.push(codes_Bhw[:, None])
        return frames_BTHWC[0].cpu().numpy(), codes_Bhw[0].cpu()
