"""The broadcaster: PAB switched on for one model. It knows the generation of each thread and opens every call of the model."""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .adapter import Adapter, Detachable
from .attach import Attached, attach_forward
from .config import PABConfig
from .costs import Arguments
from .generation import Call, Generation
from .graphs import Graphs
from .open_generation import OpenGeneration
from .scheduler import Follower, SchedulerWatch, entered_at, has_begun, left_at
from .slots import Key
from .stopwatch import REST

logger = logging.getLogger("pab_kernels")

ATTRIBUTE = "_pab_broadcaster"
"""Name of the attribute that a model has while PAB is enabled."""
_COMPILED_LAST = (
    "a model under PAB is called from a compiled graph: after compiled = torch.compile(model) call pab.enable(compiled) or give it to the "
    "pipeline and enable that, or compile it by model.compile()"
)

RESET = "_reset_stateful_cache"
"""Name of the method that diffusers' pipelines call at their end on all parts that have it."""


class _Thread(threading.local):
    def __init__(self) -> None:  # attributes of its own in every thread: what a class has, a compiled graph takes for constant
        self.generation: Generation | None = None
        self.call: Call | None = None
        self.enclosed = False  # whether the call was opened outside of a graph of the whole model
        self.context: tuple[str | None, int | None] = (None, None)
        self.graphs: Graphs | None = None


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
        self.timed = False
        self.cuda_graphs = False
        self.clock: Callable[[], Any] | None = None
        """Gives the timestep, where no scheduler that is followed tells the steps."""
        self._thread = _Thread()
        self._waiting: list[Generation] = []
        self._latest: Generation | None = None
        self._pipes: list[weakref.ref[Any]] = []
        self._follower = Follower(self)
        self._following = threading.Lock()
        self._watches: list[SchedulerWatch] = []
        self._said: set[str] = set()
        self._attached: list[Detachable] = []
        # A graph goes by what a call decides: calls are opened outside of graphs.
        self._outside = torch.compiler.disable(Broadcaster._opened, reason=_COMPILED_LAST)
        try:
            for attached in adapter.attach(self):
                self._attached.append(attached)
            self._attached.append(attach_forward(model, self._called))
            self.enclose(model)
            for name, replacement in (("cache_context", self._cache_context), (RESET, self._reset)):
                if hasattr(model, name):
                    self._attached.append(Attached(model, name, replacement))
            self._attached.append(Attached(model, "compile", self._compile))
        except BaseException:
            self.detach()
            raise

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

    def configure(self, config: PABConfig, timed: bool, cuda_graphs: bool) -> None:
        """Take other rules, from the next generation on; measure seconds or do not, capture CUDA graphs or do not."""
        self.config, self.timed, self.cuda_graphs = config, timed, cuda_graphs

    def detach(self) -> None:
        """Give the model back as it was."""
        for attached in reversed(self._attached):
            attached.detach()
        for watch in self._watches:
            watch.remove(self._follower)
        if self._latest is not None:
            self._latest.release()
        self._attached, self._watches, self._pipes, self._waiting = [], [], [], []
        self._thread, self._latest = _Thread(), None

    def enclose(self, compiled: nn.Module) -> None:
        """Open the calls of the model outside of the graph that it is, where it is compiled as a whole.

        Args:
            compiled: what `torch.compile(model)` gave, or the model itself, for `model.compile()`.
        """
        name = "_compiled_call_impl" if compiled is self._model() else "forward"
        if vars(compiled).get(name) is not None and not isinstance(vars(compiled)[name], Attached):
            self._attached.append(Attached(compiled, name, self._enclosed))

    # Generations

    def _ways(self) -> dict[str, bool]:
        """How a generation that begins now, in this thread, is run."""
        if not self.cuda_graphs:
            self._thread.graphs = None
        return {"timed": self.timed, "cuda_graphs": self.cuda_graphs}

    def begin(self, *, num_steps: int | None = None, timesteps: Sequence[float] | None = None) -> Generation:
        """Begin a generation on the bare model, in this thread."""
        generation = Generation(self.config, self.adapter.sublayers, num_steps=num_steps, timesteps=timesteps, **self._ways())
        generation.start()
        self._say(generation)
        self._latest = self._thread.generation = generation
        return generation

    def prepare(self, *, num_steps: int | None = None, timesteps: Sequence[float] | None = None) -> None:
        """Begin the first generation on the bare model, for whichever thread calls it first."""
        self._waiting = [self.begin(num_steps=num_steps, timesteps=timesteps)]
        self._thread.generation = None

    def end(self, generation: Generation) -> None:
        """End a generation: its slots are let go and no call belongs to it any more."""
        generation.release()
        if self._thread.generation is generation:
            self._thread.generation = None

    def watch(self, pipe: Any) -> None:
        """Follow the scheduler that `pipe` holds, now and whenever it holds another."""
        self._pipes = [ref for ref in self._pipes if ref() is not None and ref() is not pipe] + [weakref.ref(pipe)]
        model = self._model()
        if not hasattr(model, RESET):
            self._attached.append(Attached(model, RESET, self._reset))
        self._follow(self._held())

    def watches(self, pipe: Any) -> bool:
        """Whether the scheduler that `pipe` holds is followed."""
        return any(ref() is pipe for ref in self._pipes)

    def unwatch(self, pipe: Any) -> None:
        """Follow the scheduler of `pipe` no more, unless another pipeline holds it too."""
        self._pipes = [ref for ref in self._pipes if ref() is not pipe]
        with self._following:
            self._leave(self._held())

    def _held(self) -> list[Any]:
        """The schedulers that pipelines hold now."""
        return [pipe.scheduler for pipe in (ref() for ref in self._pipes) if pipe is not None]

    def _follow(self, held: Sequence[Any]) -> list[Any]:
        """Follow these schedulers and no others; those of them that were not followed before."""
        new = []
        with self._following:
            for scheduler in held:
                if not any(watch.scheduler is scheduler for watch in self._watches):
                    self._watches.append(SchedulerWatch.add(scheduler, self._follower))
                    new.append(scheduler)
            if new:
                self._leave(held)
        return new

    def _leave(self, held: Sequence[Any]) -> None:
        """Follow no other schedulers than these."""
        for watch in list(self._watches):
            if not any(watch.scheduler is scheduler for scheduler in held):
                watch.remove(self._follower)
                self._watches.remove(watch)

    def scheduler_begins(self, scheduler: Any) -> None:
        """`set_timesteps` was called."""
        previous = self._thread.generation
        if previous is not None:
            previous.release()
        generation = Generation(
            self.config,
            self.adapter.sublayers,
            timesteps=scheduler.timesteps,
            scheduler=scheduler,
            end=self._left_at(scheduler),
            **self._ways(),
        )
        self._latest = self._thread.generation = generation

    def _left_at(self, scheduler: Any) -> int | None:
        """The step at which another model takes over on every pipeline that holds `scheduler`, or None."""
        model, pipes = self._model(), [pipe for ref in self._pipes if (pipe := ref()) is not None and pipe.scheduler is scheduler]
        end = max((left_at(pipe, model) for pipe in pipes if model is not None), default=0)
        return end if 0 < end < len(scheduler.timesteps) else None

    def scheduler_steps(self, scheduler: Any) -> None:
        """`step` was called."""
        generation = self._thread.generation
        if generation is not None and generation.started and generation.scheduler is scheduler:
            generation.advance()

    def _current(self) -> Generation:
        thread = self._thread
        held = self._held()
        exchanged = self._follow(held)
        if thread.generation is not None and not self._goes_on(thread.generation, held):
            for scheduler in filter(has_begun, exchanged):
                self.scheduler_begins(scheduler)
        if self._waiting and (thread.generation is None or thread.generation.used_up):
            with contextlib.suppress(IndexError):  # another thread was faster
                thread.generation = self._waiting.pop()
        if thread.generation is None:
            begun = list(filter(has_begun, held))
            if not begun and self.clock is not None:
                self._latest = thread.generation = OpenGeneration(self.config, self.adapter.sublayers, self.clock, timed=self.timed)
                return thread.generation
            if not begun:
                raise RuntimeError(
                    "no generation has begun: call the model inside `with pab.generation(model, num_steps=...):`, or give num_steps to "
                    "pab.enable; on a pipeline pass the pipeline to pab.enable"
                )
            self.scheduler_begins(begun[-1])
        assert thread.generation is not None
        return thread.generation

    @staticmethod
    def _goes_on(generation: Generation, held: Sequence[Any]) -> bool:
        """Whether a further call can belong to `generation`: steps are left, and a pipeline still holds its scheduler."""
        scheduler = generation.scheduler
        return not generation.used_up and (scheduler is None or any(scheduler is other for other in held))

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

    def _reset(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """diffusers' pipelines end with this, also those that were interrupted."""
        generation = self._thread.generation
        if generation is not None:
            generation.release()
            generation.over = True
            if isinstance(generation, OpenGeneration):
                self._thread.generation = None
        return original(*args, **kwargs)

    def _compile(self, original: Any, *args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        model = self._model()
        if model is not None:
            self.enclose(model)

    def _enclosed(self, compiled: Any, *args: Any, **kwargs: Any) -> Any:
        """In place of the whole compiled model."""
        self._thread.enclosed = True
        try:
            return self._outside(self, False, compiled, *args, **kwargs)
        finally:
            self._thread.enclosed = False

    def _called(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """In place of the model's `forward`."""
        if self._thread.enclosed:
            return forward(*args, **kwargs)
        return self._outside(self, torch.compiler.is_compiling(), forward, *args, **kwargs)

    def _opened(self, traced: bool, forward: Any, *args: Any, **kwargs: Any) -> Any:
        if traced:
            raise RuntimeError(_COMPILED_LAST)
        return self._run(forward, *args, **kwargs)

    def _run(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        generation = self._current()
        if not generation.started:
            generation.start(entered_at(generation.scheduler, generation.schedule, self.adapter.timestep(*args, **kwargs)))
            self._say(generation)
        thread = self._thread
        name, step = thread.context
        call = generation.open(name, step)
        tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
        plain = self._records_gradients(tensors)
        if plain:
            generation.plain_calls += 1
            self._once("gradients are recorded: the model runs plainly; call it under torch.no_grad() for PAB")
        else:
            prompt = kwargs.get("encoder_hidden_states")
            call.context.enter(
                (tuple(map(Key.of, tensors)), _flags(kwargs)), prompt if name is None and isinstance(prompt, torch.Tensor) else None
            )
            call.arguments = Arguments.of(args, kwargs)
            if not generation.cuda_graphs:
                call.prepare()
            call.mark(REST, tensors[0].device if tensors else None)
        outer, thread.call = thread.call, None if plain else call
        try:
            if generation.cuda_graphs and not plain:
                return self._graphed(call, forward, args, kwargs)
            out = forward(*args, **kwargs)
            if not plain:
                call.finish()
        except BaseException:
            generation.release()
            raise
        finally:
            call.mark(None)
            thread.call = outer
        return out

    def _graphed(self, call: Call, forward: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What `forward` gives, from this thread's graphs; those of another config are let go."""
        thread, model = self._thread, self._model()
        assert model is not None, "its forward was called"
        if thread.graphs is None or thread.graphs.config != call.generation.config:
            thread.graphs = Graphs(model, call.generation.config)
        call.generation.graphs = thread.graphs

        def compute(call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
            thread.call = call
            out = forward(*args, **kwargs)
            call.finish()
            return out

        return thread.graphs.run(call, model, compute, args, kwargs, self.adapter.timestep(*args, **kwargs))

    def _records_gradients(self, tensors: Sequence[torch.Tensor]) -> bool:
        if not torch.is_grad_enabled():
            return False
        model = self._model()
        return any(t.requires_grad for t in tensors) or (model is not None and any(p.requires_grad for p in model.parameters()))

    def _say(self, generation: Generation) -> None:
        plan = generation.plan
        if plan is None:
            return
        if logger.isEnabledFor(logging.INFO):
            reused = ", ".join(f"{kind} reused {c.reused} of {len(plan.steps)}" for kind, c in plan.step_counts().items())
            steps = generation.schedule.num_steps
            logger.info("%s: a generation of %d steps, %d patterns; %s", type(self._model()).__name__, steps, plan.patterns, reused)
        for note in plan.notes:
            self._once(note)

    def _once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            logger.warning(message)


def _flags(kwargs: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """What says which work is asked for, such as a pass that only fills a model's own cache."""
    return tuple((name, value) for name, value in kwargs.items() if isinstance(value, (bool, str)))


def broadcaster_of(model: nn.Module) -> Broadcaster | None:
    """The broadcaster of a model on which PAB is enabled."""
    return vars(model).get(ATTRIBUTE)
