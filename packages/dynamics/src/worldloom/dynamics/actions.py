"""Action slots -> vectors: one embedding per step, slot and value; null is its own.

    slots_BfrA integers  ->  actions_BfD, the sum over the r steps and A slots that lead to a frame

Slot values are those of ActionSpec.encode. A step whose slots are NULL ("no action was given")
gets the learned null embedding, which no action of the game shares: a no-op is an action.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from worldloom.common import ActionSpec

NULL = -1
"""Stands in every slot of a step without a known action."""


class ActionEmbedding(nn.Module):
    """A table for every step of a latent frame and every slot of an action."""

    def __init__(self, spec: ActionSpec, /, *, steps: int, dim: int) -> None:
        super().__init__()
        sizes = torch.tensor(spec.sizes, dtype=torch.int64)
        per_step = int(sizes.sum()) + len(spec.sizes)  # one null a slot
        starts_A = torch.cumsum(sizes + 1, 0) - (sizes + 1)
        starts_rA = torch.arange(steps)[:, None] * per_step + starts_A
        self.register_buffer("nulls_rA", starts_rA, persistent=False)
        self.nulls_rA: Tensor
        self.table = nn.Embedding(max(1, steps * per_step), dim)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, slots_BfrA: Tensor, /) -> Tensor:
        """Return actions_BfD."""
        # Row 0 of a slot's table is null, row v + 1 is value v: NULL = -1 falls into place.
        rows = slots_BfrA + 1 + self.nulls_rA
        actions_BfD: Tensor = self.table(rearrange(rows, "B f r A -> B f (r A)")).sum(dim=2)
        return actions_BfD
