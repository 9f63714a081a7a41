"""The running generations of one model, and finding the one that a call belongs to."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from .claims import whose
from .following import Following
from .generation import Generation
from .inputs import Inputs
from .request import begun_here, note, running


class Runs:
    """The generations of one model.

    These are the generations of followed schedulers, those of requests, and at most one on the bare model without a
    request.

    Args:
        following: the pipelines of the model.
        make: makes a generation from the arguments that give its schedule.
    """

    def __init__(self, following: Following, make: weakref.WeakMethod[Callable[..., Generation]]) -> None:
        self._following = following
        self._method = make
        self._lock = threading.RLock()
        self._running: list[Generation] = []
        self._requested: weakref.WeakSet[Generation] = weakref.WeakSet()
        self.latest: Generation | None = None
        """The generation begun last."""

    def _make(self, **schedule: Any) -> Generation:
        make = self._method()
        assert make is not None, "PAB is enabled"
        return make(**schedule)

    def all(self) -> list[Generation]:
        """Every generation that may hold slots, and the latest one."""
        found = [*self._running, *self._requested, *([] if self.latest is None else [self.latest])]
        return list({id(generation): generation for generation in found}.values())

    def of(self, scheduler: Any) -> list[Generation]:
        """The running generations of a scheduler; those without one for None."""
        return [g for g in self._running if g.scheduler is scheduler and not g.over]

    def end_unheld(self) -> None:
        """End the generations whose scheduler no pipeline holds any more."""
        for g in self._running:
            if g.scheduler is not None and not g.over and not self._following.holds(g.scheduler):
                g.abort()
        self._running = [g for g in self._running if not g.over]

    def clear(self) -> None:
        """Forget all generations of schedulers and of the bare model."""
        self._running, self.latest = [], None

    def request(self, num_steps: int | None, timesteps: Sequence[float] | None) -> Generation:
        """Begin a generation on the bare model, for the calls inside `with` on its request."""
        self.latest = generation = self._make(num_steps=num_steps, timesteps=timesteps)
        self._requested.add(generation)
        return generation

    def on_bare_model(self, num_steps: int | None, timesteps: Sequence[float] | None) -> Generation:
        """Begin a generation on the bare model, for all calls outside of requests; its predecessor ends."""
        begun = self._make(num_steps=num_steps, timesteps=timesteps)
        for generation in [g for g in self._running if g.scheduler is None]:
            generation.end()
        return self.add(begun)

    def add(self, generation: Generation) -> Generation:
        """Add a running generation, as the latest."""
        self._running = [*(g for g in self._running if not g.over), generation]
        self.latest = generation
        return generation

    def follow(self, scheduler: Any) -> None:
        """Begin a generation on the timesteps just set, in this thread or task."""
        self.latest = generation = self._from(scheduler, notified=True)
        note(generation)

    def _from(self, scheduler: Any, *, notified: bool) -> Generation:
        with self._lock:
            for g in self._running:  # the second test finds a proxy of the scheduler
                if g.scheduler is not None and (g.scheduler is scheduler or g.timesteps.table is scheduler.timesteps):
                    g.end()
            end = self._following.left_at(scheduler)
            generation = self._make(timesteps=scheduler.timesteps, scheduler=scheduler, notified=notified, end=end)
            self._running = [*(g for g in self._running if not g.over), generation]
            return generation

    def find(self, inputs: Inputs, name: str | None) -> Generation | None:
        """The generation that a call of the model belongs to; None if it belongs to none.

        The first of:

        1. the request entered in this thread or task, unless a pipeline's run began inside it
        2. a run of a followed scheduler, or the run on the bare model
        3. a run of a scheduler whose timesteps were set before it was followed, because `enable` came later or the
           pipeline's scheduler was exchanged
        4. a request entered in another thread, such as for branches that run in worker threads

        Args:
            inputs: the arguments of the call.
            name: the name of its context, or None.

        Raises:
            RuntimeError: several generations fit, and nothing distinguishes them.
        """
        mine = [g for g in begun_here() if g in self._requested or g in self._running]
        entered = [g for g in mine if g.entered]
        if len(entered) > 1 and mine[0].entered:  # nested, or held open by generators, some of them suspended
            return next((g for g in entered if running(g.entered)), entered[0])
        if mine and mine[0].entered:
            return mine[0]
        following = self._following
        following.follow()
        going_on = [g for g in self._running if not g.over]
        found = whose(going_on, name, inputs, following.holders)
        if found is None:
            begun = following.begun(besides=[g.scheduler for g in going_on])
            found = whose([self._from(s, notified=False) for s in begun], name, inputs, following.holders)
        if found is None:
            entered = entered[:1] or [g for g in self._requested if g.entered and not g.over]
            found = whose(entered, name, inputs, following.holders)
        if found is not None and not found.started:
            self.latest = found
        return found
