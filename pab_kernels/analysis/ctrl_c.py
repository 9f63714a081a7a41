"""Ctrl-C during a measurement: it raises where the code can stop, and is only counted elsewhere.

Python raises KeyboardInterrupt between any two instructions: inside a record that is half written, in a destructor that
swallows it, or while hooks are removed from a model. Here the signal is counted, and raised at chosen places.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class CtrlC:
    """Counts Ctrl-C since `ctrl_c()` was entered."""

    def __init__(self) -> None:
        self.noted = 0
        self._raises_at: int | None = None

    def check(self) -> None:
        """Raise KeyboardInterrupt if Ctrl-C was pressed."""
        if self.noted:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def interruptible(self, patience: int = 0) -> Iterator[None]:
        """Let Ctrl-C raise KeyboardInterrupt anywhere in the block.

        Args:
            patience: number of signals that are only counted, for `check`, before one raises.

        Raises:
            KeyboardInterrupt: Ctrl-C, in the block or counted before it.
        """
        self.check()
        self._raises_at = patience + 1
        try:
            yield
        finally:
            self._raises_at = None

    def handle(self, number: int, frame: Any) -> None:
        """The handler of SIGINT."""
        self.noted += 1
        if self._raises_at is not None and self.noted >= self._raises_at:
            self._raises_at = self.noted + 2  # the next one may arrive while this one unwinds the stack
            raise KeyboardInterrupt


@contextlib.contextmanager
def ctrl_c() -> Iterator[CtrlC]:
    """Count Ctrl-C instead of raising it until the block ends; an inner block shares the counter of the outer one.

    Only Python's default handler is replaced; a custom one stays. Signal handlers belong to the main thread, so in
    other threads nothing is counted.
    """
    if threading.current_thread() is not threading.main_thread():
        yield CtrlC()
        return
    before = signal.getsignal(signal.SIGINT)
    outer = getattr(before, "__self__", None)
    if isinstance(outer, CtrlC):
        yield outer
        return
    inner = CtrlC()
    if before is not signal.default_int_handler:
        yield inner
        return
    try:
        signal.signal(signal.SIGINT, inner.handle)
        yield inner
    finally:
        signal.signal(signal.SIGINT, before)
