"""Windows, and what is fed in their place -> what an update is to lower.

    WindowBatch (true), WindowBatch (fed)  ->  Losses: sums in nats, and how many codes were right

Sums and not means: of windows cut into parts, and of parts in several processes, they add up.
`mean_loss` divides them by counts that hold for all parts and all processes, so that every code
weighs the same wherever it is:

    code nats / codes  +  action_weight * action nats / actions  +  z_loss * squares / codes

A model of order masked predicts every code from its frame's cells all masked, and those that are
masked in `fed` once more, given the others: both count.

The z-loss keeps the logarithm of the softmax's denominator near 0, where bf16 resolves it best.

Source: z-loss, PaLM (arXiv:2204.02311), section 5.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from .losses import IGNORED, code_losses
from .model import DynamicsModel
from .sequence import flatten_codes
from .windows import WindowBatch


class Losses(NamedTuple):
    """Sums over the windows of one forward, float32 scalars. A tuple, so that hooks see through."""

    code_nats: Tensor
    """Cross-entropy of the codes that count."""
    squares: Tensor
    """Squared log-denominators of their softmaxes; 0 without z-loss."""
    action_nats: Tensor
    """Cross-entropy of the actions that are labels; 0 without action head."""
    codes_right: Tensor
    """Codes whose true value was the likeliest."""
    actions_right: Tensor

    def added_to(self, others: "Losses | None", /) -> "Losses":
        """Return the sums over these windows and others, without their graphs."""
        own = (value.detach() for value in self)
        if others is None:
            return Losses(*own)
        return Losses(*(a + b for a, b in zip(own, others, strict=True)))


class Objective(nn.Module):
    """A dynamics model and what it is to learn."""

    def __init__(self, dynamics: DynamicsModel, /, *, z_loss: bool, bf16: bool) -> None:
        """Hold the model; nothing is added to its weights.

        Args:
            dynamics: what learns.
            z_loss: whether `squares` are wanted.
            bf16: whether matrix products run in bfloat16; the losses are taken in float32.
        """
        super().__init__()
        self.dynamics = dynamics
        self.z_loss = z_loss
        self.bf16 = bf16

    def forward(self, batch: WindowBatch, fed: WindowBatch, /) -> Losses:
        """Return the losses of predicting `batch` from `fed`.

        Labels are those of `batch`: of a code that was replaced and of an action that was dropped
        too. Both windows are the same but for that.
        """
        dynamics, action_head = self.dynamics, self.dynamics.action_head
        refined_BfSV = None
        with torch.autocast(batch.codes_Bthw.device.type, torch.bfloat16, enabled=self.bf16):
            if fed.known_Bthw is None:
                tokens_BfSD = dynamics.tokens(
                    batch.codes_Bthw, fed.slots_BTA, inputs_Bthw=fed.codes_Bthw
                )
            else:
                tokens_BfSD, refined_BfSD = dynamics.tokens_and_refined(
                    batch.codes_Bthw, fed.slots_BTA, fed.known_Bthw, inputs_Bthw=fed.codes_Bthw
                )
                refined_BfSV = dynamics.logits(refined_BfSD, batch.codes_Bthw)
            logits_BfSV = dynamics.logits(tokens_BfSD, batch.codes_Bthw)
            if action_head is not None:
                codes = dynamics.spec.tokenizer.codes
                codes_BtSQ = flatten_codes("codes", batch.codes_Bthw, codes)
                actions_BfLX = action_head(tokens_BfSD, codes_BtSQ, self._labels(batch))
        sums = code_losses(logits_BfSV, batch, squares=self.z_loss)
        if refined_BfSV is not None:
            masked = _masked_alone(batch, fed)
            others = code_losses(refined_BfSV, masked, squares=self.z_loss)
            sums = (sums[0] + others[0], sums[1] + others[1], sums[2] + others[2])
        code_nats, squares, codes_right = sums
        action_nats = actions_right = torch.zeros_like(code_nats)
        if action_head is not None:
            action_nats, _, actions_right = action_head.nats(
                actions_BfLX, self._labels(batch), batch.valid_Bt[:, 1:]
            )
        return Losses(code_nats, squares, action_nats, codes_right, actions_right)

    def counts(self, batch: WindowBatch, fed: WindowBatch | None = None, /) -> Tensor:
        """Return how many codes and how many actions are labels, int64 (2,).

        A pure function of the windows: it is needed before the first forward.

        Args:
            batch: the truth.
            fed: what is fed; only of a model of order masked it makes a difference.
        """
        valid_Bf = batch.valid_Bt[:, 1:]
        codes = valid_Bf.sum() * batch.codes_Bthw[0, 0].numel()
        if fed is not None and fed.known_Bthw is not None:
            masked = ~fed.known_Bthw[:, 1:].flatten(2) & valid_Bf[..., None]
            codes = codes + masked.sum() * self.dynamics.spec.tokenizer.codes.num_levels
        actions = torch.zeros_like(codes)
        if self.dynamics.action_head is not None:
            actions = self.dynamics.action_head.num_labels(self._labels(batch), valid_Bf)
        return torch.stack([codes, actions])

    def _labels(self, batch: WindowBatch) -> Tensor:
        """Return the true slots_BfrA."""
        steps = self.dynamics.steps_per_frame
        slots_BfrA: Tensor = rearrange(batch.slots_BTA, "B (f r) A -> B f r A", r=steps)
        return slots_BfrA


def _masked_alone(batch: WindowBatch, fed: WindowBatch) -> WindowBatch:
    """Return the true windows with what is known no longer a label."""
    codes_Bthw, known_Bthw = batch.codes_Bthw, fed.known_Bthw
    assert known_Bthw is not None
    if codes_Bthw.dim() > known_Bthw.dim():
        known_Bthw = known_Bthw[..., None]
    return replace(batch, codes_Bthw=codes_Bthw.masked_fill(known_Bthw, IGNORED))


def mean_loss(losses: Losses, counts: Tensor, /, *, action_weight: float, z_loss: float) -> Tensor:
    """Return what is lowered: nats per code, plus the weighed others.

    Args:
        losses: of some of the windows of an update.
        counts: labels of all of them, from `Objective.counts`; none at all divide as one.
        action_weight: of nats per action.
        z_loss: of the mean squared log-denominator.
    """
    codes, actions = counts.clamp_min(1).float()
    loss: Tensor = losses.code_nats / codes
    if action_weight:
        loss = loss + action_weight * losses.action_nats / actions
    if z_loss:
        loss = loss + z_loss * losses.squares / codes
    return loss
