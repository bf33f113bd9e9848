"""Episodes -> a tokenizer: a model directory that turns their frames into codes and back.

    worldloom train-tokenizer --episodes runs/doom/episodes --output runs/doom/tokenizer

reads EPISODES and writes RUN/{config.toml, env.json, metrics.jsonl, log.txt, samples/,
checkpoints/, LATEST, model/}. For several processes, which share every batch:
`torchrun --nproc_per_node 2 -m worldloom.pipelines train-tokenizer ...`.
"""

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from worldloom.common import ConfigError, Episodes, say
from worldloom.tokenizer import TokenizerConfig, TokenizerTrainingConfig, check_fit

if TYPE_CHECKING:
    from .dry_run import DryRun


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainTokenizerConfig:
    """Train a tokenizer on recorded episodes; a stopped run continues.

    worldloom train-tokenizer --episodes runs/demo/episodes --output runs/demo/tokenizer
    """

    episodes: Path
    """Folder of episodes, as `worldloom record` or `worldloom ingest` writes it; every tenth is
    held out."""
    output: Path
    """Run directory; the tokenizer itself is in its folder model/."""
    device: str = "auto"
    """Where to compute: cpu, cuda, cuda:1 ...; auto takes a GPU, each process that of its rank."""
    dry_run: bool = False
    """Say what it would take (parameters, frames per update, checkpoint, memory) and stop."""
    training: TokenizerTrainingConfig = field(default_factory=TokenizerTrainingConfig)
    """How it is trained."""
    model: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Its sizes and parts (docs/tokenizers.md)."""


def train_tokenizer(config: TrainTokenizerConfig) -> "Path | DryRun":
    """Train the tokenizer; return the model directory."""
    check_fit(config.model, config.training)
    episodes = Episodes(config.episodes)
    _check_frames(config, episodes)
    # Here and not above: `worldloom train-tokenizer --help` must not wait for torch.
    from worldloom.tokenizer import train_conv_tokenizer

    from .devices import choose_device

    device = choose_device(config.device)
    if config.dry_run:
        return _dry_run(config, episodes)
    model = train_conv_tokenizer(
        episodes, config.output, model=config.model, training=config.training, device=device
    )
    say(f"wrote {model}; look at the pictures in {config.output / 'samples'}")
    words = ["worldloom", "tokenize", "--episodes", str(config.episodes), "--tokenizer", str(model),
             "--output", str(config.output.parent / "shards")]  # fmt: skip
    say(f"next: {shlex.join(words)}")
    return model


def _check_frames(config: TrainTokenizerConfig, episodes: Episodes) -> None:
    """Refuse frames of another size before anything is written, if none may be resized."""
    spec, model = episodes.spec, config.model
    if model.resize == "exact" and (spec.height, spec.width) != (model.height, model.width):
        raise ConfigError(
            f"{config.episodes}: frames are {spec.height}x{spec.width} (height x width), the "
            f"tokenizer is to take {model.height}x{model.width} and --model.resize is exact; set "
            "--model.height and --model.width to theirs, or choose stretch, crop or pad"
        )


def _dry_run(config: TrainTokenizerConfig, episodes: Episodes) -> "DryRun":
    """Say what the training would take in one process."""
    import torch
    from torch import Tensor
    from worldloom.common import library_seed
    from worldloom.tokenizer import ConvTokenizer, PatchDiscriminator, Trained

    from .dry_run import estimate

    model, training = config.model, config.training
    trained = Trained(fps=episodes.spec.fps, frame_skip=episodes.spec.frame_skip)
    tokenizer = ConvTokenizer(model, trained=trained).train()
    critic = PatchDiscriminator() if training.discriminator_weight else None
    # The codebook's first k-means wants a vector for every code.
    codes = model.code_spec
    tokens_per_clip = codes.latent_frames(training.clip_frames) * codes.cells
    at_once = -(-training.batch_clips // training.accumulate)
    probe = min(at_once, -(-codes.vocab_size // tokens_per_clip))

    def forward() -> Tensor:
        video_BCTHW = torch.zeros(probe, 3, training.clip_frames, model.height, model.width)
        # It draws from torch's global generator.
        with library_seed(0, "dry-run"), torch.autocast("cpu", torch.bfloat16, training.bf16):
            output: Tensor = tokenizer(video_BCTHW).video_BCTHW
            return output if critic is None else critic(output)

    return estimate(
        tokenizer,
        forward,
        probe=probe,
        at_once=at_once,
        samples=training.batch_clips,
        items=training.batch_clips * training.clip_frames,
        updates=training.num_steps,
        sample="clip",
        item="frame",
        # Muon remembers one moment of what has two axes or more.
        moment_bytes=sum(
            p.nbytes if training.optimizer == "muon" and p.ndim >= 2 else 2 * p.nbytes
            for p in tokenizer.parameters()
        ),
        beside=critic,
        averaged=training.ema_decay > 0,
    )
