"""Ctrl-C while something is measured: acted on where the code can stop, and only noted where work is half done.

Python raises KeyboardInterrupt between any two of its instructions: between the two halves of a record, in a destructor
that swallows it, while a model is given back. Here the signal is counted instead, and becomes an exception at a place
that was chosen for it.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class CtrlC:
    """The Ctrl-Cs since `ctrl_c()` was entered."""

    def __init__(self) -> None:
        self.noted = 0
        self._raises_at: int | None = None

    def check(self) -> None:
        """Stop here if Ctrl-C was pressed.

        Raises:
            KeyboardInterrupt: it was.
        """
        if self.noted:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def interruptible(self, patience: int = 0) -> Iterator[None]:
        """Let a Ctrl-C raise KeyboardInterrupt wherever the block is, but for the first `patience` of them, which are
        for `check`.

        Raises:
            KeyboardInterrupt: Ctrl-C, in the block or noted before it.
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
            self._raises_at = self.noted + 2  # the next one may come while this one unwinds the stack
            raise KeyboardInterrupt


@contextlib.contextmanager
def ctrl_c() -> Iterator[CtrlC]:
    """Note Ctrl-C instead of raising it, until the block ends; an inner block joins the outer one.

    Only Python's own handler is replaced, which raises KeyboardInterrupt: another one is its owner's decision. Handlers
    belong to the main thread; in others nothing is noted.
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
