"""Ctrl-C, sent to this process as a terminal does: when it is counted, when it raises, and which handler remains."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from pab_kernels.analysis.ctrl_c import CtrlC, ctrl_c


def press() -> None:
    """A handler runs before the next instruction of the main thread."""
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(autouse=True)
def _pythons_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def test_it_is_noted_and_raises_where_it_is_looked_at() -> None:
    with ctrl_c() as stop:
        press()
        press()
        assert stop.noted == 2
        with pytest.raises(KeyboardInterrupt):
            stop.check()
        with pytest.raises(KeyboardInterrupt), stop.interruptible():
            pytest.fail("the block is not begun")


@pytest.mark.parametrize("patience", [0, 1])
def test_an_interruptible_block_stops_after_its_patience(patience: int) -> None:
    done = []
    with ctrl_c() as stop:
        with pytest.raises(KeyboardInterrupt), stop.interruptible(patience):
            for i in range(5):
                press()
                done.append(i)
        assert done == list(range(patience)) and stop.noted == patience + 1
        press()  # after the block it is only counted again
        assert stop.noted == patience + 2


def test_one_that_comes_while_another_unwinds_the_stack_does_not_tear_it() -> None:
    ended = []
    with ctrl_c() as stop, pytest.raises(KeyboardInterrupt), stop.interruptible():
        try:
            press()
        finally:
            press()
            ended.append(True)
    assert ended == [True]


def test_one_that_a_library_swallows_is_not_the_last() -> None:
    with ctrl_c() as stop, pytest.raises(KeyboardInterrupt), stop.interruptible():
        for _ in range(3):
            try:
                press()
            except KeyboardInterrupt:
                continue
            press()
            pytest.fail("it is still ignored")
        press()
        press()


def test_an_inner_block_joins_the_outer_one() -> None:
    with ctrl_c() as outer:
        with ctrl_c() as inner:
            press()
        assert inner is outer and outer.noted == 1 and signal.getsignal(signal.SIGINT) == outer.handle


def test_a_handler_that_is_not_pythons_stays() -> None:
    seen = []
    signal.signal(signal.SIGINT, lambda *_: seen.append(True))
    with ctrl_c() as stop:
        press()
    assert seen == [True] and stop.noted == 0
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_the_handler_is_given_back_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), ctrl_c():
        raise ZeroDivisionError
    with pytest.raises(KeyboardInterrupt):
        press()


def test_in_another_thread_no_handler_is_touched() -> None:
    found: list[CtrlC] = []

    def run() -> None:
        with ctrl_c() as stop, stop.interruptible():
            found.append(stop)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found[0].noted == 0
