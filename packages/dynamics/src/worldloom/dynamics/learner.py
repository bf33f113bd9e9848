"""A dynamics model that learns: windows -> gradients -> one update.

    batch, what is fed  ->  Learner.gradients  ->  Update, not yet done; gradients wait
                        ->  Learner.apply      ->  the weights after it, and their average

Nothing is drawn here, and nothing is kept between updates but weights, the optimizer's state and
the average, so `tensors` is all that a checkpoint needs. An update's windows may be cut into parts
(micro-batches) whose gradients add up: the counts that losses are divided by are those of all parts
and all processes, so the sum is the same.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from worldloom.common import (
    Checkpoint,
    Muon,
    WeightAverage,
    load_optimizer,
    optimizer_tensors,
    set_learning_rate,
    warmup_cosine,
    warmup_stable_decay,
)

from .code_embedding import CodeEmbedding
from .heads import CodeHead
from .micro_batch import find_micro_windows
from .model import DynamicsModel
from .objective import Losses, Objective, mean_loss
from .placement import Placement, Replicated
from .training_config import DynamicsTrainingConfig
from .windows import WindowBatch


@dataclass(frozen=True, slots=True)
class Update:
    """One update, computed and not yet done: the gradients wait in the parameters."""

    losses: Losses
    """Sums over all windows of all processes."""
    counts: Tensor
    """Codes and actions that are labels, over all processes."""
    gradient_norm: Tensor
    """Before it was clipped."""

    def is_finite(self) -> bool:
        """Tell whether the update may be done; the same in every process."""
        return bool(torch.isfinite(torch.stack([*self.losses, self.gradient_norm])).all())

    def numbers(self) -> dict[str, float]:
        """Return what the log says about it."""
        sums = Losses(*torch.stack(self.losses).tolist())
        codes, actions = self.counts.tolist()
        numbers = {"loss": sums.code_nats / codes, "accuracy": sums.codes_right / codes}
        if actions:
            numbers["action_loss"] = sums.action_nats / actions
            numbers["action_accuracy"] = sums.actions_right / actions
        return {**numbers, "gradient_norm": self.gradient_norm.item()}


class Learner:
    """A model, its optimizer, and the average of its weights if that is wanted."""

    def __init__(
        self,
        dynamics: DynamicsModel,
        checkpoint: Checkpoint | None,
        /,
        *,
        training: DynamicsTrainingConfig,
        accelerator: Accelerator,
    ) -> None:
        """Begin with fresh weights, or go on where a checkpoint stands.

        Args:
            dynamics: on its device, with the same weights in every process.
            checkpoint: of a run of the same settings.
            training: how it learns.
            accelerator: how many processes there are, and how they talk.

        Raises:
            FormatError: if the checkpoint does not fit.
        """
        self.dynamics = dynamics
        self.step = 0 if checkpoint is None else checkpoint.step
        """Updates done."""
        self.micro_windows = training.micro_windows
        """Windows computed at once, 0 for all; -1 as long as it is to be found."""
        self._training = training
        self._accelerator = accelerator
        found = None if checkpoint is None else checkpoint.state.get("fits")
        # Processes of unequal memory look for it again, all of them or none.
        if self.micro_windows < 0 and self._everywhere(found == self._fitting(found)):
            assert found is not None
            self.micro_windows = found["windows"]
        if dynamics.action_head is not None:
            # Of what gets no gradient, processes would wait for one.
            dynamics.action_head.requires_grad_(training.action_weight > 0)
        dynamics.transformer.recompute = training.recompute
        if training.compile and accelerator.device.type == "cuda":
            for layer in dynamics.transformer.layers:
                layer.compile()
        self._objective = Objective(dynamics, z_loss=training.z_loss > 0, bf16=training.bf16)
        self._place = _place(self._objective, accelerator, training)
        self._optimizer = _optimizer(dynamics, training)
        self._average = None
        if training.ema_decay:
            self._average = WeightAverage(dynamics, decay=training.ema_decay)
        if checkpoint is not None:
            self._restore(checkpoint)

    @property
    def learning_rate(self) -> float:
        """That of the next update: a pure function of the step."""
        training = self._training
        if training.schedule == "wsd":
            factor = warmup_stable_decay(
                self.step,
                warmup_steps=training.warmup_steps,
                num_steps=training.num_steps,
                decay_share=training.decay_share,
            )
        else:
            factor = warmup_cosine(
                self.step, warmup_steps=training.warmup_steps, num_steps=training.num_steps
            )
        return training.learning_rate * factor

    @property
    def fits(self) -> dict[str, Any] | None:
        """What was found to fit into memory, and into which; None where nobody looked for it."""
        if self._training.micro_windows >= 0 or self.micro_windows < 0:
            return None
        return self._fitting({"windows": self.micro_windows})

    def _fitting(self, found: Any) -> dict[str, Any]:
        """Return what was found, with all that it depends on as it is now."""
        device = self._accelerator.device
        memory = None
        if device.type == "cuda":
            memory = torch.cuda.get_device_properties(device).total_memory
        return {
            "windows": found.get("windows") if isinstance(found, dict) else None,
            "processes": self._accelerator.num_processes,
            "device": device.type,
            "memory_bytes": memory,
            "recompute": self._training.recompute,
            "compile": self._training.compile,
        }

    def gradients(self, batch: WindowBatch, fed: WindowBatch, /) -> Update:
        """Compute the next update from this process's windows.

        Args:
            batch: the truth, which the losses compare with.
            fed: what the model is given instead, of the same windows.
        """
        self.dynamics.train()
        counts: Tensor = self._accelerator.reduce(self._objective.counts(batch, fed))
        num_windows = len(batch.valid_Bt)
        part = self.micro_windows or num_windows
        sums: Losses | None = None
        for first in range(0, num_windows, part):
            rows = slice(first, first + part)
            with self._place.syncing(last=first + part >= num_windows):
                losses = self._add_gradients(batch.rows(rows), fed.rows(rows), counts)
            sums = losses.added_to(sums)
        assert sums is not None
        norm = self._place.clip(self._training.clip or float("inf"))
        if self._accelerator.num_processes > 1:
            sums = Losses(*self._accelerator.reduce(torch.stack(sums)))
        return Update(sums, counts, norm)

    def _add_gradients(self, batch: WindowBatch, fed: WindowBatch, counts: Tensor) -> Losses:
        """Add the gradients of some of the windows of an update; return their losses."""
        training = self._training
        losses: Losses = self._place.objective(batch, fed)
        loss = mean_loss(
            losses, counts, action_weight=training.action_weight, z_loss=training.z_loss
        )
        # Gradients are averaged over the processes, but the counts are those of all. Accelerate's
        # own backward would divide by what an environment says of accumulation.
        (loss * self._accelerator.num_processes).backward()
        return losses

    def find_micro_windows(self, batch: WindowBatch, fed: WindowBatch, /) -> None:
        """Find the most windows that fit into memory, from a process's share of a batch.

        All processes must call it together. Weights and optimizer stay as they are.

        Raises:
            TrainingError: if not even one fits.
        """
        parameters = list(self.dynamics.parameters())
        counts = self._objective.counts(batch, fed)
        most = len(batch.valid_Bt)

        def attempt(count: int) -> None:
            # What the optimizer will hold from its first update on.
            moments = [] if self._optimizer.state else [torch.empty_like(p) for p in 2 * parameters]
            rows = slice(0, count)
            try:
                for _ in range(1 if count == most else 2):  # gradients add up to those that are
                    with self._place.syncing(last=False):
                        self._add_gradients(batch.rows(rows), fed.rows(rows), counts)
            finally:
                self._optimizer.zero_grad(set_to_none=True)
                moments.clear()

        self.dynamics.train()
        self.micro_windows = find_micro_windows(attempt, most=most, everywhere=self._everywhere)

    def _everywhere(self, fits: bool) -> bool:
        """Tell whether something is true in all processes, which call it together."""
        failed = torch.tensor(int(not fits), device=self._accelerator.device)
        return not self._accelerator.reduce(failed).item()

    def apply(self) -> float:
        """Do the update whose gradients were just computed; return its learning rate."""
        learning_rate = self.learning_rate
        set_learning_rate(self._optimizer, learning_rate)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self._average is not None:
            self._average.update(self.dynamics, step=self.step)
        self.step += 1
        return learning_rate

    def judged(self) -> AbstractContextManager[DynamicsModel | None]:
        """Lend the model that is validated, drawn and kept at the end: the average if there is one.

        All processes must call it together; None where nobody shall look at it.
        """
        return self._place.judged(self._average)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return everything by name, whole, for a checkpoint; all processes must call it."""
        groups = {
            "model": self.dynamics.state_dict(),
            "optimizer": optimizer_tensors(self._optimizer),
        }
        if self._average is not None:
            groups["average"] = self._average.tensors()
        return {name: self._place.whole(tensors) for name, tensors in groups.items()}

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Put everything back as it was."""
        where, saved = str(checkpoint.path), checkpoint.tensors
        self._place.load_weights(saved["model"], where=where)
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        like = {
            f"{number}.{kind}": parameter
            for number, parameter in enumerate(parameters)
            for kind in ("momentum", "exp_avg", "exp_avg_sq")
        }
        load_optimizer(self._optimizer, self._place.shares(saved["optimizer"], like), where=where)
        if self._average is not None:
            own = self._average.tensors()
            self._average.load(self._place.shares(saved["average"], own), where=where)


def _place(
    objective: Objective, accelerator: Accelerator, training: DynamicsTrainingConfig
) -> Placement:
    """Return where the weights shall lie."""
    if not training.sharded or accelerator.num_processes == 1:
        return Replicated(objective, accelerator)
    from .sharding import Sharded  # FSDP2 takes a while to import

    compiled = training.compile and accelerator.device.type == "cuda"
    return Sharded(objective, accelerator, whole_layers=compiled)


def _optimizer(dynamics: DynamicsModel, training: DynamicsTrainingConfig) -> torch.optim.Optimizer:
    """Return the optimizer that a training asks for."""
    groups = parameter_groups(dynamics, weight_decay=training.weight_decay)
    if training.optimizer == "adamw":
        for group in groups:
            del group["orthogonal"]
        return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)
    # In bf16 as the training itself; in float32 several processes do what one does.
    precision = torch.bfloat16 if training.bf16 else torch.float32
    return Muon(groups, lr=0.0, betas=(0.9, 0.95), precision=precision)


def parameter_groups(dynamics: DynamicsModel, /, *, weight_decay: float) -> list[dict[str, Any]]:
    """Return three groups: hidden matrices, other matrices and tables, vectors.

    Hidden matrices map the stream to itself: those of attention and feed-forward layers, which are
    "orthogonal" (common/muon.py). Tables of vectors, what codes come in by and logits go out by
    are not: most rows of their gradients are near 0, and an orthogonal step would move all alike.
    Vectors do not decay.
    """
    aside = {
        id(parameter)
        for module in dynamics.modules()
        if isinstance(module, CodeEmbedding | CodeHead)
        for parameter in module.parameters()
    }
    hidden = {
        id(module.weight)
        for name, module in dynamics.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith(("to_logits", "to_weights"))
    } - aside
    kinds: dict[str, list[nn.Parameter]] = {"hidden": [], "matrices": [], "vectors": []}
    for parameter in dynamics.parameters():
        if id(parameter) in hidden:
            kinds["hidden"].append(parameter)
        else:
            # (N, 1) is a number for each head, and not a matrix.
            matrix = parameter.ndim >= 2 and min(parameter.shape) > 1
            kinds["matrices" if matrix else "vectors"].append(parameter)
    decays = {"hidden": weight_decay, "matrices": weight_decay, "vectors": 0.0}
    return [
        {"params": kinds[kind], "weight_decay": decays[kind], "orthogonal": kind == "hidden"}
        for kind in kinds
        if kinds[kind]
    ]
