"""The next item is made while one is used, and nothing else changes."""

import threading
import time

import pytest
from worldloom.pipelines.ahead import Ahead


def test_items_come_as_they_are_made_and_in_order():
    assert list(Ahead(number for number in range(100))) == list(range(100))
    assert list(Ahead(number for number in ())) == []


def test_the_next_item_is_made_while_one_is_used_and_no_further_ones():
    made, wanted = [], threading.Semaphore(0)

    def items():
        for number in range(5):
            made.append(number)
            wanted.release()
            yield number

    read = Ahead(items())
    assert wanted.acquire(timeout=30)  # 0 is made although nobody asked for it
    assert next(read) == 0
    assert wanted.acquire(timeout=30)  # and so is 1
    time.sleep(0.05)
    assert made == [0, 1]
    read.close()


def test_an_error_is_raised_in_its_turn_and_the_generator_is_closed():
    closed = []

    def items():
        try:
            yield 1
            yield 2
            raise OSError("the disk is gone")
        finally:
            closed.append(True)

    read = Ahead(items())
    assert [next(read), next(read)] == [1, 2]
    with pytest.raises(OSError, match="the disk is gone"):
        next(read)
    assert closed == [True]


def test_leaving_early_closes_the_generator_and_leaves_no_thread():
    before, closed = set(threading.enumerate()), []

    def items():
        try:
            yield from range(100)
        finally:
            closed.append(True)

    read = Ahead(items())
    assert next(read) == 0
    read.close()
    assert closed == [True]
    assert set(threading.enumerate()) <= before  # one of an earlier test may end meanwhile
