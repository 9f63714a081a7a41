"""Following a diffusers scheduler: `set_timesteps` begins a generation, `step` ends a step; and the models that it serves."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from torch import nn

from .attach import Attached
from .schedule import Schedule

DENOISERS = ("transformer", "transformer_2", "unconditional_transformer", "unet")
"""Names of what a pipeline may call at the steps of its scheduler."""


def denoisers(pipe: Any) -> dict[str, nn.Module]:
    """The models that a pipeline calls at the steps of its scheduler, by name; a compiled one is the model in it."""
    held = {name: getattr(pipe, name, None) for name in DENOISERS}
    return {name: getattr(model, "_orig_mod", model) for name, model in held.items() if isinstance(model, nn.Module)}


def left_at(pipe: Any, model: nn.Module) -> int:
    """The step of a pipeline's schedule from which it no longer calls `model`; the number of steps where it calls it to the end.

    A pipeline with a `boundary_ratio` calls `transformer` at the timesteps from `boundary_ratio * num_train_timesteps` up, and
    `transformer_2` below (Wan 2.2: an expert for much noise and one for little).
    """
    timesteps, models = pipe.scheduler.timesteps, denoisers(pipe)
    ratio = getattr(getattr(pipe, "config", None), "boundary_ratio", None)
    if ratio is None or "transformer_2" not in models or models.get("transformer") is not model:
        return len(timesteps)
    own = (timesteps >= ratio * pipe.scheduler.config.num_train_timesteps).tolist()
    return len(own) - [*reversed(own)].index(True) if any(own) else 0


def has_begun(scheduler: Any) -> bool:
    """Whether `set_timesteps` was called; the timesteps that a new scheduler has are those of training."""
    return getattr(scheduler, "num_inference_steps", None) is not None


def entered_at(scheduler: Any, schedule: Schedule, timestep: Any) -> int:
    """The step of the full schedule at which the model is called first, with this timestep."""
    for name in ("step_index", "begin_index"):
        index = getattr(scheduler, name, None)
        if index is not None:
            return int(index)
    timesteps = schedule.timesteps or ()
    if isinstance(timestep, torch.Tensor):
        if timestep.is_meta:
            return 0
        timesteps = tuple(torch.tensor(timesteps, dtype=torch.float64).to(timestep.dtype).tolist())
        timestep = float(timestep.flatten()[0])  # the one read of a timestep to the host in a generation
    places = [i for i, t in enumerate(timesteps) if t == timestep]
    # Schedulers of second order have timesteps twice, and take a run that is entered at one to be entered at its second place.
    return places[min(len(places) - 1, int(hasattr(scheduler, "index_for_timestep")))] if places else 0


class Listener(Protocol):
    """Who is told."""

    def scheduler_begins(self, scheduler: Any) -> None:
        """`set_timesteps` was called."""

    def scheduler_steps(self, scheduler: Any) -> None:
        """`step` was called."""


class Follower:
    """A listener as a scheduler knows it: weakly, so that a scheduler in use elsewhere keeps no model alive."""

    def __init__(self, listener: Listener) -> None:
        self._listener = weakref.ref(listener)

    def scheduler_begins(self, scheduler: Any) -> None:
        """`set_timesteps` was called."""
        listener = self._listener()
        if listener is not None:
            listener.scheduler_begins(scheduler)

    def scheduler_steps(self, scheduler: Any) -> None:
        """`step` was called."""
        listener = self._listener()
        if listener is not None:
            listener.scheduler_steps(scheduler)


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
