"""The generations of one model that go on, and whose a call of the model is."""

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
    """The generations of one model: those of followed schedulers, those of requests, and at most one of the bare model
    without a request.

    Args:
        following: the pipelines of the model.
        make: makes a generation, of what the schedule is given by.
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
        """Every generation that may keep something, and the one begun last."""
        found = [*self._running, *self._requested, *([] if self.latest is None else [self.latest])]
        return list({id(generation): generation for generation in found}.values())

    def of(self, scheduler: Any) -> list[Generation]:
        """Those of a scheduler that go on."""
        return [g for g in self._running if g.scheduler is scheduler and not g.over]

    def end_unheld(self) -> None:
        """End those of schedulers that no pipeline holds any more."""
        for g in self._running:
            if g.scheduler is not None and not g.over and not self._following.holds(g.scheduler):
                g.abort()
        self._running = [g for g in self._running if not g.over]

    def clear(self) -> None:
        """Forget all."""
        self._running, self.latest = [], None

    def request(self, num_steps: int | None, timesteps: Sequence[float] | None) -> Generation:
        """Begin one on the bare model, to which only calls belong for which it is taken up."""
        self.latest = generation = self._make(num_steps=num_steps, timesteps=timesteps)
        self._requested.add(generation)
        return generation

    def on_bare_model(self, num_steps: int | None, timesteps: Sequence[float] | None) -> Generation:
        """Begin one on the bare model, to which all calls belong that are nobody else's; the one before it ends."""
        begun = self._make(num_steps=num_steps, timesteps=timesteps)
        for generation in [g for g in self._running if g.scheduler is None]:
            generation.end()
        return self.add(begun)

    def add(self, generation: Generation) -> Generation:
        """A generation that goes on, the latest."""
        self._running = [*(g for g in self._running if not g.over), generation]
        self.latest = generation
        return generation

    def follow(self, scheduler: Any) -> None:
        """Begin one on the timesteps that were set now, in this thread or task."""
        self.latest = generation = self._from(scheduler, notified=True)
        note(generation)

    def _from(self, scheduler: Any, *, notified: bool) -> Generation:
        with self._lock:
            for g in self._running:  # also that of an object which passes on what is asked of `scheduler`
                if g.scheduler is not None and (g.scheduler is scheduler or g.timesteps.table is scheduler.timesteps):
                    g.end()
            end = self._following.left_at(scheduler)
            generation = self._make(timesteps=scheduler.timesteps, scheduler=scheduler, notified=notified, end=end)
            self._running = [*(g for g in self._running if not g.over), generation]
            return generation

    def find(self, inputs: Inputs, name: str | None) -> Generation | None:
        """The generation of a call of the model, or None where it is nobody's.

        1. the request that is taken up in this thread or task, unless a pipeline's run has begun inside of it
        2. a run of a scheduler that is followed, or that of the bare model
        3. a run of a scheduler whose timesteps were set while nobody followed it: `enable` came later, or it was
        exchanged
        4. a request that is taken up elsewhere, as where branches run in worker threads

        Args:
            inputs: of the call.
            name: of its context, or None.

        Raises:
            RuntimeError: it may be more than one's.
        """
        mine = [g for g in begun_here() if g in self._requested or g in self._running]
        taken_up = [g for g in mine if g.entered]
        if len(taken_up) > 1 and mine[0].entered:  # nested, or held open by generators of which some wait
            return next((g for g in taken_up if running(g.entered)), taken_up[0])
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
            taken_up = taken_up[:1] or [g for g in self._requested if g.entered and not g.over]
            found = whose(taken_up, name, inputs, following.holders)
        if found is not None and not found.started:
            self.latest = found
        return found
