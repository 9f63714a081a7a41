"""The broadcaster: PAB on one model. It finds the generation that each call of the model belongs to."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..rules.config import PABConfig
from ..rules.plan import Plan
from ..rules.presets import default_preset
from .adapter import Adapter, Detachable
from .attach import PREFIX, Attached, attach_forward, is_stand_in
from .budgeting import Budgeting
from .call import Call
from .following import Following
from .generation import Generation
from .graphs.pool import GraphPool
from .inputs import Inputs, Signature, is_transformed, records_gradients
from .lending import Lendings
from .names import Naming, named
from .offload import around_compiled, refuse_whole
from .open_generation import OpenGeneration
from .request import Request
from .runs import Runs
from .scheduler import entered_at
from .stopwatch import REST
from .summary import Summary, summarise, with_held
from .turn import NO_TURNS, CurrentCall, CurrentTurn
from .verdict import COMPILED_LAST, NOT_BEGUN, NOT_CALLED, NOT_ENTERED, NOT_FOLLOWED, in_a_line, nothing_reused
from .whole import broadcast_model

logger = logging.getLogger("pab_kernels")

ATTRIBUTE = f"{PREFIX}broadcaster"
"""Name of the attribute that holds the broadcaster while PAB is enabled on a model."""

RESET = "_reset_stateful_cache"
"""Name of the method that diffusers calls to reset a model's cache."""


class Broadcaster:
    """PAB on one model, from `attach` to `detach`.

    Args:
        model: the DiT.
        adapter: the adapter of its family.
        config: the rules.
    """

    def __init__(self, model: nn.Module, adapter: Adapter, config: PABConfig) -> None:
        self._model = weakref.ref(model)
        self.adapter = adapter
        self.config = config
        self.timed = False
        self.cuda_graphs = False
        self.chosen = True
        """Whether the user wrote the rules for this model."""
        self.default = False
        """Whether the rules are those of `enable` without a config."""
        self.clock: Callable[[], Any] | None = None
        """Returns the current timestep; used for runs whose scheduler is not followed."""
        self.plain_calls = 0
        """Number of plain calls of the model before the first generation."""
        self._signature = Signature(model)
        self._following = Following(self, model)
        self._runs = Runs(self._following, weakref.WeakMethod(self._generation))
        self._thread = CurrentCall()
        self._graphs = GraphPool()
        self._lending = Lendings()
        self._logged: set[str] = set()
        self._attached: list[Detachable] = []
        self._sublayers: set[str] = set()  # those with a stand-in
        self._current: dict[str, CurrentTurn] = {}
        # What a compiled graph does depends on the turns, so calls are opened outside of graphs.
        self._outside = torch.compiler.disable(Broadcaster._opened, reason=COMPILED_LAST)

    @property
    def call(self) -> Call | None:
        """The call of the model that this thread is in; None if the model runs plainly."""
        call = self._thread.call
        return None if call is None or call.over else call  # an interruption may leave a finished call behind

    def current(self, name: str) -> CurrentTurn:
        """The holder of the turn of sublayer `name`, which each thread fills for itself."""
        return self._current.setdefault(name, CurrentTurn())

    def _enter(self, call: Call | None) -> None:
        self._thread.enter(call, self._current)

    @property
    def latest(self) -> Generation | None:
        """The generation begun last."""
        return self._runs.latest

    def summary(self) -> Summary:
        """The summary of the latest generation, with the bytes that all generations hold."""
        found = with_held(self.summary_of(self.latest), self._runs.all())
        return found if self.latest else replace(found, plain_calls=self.plain_calls)

    def summary_of(self, generation: Generation | None) -> Summary:
        """The summary of a generation."""
        model = self._model()
        assert model is not None
        return summarise(generation, model)

    def configure(
        self, config: PABConfig, timed: bool, cuda_graphs: bool, chosen: bool = True, default: bool = False
    ) -> None:
        """Set the options of the next generations.

        Args:
            config: the rules.
            timed: whether seconds are measured.
            cuda_graphs: whether calls are captured and replayed.
            chosen: whether the user wrote these rules for this model: rules without effect are then logged as warnings.
            default: whether they are those of `enable` without a config.
        """
        self._attach_sublayers(config, timed)
        self.config, self.timed, self.cuda_graphs = config, timed, cuda_graphs
        self.chosen, self.default = chosen, default

    # Attaching

    def attach(self) -> None:
        """Install all stand-ins on the model. After an error or an interruption, `detach` removes those installed."""
        model = self._model()
        assert model is not None
        self._attach_sublayers(self.config, self.timed)
        self._put(attach_forward(model, self._called))
        self.enclose(model)
        for name, replacement in (("cache_context", self._cache_context), (RESET, self._reset)):
            if hasattr(model, name):
                self._put(Attached(model, name, replacement))
        self._put(Attached(model, "compile", self._compile))

    def _attach_sublayers(self, config: PABConfig, timed: bool) -> None:
        """Install the stand-ins that the rules need; those that earlier rules needed stay."""
        sublayers = self.adapter.sublayers
        for sublayer in sublayers:  # before the first call of any thread, which fills them
            self.current(sublayer.name)
        names = {s.name for s in sublayers if timed or s.how == "nn" or config.may_reuse(s.kind, s.layer)}
        for name, attached in self.adapter.attach(self, names):
            if name not in self._sublayers:
                self._put(attached)
                self._sublayers.add(name)
        for attached in around_compiled(self._model(), config, sublayers, self.current):
            self._put(attached)

    def _put(self, attached: Detachable) -> None:
        self._attached.append(attached)  # first, so that `detach` finds it after an interruption
        attached.attach()

    def detach(self) -> None:
        """Restore the model. If it was interrupted, a second call does the rest."""
        for generation in self._runs.all():
            generation.end()
        self._following.close()
        while self._attached:
            self._attached[-1].detach()
            self._attached.pop()
        self._sublayers.clear()
        self._runs.clear()
        self._thread, self._graphs = CurrentCall(), GraphPool()

    def enclose(self, compiled: nn.Module) -> None:
        """Open calls outside of the compiled graph, if the model is compiled as a whole.

        Args:
            compiled: the result of `torch.compile(model)`; or the model itself, for `model.compile()`.
        """
        name = "_compiled_call_impl" if compiled is self._model() else "forward"
        if vars(compiled).get(name) is not None and not is_stand_in(vars(compiled)[name]):
            self._put(Attached(compiled, name, self._enclosed))

    def _attach_again(self) -> None:
        """Install the stand-ins again around methods that were replaced since."""
        again = [a.name for a in tuple(self._attached) if isinstance(a, Attached) and a.attach_again()]
        if again:
            self._lending = Lendings()
            replaced = f"{again[0]} of {len(again)} modules was replaced since pab.enable"
            logger.info("%s: %s; PAB is attached to it again", self._name, replaced)

    @property
    def _name(self) -> str:
        return type(self._model()).__name__

    # Generations

    def _generation(self, **schedule: Any) -> Generation:
        """Make a generation; on the bare model its plan is made at once."""
        if not self.cuda_graphs:
            self._graphs = GraphPool()
        config = self.config
        if self.default and schedule.get("scheduler") is None:  # perhaps a request on a pipeline's model
            config = config.storing(default_preset(follows_scheduler=False))
        generation = Generation(
            config,
            self.adapter.sublayers,
            timed=self.timed,
            cuda_graphs=self.cuda_graphs,
            preset=not self.chosen,
            budgeting=None if config.budget is None else Budgeting(self.latest, self._once),
            **schedule,
        )
        generation.at_end = self._judge
        if generation.scheduler is None:
            self._log_plan(generation, generation.start())
        return generation

    def begin(self, *, num_steps: int | None = None, timesteps: Sequence[float] | None = None) -> Request:
        """Begin a generation on the bare model, for the calls inside `with request:`."""
        self._attach_again()
        return Request(self, self._runs.request(num_steps, timesteps))

    def prepare(self, *, num_steps: int | None = None, timesteps: Sequence[float] | None = None) -> None:
        """Begin a generation on the bare model, for all calls outside of requests."""
        self._attach_again()
        self._runs.on_bare_model(num_steps, timesteps)

    def watch(self, pipe: Any) -> None:
        """Follow the scheduler of `pipe`, also after it is replaced."""
        self._following.add(pipe)

    def watches(self, pipe: Any) -> bool:
        """Whether the scheduler of `pipe` is followed."""
        return self._following.has(pipe)

    def unwatch(self, pipe: Any) -> None:
        """Stop following the scheduler of `pipe`, unless another pipeline holds it too."""
        self._following.remove(pipe)

    def release(self) -> None:
        """End every generation and release its slots. A run that goes on starts a new plan at its next step."""
        for generation in self._runs.all():
            generation.at_end = None
            generation.end()
        self._graphs = GraphPool()

    def renew(self) -> None:
        """Look at modules again after others changed them; generations end if they hold outputs."""
        if any(generation.meter.everywhere for generation in self._runs.all()) or not self.adapter.sublayers:
            self.release()

    def scheduler_begins(self, scheduler: Any) -> None:
        """Handle a call of `set_timesteps`."""
        self._attach_again()
        if self._following.still_called(scheduler, self.enclose, self._once):
            self._runs.follow(scheduler)

    def scheduler_steps(self, scheduler: Any) -> None:
        """Handle a call of `step`."""
        for generation in self._runs.of(scheduler):
            generation.stepped()

    def step_of(self, scheduler: Any) -> Callable[..., Any] | None:
        """What is called in place of `step`, where outputs of the model are predicted."""
        found = [g for g in self._runs.of(scheduler) if g.forecaster is not None and g.started and g.called]
        return found[0].forecast_step if found else None

    def scheduler_failed(self, scheduler: Any) -> None:
        """Handle an error in `step` or `set_timesteps`."""
        for generation in self._runs.of(scheduler):
            generation.abort()

    def schedulers_changed(self) -> None:
        """Handle a pipeline that holds another scheduler, or is gone."""
        self._runs.end_unheld()

    def pipe_failed(self, pipe: Any) -> None:
        """Handle an error in a run of `pipe`."""
        self.scheduler_failed(pipe.scheduler)

    def pipe_ended(self, pipe: Any) -> None:
        """Handle the end of a run of `pipe`, complete or interrupted."""
        for generation in [g for g in self._runs.of(pipe.scheduler) if g.started]:
            generation.end()
            generation.put_away = True

    def _find(self, inputs: Inputs, name: str | None) -> Generation | None:
        """The generation that a call belongs to; see `Runs.find`."""
        found = self._runs.find(inputs, name)
        if found is None and self.clock is not None:
            found = self._runs.add(OpenGeneration(self.config, self.adapter.sublayers, self.clock, timed=self.timed))
        return found

    def _judge(self, generation: Generation) -> None:
        """Warn if a generation that has ended reused nothing."""
        cause = nothing_reused(generation)
        if generation.scheduler is not None:
            self._following.spend(generation)
            called = generation.started or generation.plain_calls
            if generation.steps_seen and not called and self._following.only(generation.scheduler):
                cause = NOT_CALLED
        if cause is not None:
            self._once(f"{self._name}: a sampling run reused nothing: {cause}")

    # Calls of the model

    @contextlib.contextmanager
    def _cache_context(self, original: Any, name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        with original(name, *args, **kwargs), Naming([self], name, None):
            yield

    def _reset(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """Replaces the method by which diffusers resets a cache."""
        for generation in self._runs.of(None):
            if isinstance(generation, OpenGeneration):
                generation.end()
        if self.latest is not None and self.latest.over:
            self.latest.put_away = True
        return original(*args, **kwargs)

    def _compile(self, original: Any, *args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        model = self._model()
        if model is not None:
            self.enclose(model)

    def _enclosed(self, compiled: Any, *args: Any, **kwargs: Any) -> Any:
        """Replaces the call of the whole compiled model."""
        refuse_whole(self._name, self.config)
        self._thread.enclosed = True
        try:
            return self._outside(self, False, compiled, *args, **kwargs)
        finally:
            self._thread.enclosed = False

    def _called(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """Replaces the model's `forward`."""
        if self._thread.enclosed or torch.compiler.is_exporting():
            return forward(*args, **kwargs)
        return self._outside(self, torch.compiler.is_compiling(), forward, *args, **kwargs)

    def _opened(self, traced: bool, forward: Any, *args: Any, **kwargs: Any) -> Any:
        if traced:
            raise RuntimeError(COMPILED_LAST)
        return self._run(forward, *args, **kwargs)

    def _run(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = Inputs(args, kwargs, self._signature.latents(args, kwargs), self._signature.timestep(args, kwargs))
        if records_gradients(self._model(), inputs.tensors) or is_transformed(inputs.tensors):
            return self._plainly(
                forward, args, kwargs, "gradients are recorded", "call it under torch.no_grad() for PAB"
            )
        name, step = named(self)
        generation = self._find(inputs, name)
        if generation is None:
            return self._plainly(forward, args, kwargs, *(NOT_FOLLOWED if self._following.pipes else NOT_BEGUN))
        generation.lending = self._lending
        if not generation.started:
            self._start(generation, inputs)
        call = generation.open(name, step, inputs)
        if call is None:
            beyond = f"it was called after the last of the scheduler's {generation.schedule.num_steps} steps"
            return self._plainly(forward, args, kwargs, beyond, "only the steps of the schedule are under PAB")
        exchanged = call.context.enter(inputs)
        if call.context.changed:
            generation.forget_outputs()
        if exchanged is not None:
            generation.exchanged[inputs.name_of(exchanged)] += 1
        outer = self.call

        def compute() -> Any:
            if generation.cuda_graphs:
                with generation.lock:  # all calls of a generation share the graphs' input tensors
                    return self._graphed(call, forward, inputs)
            call.prepare(self._thread.turns(call.plan.sublayers))
            call.mark(REST, inputs.tensors[0].device if inputs.tensors else None)
            self._enter(call)
            out = forward(*args, **kwargs)
            call.finish()
            return out

        try:
            return broadcast_model(self._model(), call, next(iter(inputs.tensors), None), compute)
        except BaseException:
            call.count()
            generation.failed = True
            generation.release()
            raise
        finally:
            self._enter(outer)  # first, as an interruption may skip the rest
            call.mark(None)

    def _start(self, generation: Generation, inputs: Inputs) -> None:
        begin: int | None = 0
        if generation.scheduler is not None:
            begin = entered_at(generation.scheduler, generation.timesteps, inputs.timestep)
        self._log_plan(generation, generation.start(begin or 0))
        if begin is None and not (isinstance(inputs.timestep, torch.Tensor) and inputs.timestep.is_meta):
            self._once(f"{self._name}: {NOT_ENTERED}")

    def _plainly(
        self, forward: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], why: str, what_to_do: str
    ) -> Any:
        """Run the model without PAB, count the call, and warn once."""
        (self.latest or self).plain_calls += 1
        self._once(f"{self._name}: {why}: the model runs plainly; {what_to_do}")
        outer = self.call
        try:
            self._enter(None)
            self._thread.place(NO_TURNS, self._current)
            return forward(*args, **kwargs)
        finally:
            self._enter(outer)

    def _graphed(self, call: Call, forward: Any, inputs: Inputs) -> Any:
        """The output of `forward`, from CUDA graphs that no other generation uses now."""
        model, generation = self._model(), call.generation
        assert model is not None, "its forward was called"
        graphs = self._graphs.taken_by(generation, model)

        def compute(call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
            self._enter(call)
            out = forward(*args, **kwargs)
            call.finish()
            return out

        try:
            return graphs.run(call, model, compute, inputs.args, inputs.kwargs, inputs.timestep)
        finally:
            graphs.running = False

    def _log_plan(self, generation: Generation, plan: Plan) -> None:
        if generation.left_alone is not None:
            self._once(f"{self._name}: PAB leaves it alone: {generation.left_alone}")
            return
        if logger.isEnabledFor(logging.INFO):
            logger.info("%s: %s", self._name, in_a_line(plan))
        for line in plan.notes:
            self._once(line, logging.WARNING if self.chosen else logging.INFO)

    def _once(self, message: str, level: int = logging.WARNING) -> None:
        if message not in self._logged:
            self._logged.add(message)
            logger.log(level, message)


def broadcaster_of(model: nn.Module) -> Broadcaster | None:
    """The broadcaster of a model; None if PAB is not enabled on it."""
    return vars(model).get(ATTRIBUTE)
