"""Words of the person's -> a device of this machine, and how many threads compute there."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from worldloom.common import ConfigError


def choose_device(name: str, /) -> str:
    """Return the device called "auto", "cpu", "cuda", "cuda:1", "mps" ...

    Raises:
        ConfigError: if there is no such device here.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        # .item() and not the allocation alone: torch's "meta" allocates, and holds nothing.
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            f"--device {name}: not to be had here; `worldloom doctor` lists the devices there are"
        ) from error
    return name


@contextmanager
def computing_with(threads: int, /) -> Iterator[None]:
    """Let torch compute with so many threads inside the block, 0 for as many as it does anyway."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
