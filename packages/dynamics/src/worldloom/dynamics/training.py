"""Train the dynamics model on token shards: no pixels, no tokenizer; resumable to the last bit.

    SHARDS  ->  RUN/{config.toml, env.json, metrics.jsonl, log.txt, checkpoints/, LATEST, model/}

Devices and processes are Accelerate's. Batch i and every draw of update i are pure functions of
(seed, i, row), so a checkpoint holds weights, the optimizer's state and i, and more processes
compute the same updates. Accelerate's own state saving is not used: it reads pickles, and resumes
without a word where a generator's state is missing. Nor is its mixed precision: it would replace
the model's `forward` for good.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor
from worldloom.common import (
    Checkpoint,
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
    to_plain,
    warmup_cosine,
    write_json,
)

from .config import DynamicsConfig
from .disturbance import disturb
from .loading import Ahead, TrainingData
from .losses import cross_entropy, num_right, num_targets
from .model import DynamicsModel
from .spec import DynamicsSpec
from .training_config import DynamicsTrainingConfig, StreamConfig
from .validation import validate_all
from .windows import WindowBatch, WindowSource

Validated = Callable[[DynamicsModel, int], None]


def train_dynamics_model(  # noqa: PLR0913 (all but two are named by who calls)
    shards: TokenShards | Sequence[TokenShards],
    run: Path,
    /,
    *,
    model: DynamicsConfig,
    training: DynamicsTrainingConfig,
    weights: Sequence[float] | None = None,
    stream: StreamConfig | None = None,
    cpu: bool = False,
    on_validation: Validated | None = None,
) -> Path:
    """Train, or go on training, and return the model directory RUN/model.

    SIGTERM and Ctrl-C save a checkpoint and exit (143, 130); the same call continues. Under
    torchrun the processes share every batch, and only the main one writes.

    Args:
        shards: codes and actions, of one folder or of several; nothing else is read.
        run: the run directory, new or of the same settings and shards.
        model: sizes.
        training: how it is trained.
        weights: how often each of several folders is drawn; None weighs latent frames alike.
        stream: where the tars are, if not in the folder, which is then opened with
            `tars_elsewhere`.
        cpu: stay on the CPU even where there is an accelerator.
        on_validation: called with the model and the update after each validation, to draw pictures.

    Raises:
        ConfigError: if weights, lanes, batch and processes do not go together.
        FormatError: if a split is empty or a shard damaged.
        MismatchError: if the run holds checkpoints of other settings or other shards, or the
            folders do not speak the same codes and actions.
        StorageError: if a stream breaks off, or the disk refuses.
        TrainingError: if the loss stops being finite; the last checkpoint stays.
    """
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision="no",
        # The buffers are constants; there is nothing to spread before each forward.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    folders = [shards] if isinstance(shards, TokenShards) else list(shards)
    data = TrainingData.open(
        folders, window_frames=training.window_frames, weights=weights, stream=stream
    )
    if stream is not None:
        stream.check_dealing(size=training.batch_windows, num_ranks=accelerator.num_processes)
    settings = {"model": to_plain(model), "training": to_plain(training), **data.settings}
    with accelerator.main_process_first():  # it may have to mend what a kill left
        checkpoint, remarks = _checkpoint(run, settings, accelerator.num_processes)
    dynamics = DynamicsModel(
        model, DynamicsSpec.of(folders[0]), folders[0].codebook_VZ(), seed=training.seed
    ).to(accelerator.device)
    optimizer = torch.optim.AdamW(
        decay_groups(dynamics, weight_decay=training.weight_decay),
        lr=0.0,
        betas=(0.9, 0.95),
        fused=True,
    )
    step = _restore(checkpoint, dynamics, optimizer)
    # Only the main process has a log; only who has a log writes.
    log = None
    if accelerator.is_main_process:
        log = RunLog(run, config={"model": settings["model"], "training": settings["training"]})
        log.forget_after(step)
        for sentence in remarks:
            log.say(sentence)
    if step == training.num_steps and (run / "model" / "config.json").exists():
        if log:
            log.say(f"all {step} updates are done; {run / 'model'} is as it was")
        return run / "model"
    if log:
        log.say(_introduction(dynamics, data.windows, accelerator, step))
    wrapped, optimizer = accelerator.prepare(dynamics, optimizer)
    rows = range(accelerator.process_index, training.batch_windows, accelerator.num_processes)
    scores: dict[str, float] | None = None
    clock = _Clock()
    ahead = Ahead(
        data.windows,
        range(step, training.num_steps),
        size=training.batch_windows,
        seed=training.seed,
        rank=accelerator.process_index,
        num_ranks=accelerator.num_processes,
    )
    with ahead, Interrupt() as interrupt:
        while step < training.num_steps:
            with clock:
                batch = ahead.next().to(accelerator.device)
                vocab_size = dynamics.spec.tokenizer.codes.vocab_size
                fed = disturb(batch, training, vocab_size=vocab_size, step=step, rows=rows)
                factor = warmup_cosine(
                    step, warmup_steps=training.warmup_steps, num_steps=training.num_steps
                )
                set_learning_rate(optimizer, training.learning_rate * factor)
                update = _gradients(accelerator, wrapped, batch, fed, bf16=training.bf16)
                if not update.is_finite():
                    origins = data.windows.origins(
                        step, size=training.batch_windows, seed=training.seed
                    )
                    raise _diverged(run, step, update, origins, write=log is not None)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step += 1
            last = step == training.num_steps
            stop = _anywhere(accelerator, interrupt.wanted)
            if step % training.log_every == 0 or last:
                values = update.numbers(accelerator, batch)
                if log:
                    tokens_per_s = _num_predicted(dynamics, training) / clock.mean_s
                    waiting = {"data_wait_share": clock.share_of(ahead.waited_s)}
                    log.metrics(step, **values, tokens_per_s=tokens_per_s, **waiting)
                    log.say(
                        f"update {step} of {training.num_steps}  {format_metrics(values)}  "
                        f"{tokens_per_s:,.0f} tokens/s"
                    )
            if log and (step % training.validate_every == 0 or last):
                scores = validate_all(dynamics, data, seed=training.seed)
                log.metrics(step, **scores)
                log.say(f"held out at {step}  {format_metrics(scores)}")
                if on_validation is not None:
                    on_validation(dynamics, step)
            if log and (step % training.checkpoint_every == 0 or last or stop):
                tensors = {
                    "model": dynamics.state_dict(),
                    "optimizer": optimizer_tensors(optimizer),
                }
                state = {"settings": settings, "num_processes": accelerator.num_processes}
                save_checkpoint(run, step, tensors, state)
            if stop:
                if log:
                    log.say(f"stopped at update {step}; the same command continues from here")
                accelerator.wait_for_everyone()
                interrupt.leave()
    if log:
        if scores is None:  # a kill came between the last checkpoint and the model
            scores = validate_all(dynamics, data, seed=training.seed)
        dynamics.eval()
        dynamics.save(run / "model", card=_card(dynamics, training, scores))
    accelerator.wait_for_everyone()
    return run / "model"


def _checkpoint(
    run: Path, settings: dict[str, Any], num_processes: int
) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest valid checkpoint, if any, and what is to be said about it.

    Called before anything is written: a run of other settings stays as it is.
    """
    checkpoint, remarks = newest_checkpoint(run)
    if checkpoint is None:
        return None, remarks
    saved = checkpoint.state.get("settings")
    if saved != settings:
        raise MismatchError(
            f"{checkpoint.path}: was trained with other settings "
            f"({describe_difference(saved, settings)}); "
            "go on with the same ones, or choose another --output"
        )
    before = checkpoint.state.get("num_processes")
    if before != num_processes:
        remarks = [
            *remarks,
            f"{num_processes} process(es) go on with what {before} began: the same windows, "
            "but sums are rounded otherwise",
        ]
    return checkpoint, remarks


def _restore(
    checkpoint: Checkpoint | None, dynamics: DynamicsModel, optimizer: torch.optim.Optimizer
) -> int:
    """Load a checkpoint, if there is one; return the updates done."""
    if checkpoint is None:
        return 0
    where = str(checkpoint.path)
    load_weights(dynamics, checkpoint.tensors["model"], where=where)
    load_optimizer(optimizer, checkpoint.tensors["optimizer"], where=where)
    return checkpoint.step


def _introduction(
    dynamics: DynamicsModel, windows: WindowSource, accelerator: Accelerator, step: int
) -> str:
    """Return the line that opens the log."""
    num_parameters = sum(p.numel() for p in dynamics.parameters())
    return (
        f"dynamics: {num_parameters / 1e6:.1f}M parameters, order {dynamics.config.order}; "
        f"{len(windows)} windows in {windows.latent_frames} latent frames; "
        f"{accelerator.num_processes} process(es) on {accelerator.device.type}, from update {step}"
    )


@dataclass(frozen=True, slots=True)
class _Update:
    """One update, computed and not yet done: the gradients wait in the parameters."""

    loss: Tensor
    """Nats per code, over all processes."""
    gradient_norm: Tensor
    logits_BfSV: Tensor
    num_codes: int
    """Over all processes."""

    def is_finite(self) -> bool:
        """Tell whether the update may be done; the same in every process."""
        return bool(torch.isfinite(self.loss) & torch.isfinite(self.gradient_norm))

    def numbers(self, accelerator: Accelerator, batch: WindowBatch) -> dict[str, float]:
        """Return what the log says about it."""
        right = accelerator.reduce(num_right(self.logits_BfSV, batch))
        return {
            "loss": self.loss.item(),
            "accuracy": right.item() / self.num_codes,
            "gradient_norm": self.gradient_norm.item(),
        }


def _gradients(
    accelerator: Accelerator,
    model: torch.nn.Module,
    batch: WindowBatch,
    fed: WindowBatch,
    *,
    bf16: bool,
) -> _Update:
    """Compute the loss of predicting `batch` from `fed`, and the clipped gradients."""
    model.train()
    device = accelerator.device
    num_codes = int(accelerator.reduce(torch.tensor(num_targets(batch), device=device)).item())
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        logits_BfSV = model(batch.codes_Bthw, fed.slots_BTA, inputs_Bthw=fed.codes_Bthw)
    nats, _ = cross_entropy(logits_BfSV, batch)
    # Gradients are averaged over processes, but padding is not dealt out evenly: every code shall
    # weigh the same, wherever it is.
    accelerator.backward(nats * (accelerator.num_processes / num_codes))
    norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
    loss = accelerator.reduce(nats.detach()) / num_codes
    return _Update(loss, norm, logits_BfSV.detach(), num_codes)


def _diverged(
    run: Path, step: int, update: _Update, origins: list[tuple[str, int]], *, write: bool
) -> TrainingError:
    """Write which windows the update saw to RUN/diverged.json; return the error to raise."""
    numbers = {"loss": str(update.loss.item()), "gradient_norm": str(update.gradient_norm.item())}
    path = run / "diverged.json"
    if write:
        content = {
            "step": step + 1,
            **numbers,  # as text: JSON has no NaN
            "windows": [{"episode": key, "first_latent_frame": first} for key, first in origins],
        }
        write_json(path, content)
    return TrainingError(
        f"{run}: at update {step + 1} the loss is {numbers['loss']} and the gradient norm "
        f"{numbers['gradient_norm']}; the update was not done and the last checkpoint is whole. "
        f"The windows are named in {path}. Lower --training.learning-rate and choose another "
        "--output"
    )


def _anywhere(accelerator: Accelerator, wanted: bool) -> bool:
    """Tell whether any process was asked to stop, in all of them at the same update."""
    if accelerator.num_processes == 1:
        return wanted
    asked = torch.tensor(int(wanted), device=accelerator.device)
    return bool(accelerator.reduce(asked).item())


def _num_predicted(dynamics: DynamicsModel, training: DynamicsTrainingConfig) -> int:
    """Return how many codes an update predicts, padding included."""
    codes_per_frame = dynamics.grid.cells * dynamics.spec.tokenizer.codes.num_levels
    return training.batch_windows * (training.window_frames - 1) * codes_per_frame


class _Clock:
    """Mean time of the blocks it goes around: updates, not validations and checkpoints."""

    def __init__(self) -> None:
        self._started = self._sum_s = 0.0
        self._told_s = self._told_part_s = 0.0
        self._count = 0

    def __enter__(self) -> None:
        self._started = time.monotonic()

    def __exit__(self, *exception: object) -> None:
        self._sum_s += time.monotonic() - self._started
        self._count += 1

    @property
    def mean_s(self) -> float:
        """Seconds per block so far."""
        return self._sum_s / self._count

    def share_of(self, part_s: float, /) -> float:
        """Return of the time since the last call how large a share part_s has grown by."""
        share = (part_s - self._told_part_s) / (self._sum_s - self._told_s)
        self._told_s, self._told_part_s = self._sum_s, part_s
        return share


def _card(
    dynamics: DynamicsModel, training: DynamicsTrainingConfig, scores: dict[str, float]
) -> str:
    """Return the model card."""
    spec, config, codes = dynamics.spec, dynamics.config, dynamics.spec.tokenizer.codes
    numbers = "\n".join(f"| held out: {name} | {value:.4f} |" for name, value in scores.items())
    levels = codes.num_levels
    each, axis = (f" in each of {levels} levels", f", {levels}") if levels > 1 else ("", "")
    return f"""# A worldloom dynamics model

Given codes and actions, the next frame's codes. It speaks the codes of the tokenizer with
fingerprint `{spec.tokenizer.fingerprint[:16]}` and of no other:
{codes.grid_height}x{codes.grid_width} cells of {codes.vocab_size} codes{each}.

| | |
|---|---|
| actions | {": ".join(filter(None, (spec.actions.kind, ", ".join(spec.actions.names))))} |
| frames per second | {spec.fps:g} |
| sizes | {config.num_layers} layers, width {config.dim}, order {config.order} |
| frames in view | {config.context_frames} |
| updates | {training.num_steps}, seed {training.seed} |
| windows | {training.batch_windows} an update, {training.window_frames} latent frames each |
{numbers}

```python
from pathlib import Path
from worldloom.dynamics import DynamicsModel, SamplingConfig, generate_codes

model = DynamicsModel.from_pretrained(Path("this folder"))
# prompt: int64 (B, p, {codes.grid_height}, {codes.grid_width}{axis}) codes, p >= 1
# actions: int64 (B, {codes.frames_per_latent} (t - 1), {spec.actions.num_slots}) slots
codes = generate_codes(model, prompt, actions, seeds=[0], sampling=SamplingConfig())
```
"""
