"""Requests: whose generation is current, by context variable, and the handle by which one on a bare model is put down
and taken up."""

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
"""The generations begun or taken up in this thread or task, the innermost last."""


def begun_here() -> Iterator[Generation]:
    """The generations begun or taken up in this thread or task that are not over, the innermost first."""
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
    if place is not None:  # else it was taken up in another thread, as where a generator is resumed in one
        del refs[place]
        _CURRENT.set(tuple(refs))


def entering() -> Any:
    """The frame of the function whose `with` is being entered, through the context managers that others have made
    around it."""
    frame: Any = sys._getframe(2)
    while frame.f_back is not None and (_is_between(frame) or _is_of(frame.f_back, "contextlib")):
        frame = frame.f_back
    return frame


def running(frames: Sequence[Any]) -> bool:
    """Whether the function of the last of these frames is being run now: a generator that waits is not."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame is not frames[-1]:
        frame = frame.f_back
    return frame is not None


def _is_between(frame: Any) -> bool:
    return _is_of(frame, "contextlib") or _is_of(frame, _PACKAGE)


def _is_of(frame: Any, package: str) -> bool:
    return bool(frame.f_globals.get("__name__", "").partition(".")[0] == package)


_PACKAGE = __name__.partition(".")[0]


class Request:
    """One sampling run on a bare model, which its caller puts down and takes up between steps.

    Calls of the model inside `with request:` belong to it, in whichever thread or task that is. What it keeps stays
    while it is put down, and is released after its last step, by `close`, at an error inside, or when nobody holds the
    request any more.

    Args:
        broadcaster: of the model.
        generation: its plan, its step and its slots.
    """

    def __init__(self, broadcaster: Broadcaster, generation: Generation) -> None:
        self.generation = generation
        self._broadcaster = weakref.ref(broadcaster)
        self._closing = weakref.finalize(self, generation.end)
        self._closing.atexit = False

    @property
    def plan(self) -> Plan | None:
        """Its plan."""
        return self.generation.plan

    @property
    def step(self) -> int:
        """The step of the last call; the number of steps where all were taken."""
        return self.generation.step

    def summary(self) -> Summary:
        """What it did; see `pab.summary`."""
        broadcaster = self._broadcaster()
        if broadcaster is None:
            raise RuntimeError("PAB is no longer enabled on the model of this request; ask before pab.disable")
        return broadcaster.summary_of(self.generation)

    def close(self) -> None:
        """Release what it keeps. It cannot be taken up again."""
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
