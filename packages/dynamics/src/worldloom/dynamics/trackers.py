"""Where numbers go besides metrics.jsonl: TensorBoard, Weights & Biases, trackio.

    names                  ->  check_trackers  ->  refused if a library is missing
    accelerator, run, step ->  start_trackers  ->  accelerator.log(values, step) reaches them

They are Accelerate's. metrics.jsonl is what counts: a run that resumes forgets there what came
after its checkpoint. TensorBoard is told to do the same, and Weights & Biases refuses steps that
it has.
"""

import importlib.util
import secrets
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from worldloom.common import ConfigError, read_limited, write_bytes

_PROJECT = "worldloom"


def check_trackers(names: Sequence[str], /) -> None:
    """Refuse trackers whose library is not installed, before anything is written.

    Raises:
        ConfigError: naming the extra to install.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"training: trackers names {name}, but its library is not installed; run "
                f"`pip install 'worldloom-dynamics[{name}]'`, or leave it out: metrics.jsonl has "
                "every number in any case"
            )


def start_trackers(
    accelerator: Accelerator, run: Path, /, *, settings: Mapping[str, Any], step: int
) -> None:
    """Open what `accelerator` was made with in `log_with`; in the main process alone.

    Args:
        accelerator: made with `logging_dir`, below which TensorBoard writes.
        run: the run directory; it gives the run its name.
        settings: plain nested values, shown beside the curves.
        step: updates done; what is there of later ones is to be forgotten.
    """
    if not accelerator.log_with or not accelerator.is_main_process:
        return
    number = run / "tracker-id"
    if not number.exists():
        write_bytes(number, secrets.token_hex(4).encode())
    key = read_limited(number, what="the number of a tracked run", limit_bytes=100).decode()
    name = f"{run.resolve().name}-{key}"
    arguments = {
        "tensorboard": {"purge_step": step + 1},
        "wandb": {
            "id": key,
            "name": name,
            "dir": str(run),
            "resume": "allow",
            "config": settings,
        },
        "trackio": {"name": name, "resume": "allow", "config": settings},
    }
    with redirect_stdout(sys.stderr):  # trackio greets, but stdout is for the command's result
        accelerator.init_trackers(_PROJECT, init_kwargs=arguments)


def stop_trackers(accelerator: Accelerator, /) -> None:
    """Have everything written that is still on its way."""
    with redirect_stdout(sys.stderr):
        for tracker in accelerator.trackers:
            tracker.finish()
