"""Names of contexts, given in one thread or task."""

from __future__ import annotations

import contextvars
import weakref
from collections.abc import Sequence
from typing import Any

from .request import entering, running


class Naming:
    """Gives a name, and perhaps a step, to the calls inside of `with`.

    Args:
        owners: for whom.
        name: of the context.
        step: of the full schedule, or None.
    """

    def __init__(self, owners: Sequence[Any], name: str | None, step: int | None) -> None:
        self._owners = [weakref.ref(owner) for owner in owners]
        self.name, self.step = name, step
        self.frames: list[Any] = []
        """Of the functions that it is given in."""

    def is_for(self, owner: Any) -> bool:
        """Whether it is given for `owner`."""
        return any(ref() is owner for ref in self._owners)

    def __enter__(self) -> None:
        self.frames.append(entering())
        _GIVEN.set((*_GIVEN.get(), self))

    def __exit__(
        self, *_: object
    ) -> None:  # in another thread, as where a generator is resumed there, it is not in force
        self.frames.pop()
        _GIVEN.set(tuple(other for other in _GIVEN.get() if other is not self))


_GIVEN: contextvars.ContextVar[tuple[Naming, ...]] = contextvars.ContextVar("pab_contexts", default=())
"""In this thread or task, the innermost last."""


def named(owner: Any) -> tuple[str | None, int | None]:
    """The name and step that calls have now.

    Of several, those given by a function that runs, and not by a generator that waits.
    """
    given = [naming for naming in reversed(_GIVEN.get()) if naming.is_for(owner)]
    if len(given) > 1:
        given = [naming for naming in given if running(naming.frames)] or given
    return (given[0].name, given[0].step) if given else (None, None)
