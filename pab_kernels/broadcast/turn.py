"""Turns: what a sublayer is to do in a call of the model, decided before the model runs, and what it did.

Eager modules and compiled graphs read the same object. A graph depends on what its sublayers do (compute, store, reuse) and on nothing else
that changes from step to step: it takes in what it reuses as tensors, and leaves in an attribute what is to be kept.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..ops.quantized import Quantized
from .costs import place as place_of
from .plan import Action, Decision, Sublayer
from .slots import CACHE_DTYPES, Key, Line, Slot, pack

if TYPE_CHECKING:
    from .call import Call


class CurrentTurn(threading.local):
    """The turn of one sublayer in the call that a thread is in; None where the sublayer is to run plainly."""

    def __init__(self) -> None:  # an attribute of its own in every thread: what a class has, a compiled graph takes for constant
        self.turn: Turn | None = None


class CurrentCall(threading.local):
    """The call of the model that a thread is in, and whether it was opened outside of a graph of the whole model."""

    def __init__(self) -> None:
        self.call: Call | None = None
        self.enclosed = False
        self._entered: list[tuple[CurrentTurn, Turn]] = []

    def enter(self, call: Call | None, current: Mapping[str, CurrentTurn]) -> None:
        """From here on, in this thread, sublayers have their turns in `call`; without one they run plainly.

        Args:
            current: where each sublayer finds its turn, by name.
        """
        left, turns = self._entered, {} if call is None else call.turns
        self.call = call
        self._entered = [(place, turns[name]) for name, place in current.items() if name in turns]
        for place, _ in left:
            place.turn = None
        for place, turn in self._entered:
            place.turn = turn


class Turn:
    """One sublayer in one call: read `slot` instead of computing, or compute and, where it `stores`, keep the output.

    A sublayer that runs several times in a call (chunks, two streams or layers that share a module) has a slot for each time, told apart by
    their order; in a compiled graph it has one for the first time only.

    Args:
        call: the call.
        sublayer: whose turn it is.
        decision: the plan's.
        slot: what it reuses; None where it computes. Where the reuse is linear, the `Line` through the two newest outputs.
    """

    def __init__(self, call: Call, sublayer: Sublayer, decision: Decision, slot: Slot | Line | None) -> None:
        config = call.generation.config
        self.call = call
        self.sublayer = sublayer
        self.decision = decision
        self.slot = slot
        self.stores = _stores(decision, slot)
        self.gated = config.cache_point == "post_gate"
        """Whether what is kept is kept after the gate."""
        self.dtype = CACHE_DTYPES[config.cache_dtype]
        """The 8-bit dtype that outputs are kept in, or None for their own."""
        self.runs = 0
        self._place = sublayer.name

    reads_last = False
    """Whether nothing else reads what `take` gave; in a graph never, as it serves other steps too."""
    reused = 0
    stored = 0
    _input: Key | tuple[tuple[int, ...], torch.dtype, torch.device] | None = None
    _kept: Any = None
    _own_dtype: torch.dtype | None = None

    def take(self, x: torch.Tensor) -> Slot | Line | None:
        """What is reused instead of computing on input `x`, of which only shape, dtype and device are read.

        What is read for the last time is released. Where None is returned, `stores` says whether the output is to be kept.
        """
        if torch.compiler.is_dynamo_compiling():
            return self._take_in_graph(x)
        self.runs += 1
        self.call.mark(self.sublayer.kind, x.device)
        if self.runs > 1:
            self._again()
        slot, held = self.slot, self.decision.held
        if slot is not None:
            self.slot = None
            if slot.key.matches(x):
                self.reads_last = self._reuse()
                return slot
            self.stores = held > 0
        # Where the plan skips it and its block was forced to run, what is held is still to be read.
        self.call.context.arena.release(self._place, held - self.stores)
        if self.stores:
            self._input = Key.of(x)
        return None

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
        self.slot = self.call.read(self._place, self.decision)
        self.stores = _stores(self.decision, self.slot)

    def _reuse(self) -> bool:
        """Count it, and release what no later step reads; whether that was all."""
        self.reused += 1
        call, held, place = self.call, self.decision.held, self._place
        call.reused.append(place)
        call.context.arena.release(place, held)
        return not (held or call.context.arena.fixed)

    def _keep(self, value: Any, key: Key, own: torch.dtype | None) -> None:
        self.stored += 1
        own = key.dtype if own is None and isinstance(value, Quantized) else own
        self.call.context.arena.put(self._place, self.sublayer.kind, value, key, self.call.step, own, self.decision.held)

    # In a compiled graph

    def _take_in_graph(self, x: torch.Tensor) -> Slot | Line | None:
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
            self._reuse()
            return
        stores = self._kept is not None
        self.call.context.arena.release(self._place, self.decision.held - stores)
        if stores:
            self._keep(self._kept, key, self._own_dtype)
            self._kept = None


def _stores(decision: Decision, slot: Slot | Line | None) -> bool:
    """Whether the output is to be kept, where it is computed: as planned, or as what was to be reused is not there."""
    return decision.action is Action.STORE or (decision.action is Action.REUSE and slot is None and decision.held > 0)
