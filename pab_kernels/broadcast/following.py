"""The pipelines of one model, and the schedulers that they hold."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from .generation import Generation
from .pipeline import PipeWatch, compiled, denoisers, holds, left_at
from .scheduler import SchedulerWatch, has_begun

logger = logging.getLogger("pab_kernels")


class Following:
    """The pipelines that call a model, and the watches on their schedulers.

    Args:
        listener: receives the events of pipelines and schedulers.
        model: the DiT.
    """

    def __init__(self, listener: Any, model: nn.Module) -> None:
        self._listener: weakref.ref[Any] = weakref.ref(listener)
        self._model = weakref.ref(model)
        self._id = id(model)
        self._pipes: list[weakref.ref[Any]] = []
        self._watches: list[SchedulerWatch] = []
        self._lock = threading.RLock()
        self._gone = weakref.finalize(model, _model_is_gone, self, type(model).__name__)
        self._gone.atexit = False

    @property
    def pipes(self) -> list[Any]:
        """The pipelines that are alive."""
        return [pipe for ref in self._pipes if (pipe := ref()) is not None]

    def has(self, pipe: Any) -> bool:
        """Whether `pipe` is one of them."""
        return any(pipe is other for other in self.pipes)

    def add(self, pipe: Any) -> None:
        """Follow the scheduler of `pipe`, also after it is replaced."""
        model, listener = self._model(), self._listener()
        assert model is not None and listener is not None
        others = [ref for ref in self._pipes if ref() is not None and ref() is not pipe]
        self._pipes = [*others, weakref.ref(pipe, self._pipe_is_gone)]
        PipeWatch.add(pipe, model, listener)
        self.follow()

    def remove(self, pipe: Any) -> None:
        """Stop following the scheduler of `pipe`, unless another pipeline holds it too."""
        PipeWatch.remove(pipe, self._id)
        self._pipes = [ref for ref in self._pipes if ref() is not pipe]
        with self._lock:
            self._leave(self._held())

    def close(self) -> None:
        """Stop following everything."""
        for pipe in self.pipes:
            self.remove(pipe)
        with self._lock:
            self._leave([])
        self._gone.detach()

    def _pipe_is_gone(self, _: Any) -> None:
        with self._lock:
            self._leave(self._held())

    def _held(self) -> list[Any]:
        return [scheduler for pipe in self.pipes if (scheduler := getattr(pipe, "scheduler", None)) is not None]

    def _with(self, scheduler: Any) -> list[Any]:
        return [pipe for pipe in self.pipes if getattr(pipe, "scheduler", None) is scheduler]

    def holds(self, scheduler: Any) -> bool:
        """Whether one of the pipelines holds `scheduler`."""
        return any(scheduler is held for held in self._held())

    def holders(self, generation: Generation) -> list[Any]:
        """The scheduler of a generation, and the pipelines that hold it."""
        scheduler = generation.scheduler
        return [] if scheduler is None else [scheduler, *self._with(scheduler)]

    def follow(self) -> None:
        """Follow the schedulers that the pipelines hold now, and no others."""
        held, listener = self._held(), self._listener()
        if (
            listener is None
            or len(held) == len(self._watches)
            and all(w.scheduler is s for w, s in zip(self._watches, held, strict=True))
        ):
            return
        with self._lock:
            for scheduler in held:
                if self._watch(scheduler) is None:
                    watch = SchedulerWatch.of(scheduler)
                    self._watches.append(watch)  # first, so that `_leave` finds it after an interruption
                    watch.add(listener)
            self._leave(held)

    def _leave(self, held: Sequence[Any]) -> None:
        left = [watch for watch in self._watches if not any(watch.scheduler is scheduler for scheduler in held)]
        listener = self._listener()
        for watch in left:
            watch.remove(listener)
            self._watches.remove(watch)
        if left and listener is not None:
            listener.schedulers_changed()

    def _watch(self, scheduler: Any) -> SchedulerWatch | None:
        return next((watch for watch in self._watches if watch.scheduler is scheduler), None)

    def begun(self, besides: Sequence[Any]) -> list[Any]:
        """Schedulers with steps left whose timesteps were set before they were followed, except those in `besides`."""
        others = [watch for watch in self._watches if not any(watch.scheduler is scheduler for scheduler in besides)]
        return [watch.scheduler for watch in others if has_begun(watch.scheduler) and not watch.is_spent]

    def spend(self, generation: Generation) -> None:
        """Mark the timesteps of an ended generation as used: the next one needs another `set_timesteps`."""
        watch = self._watch(generation.scheduler)
        if watch is not None:
            watch.spend(generation.timesteps.table)

    def only(self, scheduler: Any) -> bool:
        """Whether `scheduler` steps for this model alone."""
        watch = self._watch(scheduler)
        return (
            watch is not None
            and len(watch.listeners) == 1
            and all(len(denoisers(pipe)) == 1 for pipe in self._with(scheduler))
        )

    def left_at(self, scheduler: Any) -> int | None:
        """The step at which another model takes over on every pipeline that holds `scheduler`, or None."""
        model, pipes = self._model(), self._with(scheduler)
        end = max((left_at(pipe, model) for pipe in pipes if model is not None), default=0)
        return end if 0 < end < len(scheduler.timesteps) else None

    def still_called(self, scheduler: Any, enclose: Callable[[nn.Module], None], warn: Callable[[str], None]) -> bool:
        """Whether a pipeline that holds `scheduler` still calls the model.

        Args:
            scheduler: the scheduler whose timesteps were set.
            enclose: receives the compiled module, if a pipeline holds one around the model.
            warn: receives a message for each pipeline that calls another model.
        """
        model, watch = self._model(), self._watch(scheduler)
        if model is None or watch is None:
            return False
        watch.attach_again()
        found = False
        for pipe in self._with(scheduler):
            if not holds(pipe, model):
                warn(
                    f"{type(pipe).__name__} calls another model than the {type(model).__name__} that PAB was enabled "
                    "on, and nothing is reused; call pab.enable(pipe) again"
                )
                continue
            found = True
            outer = compiled(pipe, model)
            if outer is not None:
                enclose(outer)
        return found


def _model_is_gone(following: Following, name: str) -> None:
    """Warn that the pipelines of a model that was freed call another model now."""
    for pipe in following.pipes:
        logger.warning(
            "the %s of a %s on which PAB was enabled is gone, and nothing is reused; call pab.enable(pipe) again",
            name,
            type(pipe).__name__,
        )
    following.close()
