"""Turns: what a sublayer is to do in a call of the model, decided before the model runs, and what it did.

Eager modules and compiled graphs read the same object. A graph depends on what its sublayers do (compute, store, reuse)
and on nothing else that changes from step to step: it takes in what it reuses as tensors, and leaves in an attribute
what is to be kept.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..ops.quantized import Quantized
from ..rules.plan import Action, Decision, Plan, Sublayer
from .costs import place as place_of
from .slots import CACHE_DTYPES, Extrapolation, Key, Slot, pack

if TYPE_CHECKING:
    from .call import Call


class CurrentTurn(threading.local):
    """The turn of one sublayer in the call that a thread is in; None where the sublayer is to run plainly."""

    def __init__(
        self,
    ) -> None:  # an attribute of its own in every thread: what a class has, a compiled graph takes for constant
        self.turn: Turn | None = None


class CurrentCall(threading.local):
    """The call of the model that a thread is in, and whether it was opened outside of a graph of the whole model."""

    def __init__(self) -> None:
        self.call: Call | None = None
        self.enclosed = False
        self._entered: list[tuple[CurrentTurn, Turn]] = []
        self._plan: Plan | None = None
        self._idle: list[Turn] = []  # of that plan
        self._idle_of: dict[str, Turn] = {}

    def enter(self, call: Call | None, current: Mapping[str, CurrentTurn]) -> None:
        """From here on, in this thread, sublayers have their turns in `call`; without one they run plainly.

        Sublayers of which nothing is kept or reused in the whole generation are idle. Their turns are made once and
        stay where they are: the next call is likely to be one of the same plan.

        Args:
            current: where each sublayer finds its turn, by name.
        """
        left, before, self.call = self._entered, self.call, call
        if before is not None:
            before.idle_runs = [idle.runs for idle in before.idle]
        self._entered = (
            [] if call is None else [(current[name], turn) for name, turn in call.turns.items() if name in current]
        )
        for place, _ in left:
            place.turn = None
        if call is not None:
            self._take_idle(call, current)
        else:
            for idle in self._idle:
                idle.call = None  # type: ignore[assignment]
        for place, turn in self._entered:
            place.turn = turn

    def _take_idle(self, call: Call, current: Mapping[str, CurrentTurn]) -> None:
        if call.plan is not self._plan:
            self.forget(current)
            for sublayer in call.plan.sublayers:
                if sublayer.name in call.plan.idle and sublayer.name in current:
                    idle = self._idle_of.setdefault(sublayer.name, Turn(call, sublayer, Decision(Action.COMPUTE)))
                    idle.idle, current[sublayer.name].turn = True, idle
                    self._idle.append(idle)
            self._plan = call.plan
        call.idle = self._idle
        for idle in self._idle:
            idle.call, idle.runs = call, 0
        for idle, runs in zip(self._idle, call.idle_runs, strict=False):  # it was interrupted by another call
            idle.runs = runs

    def forget(self, current: Mapping[str, CurrentTurn]) -> None:
        """No sublayer has a turn."""
        self._plan, self._idle = None, []
        for place in current.values():
            place.turn = None


class Turn:
    """One sublayer in one call: read `slot` instead of computing, or compute and, where it `stores`, keep the output.

    A sublayer that runs several times in a call (chunks, two streams or layers that share a module) has a slot for each
    time, told apart by their order; in a compiled graph it has one for the first time only.

    Args:
        call: the call; None between two calls, where the turn is idle.
        sublayer: whose turn it is.
        decision: the plan's.
        slot: what it reuses; None where it computes. Where it reads several outputs, their `Extrapolation`.
    """

    def __init__(
        self, call: Call, sublayer: Sublayer, decision: Decision, slot: Slot | Extrapolation | None = None
    ) -> None:
        self.call = call
        self.sublayer = sublayer
        self.decision = decision
        self.slot = slot
        self.stores = decision.action is not Action.COMPUTE and _stores(decision, slot)
        self.runs = 0
        self._place = sublayer.name

    idle = False
    """Whether its sublayer keeps and reuses nothing in the whole generation."""
    reads_last = False
    """Whether nothing else reads what `take` gave; in a graph never, as it serves other steps too."""
    reused = 0
    stored = 0
    _input: Key | tuple[tuple[int, ...], torch.dtype, torch.device] | None = None
    _kept: Any = None
    _own_dtype: torch.dtype | None = None

    def take(self, x: torch.Tensor) -> Slot | Extrapolation | None:
        """What is reused instead of computing on input `x`, of which only shape, dtype and device are read.

        What is read for the last time is released. Where None is returned, `stores` says whether the output is to be
        kept.
        """
        if torch.compiler.is_dynamo_compiling():
            return self._take_in_graph(x)
        self.runs += 1
        if self.call.stopwatch is not None:
            self.call.stopwatch.mark(self.sublayer.kind, x.device)
        if self.runs > 1:
            self._again()
        slot, held = self.slot, self.decision.held
        if slot is not None:
            self.slot = None
            if slot.key.matches(x):
                self._reuse(held)
                return slot
            self.stores = held > 0
        # Where the plan skips it and its block was forced to run, what is held is still to be read.
        self.call.arena.release(self._place, held - self.stores)
        if self.stores:
            self._input = Key.of(x)
        return None

    @property
    def gated(self) -> bool:
        """Whether what is kept is kept after the gate."""
        return self.call.generation.config.cache_point == "post_gate"

    @property
    def unprojected(self) -> bool:
        """Whether attention is kept before its projection, where it can be parted from it."""
        return self.call.generation.config.cache_point == "unprojected"

    @property
    def dtype(self) -> torch.dtype | None:
        """The 8-bit dtype that outputs are kept in, or None for their own."""
        return CACHE_DTYPES[self.call.generation.config.cache_dtype]

    def passes(self) -> bool:
        """Whether there is nothing to do but to compute, which is then counted already.

        In a graph it is the same work as any computing.
        """
        if torch.compiler.is_dynamo_compiling() or not self.idle or self.call.stopwatch is not None:
            return False
        self.runs += 1
        return True

    @property
    def store(self) -> Turn | None:
        """The turn itself where the output is to be kept, else None."""
        return self if self.stores else None

    def put(self, value: Any) -> None:
        """Keep an output, quantised to `dtype` if it is not yet."""
        kept, own = pack(value, self.dtype), value.dtype if isinstance(value, torch.Tensor) else None
        if torch.compiler.is_dynamo_compiling():
            self._kept, self._own_dtype = kept, own
        else:
            assert isinstance(self._input, Key)
            self._keep(kept, self._input, own)

    def _again(self) -> None:
        """A further run in the same call."""
        self.collect()
        self._place = place_of(self.sublayer.name, self.runs - 1)
        self.slot = self.call.read(self.sublayer.name, self.decision, self._place)
        self.stores = _stores(self.decision, self.slot)

    def _reuse(self, held: int) -> None:
        """Count it, and release what no later step reads."""
        call, arena = self.call, self.call.arena
        self.reused += 1
        call.reused.append(self._place)
        arena.release(self._place, held)
        self.reads_last = not (held or arena.fixed)

    def _keep(self, value: Any, key: Key, own: torch.dtype | None) -> None:
        self.stored += 1
        own = key.dtype if own is None and isinstance(value, Quantized) else own
        self.call.arena.put(self._place, self.sublayer.kind, value, key, self.call.step, own, self.decision.held)

    # In a compiled graph

    def _take_in_graph(self, x: torch.Tensor) -> Slot | Extrapolation | None:
        self.runs += 1
        if self.runs > 1:
            self.stores = False
            return None
        self._input = (tuple(x.shape), x.dtype, x.device)
        slot = self.slot
        if slot is not None:
            if slot.key.matches(x):
                self.reused = 1
                return slot
            self.stores = self.decision.held > 0
        return None

    def collect(self) -> None:
        """Do what was left to do when the turn was taken in a compiled graph."""
        if self._input is None or isinstance(self._input, Key):
            return
        key, self._input, self.slot = Key(*self._input), None, None
        if self.reused:
            self.reused = 0
            self._reuse(self.decision.held)
            return
        stores = self._kept is not None
        self.call.arena.release(self._place, self.decision.held - stores)
        if stores:
            self._keep(self._kept, key, self._own_dtype)
            self._kept = None


def _stores(decision: Decision, slot: Slot | Extrapolation | None) -> bool:
    """Whether the output is to be kept, where it is computed: as planned, or as what was to be reused is not there."""
    return decision.action is Action.STORE or (decision.action is Action.REUSE and slot is None and decision.held > 0)
