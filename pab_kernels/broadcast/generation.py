"""Generations: one sampling run each, with its plan, step and contexts."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Sequence, Set
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..rules.config import PABConfig
from ..rules.forecast import PREDICTIONS
from ..rules.plan import Action, Plan, Sublayer
from ..rules.presets import FEWEST_STEPS, LEAST_SKIPPED
from ..rules.schedule import Schedule
from . import fusing
from .call import Call
from .context import Context
from .costs import Arguments, CallCosts, NotCounted, call_costs
from .forecaster import Forecaster, refusal
from .inputs import NO_INPUTS, Inputs
from .lending import Lendings
from .slots import Meters
from .timesteps import Moment, Timesteps

if TYPE_CHECKING:
    from .budgeting import Budgeting
    from .graphs.graphs import Graphs

logger = logging.getLogger("pab_kernels")

MOST_ALIKE = 16
"""The most calls in one step that may share a name or have none; they are distinguished by their order."""


class Generation:
    """One sampling run: its plan, step and contexts.

    Args:
        config: the rules.
        sublayers: the model's sublayers.
        num_steps, timesteps: the full schedule.
        scheduler: the scheduler whose `step` ends each step; without one, a step ends when a context is called again.
        notified: whether its `set_timesteps` was seen; else the timesteps were set before the scheduler was followed.
        timed: whether seconds are measured by kind.
        cuda_graphs: whether the model's calls are captured and replayed.
        end: the step at which another model takes over, or None.
        preset: whether the rules are a preset: where it does not suit the schedule, the model is left alone.
        budgeting: keeps the plan within the budget of the rules, if they have one.
    """

    def __init__(
        self,
        config: PABConfig,
        sublayers: Sequence[Sublayer],
        *,
        num_steps: int | None = None,
        timesteps: Sequence[float] | None = None,
        scheduler: Any = None,
        notified: bool = True,
        timed: bool = False,
        cuda_graphs: bool = False,
        end: int | None = None,
        preset: bool = False,
        budgeting: Budgeting | None = None,
    ) -> None:
        self.config = config
        self.preset = preset
        self.left_alone: str | None = None
        """Why the rules do not apply; None if they do."""
        self.sublayers = tuple(sublayers)
        self.schedule = Schedule.of(num_steps, timesteps, end=end)
        self.timesteps = Timesteps(self.schedule.timesteps, timesteps)
        self.scheduler = scheduler
        self.notified = notified
        self.timed = timed
        self.cuda_graphs = cuda_graphs
        self.graphs: Graphs | None = None
        self.plan: Plan | None = None
        self.step = 0
        self.contexts: dict[str, Context] = {}
        self.meter = Meters()
        self.held_after: dict[int, dict[str, Meters]] = {}
        """Bytes held after each step that has ended, by kind."""
        self.plain_calls = 0
        self.steps_seen = 0
        """Number of steps of its scheduler."""
        self.over = False
        """Whether it takes no further calls."""
        self.put_away = False
        """Whether its pipeline has ended and reset the model."""
        self.failed = False
        """Whether an error ended it."""
        self.entered: list[Any] = []
        """Frames of the functions that are inside `with` on its request."""
        self.at_end: Callable[[Generation], None] | None = None
        """Called once, after the last step or when it is ended."""
        self.exchanged: Counter[str] = Counter()
        """Number of times that an argument which should stay the same was exchanged, by its name."""
        self.lock = threading.RLock()
        self.forecaster = self._forecaster()
        """What predicts the outputs of steps at which the model does not run, where a rule asks for it."""
        self.budgeting = budgeting
        self.lending: Lendings | None = None
        """What is lent of each sublayer; None if every output is copied."""
        self.several_outputs = False
        """Whether the model returned several floating-point tensors, of which a scheduler's `step` is given one."""
        self.skips: bool | None = None
        """Whether the model does not run at this step; None before its first call."""
        self._called: dict[str, int] = {}  # calls in this step, by label
        self._entered: set[str] = set()  # contexts called in this step
        self._timestep: tuple[Any, Moment | None] = (None, None)  # of the last call
        self._in_schedule = False
        self._branches: int | None = None
        self.not_counted = ""
        """Why the costs of a call are not known."""
        self._costs: dict[Arguments | None, CallCosts | None] = {}
        self._fuses: dict[tuple[nn.Module, int, torch.dtype, torch.device], bool] = {}
        self._decided: dict[Hashable, bool] = {}
        self._weights: dict[tuple[float, torch.device], torch.Tensor] = {}

    def _forecaster(self) -> Forecaster | None:
        rule = self.config.rule("model", 0)
        if rule is None or rule.reuse != "forecast":
            return None
        if self.scheduler is None:
            raise ValueError(
                "reuse='forecast' predicts what a scheduler's `step` gets, and no scheduler is followed here; enable "
                "PAB on the pipeline, or use reuse='linear' or 'hold'"
            )
        return Forecaster(self.scheduler, self.schedule.num_steps)

    def forecast_step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """In place of the scheduler's `step`; see `Forecaster.step`."""
        assert self.forecaster is not None and self.plan is not None
        before, skips, calls = self.forecaster.nbytes, bool(self.skips), frozenset(self._entered)
        row = self.plan.rows[self.plan.whole or ""][self.step + 1 - self.plan.steps.start :]
        try:
            return self.forecaster.step(original, self.step, skips, calls, *args, **kwargs)
        finally:
            if not skips and not any(decision.reads for decision in row):
                self.forecaster.clear()
            self.meter.add(self.forecaster.nbytes - before)

    def forget_outputs(self) -> None:
        """Predict from no output so far: the model is called with other inputs, such as another prompt."""
        if self.forecaster is not None:
            self.meter.add(-self.forecaster.nbytes)
            self.forecaster.clear()

    @property
    def called(self) -> bool:
        """Whether the model was called at this step."""
        return bool(self._called)

    @property
    def started(self) -> bool:
        """Whether its plan is made: with the model's first call, on a bare model at once."""
        return self.plan is not None

    @property
    def taken(self) -> int:
        """Number of steps at which the model was called."""
        return self.step - self.schedule.begin + bool(self._called)

    @property
    def used_up(self) -> bool:
        """Whether every step of the model was taken."""
        return self.step >= self.schedule.steps.stop

    def start(self, begin: int = 0) -> Plan:
        """Make the plan for a schedule that is entered at step `begin`."""
        self.schedule = dataclasses.replace(self.schedule, begin=begin)
        self.left_alone = self._unsuited() if self.preset else None
        if self.left_alone is not None:
            self.config = PABConfig()
        self.plan = Plan(self.config, self.schedule, self.sublayers)
        if self.plan.whole is None or not any(decision.reads for decision in self.plan.rows[self.plan.whole]):
            self.forecaster = None
        self.step = begin
        return self.plan

    def _unsuited(self) -> str | None:
        """Why a preset that skips the model does not suit the schedule; None if it does."""
        rule, taken = self.config.rule("model", 0), self.schedule.steps
        if rule is None:
            return None
        timesteps = self.schedule.timesteps
        steps = len(taken) if timesteps is None else len({timesteps[i] for i in taken})  # the levels of Heun come twice
        if steps < FEWEST_STEPS:
            return f"it runs at {steps} steps, and below {FEWEST_STEPS} outputs change too much to skip any"
        skipped = len(rule.reused(self.schedule))
        if skipped < LEAST_SKIPPED * len(taken):
            return f"the preset would skip {skipped} of {len(taken)} steps, which gains less than {LEAST_SKIPPED:.0%}"
        return None if self.scheduler is None else refusal(self.scheduler, rule.reuse)

    # Calls

    def claims(self, timestep: Any, label: str) -> bool | None:
        """Whether a call with this timestep, in the context `label`, can be the next one; None if that is unknown."""
        moment = self.timesteps.moment(timestep) if self.timesteps.known else None
        if moment is None or not moment.single:
            return None
        if not self.started:
            # A model may be called with a function of the timestep, so no match proves nothing.
            return True if self.timesteps.recognise(moment) else None
        if not self._in_schedule:
            return None if self.notified or self.steps_seen or not self._called else moment == self._timestep[1]
        if self.timesteps.at(self.step, moment):
            return True
        stepped = self.steps_seen or not (self.notified or moment.own)
        return not stepped and any(i > self.step for i in self.timesteps.places(moment))

    def recognises(self, label: str, inputs: Inputs) -> bool:
        """Whether the last call of a context with this label, or of one without a name, had the same steady inputs."""
        contexts = (
            [self.contexts.get(label)] if label else [c for key, c in self.contexts.items() if key.startswith("#")]
        )
        return any(context is not None and context.holds(inputs) for context in contexts)

    def open(self, name: str | None = None, step: int | None = None, inputs: Inputs = NO_INPUTS) -> Call | None:
        """Open a call of the model.

        Args:
            name: name of its context, or None.
            step: its step; default the current or the next one.
            inputs: its arguments.

        Returns:
            The call; None if the schedule of a scheduler has no step left.

        Raises:
            RuntimeError: the plan of a bare model has no such step, or too many calls without names came in one step.
        """
        with self.lock:
            if self.plan is None:
                self.start()
            moment = self.timesteps.moment(inputs.timestep) if self.timesteps.known and not self.steps_seen else None
            if not self.contexts:
                self._in_schedule = bool(self.timesteps.recognise(moment))
            label = label_of(name)
            if step is None and self._begins_step(label, inputs.timestep, moment):
                ahead = [i for i in self.timesteps.places(moment) if i > self.step and self.scheduler is not None]
                self.advance(ahead[0] if ahead else None)
            self._timestep = inputs.timestep, moment
            at = self.step if step is None else step
            if at not in self.schedule.steps:
                if self.scheduler is not None and step is None:
                    return None
                raise RuntimeError(self._beyond(at))
            if at != self.step:
                self.held_after[self.step] = self.held_now()
                self._called.clear()
                self._entered.clear()
                self.step = at
            key = self._context_of(label, inputs)
            self._called[label] = self._called.get(label, 0) + 1
            self._entered.add(key)
            if key not in self.contexts:
                self.contexts[key] = Context(key, self.meter, timed=self.timed)
            return Call(self, self.contexts[key], self.step, inputs)

    def _begins_step(self, label: str, timestep: Any, moment: Moment | None) -> bool:
        """Whether a call begins a step although no `step` of a scheduler was seen."""
        if not self._called:
            return False
        if self.scheduler is None:
            return label in self._called
        if self.steps_seen:
            return False
        last, before = self._timestep
        if moment is not None and before is not None and (moment.single or not label):
            return moment.value != before.value
        if label in self._called and label:
            return True  # the pipeline steps copies of its scheduler
        if label or timestep is last or not isinstance(timestep, torch.Tensor) or timestep.is_meta:
            return False
        if self._branches is None:  # the timesteps are on the device: wait for them until the second step begins
            now, then = (self.timesteps.moment(t, wait=True) for t in (timestep, last))
            if now is None or then is None or now.value == then.value:
                return False
            self._branches = sum(self._called.values())
        return sum(self._called.values()) >= self._branches

    def _context_of(self, label: str, inputs: Inputs) -> str:
        """Key of the context of a call: its name or its order in the step, unless its prompt belongs to another one."""
        order = self._called.get(label, 0)
        if order >= MOST_ALIKE:
            raise RuntimeError(
                f"{order + 1} calls came in one step of the schedule; up to {MOST_ALIKE} without distinct names are "
                'supported: name the calls, `with pab.context(model, "cond"):`, or give the step, '
                '`pab.context(model, "cond", step=i)`'
            )
        if label:
            return f"{label}#{order}" if order else label
        key = f"#{order}"
        if key in self._entered or (key in self.contexts and not self.contexts[key].continues(inputs)):
            free = [k for k in self.contexts if k.startswith("#") and k not in self._entered]
            known = [k for k in free if self.contexts[k].holds(inputs)]
            if known:
                return known[0]
            if key in self._entered:
                key = next(f"#{i}" for i in range(len(self.contexts) + 1) if f"#{i}" not in self._entered)
        return key

    def _beyond(self, at: int) -> str:
        first = f" from {self.schedule.begin} on" if self.schedule.begin else ""
        first += f" up to {self.schedule.end}, where another model takes over," if self.schedule.end is not None else ""
        return (
            f"the plan has {self.schedule.num_steps} steps{first} and this call would be step {at}; begin a further "
            "generation, `with pab.generation(model, num_steps=...):`, or, if a step has several calls, name the "
            'calls, `with pab.context(model, "cond"):`'
        )

    # Steps and end

    def advance(self, to: int | None = None) -> None:
        """End the step; after the last step every slot is released.

        Args:
            to: the step that begins; default the next one.
        """
        with self.lock:
            self.held_after[self.step] = self.held_now()
            self.step, self.skips = self.step + 1 if to is None else to, None
            self._called.clear()
            self._entered.clear()
            if self.used_up:
                self._finish()
                if self.scheduler is not None:  # a bare model stays, so that a call too many is an error
                    self.over = True

    def held_now(self) -> dict[str, Meters]:
        """Bytes held now by kind, over all contexts; their peaks are not filled in."""
        found: dict[str, Meters] = {}
        for context in tuple(self.contexts.values()):
            for kind, meter in tuple(context.meters.items()):
                held = found.setdefault(kind, Meters())
                held.now += meter.now
                held.host.now += meter.host.now
        if self.forecaster is not None:
            found[PREDICTIONS] = Meters(self.forecaster.nbytes)
        return found

    def stepped(self) -> None:
        """Handle a step of its scheduler."""
        with self.lock:
            self.steps_seen += 1
            if self.started:
                self.advance()
            elif self.steps_seen >= self.schedule.steps.stop:
                self.end()

    def end(self) -> None:
        """End it and release everything; it takes no further calls."""
        with self.lock:
            self.over = True
            for context in self.contexts.values():
                context.arena.close()
                context.outputs.close()
            self._finish()

    def abort(self) -> None:
        """End it because of an error."""
        self.failed = True
        self.end()

    def split_spans(self) -> None:
        """Give each block and sublayer a slot of its own from the next call on: something came between those that share
        one."""
        if self.budgeting is not None:
            self.budgeting.split_spans()

    def _finish(self) -> None:
        self.release()
        at_end, self.at_end = self.at_end, None
        if at_end is not None:
            at_end(self)

    def release(self) -> None:
        """Release every slot."""
        for context in tuple(self.contexts.values()):
            context.arena.clear()
            context.outputs.clear()
        self.forget_outputs()

    @property
    def reuses_planned(self) -> bool:
        """Whether the plan had a reuse at the steps taken so far."""
        plan = self.plan
        if plan is None:
            return False
        return any(decision.action is Action.REUSE for row in set(plan.rows.values()) for decision in row[: self.taken])

    def costs(self, model: nn.Module, calls: Set[Arguments | None]) -> dict[Arguments | None, CallCosts] | None:
        """The costs of calls with these arguments, without PAB; None if those of any are not known."""
        for arguments in calls:
            if arguments not in self._costs:
                unprojected = self.config.cache_point == "unprojected"
                try:
                    self._costs[arguments] = call_costs(model, self.sublayers, arguments, unprojected)
                except NotCounted as error:
                    self._costs[arguments], self.not_counted = None, str(error)
                    logger.info("%s: FLOPs are not known, as %s", type(model).__name__, error)
        known = {arguments: costs for arguments in calls if (costs := self._costs[arguments]) is not None}
        return known if len(known) == len(calls) else None

    def fuses(self, module: nn.Module, x: torch.Tensor) -> bool:
        """See `Call.fuses`."""
        if torch.compiler.is_compiling():  # decided at compile time
            return fusing.fuses(module, x) and not fusing.autocasts(x)
        key = (module, x.shape[-1], x.dtype, x.device)
        found = self._fuses.get(key)
        if found is None:
            found = self._fuses[key] = fusing.fuses(module, x)
        return found and not fusing.autocasts(x)

    def once(self, check: Callable[[Any], bool], what: Any) -> bool:
        """`check(what)`, found out once a generation, or when a graph is compiled."""
        if torch.compiler.is_compiling():
            return check(what)
        found = self._decided.get((check, what))
        if found is None:
            found = self._decided[check, what] = check(what)
        return found

    def weight(self, value: float, device: torch.device) -> torch.Tensor:
        """`value` as a float32 scalar tensor on `device`; made once a generation, without waiting for the device."""
        key = (value, device)
        if key not in self._weights:
            # A fill kernel: nothing is copied from the host.
            self._weights[key] = torch.full((), value, dtype=torch.float32, device=device)
        return self._weights[key]


def label_of(name: str | None) -> str:
    """The name of a context as used in keys, where a single # separates it from the order of the call."""
    return (name or "").replace("#", "##")
