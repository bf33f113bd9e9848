"""PyPI's genie2-pytorch, in a process of its own that computes when it is its turn.

install(folder)                         ->  the package, none of what it needs that we have too
Genie2Process(folder)(steps)            ->  Times of so many training steps
Genie2Process(folder).generate(frames)  ->  Times of so many frames, from the first of its windows
Genie2Process(folder).forwards(...)     ->  Times of the forwards for one frame after so many

Run by itself (it is the process) it reads from stdin what to do, and answers with JSON.
"""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from turns import Times, timed
from worldloom.common import say

NAME = "genie2-pytorch 0.0.21"
DIM, DEPTH, HEADS, CODEBOOK_SIZE, NUM_ACTIONS = 512, 12, 8, 4096, 256
BATCH, CHANNELS, FRAMES, SIDE = 2, 768, 3, 2
"""Its README's model and batch; heads and codebook are its defaults."""
_PACKAGES = (
    "genie2-pytorch==0.0.21",
    # What it imports and we do not depend on.
    "beartype==0.23.1",
    "jaxtyping==0.3.11",
    "wadler-lindig==0.1.8",
)


def install(folder: Path) -> None:
    """Put it into a folder, if it is not there."""
    if (folder / "imagen_pytorch.py").exists():
        return
    say(f"installing {NAME} into {folder}")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
         "--no-deps", "--target", str(folder), *_PACKAGES],
        check=True, stdout=sys.stderr,
    )  # fmt: skip
    # Imported and never used; importing the real one needs the network.
    (folder / "imagen_pytorch.py").write_text("Imagen = None\n")


class Genie2Process:
    """The process, seen from outside."""

    def __init__(self, folder: Path, *, threads: int, seed: int) -> None:
        """Start it with the packages of a folder."""
        path = os.pathsep.join([str(folder), str(Path(__file__).parent.parent)])
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(threads), str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)},
        )
        self.num_parameters: int = self._answer()

    def __enter__(self) -> "Genie2Process":
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.communicate()  # the end of stdin is its end

    def __call__(self, steps: int) -> Times:
        """Let it do a round of training steps."""
        return self._ask(f"train {steps}")

    def generate(self, frames: int) -> Times:
        """Let it generate: seconds are of all frames. It takes no actions unless a person types."""
        return self._ask(f"generate {frames}")

    def forwards(self, steps: int, *, frames: int, cond_scale: float) -> Times:
        """Let it run the forwards for the cells of a frame after so many, actions given."""
        return self._ask(f"forwards {steps} {frames} {cond_scale}")

    def _ask(self, line: str) -> Times:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return Times(*self._answer())

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{NAME}: its process ended; what it said is above")
        return json.loads(line)


def serve(threads: int, seed: int) -> None:
    """Be the process."""
    from genie2_pytorch import Genie2

    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    model = Genie2(
        dim=DIM,
        depth=DEPTH,
        dim_latent=CHANNELS,
        num_actions=NUM_ACTIONS,
        latent_channel_first=True,
        is_video_enc_dec=True,
    )
    video = torch.randn(BATCH, CHANNELS, FRAMES, SIDE, SIDE)
    actions = torch.randint(0, NUM_ACTIONS, (BATCH, FRAMES))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        loss, _ = model(video, actions=actions)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def forwards(frames: int, cond_scale: float) -> None:
        model.eval()
        cells = SIDE * SIDE
        codes = torch.randint(0, CODEBOOK_SIZE, (BATCH, (frames + 1) * cells))
        actions = torch.randint(0, NUM_ACTIONS, (BATCH, frames + 1, 1))
        for cell in range(cells):
            model.forward_with_cfg(
                state_codes=codes[:, : frames * cells + cell],
                time_seq_len=frames + 1,
                actions=actions,
                cond_scale=cond_scale,
            )
        model.train()

    def answer(value: Any) -> None:
        sys.stdout.write(json.dumps(value) + "\n")
        sys.stdout.flush()

    answer(sum(p.numel() for p in model.parameters()))
    for line in sys.stdin:
        match line.split():
            case ["train", steps]:
                times = timed(step, int(steps))
            case ["generate", frames]:
                job = partial(model.generate, video[:, :, 0], num_frames=int(frames))
                times = timed(job, 1)
            case ["forwards", steps, frames, cond_scale]:
                job = partial(forwards, int(frames), float(cond_scale))
                times = timed(job, int(steps))
            case _:
                raise SystemExit(f"{NAME}: asked {line!r}, knows train, generate and forwards")
        answer([times.wall_s, times.cpu_s])


if __name__ == "__main__":
    serve(*map(int, sys.argv[1:]))
