"""Following a diffusers scheduler: `set_timesteps` begins a generation, `step` ends a step."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch

from .attach import PREFIX, Attached, take_off
from .timesteps import Timesteps

_WATCH = f"{PREFIX}watch"
"""Name of the attribute that holds the watch while a scheduler is followed."""


def has_begun(scheduler: Any) -> bool:
    """Whether `set_timesteps` was called and steps are left.

    A new scheduler has the timesteps of training; `num_inference_steps` shows that others were set.
    """
    index = getattr(scheduler, "step_index", None)
    return getattr(scheduler, "num_inference_steps", None) is not None and (
        index is None or index < len(scheduler.timesteps)
    )


def entered_at(scheduler: Any, timesteps: Timesteps, timestep: Any) -> int | None:
    """The step of the full schedule at which a run enters it; None if that is unknown.

    Args:
        scheduler: its scheduler.
        timesteps: the full schedule.
        timestep: the timestep of the model's first call.
    """
    for name in ("step_index", "begin_index"):
        index = getattr(scheduler, name, None)
        if index is not None:
            return int(index)
    # The only time in a generation that the host waits for a timestep.
    places = timesteps.recognise(timesteps.moment(timestep, wait=True))
    # Second-order schedulers list timesteps twice, and enter a run at the second of two equal ones.
    return places[min(len(places) - 1, int(hasattr(scheduler, "index_for_timestep")))] if places else None


class Listener(Protocol):
    """Receives the events of schedulers."""

    def scheduler_begins(self, scheduler: Any) -> None:
        """Handle a call of `set_timesteps`."""

    def step_of(self, scheduler: Any) -> Callable[..., Any] | None:
        """What is called in place of `step`, with that method first; None to call the method itself."""

    def scheduler_steps(self, scheduler: Any) -> None:
        """Handle a call of `step`."""

    def scheduler_failed(self, scheduler: Any) -> None:
        """Handle an error in `step` or `set_timesteps`."""


class SchedulerWatch:
    """Reports the events of one scheduler to its listeners; its methods are replaced while there is a listener.

    Listeners are held by weak references, so a scheduler in use elsewhere keeps no model alive.

    Args:
        scheduler: the scheduler.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.listeners: list[weakref.ref[Listener]] = []
        self.spent: weakref.ref[torch.Tensor] | None = None
        """The timesteps of the last run that ended."""
        events = {"set_timesteps": "scheduler_begins", "step": "scheduler_steps"}
        self._attached = [Attached(scheduler, method, partial(self._called, event)) for method, event in events.items()]

    @classmethod
    def of(cls, scheduler: Any) -> SchedulerWatch:
        """The watch of `scheduler`, which all its listeners share; a new one if it has none."""
        watch = getattr(scheduler, "__dict__", {}).get(_WATCH)
        return watch if isinstance(watch, cls) and watch.scheduler is scheduler else cls(scheduler)

    def add(self, listener: Listener) -> None:
        """Report events to `listener`. After an interruption, `remove` undoes what was done."""
        if not self.listeners:
            vars(self.scheduler)[_WATCH] = self
            for attached in self._attached:
                attached.attach()
        self.listeners.append(weakref.ref(listener))

    def remove(self, listener: Listener | None) -> None:
        """Remove `listener` and those that are gone; the scheduler is restored when none is left."""
        for ref in tuple(self.listeners):
            if ref() in (None, listener) and ref in self.listeners:
                self.listeners.remove(ref)
        if not self.listeners:
            for attached in self._attached:
                attached.detach()
            take_off(self.scheduler, _WATCH)

    def attach_again(self) -> None:
        """Install the stand-ins again around methods that were replaced since."""
        for attached in self._attached:
            attached.attach_again()

    def spend(self, timesteps: torch.Tensor | None) -> None:
        """Mark `timesteps` as used by a run that has ended: no other run begins on them."""
        self.spent = None if timesteps is None else weakref.ref(timesteps)

    @property
    def is_spent(self) -> bool:
        """Whether a run on the current timesteps has ended."""
        return self.spent is not None and self.spent() is self.scheduler.timesteps

    def _called(self, event: str, original: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            if event == "scheduler_steps":
                stands_in = [f for ref in self.listeners if (found := ref()) and (f := found.step_of(self.scheduler))]
                original = partial(stands_in[0], original) if stands_in else original
            result = original(*args, **kwargs)
        except BaseException:
            self._notify("scheduler_failed")
            raise
        self._notify(event)
        return result

    def _notify(self, event: str) -> None:
        for listener in [ref() for ref in self.listeners]:
            if listener is not None:
                getattr(listener, event)(self.scheduler)
