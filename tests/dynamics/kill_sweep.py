"""Kill a toy training at every step of writing, run it again, compare with an undisturbed one.

python kill_sweep.py SHARDS FOLDER [everything]     the word switches every option on
"""

import os
import shutil
import signal
import sys
from pathlib import Path

import torch
from dynamics.toys import tiny, train
from dynamics.training_options import MODEL, TRAINING
from worldloom.common import read_metrics

# The n-th pass of a named step; a training of four updates with two checkpoints passes them all.
FAILPOINTS = (
    "write:1", "fsync:2", "rename:2", "checkpoint-file:1", "checkpoint-file:3", "folder-fsync:1",
    "folder-rename:1", "checkpoint-latest:1", "rename:3", "checkpoint-file:5", "folder-fsync:2",
    "folder-rename:2", "checkpoint-latest:2", "checkpoint-file:7", "folder-fsync:3",
    "folder-rename:3",
)  # fmt: skip


def in_a_fork(shards: Path, run: Path, everything: bool, failpoint: str = "") -> int:
    """Train in a child; return its wait status."""
    settings = {**TRAINING, "model": tiny(**MODEL)} if everything else {}
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.environ["WORLDLOOM_FAILPOINT"] = failpoint
            train(shards, run, num_steps=4, checkpoint_every=2, validate_every=2, **settings)
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
        "card": (run / "model" / "README.md").read_bytes(),
        "metrics": [
            {k: v for k, v in r.items() if k not in ("tokens_per_s", "data_wait_share")}
            for r in rows
        ],
        "leftovers": [str(path) for path in run.rglob("tmp-*")],
    }


def main(shards: Path, folder: Path, *, everything: bool) -> None:
    torch.set_num_threads(1)
    assert in_a_fork(shards, folder / "undisturbed", everything) == 0
    expected = outcome(folder / "undisturbed")
    for failpoint in FAILPOINTS:
        run = folder / failpoint.replace(":", "-")
        status = in_a_fork(shards, run, everything, failpoint)
        assert os.WIFSIGNALED(status), f"{failpoint}: never reached ({status})"
        assert os.WTERMSIG(status) == signal.SIGKILL, failpoint
        assert in_a_fork(shards, run, everything) == 0, f"{failpoint}: the second run failed"
        found = outcome(run)
        for name in expected:
            assert found[name] == expected[name], f"{failpoint}: {name} differ"
        shutil.rmtree(run)
        sys.stderr.write(f"{failpoint} fine\n")
    sys.stdout.write("equal\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), everything=sys.argv[3:] == ["everything"])
