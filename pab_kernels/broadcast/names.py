"""Names of contexts, given in one thread or task."""

from __future__ import annotations

import contextlib
import contextvars
import weakref
from collections.abc import Iterator
from typing import Any

_GIVEN: contextvars.ContextVar[tuple[tuple[weakref.ref[Any], str | None, int | None], ...]] = contextvars.ContextVar(
    "pab_contexts", default=()
)
"""For whom a name was given, the name, and the step; the innermost last."""


@contextlib.contextmanager
def naming(owner: Any, name: str | None, step: int | None) -> Iterator[None]:
    """Give a name, and perhaps a step, to the calls inside."""
    entry = weakref.ref(owner), name, step
    _GIVEN.set((*_GIVEN.get(), entry))
    try:
        yield
    finally:  # in another context, as where a generator is resumed in another thread, it is not there
        _GIVEN.set(tuple(other for other in _GIVEN.get() if other is not entry))


def named(owner: Any) -> tuple[str | None, int | None]:
    """The name and step that calls have now."""
    return next(((name, step) for ref, name, step in reversed(_GIVEN.get()) if ref() is owner), (None, None))
