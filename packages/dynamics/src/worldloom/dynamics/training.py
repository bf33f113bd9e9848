"""Train the dynamics model on token shards: no pixels, no tokenizer; resumable to the last bit.

    SHARDS  ->  RUN/{config.toml, env.json, metrics.jsonl, log.txt, checkpoints/, model/}

Devices, precision and processes are Accelerate's. Batch i and every draw of update i are pure
functions of (seed, i), so a checkpoint holds weights, the optimizer's state and i; Accelerate's
own state saving is not used (it reads pickles, and resumes with a missing generator state without
a word).
"""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import cross_entropy as nats
from worldloom.common import (
    Interrupt,
    MismatchError,
    RunLog,
    TokenShards,
    TrainingError,
    decay_groups,
    describe_difference,
    format_metrics,
    load_optimizer,
    load_weights,
    newest_checkpoint,
    optimizer_tensors,
    save_checkpoint,
    set_learning_rate,
    stream,
    to_plain,
    warmup_cosine,
)

from .actions import NULL
from .config import DynamicsConfig, DynamicsTrainingConfig, SamplingConfig
from .model import DynamicsModel, DynamicsSpec
from .rollout import generate_codes
from .windows import WindowBatch, Windows

Validated = Callable[[DynamicsModel, int], None]


def train_dynamics_model(  # noqa: PLR0913 (all but two are named by who calls)
    shards: TokenShards,
    run: Path,
    /,
    *,
    model: DynamicsConfig,
    training: DynamicsTrainingConfig,
    cpu: bool = False,
    on_validation: Validated | None = None,
) -> Path:
    """Train, or go on training, and return the model directory RUN/model.

    Args:
        shards: codes and actions; only this folder is read.
        run: the run directory.
        model: sizes.
        training: how.
        cpu: stay on the CPU even where there is an accelerator.
        on_validation: called with the model and the update after each validation, to draw pictures.

    Raises:
        FormatError: if a split is empty or a shard damaged.
        MismatchError: if the run holds checkpoints of other settings or other shards.
        TrainingError: if the loss stops being finite; the last checkpoint stays.
    """
    accelerator = Accelerator(cpu=cpu, mixed_precision="bf16" if training.bf16 else "no")
    spec = DynamicsSpec(
        tokenizer=shards.tokenizer,
        actions=shards.actions,
        fps=shards.fps,
        frame_skip=shards.frame_skip,
    )
    settings = {
        "model": to_plain(model),
        "training": to_plain(training),
        "spec": spec.to_dict(),
    }
    windows = Windows(shards, "train", window_frames=training.window_frames)
    held_out = Windows(
        shards,
        "validation" if shards.split("validation") else "train",
        window_frames=training.window_frames,
    )
    dynamics = DynamicsModel(model, spec, shards.codebook_VZ(), seed=training.seed)
    log = RunLog(run, config={"model": settings["model"], "training": settings["training"]})
    optimizer = torch.optim.AdamW(
        decay_groups(dynamics, weight_decay=training.weight_decay), lr=0.0, betas=(0.9, 0.95)
    )
    step = _resume(run, log, dynamics, optimizer, settings)
    wrapped, optimizer = accelerator.prepare(dynamics, optimizer)
    num_parameters = sum(p.numel() for p in dynamics.parameters())
    log.say(
        f"dynamics: {num_parameters / 1e6:.1f}M parameters, order {model.order}; "
        f"{len(windows)} windows of {training.window_frames} latent frames; "
        f"{accelerator.num_processes} process(es) on {accelerator.device.type}; from update {step}"
    )
    started, start_step = time.monotonic(), step
    with Interrupt() as interrupt:
        while step < training.num_steps:
            batch = windows.batch(
                step,
                size=training.batch_windows,
                seed=training.seed,
                rank=accelerator.process_index,
                num_ranks=accelerator.num_processes,
            ).to(accelerator.device)
            factor = warmup_cosine(
                step, warmup_steps=training.warmup_steps, num_steps=training.num_steps
            )
            set_learning_rate(optimizer, training.learning_rate * factor)
            rng = stream(training.seed, "dynamics-update", step, accelerator.process_index)
            fed = _disturb(batch, training, shards.codes.vocab_size, rng)
            values = _update(accelerator, wrapped, optimizer, batch, fed)
            step += 1
            last = step == training.num_steps
            if step % training.log_every == 0 or last:
                seconds_per_step = (time.monotonic() - started) / (step - start_step)
                tokens = training.batch_windows * (training.window_frames - 1) * dynamics.grid.cells
                log.metrics(step, **values, tokens_per_s=tokens / seconds_per_step)
                log.say(
                    f"update {step} of {training.num_steps}  {format_metrics(values)}  "
                    f"{tokens / seconds_per_step:,.0f} tokens/s"
                )
            if step % training.validate_every == 0 or last:
                scores = validate(dynamics, held_out, seed=training.seed)
                log.metrics(step, **scores)
                log.say(f"held out at {step}  {format_metrics(scores)}")
                if on_validation is not None:
                    on_validation(dynamics, step)
            if step % training.checkpoint_every == 0 or last or interrupt.wanted:
                save_checkpoint(
                    run,
                    step,
                    {"model": dynamics.state_dict(), "optimizer": optimizer_tensors(optimizer)},
                    {"settings": settings},
                )
            if interrupt.wanted:
                log.say(f"stopped at update {step}; the same command continues from here")
                interrupt.leave()
    scores = validate(dynamics, held_out, seed=training.seed)
    dynamics.save(run / "model", card=_card(dynamics, training, scores))
    return run / "model"


def _resume(
    run: Path,
    log: RunLog,
    dynamics: DynamicsModel,
    optimizer: torch.optim.Optimizer,
    settings: dict[str, object],
) -> int:
    """Load the newest valid checkpoint, if there is one; return the updates done."""
    checkpoint, skipped = newest_checkpoint(run)
    for sentence in skipped:
        log.say(sentence)
    if checkpoint is None:
        log.forget_after(0)
        return 0
    if checkpoint.state["settings"] != settings:
        raise MismatchError(
            f"{checkpoint.path}: was trained with other settings "
            f"({describe_difference(checkpoint.state['settings'], settings)}); "
            "go on with the same ones, or choose another --output"
        )
    load_weights(dynamics, checkpoint.tensors["model"], where=str(checkpoint.path))
    load_optimizer(optimizer, checkpoint.tensors["optimizer"], where=str(checkpoint.path))
    log.forget_after(checkpoint.step)
    return checkpoint.step


def _update(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: WindowBatch,
    fed: WindowBatch,
) -> dict[str, float]:
    """Do one optimizer update that learns `batch` from `fed`; return its numbers."""
    model.train()
    with accelerator.autocast():
        logits_BfSV = model(batch.codes_Bthw, fed.slots_BTA, inputs_Bthw=fed.codes_Bthw)
    loss, accuracy = cross_entropy(logits_BfSV, batch)
    accelerator.backward(loss)
    norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
    if not torch.isfinite(loss) or not torch.isfinite(norm):
        raise TrainingError(
            f"the loss is {loss.item()} and the gradient norm {norm.item()}; the weights were left "
            "as they were. Lower --training.learning-rate"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"loss": loss.item(), "accuracy": accuracy.item(), "gradient_norm": norm.item()}


def _disturb(
    batch: WindowBatch, training: DynamicsTrainingConfig, vocab_size: int, rng: torch.Generator, /
) -> WindowBatch:
    """Return what the model is fed: some windows without actions, some codes wrong."""
    return WindowBatch(
        corrupt(batch.codes_Bthw, training.corruption, vocab_size, rng),
        drop_actions(batch.slots_BTA, training.action_dropout, rng),
        batch.valid_Bt,
    )


def cross_entropy(logits_BfSV: Tensor, batch: WindowBatch, /) -> tuple[Tensor, Tensor]:
    """Return (cross-entropy in nats per code, accuracy) over the valid frames after the first."""
    targets_BfS = batch.codes_Bthw[:, 1:].flatten(2)
    valid_BfS = batch.valid_Bt[:, 1:, None].expand_as(targets_BfS)
    logits, targets = logits_BfSV[valid_BfS].float(), targets_BfS[valid_BfS]
    accuracy = (logits.argmax(-1) == targets).float().mean()
    return nats(logits, targets), accuracy.detach()


def drop_actions(slots_BTA: Tensor, rate: float, rng: torch.Generator, /) -> Tensor:
    """Return slots in which a share of the windows, never a whole batch, has null actions."""
    dropped_B = torch.rand(len(slots_BTA), generator=rng) < rate
    return slots_BTA.masked_fill(dropped_B.to(slots_BTA.device)[:, None, None], NULL)


def corrupt(codes_Bthw: Tensor, most: float, vocab_size: int, rng: torch.Generator, /) -> Tensor:
    """Return input codes of which a share is replaced at random, growing along the window.

    A rollout feeds on its own mistakes, which training never shows; random ones teach not to
    trust every cell. The share goes from 0 at the first frame to a rate drawn per window, at most
    `most`.
    """
    batch, t = codes_Bthw.shape[:2]
    rate_B = torch.rand(batch, generator=rng) * most
    rate_Bt = rate_B[:, None] * torch.linspace(0, 1, t)
    replaced = torch.rand(codes_Bthw.shape, generator=rng) < rate_Bt[:, :, None, None]
    random = torch.randint(vocab_size, codes_Bthw.shape, generator=rng)
    device = codes_Bthw.device
    return torch.where(replaced.to(device), random.to(device), codes_Bthw)


@torch.no_grad()
def validate(
    dynamics: DynamicsModel, windows: Windows, /, *, seed: int, num_windows: int = 128
) -> dict[str, float]:
    """Return held-out numbers, teacher-forced and free-running.

    validation_loss, validation_accuracy: the next frame's codes given the true past.
    free_running_accuracy: cells of the first frame sampled after a prompt of half a window that
    are the true ones. copy_accuracy: the same for repeating the prompt's last frame.
    """
    dynamics.eval()
    batch = windows.batch(0, size=num_windows, seed=seed).to(dynamics.device)
    logits_BfSV = dynamics(batch.codes_Bthw, batch.slots_BTA)
    loss, accuracy = cross_entropy(logits_BfSV, batch)
    prompt_frames = max(1, batch.codes_Bthw.shape[1] // 2)
    whole_B = batch.valid_Bt[:, : prompt_frames + 1].all(1)
    scores = {"validation_loss": loss.item(), "validation_accuracy": accuracy.item()}
    if whole_B.any():
        codes_Bthw, slots_BTA = batch.codes_Bthw[whole_B], batch.slots_BTA[whole_B]
        generated_Bthw = generate_codes(
            dynamics,
            codes_Bthw[:, :prompt_frames],
            slots_BTA[:, : prompt_frames * dynamics.steps_per_frame],
            seeds=range(len(codes_Bthw)),
            sampling=SamplingConfig(),
        )
        true_Bhw = codes_Bthw[:, prompt_frames]
        free, copied = (
            generated_Bthw[:, -1] == true_Bhw,
            codes_Bthw[:, prompt_frames - 1] == true_Bhw,
        )
        scores["free_running_accuracy"] = free.float().mean().item()
        scores["copy_accuracy"] = copied.float().mean().item()
    return scores


def _card(
    dynamics: DynamicsModel, training: DynamicsTrainingConfig, scores: dict[str, float]
) -> str:
    """Return the model card."""
    spec, config, codes = dynamics.spec, dynamics.config, dynamics.spec.tokenizer.codes
    numbers = "\n".join(f"| held out: {name} | {value:.4f} |" for name, value in scores.items())
    return f"""# A worldloom dynamics model

Given codes and actions, the next frame's codes. It speaks the codes of the tokenizer with
fingerprint `{spec.tokenizer.fingerprint[:16]}` and of no other:
{codes.grid_height}x{codes.grid_width} cells of {codes.vocab_size} codes.

| | |
|---|---|
| actions | {spec.actions.kind}: {", ".join(spec.actions.names)} |
| frames per second | {spec.fps:g} |
| sizes | {config.num_layers} layers, width {config.dim}, order {config.order} |
| frames in view | {config.context_frames} |
| updates | {training.num_steps}, seed {training.seed} |
| windows | {training.batch_windows} an update, {training.window_frames} latent frames each |
{numbers}

```python
from worldloom.dynamics import DynamicsModel, SamplingConfig, generate_codes

model = DynamicsModel.from_pretrained("this folder")
codes = generate_codes(model, prompt_codes, actions, seeds=[0], sampling=SamplingConfig())
```
"""
