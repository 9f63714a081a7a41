"""Generations: one sampling run each, with its plan, its step and its contexts."""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Sequence, Set
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..rules.config import PABConfig
from ..rules.plan import Action, Plan, Sublayer
from ..rules.schedule import Schedule
from . import fusing
from .call import Call
from .context import Context
from .costs import Arguments, CallCosts, call_costs
from .inputs import NO_INPUTS, Inputs
from .slots import Key, Meter
from .timesteps import Moment, Timesteps

if TYPE_CHECKING:
    from .graphs.graphs import Graphs

MOST_ALIKE = 16
"""Calls of one name, or without one, that are told apart by their order in a step."""


class Generation:
    """One sampling run: its plan, its step, its contexts.

    Args:
        config: the rules.
        sublayers: the model's.
        num_steps, timesteps: the full schedule.
        scheduler: whose `step` ends each step; without one, a step ends when a context is called again.
        notified: whether `set_timesteps` of the scheduler was seen; else it was found as somebody had set it.
        timed: whether seconds are measured by kind.
        cuda_graphs: whether the model's calls are captured and replayed.
        end: the step at which another model takes over, or None.
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
    ) -> None:
        self.config = config
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
        self.meter = Meter()
        self.plain_calls = 0
        self.steps_seen = 0
        """How often its scheduler stepped."""
        self.over = False
        """Whether no further call belongs to it."""
        self.put_away = False
        """Whether its pipeline, at its end, has reset the model."""
        self.failed = False
        """Whether it was ended by an error."""
        self.entered: list[Any] = []
        """Frames of the functions that have taken its request up now."""
        self.at_end: Callable[[Generation], None] | None = None
        """Called once, when its last step is taken or it is ended."""
        self.exchanged: Counter[str] = Counter()
        """How often arguments that should stay the same were other ones, by name."""
        self.lock = threading.RLock()
        self._called: dict[str, int] = {}
        self._entered: set[str] = set()  # contexts called in this step
        self._timestep: tuple[Any, Moment | None] = (None, None)  # of the last call
        self._in_schedule = False
        self._branches: int | None = None
        self._costs: dict[Arguments | None, CallCosts | None] = {}
        self._fuses: dict[tuple[nn.Module, Key], bool] = {}
        self._decided: dict[Hashable, bool] = {}
        self._weights: dict[tuple[float, torch.device], torch.Tensor] = {}

    @property
    def started(self) -> bool:
        """Whether the model was called."""
        return self.plan is not None

    @property
    def taken(self) -> int:
        """How many steps the model was called at."""
        return self.step - self.schedule.begin + bool(self._called)

    @property
    def used_up(self) -> bool:
        """Whether every step of the model was taken."""
        return self.step >= self.schedule.steps.stop

    def start(self, begin: int = 0) -> Plan:
        """Make the plan, for a schedule entered at step `begin`."""
        self.schedule = dataclasses.replace(self.schedule, begin=begin)
        self.plan = Plan(self.config, self.schedule, self.sublayers)
        self.step = begin
        return self.plan

    # Which calls are its own

    def claims(self, timestep: Any, label: str) -> bool | None:
        """Whether a call with this timestep, in the context `label`, can be the next one.

        None where that cannot be known.
        """
        moment = self.timesteps.moment(timestep)
        if moment is None or not moment.single or not self.timesteps.known:
            return None
        if not self.started:
            return (
                True if self.timesteps.recognise(moment) else None
            )  # models may be called with a function of the timestep
        if not self._in_schedule:
            return None if self.notified or self.steps_seen or not self._called else moment == self._timestep[1]
        if self.timesteps.at(self.step, moment):
            return True
        told = self.steps_seen or not (self.notified or moment.own)
        return not told and any(i > self.step for i in self.timesteps.places(moment))

    def recognises(self, label: str, inputs: Inputs) -> bool:
        """Whether a context that such a call could be in was last called with the same tensors, latents and timestep
        aside."""
        contexts = (
            [self.contexts.get(label)] if label else [c for key, c in self.contexts.items() if key.startswith("#")]
        )
        return any(context is not None and context.holds(inputs) for context in contexts)

    def open(self, name: str | None = None, step: int | None = None, inputs: Inputs = NO_INPUTS) -> Call | None:
        """A call of the model in context `name`, at `step` if it is given; None where a scheduler has no step left for
        it.

        Raises:
            RuntimeError: all steps of the plan are used, and it is one of a bare model; or too many calls without names
            came in one step.
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
                self._called.clear()
                self._entered.clear()
                self.step = at
            key = self._context_of(label, inputs)
            self._called[label] = self._called.get(label, 0) + 1
            self._entered.add(key)
            if key not in self.contexts:
                self.contexts[key] = Context(key, self.meter, timed=self.timed)
            return Call(self, self.contexts[key], self.step)

    def _begins_step(self, label: str, timestep: Any, moment: Moment | None) -> bool:
        """Whether a call is the first of a further step, which no `step` of a scheduler has told."""
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
            return True  # copies of the scheduler step
        if label or timestep is last or not isinstance(timestep, torch.Tensor) or timestep.is_meta:
            return False
        if self._branches is None:  # not known to the host: it waits once, for the first further call
            now, then = (self.timesteps.moment(t, wait=True) for t in (timestep, last))
            if now is None or then is None or now.value == then.value:
                return False
            self._branches = sum(self._called.values())
        return sum(self._called.values()) >= self._branches

    def _context_of(self, label: str, inputs: Inputs) -> str:
        """Key of the context of a call. Calls without names go by their order, unless the prompt says otherwise."""
        order = self._called.get(label, 0)
        if order >= MOST_ALIKE:
            raise RuntimeError(
                f"{order + 1} calls came in one step of the schedule; calls of up to {MOST_ALIKE} branches without "
                "names are supported: "
                'name the calls, `with pab.context(model, "cond"):`, or the step, `pab.context(model, "cond", step=i)`'
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
            "generation: "
            "with pab.generation(model, num_steps=...):, or, where a step has several calls, name the calls: "
            'with pab.context(model, "cond"):'
        )

    # Its steps, and its end

    def advance(self, to: int | None = None) -> None:
        """End the step; after the last one every slot is released.

        Args:
            to: the step that begins; default the next one.
        """
        with self.lock:
            self.step = self.step + 1 if to is None else to
            self._called.clear()
            self._entered.clear()
            if self.used_up:
                self._finish()
                if self.scheduler is not None:  # on a bare model a call too many is an error
                    self.over = True

    def stepped(self) -> None:
        """Its scheduler has stepped."""
        with self.lock:
            self.steps_seen += 1
            if self.started:
                self.advance()
            elif self.steps_seen >= self.schedule.steps.stop:
                self.end()

    def end(self) -> None:
        """Release everything: no call belongs to it any more."""
        with self.lock:
            self.over = True
            for context in self.contexts.values():
                context.arena.close()
            self._finish()

    def abort(self) -> None:
        """End it because of an error."""
        self.failed = True
        self.end()

    def _finish(self) -> None:
        self.release()
        at_end, self.at_end = self.at_end, None
        if at_end is not None:
            at_end(self)

    def release(self) -> None:
        """Release every slot."""
        for context in tuple(self.contexts.values()):
            context.arena.clear()

    @property
    def reuses_planned(self) -> bool:
        """Whether the plan had a reuse at the steps that were taken."""
        plan = self.plan
        if plan is None:
            return False
        return any(decision.action is Action.REUSE for row in set(plan.rows.values()) for decision in row[: self.taken])

    def costs(self, model: nn.Module, calls: Set[Arguments | None]) -> dict[Arguments | None, CallCosts] | None:
        """What calls with these arguments cost without PAB; None where that of any is not known."""
        for arguments in calls:
            if arguments not in self._costs:
                self._costs[arguments] = call_costs(
                    model, self.sublayers, arguments, self.config.cache_point == "unprojected"
                )
        known = {arguments: costs for arguments in calls if (costs := self._costs[arguments]) is not None}
        return known if len(known) == len(calls) else None

    def fuses(self, module: nn.Module, x: torch.Tensor) -> bool:
        """See `Call.fuses`."""
        if torch.compiler.is_compiling():  # decided while the graph is made
            return fusing.fuses(module, x) and not fusing.autocasts(x)
        key = (module, Key((x.shape[-1],), x.dtype, x.device))
        if key not in self._fuses:
            self._fuses[key] = fusing.fuses(module, x)
        return self._fuses[key] and not fusing.autocasts(x)

    def once(self, what: Hashable, decide: Callable[[], bool]) -> bool:
        """What `decide()` says of `what`, asked once a generation."""
        if what not in self._decided:
            self._decided[what] = decide()
        return self._decided[what]

    def weight(self, value: float, device: torch.device) -> torch.Tensor:
        """`value` as one float32 number on `device`; made once a generation, and without waiting for the device."""
        key = (value, device)
        if key not in self._weights:
            self._weights[key] = torch.full(
                (), value, dtype=torch.float32, device=device
            )  # a fill: nothing is copied from the host
        return self._weights[key]


def label_of(name: str | None) -> str:
    """The name of a context as its key has it: a single # parts a name from the order of the call."""
    return (name or "").replace("#", "##")
