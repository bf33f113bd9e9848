"""How many windows are computed at once: the most that fit into memory, found by trying.

    attempt, most windows  ->  find_micro_windows  ->  how many: `most`, or a half, a quarter of it

The gradients of micro-batches add up, so what is found changes sums by their rounding and nothing
else. A number too many shows on the first attempt, not after a night: an attempt takes the memory
of a whole update.

Source: the idea is Accelerate's `find_executable_batch_size`; departs from it in asking all
processes, and in counting as failed what is known to be a lack of memory and nothing else.
"""

import gc
from collections.abc import Callable

import torch
from worldloom.common import TrainingError

_LACKING = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What the messages of a RuntimeError say that is a lack of memory: CUDA's, the CPU's, cuBLAS's."""


def find_micro_windows(
    attempt: Callable[[int], object], /, *, most: int, everywhere: Callable[[bool], bool]
) -> int:
    """Return the most windows that fit in every process, halved from `most` until they do.

    All processes must call it together, with the same `most`: they try the same numbers.

    Args:
        attempt: computes so many windows as an update does, with all that an update holds, and
            forgets the gradients. Called anew with half of it after it ran out of memory.
        most: a process's share of the batch, at least 1.
        everywhere: tells whether something is true in all processes.

    Raises:
        TrainingError: if not even one window fits.
    """
    count = most
    while not everywhere(_fits(attempt, count)):
        if count == 1:
            raise TrainingError(
                "training: not even one window fits into memory; keep less of it with "
                "--training.recompute, deal the weights out with --training.sharded, or take a "
                "smaller model or fewer --training.window-frames"
            )
        count = -(-count // 2)
    return count


def _fits(attempt: Callable[[int], object], count: int) -> bool:
    """Try so many windows; let go of what the attempt held, whether it ended well or not."""
    try:
        attempt(count)
    except (MemoryError, RuntimeError) as error:
        if not _lacks_memory(error):
            raise
        fits = False
    else:
        fits = True
    # Only here, behind the except: until its end the error holds the frames, and they the tensors.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return fits


def _lacks_memory(error: Exception) -> bool:
    """Tell whether an error says that there is too little memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(words in str(error) for words in _LACKING)
