"""Kill a toy training at every step of writing, run it again, compare with an undisturbed one.

python kill_sweep.py EPISODES FOLDER
"""

import os
import shutil
import signal
import sys
from pathlib import Path

import torch
from tokenizer.toys import EVERYTHING, train
from worldloom.common import read_metrics

# The n-th pass of a named step; a training of four updates with two checkpoints passes them all.
# A checkpoint is six files, a model one.
FAILPOINTS = (
    "write:1", "fsync:2", "rename:3", "checkpoint-file:1", "checkpoint-file:3", "folder-fsync:1",
    "folder-rename:1", "checkpoint-latest:1", "rename:5", "checkpoint-file:5", "folder-fsync:2",
    "folder-rename:2", "checkpoint-latest:2", "checkpoint-file:7", "checkpoint-file:10",
    "checkpoint-file:13", "folder-fsync:3", "folder-rename:3",
)  # fmt: skip


def in_a_fork(episodes: Path, run: Path, failpoint: str = "") -> int:
    """Train in a child; return its wait status."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.environ["WORLDLOOM_FAILPOINT"] = failpoint
            # The discriminator begins with update 2, so both checkpoints hold what it learned.
            train(episodes, run, **EVERYTHING, num_steps=4, checkpoint_every=2, sample_every=2)
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1]


def outcome(run: Path) -> dict[str, object]:
    """What must not depend on kills."""
    rows = read_metrics(run)
    return {
        "weights": (run / "model" / "model.safetensors").read_bytes(),
        "config": (run / "model" / "config.json").read_bytes(),
        "metrics": [{k: v for k, v in r.items() if k != "seconds_per_step"} for r in rows],
        "leftovers": [str(path) for path in run.rglob("tmp-*")],
    }


def main(episodes: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    assert in_a_fork(episodes, folder / "undisturbed") == 0
    expected = outcome(folder / "undisturbed")
    for failpoint in FAILPOINTS:
        run = folder / failpoint.replace(":", "-")
        status = in_a_fork(episodes, run, failpoint)
        assert os.WIFSIGNALED(status), f"{failpoint}: never reached ({status})"
        assert os.WTERMSIG(status) == signal.SIGKILL, failpoint
        assert in_a_fork(episodes, run) == 0, f"{failpoint}: the second run failed"
        found = outcome(run)
        for name in expected:
            assert found[name] == expected[name], f"{failpoint}: {name} differ"
        shutil.rmtree(run)
        sys.stderr.write(f"{failpoint} fine\n")
    sys.stdout.write("equal\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
