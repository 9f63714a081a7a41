"""Following a diffusers scheduler: `set_timesteps` begins a generation, `step` ends a step."""

from __future__ import annotations

from typing import Any, Protocol

from .attach import Attached


class Listener(Protocol):
    """Who is told."""

    def scheduler_begins(self, scheduler: Any) -> None:
        """`set_timesteps` was called."""

    def scheduler_steps(self, scheduler: Any) -> None:
        """`step` was called."""


class SchedulerWatch:
    """The listeners of one scheduler; its methods are attached while there is at least one."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self._listeners: list[Listener] = []
        self._attached: list[Attached] = []

    @classmethod
    def add(cls, scheduler: Any, listener: Listener) -> SchedulerWatch:
        """Tell `listener` of `scheduler`; one watch serves all listeners of a scheduler."""
        held = vars(scheduler).get("step")
        replacement = held.replacement if isinstance(held, Attached) else None
        watch = getattr(replacement, "__self__", None)
        if not isinstance(watch, cls):
            watch = cls(scheduler)
            watch._attached = [
                Attached(scheduler, "set_timesteps", watch._set_timesteps),
                Attached(scheduler, "step", watch._step),
            ]
        watch._listeners.append(listener)
        return watch

    def remove(self, listener: Listener) -> None:
        """Tell `listener` no more; without listeners the scheduler is given back."""
        self._listeners.remove(listener)
        if not self._listeners:
            for attached in self._attached:
                attached.detach()

    def _set_timesteps(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        for listener in tuple(self._listeners):
            listener.scheduler_begins(self.scheduler)
        return result

    def _step(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        for listener in tuple(self._listeners):
            listener.scheduler_steps(self.scheduler)
        return result
