"""The broadcaster: PAB switched on for one model. It knows the generation of each thread and opens every call of the model."""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from .attach import Attached, attach_forward
from .config import PABConfig
from .generation import Call, Generation
from .plan import Sublayer
from .scheduler import SchedulerWatch

logger = logging.getLogger("pab_kernels")

ATTRIBUTE = "_pab_broadcaster"
"""Name of the attribute that a model has while PAB is enabled."""


class Detachable(Protocol):
    """Something done to a model that can be undone."""

    def detach(self) -> None:
        """Undo it."""


class Adapter(Protocol):
    """How one family of models is run under PAB; see `pab_kernels.adapters`."""

    @property
    def sublayers(self) -> Sequence[Sublayer]:
        """The model's sublayers."""

    @property
    def cache_points(self) -> Sequence[str]:
        """The cache points that it supports."""

    def attach(self, broadcaster: Broadcaster) -> Sequence[Detachable]:
        """Make the model's blocks ask `broadcaster.call` what to do."""

    def rest_flops(self, *args: Any, **kwargs: Any) -> int:
        """FLOPs outside of the sublayers, of a call with these arguments."""

    def timestep(self, *args: Any, **kwargs: Any) -> torch.Tensor | float | None:
        """The timestep among these arguments."""


class _Thread(threading.local):
    generation: Generation | None = None
    call: Call | None = None
    context: tuple[str | None, int | None] = (None, None)


class Broadcaster:
    """PAB on one model.

    Args:
        model: the DiT.
        adapter: of its family.
        config: the rules.
    """

    def __init__(self, model: nn.Module, adapter: Adapter, config: PABConfig) -> None:
        self._model = weakref.ref(model)
        self.adapter = adapter
        self.config = config
        self._thread = _Thread()
        self._waiting: Generation | None = None
        self._latest: Generation | None = None
        self._pipes: list[weakref.ref[Any]] = []
        self._watches: list[SchedulerWatch] = []
        self._said: set[str] = set()
        self._attached: list[Detachable] = [attach_forward(model, self._run), *adapter.attach(self)]
        if hasattr(model, "cache_context"):
            self._attached.append(Attached(model, "cache_context", self._cache_context))

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None  # a copy of the model is a plain model

    def __reduce__(self) -> Any:
        return (type(None), ())

    @property
    def call(self) -> Call | None:
        """The call of the model that this thread is in, or None where the model is to run plainly."""
        return self._thread.call

    @property
    def latest(self) -> Generation | None:
        """The generation begun last."""
        return self._latest

    def configure(self, config: PABConfig) -> None:
        """Take other rules, from the next generation on."""
        self.config = config

    def detach(self) -> None:
        """Give the model back as it was."""
        for attached in reversed(self._attached):
            attached.detach()
        for watch in self._watches:
            watch.remove(self)
        if self._latest is not None:
            self._latest.release()
        self._attached, self._watches, self._pipes = [], [], []
        self._thread, self._waiting, self._latest = _Thread(), None, None

    # Generations

    def begin(self, *, num_steps: int | None = None, timesteps: Sequence[float] | None = None) -> Generation:
        """Begin a generation on the bare model, in this thread."""
        generation = self._begin(num_steps=num_steps, timesteps=timesteps)
        generation.start()
        self._say(generation)
        self._thread.generation = generation
        return generation

    def prepare(self, *, num_steps: int | None = None, timesteps: Sequence[float] | None = None) -> None:
        """Begin the first generation on the bare model, for whichever thread calls it first."""
        self._waiting, self._thread.generation = self.begin(num_steps=num_steps, timesteps=timesteps), None

    def end(self, generation: Generation) -> None:
        """End a generation: its slots are let go and no call belongs to it any more."""
        generation.release()
        if self._thread.generation is generation:
            self._thread.generation = None

    def watch(self, pipe: Any) -> None:
        """Follow the scheduler that `pipe` holds, now and whenever it holds another."""
        if not any(ref() is pipe for ref in self._pipes):
            self._pipes.append(weakref.ref(pipe))
        self._follow(pipe.scheduler)

    def _follow(self, scheduler: Any) -> None:
        if not any(watch.scheduler is scheduler for watch in self._watches):
            self._watches.append(SchedulerWatch.add(scheduler, self))

    def scheduler_begins(self, scheduler: Any) -> None:
        """`set_timesteps` was called."""
        previous = self._thread.generation
        if previous is not None:
            previous.release()
        self._thread.generation = self._begin(timesteps=scheduler.timesteps, scheduler=scheduler)

    def scheduler_steps(self, scheduler: Any) -> None:
        """`step` was called."""
        generation = self._thread.generation
        if generation is not None and generation.started and generation.scheduler is scheduler:
            generation.advance()

    def _begin(self, **schedule: Any) -> Generation:
        self._latest = Generation(self.config, self.adapter.sublayers, **schedule)
        return self._latest

    def _current(self) -> Generation:
        schedulers = [pipe.scheduler for pipe in (ref() for ref in self._pipes) if pipe is not None]
        for scheduler in schedulers:  # exchanged since?
            if not any(watch.scheduler is scheduler for watch in self._watches):
                self._follow(scheduler)
                self.scheduler_begins(scheduler)
        thread = self._thread
        if thread.generation is None and self._waiting is not None:
            thread.generation, self._waiting = self._waiting, None
        if thread.generation is None:
            begun = [s for s in schedulers if getattr(s, "timesteps", None) is not None]
            if not begun:
                raise RuntimeError(
                    "no generation has begun: call the model inside `with pab.generation(model, num_steps=...):`, or give num_steps to "
                    "pab.enable; on a pipeline pass the pipeline to pab.enable"
                )
            self.scheduler_begins(begun[-1])
        assert thread.generation is not None
        return thread.generation

    # Calls of the model

    @contextlib.contextmanager
    def context(self, name: str | None, step: int | None = None) -> Iterator[None]:
        """Name the context (and the step) of the calls inside."""
        previous = self._thread.context
        self._thread.context = (name, step)
        try:
            yield
        finally:
            self._thread.context = previous

    @contextlib.contextmanager
    def _cache_context(self, original: Any, name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        with original(name, *args, **kwargs), self.context(name):
            yield

    def _run(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        thread = self._thread
        outer, thread.call = thread.call, None
        generation = self._current()
        if not generation.started:
            generation.start(self._entered_at(generation, args, kwargs))
            self._say(generation)
        call = generation.open(*thread.context)
        if self._records_gradients(args, kwargs):
            generation.plain_calls += 1
            self._once("gradients are recorded: the model runs plainly; call it under torch.no_grad() for PAB")
        else:
            call.context.count(self.adapter.rest_flops(*args, **kwargs), run=True)
            thread.call = call
        try:
            return forward(*args, **kwargs)
        except BaseException:
            generation.release()
            raise
        finally:
            thread.call = outer

    def _entered_at(self, generation: Generation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """The step of the full schedule at which the model is called first."""
        begin = getattr(generation.scheduler, "begin_index", None)
        if begin is not None:
            return int(begin)
        timestep = self.adapter.timestep(*args, **kwargs)
        if isinstance(timestep, torch.Tensor):
            if timestep.is_meta:
                return 0
            timestep = float(timestep.flatten()[0])  # the one read of a timestep to the host in a generation
        schedule = generation.schedule.timesteps or ()
        return schedule.index(timestep) if timestep in schedule else 0

    def _records_gradients(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if not torch.is_grad_enabled():
            return False
        model = self._model()
        tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
        return any(t.requires_grad for t in tensors) or (model is not None and any(p.requires_grad for p in model.parameters()))

    def _say(self, generation: Generation) -> None:
        for note in generation.plan.notes if generation.plan else ():
            self._once(note)

    def _once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            logger.warning(message)


def broadcaster_of(model: nn.Module) -> Broadcaster | None:
    """The broadcaster of a model on which PAB is enabled."""
    return vars(model).get(ATTRIBUTE)
