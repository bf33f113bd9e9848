"""Train the image tokenizer: clips in, a model directory out, resumable to the last bit.

    EPISODES  ->  RUN/{config.toml, env.json, metrics.jsonl, log.txt, samples/, checkpoints/,
                       model/}

Batch i, the learning rate of update i and the random draws of update i are pure functions of
(seed, i), so a checkpoint needs only weights, the optimizer's state and i.
"""

import io
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
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
    write_json,
)

from .clips import Clips
from .config import TokenizerConfig, TokenizerTrainingConfig
from .losses import motion_weight, reconstruction_loss
from .metrics import moving_psnr, psnr, usage
from .model import ImageTokenizer, Reconstruction, Trained
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

    SIGTERM and Ctrl-C save a checkpoint and exit (143, 130); the same call continues.

    Args:
        episodes: what to train on; their validation split is held out.
        run: the run directory, new or of the same settings and episodes.
        model: sizes.
        training: how it is trained.
        device: where to compute.

    Raises:
        FormatError: if no episode is long enough for a clip.
        MismatchError: if the run holds checkpoints of other settings or episodes.
        TrainingError: if the loss stops being finite; the last checkpoint stays.
    """
    clips = _clips(episodes, "train", model, training)
    held_out = _clips(
        episodes, "validation" if episodes.split("validation") else "train", model, training
    )
    settings = {
        "model": to_plain(model),
        "training": to_plain(training),
        "episodes": episodes.fingerprint(),
    }
    checkpoint, skipped = _checkpoint(run, settings)
    log = RunLog(run, config={"model": model, "training": training})
    for sentence in skipped:
        log.say(sentence)
    tokenizer = ImageTokenizer(
        model,
        trained=Trained(fps=episodes.spec.fps, frame_skip=episodes.spec.frame_skip),
        seed=training.seed,
        tokens_per_step=training.batch_clips * training.clip_frames * model.code_spec.cells,
    ).to(device)
    optimizer = torch.optim.AdamW(
        decay_groups(tokenizer, weight_decay=training.weight_decay), lr=0.0, betas=(0.9, 0.95)
    )
    step = _restore(checkpoint, tokenizer, optimizer)
    log.forget_after(step)
    if step == training.num_steps and (run / "model" / "config.json").exists():
        log.say(f"all {step} updates are done; {run / 'model'} is as it was")
        return run / "model"
    log.say(_introduction(tokenizer, clips, step))
    started, start_step = time.monotonic(), step
    with Interrupt() as interrupt:
        while step < training.num_steps:
            frames = clips.batch(step, size=training.batch_clips, seed=training.seed).to(device)
            factor = warmup_cosine(
                step, warmup_steps=training.warmup_steps, num_steps=training.num_steps
            )
            set_learning_rate(optimizer, training.learning_rate * factor)
            update = _gradients(tokenizer, frames, training, step)
            if not update.is_finite():
                raise _diverged(run, step, update, clips, training)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            last = step == training.num_steps
            if step % training.log_every == 0 or last:
                values = update.numbers(frames, model.quantizer.vocab_size)
                seconds_per_step = (time.monotonic() - started) / (step - start_step)
                log.metrics(step, **values, seconds_per_step=seconds_per_step)
                log.say(
                    f"update {step} of {training.num_steps}  {format_metrics(values)}  "
                    f"{seconds_per_step:.2f} s/update"
                )
            if step % training.sample_every == 0 or last:
                scores = _validate(tokenizer, held_out, training)
                log.metrics(step, **{f"validation_{name}": v for name, v in scores.items()})
                log.say(f"held out  {format_metrics(scores)}")
                _sample(tokenizer, held_out, run / "samples" / f"step-{step:08d}.png", training)
            if step % training.checkpoint_every == 0 or last or interrupt.wanted:
                tensors = {
                    "model": tokenizer.state_dict(),
                    "optimizer": optimizer_tensors(optimizer),
                }
                save_checkpoint(run, step, tensors, {"settings": settings})
            if interrupt.wanted:
                log.say(f"stopped at update {step}; the same command continues from here")
                interrupt.leave()
    # Once more: a run that was killed right here comes back with all updates done.
    scores = _validate(tokenizer, held_out, training)
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


def _checkpoint(run: Path, settings: dict[str, Any]) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest valid checkpoint, if any, and why others were skipped.

    Called before anything is written: a run of other settings stays as it is.
    """
    checkpoint, skipped = newest_checkpoint(run)
    if checkpoint is not None and checkpoint.state.get("settings") != settings:
        raise MismatchError(
            f"{checkpoint.path}: was trained with other settings "
            f"({describe_difference(checkpoint.state.get('settings'), settings)}); "
            "go on with the same ones, or choose another --output"
        )
    return checkpoint, skipped


def _restore(
    checkpoint: Checkpoint | None, tokenizer: ImageTokenizer, optimizer: torch.optim.Optimizer
) -> int:
    """Load a checkpoint, if there is one; return the updates done."""
    if checkpoint is None:
        return 0
    where = str(checkpoint.path)
    load_weights(tokenizer, checkpoint.tensors["model"], where=where)
    load_optimizer(optimizer, checkpoint.tensors["optimizer"], where=where)
    return checkpoint.step


def _introduction(tokenizer: ImageTokenizer, clips: Clips, step: int) -> str:
    """Return the line that opens the log."""
    num_parameters = sum(p.numel() for p in tokenizer.parameters())
    spec = tokenizer.config.code_spec
    return (
        f"tokenizer: {num_parameters / 1e6:.1f}M parameters, {clips.num_frames} frames in "
        f"{len(clips.keys)} episodes ({clips.num_short} too short), "
        f"grid {spec.grid_height}x{spec.grid_width}, from update {step}"
    )


@dataclass(frozen=True, slots=True)
class _Update:
    """One update, computed and not yet done: the gradients wait in the parameters."""

    loss: Tensor
    reconstruction: Tensor
    gradient_norm: Tensor
    output: Reconstruction

    def is_finite(self) -> bool:
        """Tell whether the update may be done."""
        return bool(torch.isfinite(self.loss) & torch.isfinite(self.gradient_norm))

    def numbers(self, frames_BTHWC: Tensor, vocab_size: int) -> dict[str, float]:
        """Return what the log says about it."""
        codes_used, perplexity = usage(self.output.codes_Bthw, vocab_size)
        return {
            "loss": self.loss.item(),
            "reconstruction": self.reconstruction.item(),
            "quantizer": self.output.quantizer_loss.item(),
            "psnr_db": psnr(frames_BTHWC, to_frames(self.output.video_BCTHW.detach())),
            "codes_used": codes_used,
            "perplexity": perplexity,
            "gradient_norm": self.gradient_norm.item(),
        }


def _gradients(
    tokenizer: ImageTokenizer, frames_BTHWC: Tensor, training: TokenizerTrainingConfig, step: int
) -> _Update:
    """Compute the loss and clipped gradients of one update; the codebook moves already here."""
    tokenizer.train()
    video_BCTHW = to_video(frames_BTHWC)
    weight_B1THW = motion_weight(frames_BTHWC, extra=training.motion_weight)
    # The codebook's k-means and the replacement of dead codes draw from torch's global generator.
    with library_seed(training.seed, "tokenizer-update", step):
        with torch.autocast(frames_BTHWC.device.type, torch.bfloat16, enabled=training.bf16):
            output = tokenizer(video_BCTHW)
        reconstruction = reconstruction_loss(video_BCTHW, output.video_BCTHW, weight_B1THW)
        loss = reconstruction + output.quantizer_loss
        loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(tokenizer.parameters(), 1.0)
    return _Update(loss.detach(), reconstruction.detach(), norm, output)


def _diverged(
    run: Path, step: int, update: _Update, clips: Clips, training: TokenizerTrainingConfig
) -> TrainingError:
    """Write which clips the update saw to RUN/diverged.json; return the error to raise."""
    origins = clips.origins(step, size=training.batch_clips, seed=training.seed)
    numbers = {"loss": str(update.loss.item()), "gradient_norm": str(update.gradient_norm.item())}
    path = run / "diverged.json"
    write_json(
        path,
        {
            "step": step + 1,
            **numbers,  # as text: JSON has no NaN
            "clips": [{"episode": key, "first_frame": first} for key, first in origins],
        },
    )
    return TrainingError(
        f"{run}: at update {step + 1} the loss is {numbers['loss']} and the gradient norm "
        f"{numbers['gradient_norm']}; the update was not done and the last checkpoint is whole. "
        f"The clips are named in {path}. Lower --training.learning-rate and choose another "
        "--output"
    )


def _validate(
    tokenizer: ImageTokenizer, clips: Clips, training: TokenizerTrainingConfig
) -> dict[str, float]:
    """Return PSNR and moving-pixel PSNR of 64 clips, encoded and decoded as users do."""
    tokenizer.eval()
    true = torch.cat([clips.batch(i, size=16, seed=training.seed) for i in range(4)])
    recon = _round_trip(tokenizer, true)
    return {"psnr_db": psnr(true, recon), "moving_psnr_db": moving_psnr(true, recon)}


def _sample(
    tokenizer: ImageTokenizer, clips: Clips, path: Path, training: TokenizerTrainingConfig
) -> None:
    """Write a picture: six rows of true frames, under each its reconstruction."""
    tokenizer.eval()
    true = clips.batch(0, size=6, seed=training.seed)
    pairs = torch.stack([true, _round_trip(tokenizer, true)], dim=1)
    images = rearrange(pairs, "B pair T H W C -> (B pair T) C H W")
    grid_CHW = make_grid(images, nrow=true.shape[1], padding=1, pad_value=128)
    png = io.BytesIO()
    Image.fromarray(rearrange(grid_CHW, "C H W -> H W C").numpy()).save(png, "png")
    write_bytes(path, png.getvalue())


def _round_trip(tokenizer: ImageTokenizer, frames_BTHWC: Tensor) -> Tensor:
    """Return the frames after encoding and decoding."""
    codes_Bthw = tokenizer.encode(frames_BTHWC)
    return tokenizer.decode(codes_Bthw, num_frames=frames_BTHWC.shape[1]).cpu()


def _card(
    tokenizer: ImageTokenizer,
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
