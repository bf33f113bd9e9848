"""Train the dynamics model on token shards: no pixels, no tokenizer; resumable to the last bit.

    SHARDS  ->  RUN/{config.toml, env.json, metrics.jsonl, log.txt, checkpoints/, LATEST, model/}

Devices and processes are Accelerate's. Batch i and every draw of update i are pure functions of
(seed, i, row), so a checkpoint holds what learner.py's `Learner` holds, and i; more processes
compute the same updates. Accelerate's own state saving is not used: it reads pickles, and resumes
without a word where a generator's state is missing. Nor is its mixed precision: it would replace
the model's `forward` for good.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration
from worldloom.common import (
    Checkpoint,
    ConfigError,
    Interrupt,
    MismatchError,
    RunLog,
    TokenShards,
    TrainingError,
    describe_difference,
    format_metrics,
    newest_checkpoint,
    save_checkpoint,
    to_plain,
    write_json,
)

from .config import DynamicsConfig
from .disturbance import disturb, mask_cells
from .learner import Learner, Update
from .loading import Ahead, TrainingData
from .model import DynamicsModel
from .model_card import model_card
from .spec import DynamicsSpec
from .throughput import Throughput
from .trackers import check_trackers, start_trackers, stop_trackers
from .training_config import DynamicsTrainingConfig, StreamConfig
from .validation import validate_all
from .windows import WindowSource

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
        on_validation: called after each validation with the model that was validated and the
            update, to draw pictures.

    Raises:
        ConfigError: if weights, lanes, batch and processes do not go together, or a tracker's
            library is missing.
        FormatError: if a split is empty or a shard damaged.
        MismatchError: if the run holds checkpoints of other settings or other shards, or the
            folders do not speak the same codes and actions.
        StorageError: if a stream breaks off, or the disk refuses.
        TrainingError: if the loss stops being finite; the last checkpoint stays.
    """
    check_trackers(training.trackers)
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision="no",
        log_with=list(training.trackers) or None,
        project_config=ProjectConfiguration(logging_dir=str(run / "tensorboard")),
        kwargs_handlers=[
            # The buffers are constants; there is nothing to spread before each forward.
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        ],
    )
    folders = [shards] if isinstance(shards, TokenShards) else list(shards)
    data = TrainingData.open(
        folders, window_frames=training.window_frames, weights=weights, stream=stream
    )
    if training.batch_windows % accelerator.num_processes:
        raise ConfigError(
            f"training: a batch of {training.batch_windows} windows cannot be dealt to "
            f"{accelerator.num_processes} processes; choose a multiple of them"
        )
    if stream is not None:
        stream.check_dealing(size=training.batch_windows, num_ranks=accelerator.num_processes)
    settings = {"model": to_plain(model), "training": training.what(), **data.settings}
    with accelerator.main_process_first():  # it may have to mend what a kill left
        checkpoint, remarks = _checkpoint(run, settings, accelerator.num_processes)
    spec = DynamicsSpec.of(*folders)
    dynamics = DynamicsModel(model, spec, folders[0].codebook_VZ(), seed=training.seed)
    introduction = _introduction(dynamics, data.windows, accelerator)
    learner = Learner(
        dynamics.to(accelerator.device), checkpoint, training=training, accelerator=accelerator
    )
    del checkpoint  # as large as weights and optimizer together
    # Only the main process has a log; only who has a log writes.
    log = None
    if accelerator.is_main_process:
        log = RunLog(run, config={"model": model, "training": training})
        log.forget_after(learner.step)
        for sentence in remarks:
            log.say(sentence)
    if learner.step == training.num_steps and (run / "model" / "config.json").exists():
        if log:
            log.say(f"all {learner.step} updates are done; {run / 'model'} is as it was")
        return run / "model"
    if log:
        for sentence in _advice(model, training, accelerator):
            log.say(sentence)
        log.say(f"{introduction}, from update {learner.step}")
    shown = {"model": to_plain(model), "training": to_plain(training)}
    start_trackers(accelerator, run, settings=shown, step=learner.step)

    def note(values: dict[str, float]) -> None:
        """Write numbers down, wherever they go."""
        if log:
            log.metrics(learner.step, **values)
            accelerator.log(values, step=learner.step)

    def save() -> None:
        """Write a checkpoint; all processes call it together."""
        tensors = learner.tensors()
        if log:
            state = {
                "settings": settings,
                "num_processes": accelerator.num_processes,
                "fits": learner.fits,
            }
            save_checkpoint(run, learner.step, tensors, state)

    def leave(interrupt: Interrupt) -> NoReturn:
        """End after a checkpoint was written; all processes call it together."""
        if log:
            log.say(f"stopped at update {learner.step}; the same command continues from here")
        stop_trackers(accelerator)
        accelerator.wait_for_everyone()
        interrupt.leave()

    def judge(judged: DynamicsModel) -> dict[str, float]:
        """Return held-out numbers, of no more windows at once than training takes."""
        share = training.batch_windows // accelerator.num_processes
        most = min(16, learner.micro_windows if learner.micro_windows > 0 else share)
        return validate_all(judged, data, seed=training.seed, batch_windows=most)

    ahead = Ahead(
        data.windows,
        range(learner.step, training.num_steps),
        size=training.batch_windows,
        seed=training.seed,
        rank=accelerator.process_index,
        num_ranks=accelerator.num_processes,
    )
    rows = range(accelerator.process_index, training.batch_windows, accelerator.num_processes)
    vocab_size = spec.tokenizer.codes.vocab_size
    scores: dict[str, float] | None = None
    throughput = Throughput()
    alone = accelerator.num_processes == 1
    with ahead, Interrupt() as interrupt:
        while learner.step < training.num_steps:
            with throughput:
                # Of several processes none may leave the others waiting for its share.
                if not ahead.wait(unless=lambda: alone and interrupt.wanted):
                    save()
                    leave(interrupt)
                batch = ahead.next().to(accelerator.device)
                fed = disturb(batch, training, vocab_size=vocab_size, step=learner.step, rows=rows)
                if dynamics.grid.refines:
                    fed = mask_cells(fed, training, step=learner.step, rows=rows)
                if learner.micro_windows < 0:
                    learner.find_micro_windows(batch, fed)
                    if log:
                        log.say(f"{learner.micro_windows} windows fit into a process at once")
                update = learner.gradients(batch, fed)
                if not update.is_finite():
                    raise _diverged(run, learner.step, update, data.windows, training, log)
                learning_rate = learner.apply()
            step, last = learner.step, learner.step == training.num_steps
            stop = _anywhere(accelerator, interrupt.wanted)
            if stop:  # before anything that may outlast the patience of who asked
                save()
            if log and (step % training.log_every == 0 or last):
                values = update.numbers()
                tokens_per_s = _num_predicted(spec, training) / throughput.mean_s
                note(
                    {
                        **values,
                        "learning_rate": learning_rate,
                        "tokens_per_s": tokens_per_s,
                        "data_wait_share": throughput.share_of(ahead.waited_s),
                    }
                )
                log.say(
                    f"update {step} of {training.num_steps}  {format_metrics(values)}  "
                    f"{tokens_per_s:,.0f} tokens/s"
                )
            if step % training.validate_every == 0 or last:
                with learner.judged() as judged:
                    if log and judged is not None:
                        scores = judge(judged)
                        note(scores)
                        log.say(f"held out at {step}  {format_metrics(scores)}")
                        if on_validation is not None:
                            on_validation(judged, step)
            if stop:
                leave(interrupt)
            if step % training.checkpoint_every == 0 or last:
                save()
    with learner.judged() as judged:
        if judged is not None and log:
            if scores is None:  # a kill came between the last checkpoint and the model
                scores = judge(judged)
            judged.eval().save(run / "model", card=model_card(judged, training, scores))
    stop_trackers(accelerator)
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


def _introduction(dynamics: DynamicsModel, windows: WindowSource, accelerator: Accelerator) -> str:
    """Return the line that opens the log."""
    num_parameters = sum(p.numel() for p in dynamics.parameters())
    return (
        f"dynamics: {num_parameters / 1e6:.1f}M parameters, order {dynamics.config.order}; "
        f"{len(windows)} windows in {windows.latent_frames} latent frames; "
        f"{accelerator.num_processes} process(es) on {accelerator.device.type}"
    )


def _advice(
    model: DynamicsConfig, training: DynamicsTrainingConfig, accelerator: Accelerator
) -> list[str]:
    """Return a sentence for each setting that does nothing here, or will be regretted."""
    sentences = []
    if training.window_frames <= model.context_frames:
        sentences.append(
            f"warning: windows of {training.window_frames} latent frames never slide out of a "
            f"context of {model.context_frames}, so a rollout that is longer meets what was never "
            "learned; choose --training.window-frames half as many again as the context"
        )
    if training.compile and accelerator.device.type != "cuda":
        sentences.append(f"compile: only on CUDA, not on {accelerator.device.type}")
    if training.sharded and accelerator.num_processes == 1:
        sentences.append("sharded: there is one process, which holds all weights")
    return sentences


def _diverged(  # noqa: PLR0913 - what was asked for, what came of it, and whether to write
    run: Path,
    step: int,
    update: Update,
    windows: WindowSource,
    training: DynamicsTrainingConfig,
    log: RunLog | None,
) -> TrainingError:
    """Write which windows the update saw to RUN/diverged.json; return the error to raise."""
    numbers = {name: str(value) for name, value in update.numbers().items()}
    path = run / "diverged.json"
    if log:
        origins = windows.origins(step, size=training.batch_windows, seed=training.seed)
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


def _num_predicted(spec: DynamicsSpec, training: DynamicsTrainingConfig) -> int:
    """Return how many codes an update predicts, padding included."""
    codes = spec.tokenizer.codes
    per_frame = codes.cells * codes.num_levels
    return training.batch_windows * (training.window_frames - 1) * per_frame
