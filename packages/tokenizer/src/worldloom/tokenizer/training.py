"""Train the image tokenizer: clips in, a model directory out, resumable to the last bit.

    EPISODES  ->  RUN/{config.toml, env.json, metrics.jsonl, log.txt, samples/, checkpoints/, model/}

Batch i, the learning rate of update i and the random draws of update i are pure functions of
(seed, i), so a checkpoint needs only weights, the optimizer's state and i.
"""

import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.io import encode_png
from torchvision.utils import make_grid
from worldloom.common import (
    Checkpoint,
    Episodes,
    Interrupt,
    MismatchError,
    RunLog,
    TrainingError,
    decay_groups,
    describe_difference,
    format_metrics,
    library_seed,
    load_optimizer,
    load_weights,
    newest_checkpoint,
    optimizer_tensors,
    save_checkpoint,
    set_learning_rate,
    to_plain,
    warmup_cosine,
    write_bytes,
)

from .clips import Clips
from .config import TokenizerConfig, TokenizerTrainingConfig
from .losses import motion_weight, reconstruction_loss, usage
from .metrics import moving_psnr, psnr
from .model import ImageTokenizer, Trained
from .pixels import to_frames, to_video


def train_image_tokenizer(
    episodes: Episodes,
    run: Path,
    /,
    *,
    model: TokenizerConfig,
    training: TokenizerTrainingConfig,
    device: str = "cpu",
) -> Path:
    """Train, or go on training, and return the model directory RUN/model.

    Raises:
        FormatError: if no episode is long enough for a clip.
        MismatchError: if the run holds checkpoints of other settings.
        TrainingError: if the loss stops being finite; the last checkpoint stays.
    """
    clips = _clips(episodes, "train", model, training)
    held_out = _clips(
        episodes, "validation" if episodes.split("validation") else "train", model, training
    )
    settings = {"model": to_plain(model), "training": to_plain(training)}
    log = RunLog(run, config=settings)
    tokenizer = ImageTokenizer(
        model,
        trained=Trained(fps=episodes.spec.fps, frame_skip=episodes.spec.frame_skip),
        seed=training.seed,
        tokens_per_step=training.batch_clips * training.clip_frames * model.code_spec.cells,
    ).to(device)
    optimizer = torch.optim.AdamW(
        decay_groups(tokenizer, weight_decay=training.weight_decay), lr=0.0, betas=(0.9, 0.95)
    )
    step = _resume(run, log, tokenizer, optimizer, settings)
    num_parameters = sum(p.numel() for p in tokenizer.parameters())
    log.say(
        f"tokenizer: {num_parameters / 1e6:.1f}M parameters, {clips.num_frames} frames in "
        f"{len(clips.keys)} episodes ({clips.num_short} too short), "
        f"grid {model.code_spec.grid_height}x{model.code_spec.grid_width}, from update {step}"
    )
    started, start_step = time.monotonic(), step
    with Interrupt() as interrupt:
        while step < training.num_steps:
            frames = clips.batch(step, size=training.batch_clips, seed=training.seed)
            factor = warmup_cosine(
                step, warmup_steps=training.warmup_steps, num_steps=training.num_steps
            )
            set_learning_rate(optimizer, training.learning_rate * factor)
            values = _update(tokenizer, optimizer, frames.to(device), training, step)
            step += 1
            if step % training.log_every == 0 or step == training.num_steps:
                seconds_per_step = (time.monotonic() - started) / (step - start_step)
                log.metrics(step, **values, seconds_per_step=seconds_per_step)
                log.say(f"update {step} of {training.num_steps}  {format_metrics(values)}  "
                        f"{seconds_per_step:.2f} s/update")  # fmt: skip
            if step % training.sample_every == 0 or step == training.num_steps:
                sample(tokenizer, held_out, run / "samples" / f"step-{step:08d}.png", training.seed)
            if (
                step % training.checkpoint_every == 0
                or step == training.num_steps
                or interrupt.wanted
            ):
                save_checkpoint(
                    run,
                    step,
                    {"model": tokenizer.state_dict(), "optimizer": optimizer_tensors(optimizer)},
                    {"settings": settings},
                )
            if interrupt.wanted:
                log.say(f"stopped at update {step}; the same command continues from here")
                interrupt.leave()
    tokenizer.eval()
    scores = validate(tokenizer, held_out, training.seed)
    log.say(f"held out  {format_metrics(scores)}")
    log.metrics(step, **{f"validation_{name}": value for name, value in scores.items()})
    tokenizer.save(run / "model", card=_card(tokenizer, episodes, training, scores))
    return run / "model"


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


def _resume(
    run: Path,
    log: RunLog,
    tokenizer: ImageTokenizer,
    optimizer: torch.optim.Optimizer,
    settings: dict[str, object],
) -> int:
    """Load the newest valid checkpoint, if there is one; return the updates done."""
    checkpoint: Checkpoint | None
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
    load_weights(tokenizer, checkpoint.tensors["model"], where=str(checkpoint.path))
    load_optimizer(optimizer, checkpoint.tensors["optimizer"], where=str(checkpoint.path))
    log.forget_after(checkpoint.step)
    return checkpoint.step


def _update(
    tokenizer: ImageTokenizer,
    optimizer: torch.optim.Optimizer,
    frames_BTHWC: Tensor,
    training: TokenizerTrainingConfig,
    step: int,
) -> dict[str, float]:
    """Do one optimizer update; return its numbers."""
    tokenizer.train()
    video_BCTHW = to_video(frames_BTHWC)
    # The codebook's k-means and the replacement of dead codes draw from torch's global generator.
    with library_seed(training.seed, "tokenizer-update", step):
        with torch.autocast(frames_BTHWC.device.type, torch.bfloat16, enabled=training.bf16):
            output = tokenizer(video_BCTHW)
        weight_B1THW = motion_weight(video_BCTHW, extra=training.motion_weight)
        reconstruction = reconstruction_loss(video_BCTHW, output.video_BCTHW, weight_B1THW)
        loss = reconstruction + output.quantizer_loss
        loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(tokenizer.parameters(), 1.0)
    if not torch.isfinite(loss) or not torch.isfinite(norm):
        raise TrainingError(
            f"update {step + 1}: the loss is {loss.item()} and the gradient norm {norm.item()}; "
            "the weights were left as they were. Lower --training.learning-rate"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    used, perplexity = usage(output.codes_Bthw, tokenizer.config.quantizer.vocab_size)
    return {
        "loss": loss.item(),
        "reconstruction": reconstruction.item(),
        "quantizer": output.quantizer_loss.item(),
        "psnr_db": psnr(frames_BTHWC, to_frames(output.video_BCTHW.detach().float())),
        "codes_used": used,
        "perplexity": perplexity,
        "gradient_norm": norm.item(),
    }


def validate(
    tokenizer: ImageTokenizer, clips: Clips, seed: int, /, *, num_batches: int = 4
) -> dict[str, float]:
    """Return PSNR and moving-pixel PSNR of held-out clips, encoded and decoded as users do."""
    true = torch.cat([clips.batch(i, size=16, seed=seed) for i in range(num_batches)])
    recon = tokenizer.decode(tokenizer.encode(true), num_frames=true.shape[1]).cpu()
    return {"psnr_db": psnr(true, recon), "moving_psnr_db": moving_psnr(true, recon)}


def sample(tokenizer: ImageTokenizer, clips: Clips, path: Path, seed: int, /) -> None:
    """Write a picture: rows of true frames, under each its reconstruction."""
    tokenizer.eval()
    true = clips.batch(0, size=6, seed=seed)
    recon = tokenizer.decode(tokenizer.encode(true), num_frames=true.shape[1]).cpu()
    rows = torch.stack([true, recon], dim=1).flatten(0, 2)  # clip, (true, recon), frame
    grid = make_grid(rows.permute(0, 3, 1, 2), nrow=true.shape[1], padding=1, pad_value=128)
    write_bytes(path, bytes(np.asarray(encode_png(grid))))


def _card(
    tokenizer: ImageTokenizer,
    episodes: Episodes,
    training: TokenizerTrainingConfig,
    scores: dict[str, float],
) -> str:
    """Return the model card."""
    spec = tokenizer.spec
    codes = spec.codes
    return f"""# A worldloom tokenizer

Turns {spec.width}x{spec.height} frames into {codes.grid_height}x{codes.grid_width} codes of
{codes.vocab_size} and back. Fingerprint `{spec.fingerprint[:16]}`.

| | |
|---|---|
| trained on | {len(episodes.keys)} episodes, {dict(episodes.spec.source)} |
| updates | {training.num_steps} of {training.batch_clips} clips of {training.clip_frames} frames, seed {training.seed} |
| held-out PSNR | {scores["psnr_db"]:.2f} dB |
| held-out PSNR on moving pixels | {scores["moving_psnr_db"]:.2f} dB |
| config | `{asdict(tokenizer.config)}` |

```python
from worldloom.tokenizer import load_tokenizer

tokenizer = load_tokenizer("this folder")
codes = tokenizer.encode(frames)  # uint8 (B, T, {spec.height}, {spec.width}, 3) -> (B, T, {codes.grid_height}, {codes.grid_width})
frames = tokenizer.decode(codes, num_frames=codes.shape[1])
```
"""
