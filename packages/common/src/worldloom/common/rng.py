"""One generator per purpose, derived from one seed.

    (seed, purpose, ...)  ->  a 63-bit seed, a numpy generator or a torch generator

A new purpose never shifts an old one's numbers, and nothing reads a global seed.
"""

import hashlib
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def derive_seed(seed: int, /, *purpose: str | int) -> int:
    """Return an int in [0, 2**63) that depends on the seed and on every word of the purpose."""
    # numpy's integers and strings print otherwise than Python's, yet mean the same purpose.
    words = tuple(str(w) if isinstance(w, str) else operator.index(w) for w in (seed, *purpose))
    digest = hashlib.sha256(repr(words).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def numpy_stream(seed: int, /, *purpose: str | int) -> np.random.Generator:
    """Return the numpy generator of one purpose."""
    return np.random.default_rng(derive_seed(seed, *purpose))


def stream(seed: int, /, *purpose: str | int) -> "torch.Generator":
    """Return the torch generator (on the CPU) of one purpose."""
    import torch

    return torch.Generator().manual_seed(derive_seed(seed, *purpose))


@contextmanager
def library_seed(seed: int, /, *purpose: str | int) -> Iterator[None]:
    """Seed torch's global generator inside the block and restore it afterwards.

    For libraries that draw from the global generator and take no other (parameter
    initialisation, vector-quantize-pytorch's k-means, dropout). Seeding each block by its own
    purpose makes it independent of everything that ran before: resuming needs no saved state.
    """
    import torch

    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(derive_seed(seed, *purpose))
        yield
