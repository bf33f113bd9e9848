"""Action slots -> vectors: one embedding per step, slot and value; null is its own.

    slots_BfrA integers  ->  actions_BfrD, one vector for each of the r steps that lead to a frame

Slot values are those of ActionSpec.encode. A step whose slots are NULL ("no action was given")
gets the learned null embedding, which no action of the game shares: a no-op is an action. Several
keys at once are summed, and a key means the same in whichever slot it stands.
"""

import torch
from torch import Tensor, nn
from worldloom.common import ActionSpec

NULL = -1
"""Stands in every slot of a step without a known action."""


class ActionEmbedding(nn.Module):
    """A table for every step of a latent frame and every slot of an action."""

    def __init__(self, spec: ActionSpec, /, *, steps: int, dim: int) -> None:
        super().__init__()
        # Row 0 of a slot's table is null and row v + 1 is value v, so that NULL = -1 falls into
        # place. Pressed keys move up a slot when another key is let go: their slots share a table.
        self.register_buffer(
            "sizes_A", torch.tensor(spec.sizes, dtype=torch.int64), persistent=False
        )
        self.sizes_A: Tensor
        sizes_A = self.sizes_A + 1
        starts_A = torch.cumsum(sizes_A, 0) - sizes_A
        if spec.kind == "keys":
            starts_A, sizes_A = torch.zeros_like(starts_A), sizes_A[:1]
        per_step = int(sizes_A.sum())
        first_rows_rA = 1 + torch.arange(steps)[:, None] * per_step + starts_A
        self.register_buffer("first_rows_rA", first_rows_rA, persistent=False)
        self.first_rows_rA: Tensor
        # Where there are no actions one row stays, unused: an empty table has no width.
        self.table = nn.Embedding(max(1, steps * per_step), dim)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, slots_BfrA: Tensor, /) -> Tensor:
        """Return actions_BfrD, each the sum over its slots."""
        actions_BfrD: Tensor = self.table(slots_BfrA + self.first_rows_rA).sum(dim=-2)
        return actions_BfrD
