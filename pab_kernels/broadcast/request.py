"""Requests: the handle of a generation on a bare model, and the current generation by context variable."""

from __future__ import annotations

import contextvars
import sys
import weakref
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..rules.plan import Plan
from .generation import Generation

if TYPE_CHECKING:
    from .broadcaster import Broadcaster
    from .summary import Summary

_CURRENT: contextvars.ContextVar[tuple[weakref.ref[Generation], ...]] = contextvars.ContextVar(
    "pab_generations", default=()
)
"""The generations begun or entered in this thread or task, innermost last."""


def begun_here() -> Iterator[Generation]:
    """The generations begun or entered in this thread or task that are not over, innermost first."""
    for ref in reversed(_CURRENT.get()):
        generation = ref()
        if generation is not None and not generation.over:
            yield generation


def note(generation: Generation) -> None:
    """Make `generation` the innermost of this thread or task."""
    _CURRENT.set((*(ref for ref in _CURRENT.get() if (g := ref()) is not None and not g.over), weakref.ref(generation)))


def _forget(generation: Generation) -> None:
    refs = list(_CURRENT.get())
    place = next((i for i in reversed(range(len(refs))) if refs[i]() is generation), None)
    if place is not None:  # None if it was entered in another thread: a generator can be resumed in a different one
        del refs[place]
        _CURRENT.set(tuple(refs))


def entering() -> Any:
    """The frame of the function that executes the `with` statement, past frames of contextlib and this package."""
    frame: Any = sys._getframe(2)
    while frame.f_back is not None and (_is_of(frame, "contextlib", _PACKAGE) or _is_of(frame.f_back, "contextlib")):
        frame = frame.f_back
    return frame


def running(frames: Sequence[Any]) -> bool:
    """Whether the last of these frames is on the stack; the frame of a suspended generator is not."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame is not frames[-1]:
        frame = frame.f_back
    return frame is not None


def _is_of(frame: Any, *packages: str) -> bool:
    return frame.f_globals.get("__name__", "").partition(".")[0] in packages


_PACKAGE = __name__.partition(".")[0]


class Request:
    """One sampling run on a bare model.

    Calls of the model inside `with request:` belong to it. The block can be left and entered again between steps, in
    any thread or task. Its slots are released after the last step, by `close`, by an error inside the block, or when
    the request is garbage collected.

    Args:
        broadcaster: the broadcaster of the model.
        generation: its plan, step and slots.
    """

    def __init__(self, broadcaster: Broadcaster, generation: Generation) -> None:
        self.generation = generation
        self._broadcaster = weakref.ref(broadcaster)
        self._closing = weakref.finalize(self, generation.end)
        self._closing.atexit = False

    @property
    def plan(self) -> Plan | None:
        """The plan of its generation."""
        return self.generation.plan

    @property
    def step(self) -> int:
        """The step of the last call; the number of steps after all of them."""
        return self.generation.step

    def summary(self) -> Summary:
        """The summary of its generation; see `pab.summary`.

        Raises:
            RuntimeError: PAB is no longer enabled on the model.
        """
        broadcaster = self._broadcaster()
        if broadcaster is None:
            raise RuntimeError(
                "PAB is no longer enabled on the model of this request; call request.summary() before pab.disable"
            )
        return broadcaster.summary_of(self.generation)

    def close(self) -> None:
        """End it and release its slots; it cannot be entered again."""
        self._closing()

    def __enter__(self) -> Request:
        if self.generation.over and not self.generation.used_up:
            raise RuntimeError(
                "this request is closed, or ended by an error; begin another one: pab.generation(model, num_steps=...)"
            )
        self.generation.entered.append(entering())
        note(self.generation)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.generation.entered.pop()
        _forget(self.generation)
        if kind is not None:
            self.generation.abort()
            self.close()
