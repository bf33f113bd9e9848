"""The numbers of a toy dynamics model's training: five updates and held-out scores, per order."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from dynamics.toys import STEER, Mover, tiny, train
from worldloom.common import read_metrics


def record() -> dict[str, list[float]]:
    """Train and return the recorded columns of its metrics."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    numbers = {}
    try:
        with TemporaryDirectory() as folder:
            shards = Mover(STEER).write(Path(folder) / "shards", episodes=6, num_frames=12)
            for order in ("raster", "row", "frame", "masked"):
                run = Path(folder) / order
                train(shards.folder, run, model=tiny(order=order), num_steps=5)
                rows = read_metrics(run)
                for name in ("loss", "gradient_norm", "validation_loss"):
                    numbers[f"{order}_{name}"] = [row[name] for row in rows if name in row]
    finally:
        torch.set_num_threads(threads)
    return numbers
