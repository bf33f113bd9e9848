"""What an update of a tokenizer changes, and how: frames in, gradients, then new weights.

    frames_BTHWC of this process's clips  ->  Learner.gradients  ->  Update, computed, not yet done
    Update                                ->  Learner.apply      ->  weights, their average
    Learner                               ->  tensors / restore  <-  a checkpoint

A batch may be cut twice, over processes and into parts that follow one another (`accumulate`). The
gradients are those of the whole batch all the same: weights of pixels are normalised over the
whole, every part counts by its clips, and sums over processes are Accelerate's. Four things are
of a part, because they are not sums: a learned codebook moves once a part (over all processes
together, so that it stays one), lfq's entropy is that of a part, so is the first k-means, and so
is what hard pixels weigh against the others.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor
from worldloom.common import (
    Checkpoint,
    Muon,
    WeightAverage,
    decay_groups,
    library_seed,
    load_optimizer,
    load_weights,
    optimizer_tensors,
    set_learning_rate,
    warmup_cosine,
)

from .codebook_health import count_codes, measure, summary
from .conv3d import CausalConv3d
from .discriminator import PatchDiscriminator
from .losses import (
    adversarial_loss,
    gradient_loss,
    hard_pixel_weight,
    hinge_loss,
    multiscale_loss,
    pixel_weight,
    reconstruction_loss,
)
from .metrics import decibels, squared_error
from .model import ConvTokenizer, Reconstruction
from .pixels import to_frames, to_video
from .training_config import TokenizerTrainingConfig


@dataclass(frozen=True, slots=True)
class Update:
    """One update, computed and not yet done: the gradients wait in the parameters."""

    losses: dict[str, Tensor]
    """The sum under "loss", and its terms before their weights; over the whole batch."""
    norms: dict[str, Tensor]
    """Of the gradients, before they were clipped."""
    pairs: list[tuple[Tensor, Tensor]]
    """True frames_BTHWC and reconstructed video_BCTHW of every part of this process."""
    counts_QV: Tensor
    """How often this process's clips took each code."""
    share: float
    """Of the batch's clips, those of this process."""

    def is_finite(self) -> bool:
        """Tell whether the update may be done; the same in every process."""
        values = torch.stack([*self.losses.values(), *self.norms.values()])
        return bool(torch.isfinite(values).all())

    def numbers(self, accelerator: Accelerator) -> dict[str, float]:
        """Return what the log says about it, over all processes; each of them has to ask."""
        errors = [squared_error(true, to_frames(recon)).flatten() for true, recon in self.pairs]
        error = accelerator.reduce(torch.cat(errors).mean() * self.share)
        levels = summary(measure(accelerator.reduce(self.counts_QV)))
        return {
            **{name: value.item() for name, value in self.losses.items()},
            "psnr_db": decibels(error.item()),
            "codes_used": levels["codes_used"],
            "perplexity": levels["perplexity"],
            **{name: value.item() for name, value in self.norms.items()},
        }


class Learner:
    """A tokenizer in training: everything that an update changes and a checkpoint holds."""

    def __init__(
        self,
        tokenizer: ConvTokenizer,
        checkpoint: Checkpoint | None,
        /,
        *,
        training: TokenizerTrainingConfig,
        accelerator: Accelerator,
    ) -> None:
        """Begin, or go on from a checkpoint.

        Args:
            tokenizer: on its device, with the weights to begin with.
            checkpoint: where to go on, of the same settings.
            training: how it is trained.
            accelerator: the processes that share every batch.

        Raises:
            FormatError: if the checkpoint's tensors are not those of this tokenizer.
        """
        self.tokenizer = tokenizer
        self._training = training
        self._accelerator = accelerator
        self._optimizer = _optimizer(tokenizer, training)
        self._average: WeightAverage[ConvTokenizer] | None = None
        if training.ema_decay:
            self._average = WeightAverage(tokenizer, decay=training.ema_decay)
        self._critic: _Critic | None = None
        if training.discriminator_weight:
            device = next(tokenizer.parameters()).device
            self._critic = _Critic(training, accelerator, device)
        if checkpoint is not None:
            self._restore(checkpoint)
        self._wrapped: torch.nn.Module = tokenizer
        if accelerator.num_processes > 1:
            self._wrapped, self._optimizer = accelerator.prepare(tokenizer, self._optimizer)

    def judged(self) -> ConvTokenizer:
        """Return what is validated, drawn and saved, in evaluation mode: the average, if any."""
        if self._average is None:
            return self.tokenizer.eval()
        return self._average.of(self.tokenizer)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return everything by name, for a checkpoint."""
        groups = {
            "model": self.tokenizer.state_dict(),
            "optimizer": optimizer_tensors(self._optimizer),
        }
        if self._average is not None:
            groups["average"] = self._average.tensors()
        if self._critic is not None:
            groups |= self._critic.tensors()
        return groups

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Put everything back as it was."""
        where, groups = str(checkpoint.path), checkpoint.tensors
        load_weights(self.tokenizer, groups["model"], where=where)
        load_optimizer(self._optimizer, groups["optimizer"], where=where)
        if self._average is not None:
            self._average.load(groups["average"], where=where)
        if self._critic is not None:
            self._critic.restore(groups, where=where)

    def gradients(self, frames_BTHWC: Tensor, /, *, step: int) -> Update:
        """Compute the losses and the clipped gradients of update `step`; the codebook moves here.

        Args:
            frames_BTHWC: the clips of this process, uint8, on the tokenizer's device.
            step: number of the update, from 0; it decides every random draw.
        """
        training, accelerator = self._training, self._accelerator
        self.tokenizer.train()
        share = len(frames_BTHWC) / training.batch_clips
        weight_B1THW = pixel_weight(frames_BTHWC, motion=training.motion_weight)
        weight_B1THW = weight_B1THW / accelerator.reduce(weight_B1THW.mean() * share)
        parts = list(
            zip(
                torch.tensor_split(frames_BTHWC, training.accumulate),
                torch.tensor_split(weight_B1THW, training.accumulate),
                strict=True,
            )
        )
        sums: dict[str, Tensor] = {}
        outputs: list[Reconstruction] = []
        # The codebook's k-means and the replacement of dead codes draw from torch's generator.
        with library_seed(training.seed, "tokenizer-update", step):
            for number, (frames, weight) in enumerate(parts):
                # Gradients travel between processes once, with the last part.
                wait = number + 1 < len(parts)
                with accelerator.no_sync(self._wrapped) if wait else nullcontext():
                    losses, output = self._part(frames, weight, step=step)
                outputs.append(output)
                for name, value in losses.items():
                    whole = value * (len(frames) / training.batch_clips)
                    sums[name] = sums[name] + whole if name in sums else whole
        norms = {"gradient_norm": accelerator.clip_grad_norm_(self._wrapped.parameters(), 1.0)}
        if "discriminator" in sums and self._critic is not None:
            norms["discriminator_gradient_norm"] = self._critic.spread_gradients()
        spec = self.tokenizer.config.code_spec
        return Update(
            losses={name: accelerator.reduce(value) for name, value in sums.items()},
            norms=norms,
            pairs=[(p[0], o.video_BCTHW.detach()) for p, o in zip(parts, outputs, strict=True)],
            counts_QV=torch.stack([count_codes(o.codes_Bthw, spec) for o in outputs]).sum(0),
            share=share,
        )

    def _part(
        self, frames_BTHWC: Tensor, weight_B1THW: Tensor, *, step: int
    ) -> tuple[dict[str, Tensor], Reconstruction]:
        """Add the gradients of some clips of this process; return the losses, means over them."""
        training = self._training
        video_BCTHW = to_video(frames_BTHWC)
        critic = self._critic if step >= training.discriminator_step else None
        with torch.autocast(frames_BTHWC.device.type, torch.bfloat16, enabled=training.bf16):
            output = self._wrapped(video_BCTHW)
            verdicts = None if critic is None else critic.verdicts(output.video_BCTHW)
        if training.hard_pixel_power:
            weight_B1THW = self._on_hard_pixels(video_BCTHW, output.video_BCTHW, weight_B1THW)
        seen = video_BCTHW, output.video_BCTHW, weight_B1THW
        losses = {
            "reconstruction": reconstruction_loss(*seen),
            "quantizer": output.quantizer_loss,
        }
        loss = losses["reconstruction"] + losses["quantizer"]
        for name, value, weight in _terms(training, output, verdicts, *seen):
            losses[name] = value
            loss = loss + weight * value
        # Accelerate averages over processes; this is a sum over them, of parts of one mean.
        # Its own backward would divide by what an environment says of accumulation.
        scale = len(frames_BTHWC) / training.batch_clips * self._accelerator.num_processes
        (loss * scale).backward()
        losses = {"loss": loss, **losses}
        if critic is not None:
            with torch.autocast(frames_BTHWC.device.type, torch.bfloat16, enabled=training.bf16):
                losses["discriminator"] = critic.learn(
                    video_BCTHW, output.video_BCTHW.detach(), scale=scale
                )
        return {name: value.detach() for name, value in losses.items()}, output

    def _on_hard_pixels(
        self, true_BCTHW: Tensor, recon_BCTHW: Tensor, weight_B1THW: Tensor
    ) -> Tensor:
        """Return the weight moved to what is wrong; its mean over all processes' clips stays."""
        power = self._training.hard_pixel_power
        moved_B1THW = weight_B1THW * hard_pixel_weight(true_BCTHW, recon_BCTHW, power=power)
        means = torch.stack([weight_B1THW.mean(), moved_B1THW.mean()]) * len(weight_B1THW)
        before, after = self._accelerator.reduce(means)
        brought_back: Tensor = moved_B1THW * (before / after.clamp_min(1e-12))
        return brought_back

    def apply(self, *, step: int) -> None:
        """Do update `step`, whose gradients were just computed."""
        training = self._training
        factor = warmup_cosine(
            step, warmup_steps=training.warmup_steps, num_steps=training.num_steps
        )
        set_learning_rate(self._optimizer, training.learning_rate * factor)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self._average is not None:
            self._average.update(self.tokenizer, step=step)
        if self._critic is not None and step >= training.discriminator_step:
            self._critic.apply(factor)


def _optimizer(
    tokenizer: ConvTokenizer, training: TokenizerTrainingConfig
) -> torch.optim.Optimizer:
    """Return the optimizer that a training asks for."""
    matrices, vectors = decay_groups(tokenizer, weight_decay=training.weight_decay)
    if training.optimizer == "adamw":
        return torch.optim.AdamW([matrices, vectors], lr=0.0, betas=(0.9, 0.95))
    # The convolutions around the quantizer begin as the identity and shall stay near it: orthogonal
    # steps, as long as any, turn them so far that codes flicker and 0.5 dB is lost (docs/log.md).
    layers = (layer for layer in tokenizer.modules() if isinstance(layer, CausalConv3d))
    near = {id(layer.weight) for layer in layers}
    parameters = matrices["params"]
    groups = [
        {**matrices, "params": [p for p in parameters if id(p) not in near]},
        {**matrices, "params": [p for p in parameters if id(p) in near], "orthogonal": False},
        vectors,
    ]
    return Muon(groups, lr=0.0, betas=(0.9, 0.95))


def _terms(  # noqa: PLR0913 - two of them are what one line of the caller unpacks
    training: TokenizerTrainingConfig,
    output: Reconstruction,
    verdicts: Tensor | None,
    true_BCTHW: Tensor,
    recon_BCTHW: Tensor,
    weight_B1THW: Tensor,
) -> Iterator[tuple[str, Tensor, float]]:
    """Yield (name, value, weight) of the terms that are switched on."""
    if training.temporal_weight:
        yield "temporal", output.temporal_loss, training.temporal_weight
    if training.gradient_weight:
        value = gradient_loss(true_BCTHW, recon_BCTHW, weight_B1THW)
        yield "gradient", value, training.gradient_weight
    if training.multiscale_weight:
        value = multiscale_loss(true_BCTHW, recon_BCTHW, weight_B1THW)
        yield "multiscale", value, training.multiscale_weight
    if verdicts is not None:
        yield "adversarial", adversarial_loss(verdicts), training.discriminator_weight


class _Critic:
    """The discriminator and its optimizer."""

    def __init__(
        self, training: TokenizerTrainingConfig, accelerator: Accelerator, device: torch.device
    ) -> None:
        self._learning_rate = training.discriminator_learning_rate
        self._accelerator = accelerator
        with library_seed(training.seed, "discriminator-weights"):
            self._network = PatchDiscriminator().to(device)
        # The moments of GANs: what was right long ago is wrong now.
        self._optimizer = torch.optim.AdamW(
            decay_groups(self._network, weight_decay=training.weight_decay),
            lr=0.0,
            betas=(0.5, 0.9),
        )

    def verdicts(self, made_BCTHW: Tensor) -> Tensor:
        """Return what it says of made frames, for the tokenizer to learn from."""
        self._network.requires_grad_(requires_grad=False)
        verdicts: Tensor = self._network(made_BCTHW)
        self._network.requires_grad_(requires_grad=True)
        return verdicts

    def learn(self, true_BCTHW: Tensor, made_BCTHW: Tensor, *, scale: float) -> Tensor:
        """Add the gradients of telling true frames from made ones; return the loss."""
        loss = hinge_loss(self._network(true_BCTHW), self._network(made_BCTHW))
        (loss * scale).backward()  # type: ignore[no-untyped-call]
        return loss

    def spread_gradients(self) -> Tensor:
        """Average the gradients over processes, clip them, and return their norm before that."""
        if self._accelerator.num_processes > 1:
            for parameter in self._network.parameters():
                if parameter.grad is not None:
                    parameter.grad.copy_(self._accelerator.reduce(parameter.grad, "mean"))
        return torch.nn.utils.clip_grad_norm_(self._network.parameters(), 1.0)

    def apply(self, factor: float) -> None:
        """Do its update, at `factor` of its learning rate."""
        set_learning_rate(self._optimizer, self._learning_rate * factor)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return everything by name, for a checkpoint."""
        return {
            "discriminator": self._network.state_dict(),
            "discriminator_optimizer": optimizer_tensors(self._optimizer),
        }

    def restore(self, groups: dict[str, dict[str, Tensor]], *, where: str) -> None:
        """Put everything back as it was."""
        load_weights(self._network, groups["discriminator"], where=where)
        load_optimizer(self._optimizer, groups["discriminator_optimizer"], where=where)
