"""Updates of ours as training.py does them, for benchmarks to time.

model, windows from shards on disk or held in memory  ->  Updates: a round of them, timed
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from accelerate import Accelerator
from report import Report
from torch import nn
from turns import Times, timed
from worldloom.common import TokenShards
from worldloom.dynamics import (
    DynamicsConfig,
    DynamicsModel,
    DynamicsSpec,
    DynamicsTrainingConfig,
    WindowBatch,
    Windows,
)
from worldloom.dynamics.disturbance import disturb, mask_cells
from worldloom.dynamics.learner import Learner
from worldloom.dynamics.loading import Ahead

Run = Callable[[int], Times]


class Updates:
    """Our updates, as training.py does them."""

    def __init__(
        self,
        model: DynamicsModel,
        training: DynamicsTrainingConfig,
        next_batch: Callable[[], WindowBatch],
    ) -> None:
        self.training = training
        self.next_batch = next_batch
        accelerator = Accelerator(cpu=True, mixed_precision="no")
        self.learner = Learner(model, None, training=training, accelerator=accelerator)
        self.vocab_size = model.spec.tokenizer.codes.vocab_size

    def __call__(self, steps: int) -> Times:
        """Do a round."""
        return timed(self._update, steps)

    def _update(self) -> None:
        batch = self.next_batch()
        step, rows = self.learner.step, range(len(batch.valid_Bt))
        fed = disturb(batch, self.training, vocab_size=self.vocab_size, step=step, rows=rows)
        if self.learner.dynamics.grid.refines:
            fed = mask_cells(fed, self.training, step=step, rows=rows)
        update = self.learner.gradients(batch, fed)
        if not update.is_finite():
            raise SystemExit("updates: the loss is no longer finite; nothing was measured")
        self.learner.apply()


@contextmanager
def updates_from_disk(
    shards: TokenShards, config: DynamicsConfig, training: DynamicsTrainingConfig, *, seed: int
) -> Iterator[Updates]:
    """Lend updates whose windows a thread reads from shards, one batch ahead."""
    model = DynamicsModel(config, DynamicsSpec.of(shards), shards.codebook_VZ(), seed=seed)
    windows = Windows(shards, "train", window_frames=training.window_frames)
    with Ahead(windows, count(), size=training.batch_windows, seed=seed) as ahead:
        yield Updates(model, training, lambda: ahead.next().to("cpu"))


def num_parameters(model: nn.Module) -> int:
    """Count what is learned."""
    return sum(p.numel() for p in model.parameters())


def asked_of(parser: ArgumentParser, /) -> Namespace:
    """Return what is asked for, and how often all is timed; torch has its threads from here on."""
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="of every contender in a round")
    parser.add_argument("--warm", type=int, default=3, help="steps that do not count")
    parser.add_argument("--seed", type=int, default=0, help="of weights and windows")
    asked = parser.parse_args()
    if asked.quick:
        asked.rounds, asked.steps, asked.warm = 1, 1, 1
    torch.set_num_threads(asked.threads)
    return asked


def about(asked: Any) -> dict[str, Any]:
    """Return what every table was made with."""
    return {name: getattr(asked, name) for name in ("seed", "threads", "rounds", "steps")}


def type_name(bf16: bool) -> str:
    """Return what tables call a type."""
    return "bf16" if bf16 else "float32"


def in_both_types(table: Callable[..., None]) -> Callable[[Report, Any], None]:
    """Return what prints a table in float32 and one in bf16."""

    def print_both(report: Report, asked: Any) -> None:
        for bf16 in (False, True):
            table(report, asked, bf16=bf16)

    return print_both
