"""Following a diffusers scheduler: `set_timesteps` begins a generation, `step` ends a step."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any, Protocol

import torch

from .attach import PREFIX, Attached, take_off
from .timesteps import Timesteps

_WATCH = f"{PREFIX}watch"
"""Attribute that a scheduler has while it is followed."""


def has_begun(scheduler: Any) -> bool:
    """Whether `set_timesteps` was called, and steps are left.

    The timesteps that a new scheduler has are those of training.
    """
    index = getattr(scheduler, "step_index", None)
    return getattr(scheduler, "num_inference_steps", None) is not None and (
        index is None or index < len(scheduler.timesteps)
    )


def entered_at(scheduler: Any, timesteps: Timesteps, timestep: Any) -> int | None:
    """The step of the full schedule at which the model is called first, with this timestep.

    None where that is not known.
    """
    for name in ("step_index", "begin_index"):
        index = getattr(scheduler, name, None)
        if index is not None:
            return int(index)
    places = timesteps.recognise(
        timesteps.moment(timestep, wait=True)
    )  # the one read of a timestep to the host in a generation
    # Schedulers of second order have timesteps twice, and take a run that is entered at one to be entered at its second
    # place.
    return places[min(len(places) - 1, int(hasattr(scheduler, "index_for_timestep")))] if places else None


class Listener(Protocol):
    """Receives the events of schedulers."""

    def scheduler_begins(self, scheduler: Any) -> None:
        """`set_timesteps` was called."""

    def scheduler_steps(self, scheduler: Any) -> None:
        """`step` was called."""

    def scheduler_failed(self, scheduler: Any) -> None:
        """`step` or `set_timesteps` raised an error."""


class SchedulerWatch:
    """The listeners of one scheduler; its methods are replaced while there is at least one.

    They are known weakly, so that a scheduler in use elsewhere keeps no model alive.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.listeners: list[weakref.ref[Listener]] = []
        self.spent: weakref.ref[torch.Tensor] | None = None
        """The timesteps of which a run was at its end."""
        events = {"set_timesteps": "scheduler_begins", "step": "scheduler_steps"}
        self._attached = [Attached(scheduler, method, partial(self._called, event)) for method, event in events.items()]

    @classmethod
    def of(cls, scheduler: Any) -> SchedulerWatch:
        """The watch of `scheduler`, or a new one: one serves all its listeners."""
        watch = getattr(scheduler, "__dict__", {}).get(_WATCH)
        return watch if isinstance(watch, cls) and watch.scheduler is scheduler else cls(scheduler)

    def add(self, listener: Listener) -> None:
        """Tell `listener` of the scheduler. An interruption leaves what `remove` takes back."""
        if not self.listeners:
            vars(self.scheduler)[_WATCH] = self
            for attached in self._attached:
                attached.attach()
        self.listeners.append(weakref.ref(listener))

    def remove(self, listener: Listener | None) -> None:
        """Tell `listener` no more, nor those that are gone; without listeners the scheduler is given back."""
        for ref in tuple(self.listeners):
            if ref() in (None, listener) and ref in self.listeners:
                self.listeners.remove(ref)
        if not self.listeners:
            for attached in self._attached:
                attached.detach()
            take_off(self.scheduler, _WATCH)

    def attach_again(self) -> None:
        """Replace methods again that somebody has replaced since."""
        for attached in self._attached:
            attached.attach_again()

    def spend(self, timesteps: torch.Tensor | None) -> None:
        """A run on `timesteps` is at its end: no other one begins on them."""
        self.spent = None if timesteps is None else weakref.ref(timesteps)

    @property
    def is_spent(self) -> bool:
        """Whether a run on the timesteps that are set was at its end."""
        return self.spent is not None and self.spent() is self.scheduler.timesteps

    def _called(self, event: str, original: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            result = original(*args, **kwargs)
        except BaseException:
            self._tell("scheduler_failed")
            raise
        self._tell(event)
        return result

    def _tell(self, event: str) -> None:
        for listener in [ref() for ref in self.listeners]:
            if listener is not None:
                getattr(listener, event)(self.scheduler)
