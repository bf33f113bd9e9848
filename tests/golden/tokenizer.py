"""The numbers of a toy tokenizer's training: five updates and two scores on held-out clips."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tokenizer.toys import train, write_toy_episodes
from worldloom.common import read_metrics


def record() -> dict[str, list[float]]:
    """Train and return the recorded columns of its metrics."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with TemporaryDirectory() as folder:
            episodes = write_toy_episodes(Path(folder) / "episodes")
            # Not by muon, whose bfloat16 other processors round otherwise.
            train(
                episodes.folder, Path(folder) / "run", num_steps=5,
                optimizer="adamw", hard_pixel_power=0.0,
            )  # fmt: skip
            rows = read_metrics(Path(folder) / "run")
    finally:
        torch.set_num_threads(threads)
    columns = ("loss", "reconstruction", "quantizer", "gradient_norm", "validation_psnr_db")
    return {name: [row[name] for row in rows if name in row] for name in columns}
