"""Many learned worlds side by side: one rollout and one decoder session, B rows.

    Starts, seeds     -> WorldBatch: frames_BTHWC of the prompts
    slots_BrA         -> step: the r frames_BrHWC of every world that they lead to, and its codes

What a row shows depends on its own start, seed and actions alone: noise is keyed by the seed, and
rows never meet. (Two codes whose scores tie to the last bits of float32 are the exception: there
another batch may decide otherwise.) All rows are equally far from their starts.
"""

from collections.abc import Sequence

import numpy as np
import torch
from worldloom.common import ConfigError, Frames, SlotArray
from worldloom.dynamics import DynamicsModel, Rollout, SamplingConfig
from worldloom.tokenizer import DecoderSession, VideoTokenizer

from .starts import Start


class WorldBatch:
    """As many worlds as there are starts, in lockstep."""

    def __init__(
        self,
        model: DynamicsModel,
        tokenizer: VideoTokenizer,
        starts: Sequence[Start],
        /,
        *,
        seeds: Sequence[int],
        sampling: SamplingConfig,
    ) -> None:
        """Read the prompts.

        Args:
            model: in eval mode.
            tokenizer: the one it was trained on.
            starts: one a world, with prompts of one length.
            seeds: one a world; all its randomness.
            sampling: how codes are drawn, in every world.

        Raises:
            ConfigError: if the prompts are of different lengths.
        """
        lengths = {len(start.codes_thw) for start in starts}
        if len(lengths) != 1:
            raise ConfigError(
                f"starts of {', '.join(map(str, sorted(lengths)))} latent frames: worlds that run "
                "side by side must start from prompts of one length"
            )
        codes_Bthw = torch.stack([start.codes_thw for start in starts])
        slots_BTA = torch.from_numpy(np.stack([start.slots_TA for start in starts]))
        self._rollout = Rollout(model, codes_Bthw, slots_BTA, seeds=seeds, sampling=sampling)
        self._decoder: DecoderSession = tokenizer.open_decoder()
        self.first_BTHWC: Frames = self._decoder.push(codes_Bthw).cpu().numpy()
        """The prompts' frames, as the decoder sees them."""

    @property
    def forwards(self) -> int:
        """How many of the model the last step needed, for all worlds together."""
        return self._rollout.forwards

    def step(self, slots_BrA: SlotArray, /) -> tuple[Frames, torch.Tensor]:
        """Do each world's r actions; return frames_BrHWC and codes_Bhw (or BhwQ).

        Raises:
            ShapeError, FormatError: if an action is not one of the model's; nothing happened.
        """
        codes_Bhw = self._rollout.step(torch.from_numpy(np.ascontiguousarray(slots_BrA)))
        frames_BrHWC = self._decoder.push(codes_Bhw[:, None])
        return frames_BrHWC.cpu().numpy(), codes_Bhw.cpu()
