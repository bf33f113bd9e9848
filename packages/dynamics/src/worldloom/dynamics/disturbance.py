"""What training feeds instead of the truth: some windows without actions, some codes wrong.

    WindowBatch, one generator a row  ->  WindowBatch

And which cells it may look at to predict the others of their frame, if it learns to refine. A
row's draws come from its own generators, so they are the same in whichever process it is.

Source: the schedule of masks, MaskGIT (arXiv:2202.04200), section 3.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Generator, Tensor
from worldloom.common import stream

from .actions import NULL
from .training_config import DynamicsTrainingConfig
from .windows import WindowBatch


def disturb(
    batch: WindowBatch,
    training: DynamicsTrainingConfig,
    /,
    *,
    vocab_size: int,
    step: int,
    rows: Sequence[int],
) -> WindowBatch:
    """Return what the model is fed in update `step`; nothing of it is a label.

    Args:
        batch: the truth.
        training: the shares of windows and codes that are disturbed, and the seed.
        vocab_size: number of codes, V.
        step: the update.
        rows: where the windows stand in the whole batch, over all processes.
    """
    rngs = [stream(training.seed, "dynamics-update", step, row) for row in rows]
    return WindowBatch(
        # First, so that another corruption drops the same actions.
        slots_BTA=drop_actions(batch.slots_BTA, training.action_dropout, rngs),
        codes_Bthw=corrupt(batch.codes_Bthw, training.corruption, vocab_size, rngs),
        valid_Bt=batch.valid_Bt,
    )


def drop_actions(slots_BTA: Tensor, rate: float, rngs: Sequence[Generator], /) -> Tensor:
    """Return slots in which a share of the windows, never a batch as such, has null actions."""
    dropped_B = torch.cat([torch.rand(1, generator=rng) for rng in rngs]) < rate
    return slots_BTA.masked_fill(dropped_B.to(slots_BTA.device)[:, None, None], NULL)


def corrupt(
    codes_Bthw: Tensor, most: float, vocab_size: int, rngs: Sequence[Generator], /
) -> Tensor:
    """Return codes of which a share is replaced at random, growing along the window.

    Each code by itself: of a cell with levels, some may be wrong and others not.

    A rollout feeds on its own mistakes, which training never shows; random ones teach not to
    trust every cell. The share grows from 0 at the first frame to a rate at the last, which is
    drawn for each window from [0, most).
    """
    if most == 0:
        return codes_Bthw
    shape = codes_Bthw.shape[1:]
    shares_t = torch.linspace(0, most, shape[0])
    cell = (1,) * (len(shape) - 1)
    replaced, others = [], []
    for rng in rngs:
        rates_t = shares_t * torch.rand(1, generator=rng)
        replaced.append(torch.rand(shape, generator=rng) < rates_t.reshape(-1, *cell))
        others.append(torch.randint(vocab_size, shape, generator=rng))
    device = codes_Bthw.device
    return torch.where(torch.stack(replaced).to(device), torch.stack(others).to(device), codes_Bthw)


def mask_cells(
    fed: WindowBatch, training: DynamicsTrainingConfig, /, *, step: int, rows: Sequence[int]
) -> WindowBatch:
    """Return what a model that learns to refine is fed in update `step`: with `known_Bthw`.

    In every frame random cells are known, as many as might be in the midst of a refinement.
    Of S cells ceil(S cos(pi u / 2)) are masked, u drawn from [0, 1) for every window and frame. One
    cell at least is masked, and one at least is not: every frame is predicted from none besides.

    Args:
        fed: from `disturb`.
        training: its seed.
        step: the update.
        rows: where the windows stand in the whole batch, over all processes.
    """
    frames, height, width = fed.codes_Bthw.shape[1:4]
    cells, known = height * width, []
    for row in rows:
        rng = stream(training.seed, "dynamics-masks", step, row)
        shares_t1 = torch.cos(math.pi / 2 * torch.rand(frames, 1, generator=rng))
        masked_t1 = torch.ceil(cells * shares_t1).clamp(max=max(1, cells - 1))
        ranks_tS = torch.rand(frames, cells, generator=rng).argsort(-1).argsort(-1)
        known.append((ranks_tS >= masked_t1).reshape(frames, height, width))
    return replace(fed, known_Bthw=torch.stack(known).to(fed.codes_Bthw.device))
