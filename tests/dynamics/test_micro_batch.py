"""Promises of micro_batch.py: the most windows that fit are found, and nothing else changes."""

import weakref
from collections.abc import Callable

import pytest
import torch
from worldloom.common import TrainingError
from worldloom.dynamics.micro_batch import find_micro_windows


def limited(limit: int, error: Exception) -> tuple[list[int], Callable[[int], None]]:
    """Attempts that fail with an error above a number of windows, and which there were."""
    tried: list[int] = []

    def attempt(count: int) -> None:
        tried.append(count)
        if count > limit:
            raise error

    return tried, attempt


LACKING = [
    torch.OutOfMemoryError("no more"),
    MemoryError(),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


@pytest.mark.parametrize("error", LACKING, ids=lambda error: type(error).__name__)
def test_the_whole_share_is_halved_until_it_fits(error):
    tried, attempt = limited(3, error)
    assert find_micro_windows(attempt, most=20, everywhere=bool) == 3
    assert tried == [20, 10, 5, 3]


def test_what_fits_at_once_is_tried_once():
    tried, attempt = limited(20, MemoryError())
    assert find_micro_windows(attempt, most=20, everywhere=bool) == 20
    assert tried == [20]


def test_one_process_that_lacks_memory_decides_for_all():
    _, attempt = limited(99, MemoryError())
    others = iter([False, False, True])
    said = []

    def everywhere(here: bool) -> bool:
        said.append(here)
        return next(others)

    assert find_micro_windows(attempt, most=8, everywhere=everywhere) == 2
    assert said == [True, True, True]


def test_where_not_one_window_fits_it_says_what_helps():
    tried, attempt = limited(0, MemoryError())
    with pytest.raises(TrainingError, match=r"not even one window .* --training\.recompute"):
        find_micro_windows(attempt, most=3, everywhere=bool)
    assert tried == [3, 2, 1]


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not match"), ValueError("no"), KeyError()]
)
def test_an_error_that_is_not_a_lack_of_memory_is_raised(error):
    _, attempt = limited(0, error)
    with pytest.raises(type(error)):
        find_micro_windows(attempt, most=4, everywhere=bool)


def test_what_a_failed_attempt_held_is_let_go_before_the_next():
    held: list[weakref.ref[torch.Tensor]] = []

    def attempt(count: int) -> None:
        assert all(reference() is None for reference in held)
        tensor = torch.zeros(count)
        held.append(weakref.ref(tensor))
        if count > 1:
            raise torch.OutOfMemoryError("no more")

    assert find_micro_windows(attempt, most=8, everywhere=bool) == 1
    assert len(held) == 4
