"""Naming the context of calls, by thread or task."""

from __future__ import annotations

import contextvars
import weakref
from collections.abc import Sequence
from typing import Any

from .request import entering, running


class Naming:
    """Gives a context name, and perhaps a step, to the calls inside `with`.

    Args:
        owners: the broadcasters whose calls are named.
        name: name of the context.
        step: step of the full schedule, or None.
    """

    def __init__(self, owners: Sequence[Any], name: str | None, step: int | None) -> None:
        self._owners = [weakref.ref(owner) for owner in owners]
        self.name, self.step = name, step
        self.frames: list[Any] = []
        """Frames of the functions that have entered it."""

    def is_for(self, owner: Any) -> bool:
        """Whether it names the calls of `owner`."""
        return any(ref() is owner for ref in self._owners)

    def __enter__(self) -> None:
        self.frames.append(entering())
        _GIVEN.set((*_GIVEN.get(), self))

    def __exit__(self, *_: object) -> None:
        self.frames.pop()
        # It may be absent: a generator can be resumed in another thread.
        _GIVEN.set(tuple(other for other in _GIVEN.get() if other is not self))


_GIVEN: contextvars.ContextVar[tuple[Naming, ...]] = contextvars.ContextVar("pab_contexts", default=())
"""The names in force in this thread or task, innermost last."""


def named(owner: Any) -> tuple[str | None, int | None]:
    """The name and step of a call made now.

    A name given by a running function takes precedence over one given by a suspended generator.

    Args:
        owner: the broadcaster of the model that is called.
    """
    given = [naming for naming in reversed(_GIVEN.get()) if naming.is_for(owner)]
    if len(given) > 1:
        given = [naming for naming in given if running(naming.frames)] or given
    return (given[0].name, given[0].step) if given else (None, None)
