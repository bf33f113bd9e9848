"""Promises of interrupt.py: a signal is a wish granted between two steps, with the right code."""

import os
import signal

import pytest
from worldloom.common import Interrupt


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_noted_and_the_loop_leaves_with_its_code(number, code):
    before = signal.getsignal(number)
    with Interrupt() as interrupt:
        assert not interrupt.wanted
        os.kill(os.getpid(), number)
        assert interrupt.wanted  # and the step that was running went on
        with pytest.raises(SystemExit) as left:
            interrupt.leave()
    assert left.value.code == code
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_stops_at_once():
    with Interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
