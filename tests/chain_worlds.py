"""Episodes, tokenizers and settings so small that a whole chain over them takes seconds."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from worldloom.common import ActionSpec, EpisodesSpec, EpisodeWriter, file_sha256
from worldloom.tokenizer import ConvTokenizer, QuantizerConfig, TokenizerConfig, Trained

PUSHES = ActionSpec.discrete(["STAY", "LEFT", "RIGHT"])


def pushed_square(num_frames: int, seed: int, *, size: int = 16) -> tuple[Any, Any]:
    """Frames in which a light square moves as it is pushed, and the pushes."""
    rng = np.random.default_rng(seed)
    actions = rng.integers(0, 3, num_frames - 1)
    column, frames = 6, np.full((num_frames, 16, 16, 3), 30, np.uint8)
    for index in range(num_frames):
        if index:
            column = int(np.clip(column + (0, -2, 2)[actions[index - 1]], 0, 12))
        frames[index, 6:10, column : column + 4] = (240, 200, 60)
    return frames.repeat(size // 16, axis=1).repeat(size // 16, axis=2), actions


def write_pushed_squares(folder: Path, lengths: tuple[int, ...], *, size: int = 16) -> Path:
    """Write one episode of each length; return the folder."""
    spec = EpisodesSpec(
        actions=PUSHES, height=size, width=size, fps=8.75, frame_skip=4, source={"env": "square"}
    )
    folder.mkdir(parents=True)
    spec.write(folder)
    for number, length in enumerate(lengths):
        frames, actions = pushed_square(length, number, size=size)
        with EpisodeWriter(folder, f"episode-{number:06d}", spec=spec) as writer:
            for frame in frames:
                writer.append(frame)
            writer.finish(actions)
    return folder


def save_tokenizer(
    folder: Path, *, seed: int = 0, resize: str = "stretch", num_levels: int = 1
) -> Path:
    """Write a tokenizer of 16x16 frames with random weights and a codebook; return its folder."""
    kind = "residual" if num_levels > 1 else "vq"
    config = TokenizerConfig(
        height=16,
        width=16,
        resize=resize,
        widths=(8,),
        num_blocks=(1,),
        quantizer=QuantizerConfig(kind=kind, vocab_size=16, code_dim=4, num_levels=num_levels),
    )
    tokenizer = ConvTokenizer(config, trained=Trained(fps=8.75, frame_skip=4), seed=seed).train()
    frames = torch.from_numpy(np.concatenate([pushed_square(9, 900 + i)[0] for i in range(4)]))
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)  # the codebook's k-means draws from the global generator
        tokenizer(frames[None].movedim(-1, 1).float() / 127.5 - 1)
    tokenizer.eval().save(folder, card="tiny")
    return folder


TOKENIZER_FLAGS = (
    "--device", "cpu", "--model.height", 16, "--model.width", 16, "--model.widths", 8,
    "--model.num-blocks", 1, "--model.quantizer.vocab-size", 16, "--model.quantizer.code-dim", 4,
    "--training.batch-clips", 2, "--training.clip-frames", 3, "--training.warmup-steps", 2,
    "--training.log-every", 1,
)  # fmt: skip
DYNAMICS_FLAGS = (
    "--cpu", "--model.num-layers", 1, "--model.dim", 16, "--model.num-heads", 2,
    "--model.context-frames", 4, "--model.num-meta-tokens", 2, "--training.batch-windows", 4,
    "--training.window-frames", 4, "--training.warmup-steps", 2, "--training.log-every", 1,
)  # fmt: skip


def hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder, by its path in there."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): file_sha256(path) for path in files}


def identities(folder: Path) -> dict[str, tuple[int, int]]:
    """Return what changes when a file is written again, even with the same bytes."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.iterdir()}
