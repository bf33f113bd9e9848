"""Toy episodes and tiny tokenizers: the smallest inputs that can still go wrong.

python toys.py EPISODES RUN NUM_STEPS [BATCH_CLIPS]     trains, for tests that need a process
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from worldloom.common import ActionSpec, Episodes, EpisodesSpec, EpisodeWriter
from worldloom.tokenizer import (
    ConvTokenizer,
    QuantizerConfig,
    TokenizerConfig,
    TokenizerTrainingConfig,
    Trained,
    train_conv_tokenizer,
)

# Not square, so that an exchange of height and width cannot hide: 4 x 6 cells.
CONFIG = TokenizerConfig(
    height=16,
    width=24,
    resize="exact",
    patch=2,
    widths=(8, 16),
    num_blocks=(1, 1),
    quantizer=QuantizerConfig(vocab_size=32, code_dim=4),
)

TRAINING = TokenizerTrainingConfig(
    num_steps=6,
    batch_clips=4,
    clip_frames=4,
    learning_rate=2e-3,
    warmup_steps=2,
    checkpoint_every=3,
    sample_every=3,
    log_every=1,
    seed=5,
)

EVERYTHING: dict[str, object] = {
    "accumulate": 2,
    "ema_decay": 0.9,
    "temporal_weight": 0.2,
    "gradient_weight": 0.5,
    "multiscale_weight": 0.5,
    "discriminator_weight": 0.1,
    "discriminator_start": 0.4,
}
"""What training can do and is off in TRAINING; of six updates the discriminator is in four."""


def make_tokenizer(config: TokenizerConfig = CONFIG, *, seed: int = 0) -> ConvTokenizer:
    """A tokenizer in which every layer does something; fresh ones begin as near-identities."""
    tokenizer = ConvTokenizer(config, trained=Trained(fps=8.75, frame_skip=4), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tokenizer.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return tokenizer.eval().requires_grad_(requires_grad=False)


def random_frames(*shape: int, seed: int = 0) -> torch.Tensor:
    """Frames in which every pixel is drawn by itself."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=generator)


def write_toy_episodes(
    folder: Path, *, lengths: Sequence[int] = (9, 7, 12, 8, 10, 9), seed: int = 0
) -> Episodes:
    """A light square that bounces over a background of its episode's own; 16 x 24."""
    rng = np.random.default_rng(seed)
    clips = []
    for length in lengths:
        background = rng.integers(40, 120, (4, 6, 3), np.uint8).repeat(4, 0).repeat(4, 1)
        place, speed = rng.integers(0, 12, 2), rng.choice([-1, 1], 2) * rng.integers(1, 4, 2)
        frames = []
        for _ in range(length):
            frame = background.copy()
            frame[place[0] : place[0] + 3, place[1] : place[1] + 3] = (250, 220, 60)
            frames.append(frame)
            speed = np.where((place + speed < 0) | (place + speed > (13, 21)), -speed, speed)
            place = place + speed
        clips.append(np.stack(frames))
    return write_clips(folder, clips)


def write_clips(folder: Path, clips: Sequence[np.ndarray]) -> Episodes:
    """Write episodes of the given frames, named episode-0, episode-1, ..."""
    spec = EpisodesSpec(
        actions=ActionSpec.discrete(["stay", "go"]),
        height=clips[0].shape[1],
        width=clips[0].shape[2],
        fps=8.75,
        frame_skip=4,
        source={"environment": "toy"},
    )
    spec.write(folder)
    for number, frames in enumerate(clips):
        with EpisodeWriter(folder, f"episode-{number}", spec=spec) as writer:
            for frame in frames:
                writer.append(frame)
            writer.finish(np.zeros(len(frames) - 1, np.int64))
    return Episodes(folder)


def train(
    episodes: Path, run: Path, *, config: TokenizerConfig = CONFIG, **settings: object
) -> Path:
    """Train on a folder of toy episodes."""
    training = replace(TRAINING, **settings)  # type: ignore[arg-type]
    return train_conv_tokenizer(Episodes(episodes), run, model=config, training=training)


if __name__ == "__main__":
    torch.set_num_threads(1)
    batch_clips = int(sys.argv[4]) if len(sys.argv) > 4 else TRAINING.batch_clips
    steps = int(sys.argv[3])
    train(Path(sys.argv[1]), Path(sys.argv[2]), num_steps=steps, batch_clips=batch_clips)
