"""Train one of our tokenizers: clips in, a model directory out, resumable to the last bit.

    EPISODES  ->  RUN/{config.toml, env.json, metrics.jsonl, log.txt, samples/, checkpoints/,
                       model/}

Batch i, the learning rate of update i and the random draws of update i are pure functions of
(seed, i), so a checkpoint needs only what learner.py's `Learner` holds, and i. Under torchrun the
processes share every batch; devices and processes are Accelerate's, whose own state saving is not
used: it reads pickles, and resumes without a word where a generator's state is missing.
"""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor
from worldloom.common import (
    Checkpoint,
    ConfigError,
    Episodes,
    Interrupt,
    MismatchError,
    RunLog,
    TrainingError,
    describe_difference,
    format_metrics,
    newest_checkpoint,
    save_checkpoint,
    to_plain,
    write_bytes,
    write_json,
)

from .clips import Clips
from .codebook_health import advice, count_codes, measure, summary
from .config import TokenizerConfig
from .learner import Learner, Update
from .metrics import moving_psnr, psnr
from .model import ConvTokenizer, Trained
from .training_config import TokenizerTrainingConfig, check_fit
from .training_pictures import reconstruction_png, usage_png

_SPREAD_STEPS = 1000
"""Or half of a shorter training: by then a codebook is in use, or will not be. Young latents lie
close together; a healthy run of 400 updates used 5% of its codes after 50, and 47% after 200."""


def train_conv_tokenizer(
    episodes: Episodes,
    run: Path,
    /,
    *,
    model: TokenizerConfig,
    training: TokenizerTrainingConfig,
    device: str = "cpu",
) -> Path:
    """Train, or go on training, and return the model directory RUN/model.

    SIGTERM and Ctrl-C save a checkpoint and exit (143, 130); the same call continues. Under
    torchrun the processes share every batch, and only the main one writes.

    Args:
        episodes: what to train on; their validation split is held out.
        run: the run directory, new or of the same settings and episodes.
        model: sizes.
        training: how it is trained.
        device: where to compute; of several processes each takes "cpu", or the GPU of its rank.

    Raises:
        ConfigError: if clips do not fill latent frames, or a process would have no clip.
        FormatError: if no episode is long enough for a clip.
        MismatchError: if the run holds checkpoints of other settings or episodes.
        TrainingError: if the loss stops being finite; the last checkpoint stays.
    """
    accelerator = Accelerator(
        cpu=device == "cpu",
        mixed_precision="no",
        # The codebook is the same everywhere already; the other buffers are constants.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    rank, num_ranks = accelerator.process_index, accelerator.num_processes
    place = _place(accelerator, device)
    check_fit(model, training, num_processes=num_ranks)
    clips = _clips(episodes, "train", model, training)
    held_out = _clips(
        episodes, "validation" if episodes.split("validation") else "train", model, training
    )
    settings = {
        "model": to_plain(model),
        "training": training.what(),
        "episodes": episodes.fingerprint(),
    }
    with accelerator.main_process_first():  # it may have to mend what a kill left
        checkpoint, remarks = _checkpoint(run, settings, num_ranks)
    # After the accelerator, which is when a codebook learns that it is shared.
    tokenizer = ConvTokenizer(
        model,
        trained=Trained(fps=episodes.spec.fps, frame_skip=episodes.spec.frame_skip),
        seed=training.seed,
        tokens_per_step=_tokens_per_move(model, training),
    ).to(place)
    learner = Learner(tokenizer, checkpoint, training=training, accelerator=accelerator)
    step = 0 if checkpoint is None else checkpoint.step
    del checkpoint  # as large as weights and optimizer together
    # Only the main process has a log; only who has a log writes.
    log = None
    if accelerator.is_main_process:
        log = RunLog(run, config={"model": model, "training": training})
        for sentence in remarks:
            log.say(sentence)
        log.forget_after(step)
    if step == training.num_steps and (run / "model" / "config.json").exists():
        if log:
            log.say(f"all {step} updates are done; {run / 'model'} is as it was")
        return run / "model"
    if log:
        log.say(_introduction(tokenizer, clips, accelerator, step))
    state = {"settings": settings, "num_processes": num_ranks}
    started, start_step = time.monotonic(), step
    with Interrupt() as interrupt:
        while step < training.num_steps:
            frames = clips.batch(
                step, size=training.batch_clips, seed=training.seed, rank=rank, num_ranks=num_ranks
            )
            update = learner.gradients(frames.to(place), step=step)
            if not update.is_finite():
                raise _diverged(run, step, update, clips, training, write=log is not None)
            learner.apply(step=step)
            step += 1
            last = step == training.num_steps
            stop = _anywhere(accelerator, interrupt.wanted)
            if log and stop:  # before anything that may outlast the patience of who asked
                save_checkpoint(run, step, learner.tensors(), state)
            if step % training.log_every == 0 or last:
                values = update.numbers(accelerator)
                seconds_per_step = (time.monotonic() - started) / (step - start_step)
                if log:
                    log.metrics(step, **values, seconds_per_step=seconds_per_step)
                    log.say(
                        f"update {step} of {training.num_steps}  {format_metrics(values)}  "
                        f"{seconds_per_step:.2f} s/update"
                    )
            if log and (step % training.sample_every == 0 or last):
                _look(learner, held_out, training, log, step)
            if log and not stop and (step % training.checkpoint_every == 0 or last):
                save_checkpoint(run, step, learner.tensors(), state)
            if stop:
                if log:
                    log.say(f"stopped at update {step}; the same command continues from here")
                accelerator.wait_for_everyone()
                interrupt.leave()
    if log:
        # Once more: a run that was killed right here comes back with all updates done.
        judged = learner.judged()
        scores, _ = _validate(judged, held_out, training)
        judged.save(run / "model", card=_card(judged, episodes, training, scores))
    accelerator.wait_for_everyone()
    return run / "model"


def _place(accelerator: Accelerator, device: str) -> torch.device:
    """Return where this process computes."""
    if accelerator.num_processes == 1:
        return torch.device(device)
    if torch.device(device).index is not None:
        raise ConfigError(
            f"device: {device} was asked for by {accelerator.num_processes} processes at once; "
            f"say {torch.device(device).type}, and each takes the one of its rank"
        )
    place: torch.device = accelerator.device
    return place


def _clips(
    episodes: Episodes, split: str, model: TokenizerConfig, training: TokenizerTrainingConfig
) -> Clips:
    """Return the clips of one split."""
    return Clips(
        episodes,
        episodes.split(split),
        clip_frames=training.clip_frames,
        size=(model.height, model.width),
        resize=model.resize,
    )


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
            f"{num_processes} process(es) go on with what {before} began: the same clips, "
            "but sums are rounded otherwise and the codebook draws otherwise",
        ]
    return checkpoint, remarks


def _tokens_per_move(model: TokenizerConfig, training: TokenizerTrainingConfig) -> int:
    """Return the latents from which the codebook moves once, over all processes."""
    spec = model.code_spec
    tokens_per_clip = spec.latent_frames(training.clip_frames) * spec.cells
    return training.batch_clips * tokens_per_clip // training.accumulate


def _introduction(
    tokenizer: ConvTokenizer, clips: Clips, accelerator: Accelerator, step: int
) -> str:
    """Return the line that opens the log."""
    num_parameters = sum(p.numel() for p in tokenizer.parameters())
    spec = tokenizer.config.code_spec
    levels = f"x{spec.num_levels}" if spec.num_levels > 1 else ""
    return (
        f"tokenizer: {num_parameters / 1e6:.1f}M parameters, {clips.num_frames} frames in "
        f"{len(clips.keys)} episodes ({clips.num_short} too short), "
        f"grid {spec.grid_height}x{spec.grid_width}{levels}; {accelerator.num_processes} "
        f"process(es) on {next(tokenizer.parameters()).device.type}, from update {step}"
    )


def _anywhere(accelerator: Accelerator, wanted: bool) -> bool:
    """Tell whether any process was asked to stop, in all of them at the same update."""
    if accelerator.num_processes == 1:
        return wanted
    asked = torch.tensor(int(wanted), device=accelerator.device)
    return bool(accelerator.reduce(asked).item())


def _diverged(  # noqa: PLR0913 - what was asked for, what came of it, and whether to write
    run: Path,
    step: int,
    update: Update,
    clips: Clips,
    training: TokenizerTrainingConfig,
    *,
    write: bool,
) -> TrainingError:
    """Write which clips the update saw to RUN/diverged.json; return the error to raise."""
    origins = clips.origins(step, size=training.batch_clips, seed=training.seed)
    numbers = {name: str(v.item()) for name, v in {**update.losses, **update.norms}.items()}
    path = run / "diverged.json"
    if write:
        content = {
            "step": step + 1,
            **numbers,  # as text: JSON has no NaN
            "clips": [{"episode": key, "first_frame": first} for key, first in origins],
        }
        write_json(path, content)
    return TrainingError(
        f"{run}: at update {step + 1} the loss is {numbers['loss']} and the gradient norm "
        f"{numbers['gradient_norm']}; the update was not done and the last checkpoint is whole. "
        f"The clips are named in {path}. Lower --training.learning-rate and choose another "
        "--output"
    )


def _look(
    learner: Learner, held_out: Clips, training: TokenizerTrainingConfig, log: RunLog, step: int
) -> None:
    """Score held-out clips, draw some, and say so if the codebook has collapsed."""
    judged = learner.judged()
    scores, counts_QV = _validate(judged, held_out, training)
    levels = measure(counts_QV)
    scores |= summary(levels)
    log.metrics(step, **{f"validation_{name}": value for name, value in scores.items()})
    log.say(f"held out  {format_metrics(scores)}")
    settled = step > training.warmup_steps and step >= min(_SPREAD_STEPS, training.num_steps // 2)
    sentence = advice(levels, judged.config.quantizer) if settled else None
    if sentence is not None:
        log.say(f"warning: at update {step} {sentence}")
    true = held_out.batch(0, size=6, seed=training.seed)
    recon, _ = _round_trip(judged, true)
    samples = log.run / "samples"
    write_bytes(samples / f"step-{step:08d}.png", reconstruction_png(true, recon))
    write_bytes(samples / f"step-{step:08d}-codes.png", usage_png(counts_QV))


def _validate(
    tokenizer: ConvTokenizer, clips: Clips, training: TokenizerTrainingConfig
) -> tuple[dict[str, float], Tensor]:
    """Return PSNR and moving-pixel PSNR of 64 clips, encoded and decoded as users do; counts_QV."""
    true = torch.cat([clips.batch(i, size=16, seed=training.seed) for i in range(4)])
    recon, codes_Bthw = _round_trip(tokenizer, true)
    scores = {"psnr_db": psnr(true, recon), "moving_psnr_db": moving_psnr(true, recon)}
    return scores, count_codes(codes_Bthw, tokenizer.config.code_spec)


def _round_trip(tokenizer: ConvTokenizer, frames_BTHWC: Tensor) -> tuple[Tensor, Tensor]:
    """Return the frames after encoding and decoding, and their codes, on the CPU."""
    codes_Bthw = tokenizer.encode(frames_BTHWC)
    recon = tokenizer.decode(codes_Bthw, num_frames=frames_BTHWC.shape[1])
    return recon.cpu(), codes_Bthw.cpu()


def _card(
    tokenizer: ConvTokenizer,
    episodes: Episodes,
    training: TokenizerTrainingConfig,
    scores: dict[str, float],
) -> str:
    """Return the model card."""
    spec = tokenizer.spec
    grid = f"{spec.codes.grid_height}, {spec.codes.grid_width}"
    updates = (
        f"{training.num_steps} of {training.batch_clips} clips of {training.clip_frames} frames, "
        f"seed {training.seed}"
    )
    return f"""# A worldloom tokenizer

Turns {spec.width}x{spec.height} frames into {grid.replace(", ", "x")} codes of
{spec.codes.vocab_size} and back. Fingerprint `{spec.fingerprint[:16]}`.

| | |
|---|---|
| trained on | {len(episodes.keys)} episodes, {dict(episodes.spec.source)} |
| updates | {updates} |
| held-out PSNR | {scores["psnr_db"]:.2f} dB |
| held-out PSNR on moving pixels | {scores["moving_psnr_db"]:.2f} dB |
| config | `{asdict(tokenizer.config)}` |

```python
from pathlib import Path
from worldloom.tokenizer import load_tokenizer

tokenizer = load_tokenizer(Path("this folder"))
# frames: uint8 (B, T, {spec.height}, {spec.width}, 3); codes: int64 (B, T, {grid})
codes = tokenizer.encode(frames)
frames = tokenizer.decode(codes, num_frames=codes.shape[1])
```
"""
