"""Turns: what a sublayer is to do in a call of the model, decided before the model runs, and what it did.

Eager modules and compiled graphs read the same object. A graph depends on what its sublayers do (compute, store, reuse)
and on nothing else that changes from step to step: it takes in what it reuses as tensors, and leaves in an attribute
what is to be kept.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..ops.quantized import Quantized
from ..rules.plan import Action, Decision, Sublayer
from .costs import place as place_of
from .slots import CACHE_DTYPES, Extrapolation, Key, Slot, pack

if TYPE_CHECKING:
    from .call import Call

_COMPUTE = Decision(Action.COMPUTE)


class CurrentTurn(threading.local):
    """The turn of one sublayer in the call that a thread is in; None where the sublayer runs plainly."""

    def __init__(self) -> None:  # torch.compile takes a class attribute for a constant
        self.turn: Turn | None = None


class CurrentCall(threading.local):
    """The call of the model that a thread is in, and whether it was opened outside of a graph of the whole model."""

    def __init__(self) -> None:
        self.call: Call | None = None
        self.enclosed = False
        self._turns = self._placed = NO_TURNS

    def turns(self, sublayers: Sequence[Sublayer]) -> Turns:
        """Turns for a call that begins: those of the last call in this thread, unless that goes on."""
        if self._turns.sublayers != sublayers or self._turns.call is not None:
            self._turns = Turns(sublayers)
        return self._turns

    def enter(self, call: Call | None, current: Mapping[str, CurrentTurn]) -> None:
        """Give the sublayers their turns in `call`, in this thread; without a call they run plainly.

        Args:
            current: where each sublayer finds its turn, by name.
        """
        self.call = call
        turns = self._placed if call is None else call.turns
        if turns is not self._placed:
            self.place(turns, current)

    def place(self, turns: Turns, current: Mapping[str, CurrentTurn]) -> None:
        """Put each turn where its sublayer finds it."""
        for name, place in current.items():
            place.turn = turns.by_name.get(name)
        self._placed = turns


class Turns:
    """The turns of all sublayers, for one call after another.

    Args:
        sublayers: the model's.
    """

    def __init__(self, sublayers: Sequence[Sublayer]) -> None:
        self.sublayers = sublayers
        self.by_name = {sublayer.name: Turn(sublayer, self) for sublayer in sublayers}
        self.call: Call | None = None
        """The call that goes on. Between two calls the sublayers run plainly."""


NO_TURNS = Turns(())
"""Those of a model that runs plainly."""


class Turn:
    """One sublayer in one call: read `slot` instead of computing, or compute and, where it `stores`, keep the output.

    A sublayer that runs several times in a call (chunks, two streams, layers that share a module) has a slot for each
    run, told apart by their order; in a compiled graph only for the first one.

    Args:
        sublayer: whose turn it is.
        turns: those that it is one of.
    """

    def __init__(self, sublayer: Sublayer, turns: Turns) -> None:
        self.sublayer = sublayer
        self._turns = turns
        self.decision = _COMPUTE
        self.slot: Slot | Extrapolation | None = None
        """What it reuses; None where it computes. Where it reads several outputs, their `Extrapolation`."""
        self.idle = False
        """Whether its sublayer keeps and reuses nothing in the whole generation."""
        self.stores = False
        self.reads_last = False
        """Whether nothing else reads what `take` gave; in a graph never, as it serves other steps too."""
        self.runs = self.reused = self.stored = 0
        self._place = sublayer.name
        self._key: Key | None = None
        self._traced: tuple[tuple[int, ...], torch.dtype, torch.device] | None = None
        """Shape, dtype and device of the input, where the turn was taken in a compiled graph."""
        self._kept: Any = None
        self._own_dtype: torch.dtype | None = None

    @property
    def call(self) -> Call:
        """The call that goes on."""
        return self._turns.call  # type: ignore[return-value]

    @property
    def open(self) -> bool:
        """Whether a call goes on: between two calls the sublayer runs plainly."""
        return self._turns.call is not None

    def decide(self, decision: Decision, slot: Slot | Extrapolation | None) -> None:
        """What it is to do in the next call."""
        self.decision, self.slot = decision, slot
        self.stores = _stores(decision, slot)

    def end(self) -> None:
        """The call is over: forget it."""
        self.decision, self.slot, self.stores = _COMPUTE, None, False
        self.runs = self.reused = self.stored = 0
        self.reads_last, self._place, self._kept = False, self.sublayer.name, None

    def take(self, x: torch.Tensor) -> Slot | Extrapolation | None:
        """What is reused instead of computing on input `x`, of which only shape, dtype and device are read.

        What is read for the last time is released. Where None is returned, `stores` says whether the output is to be
        kept.
        """
        if torch.compiler.is_dynamo_compiling():
            return self._take_in_graph(x)
        call, held = self.call, self.decision.held
        if call.stopwatch is not None:
            call.stopwatch.mark(self.sublayer.kind, x.device)
        self.runs += 1
        if self.runs > 1:
            self._again()
        slot = self.slot
        if slot is not None:
            self.slot = None
            if slot.key.matches(x):
                self._reuse(held)
                return slot
            self.stores = held > 0
        # Where the plan skips it and its block was forced to run, what is held is still to be read.
        call.arena.release(self._place, held - self.stores)
        if self.stores:
            self._key = Key.of(x)
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
            assert self._key is not None
            self._keep(kept, self._key, own)

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
        self._traced = (tuple(x.shape), x.dtype, x.device)
        slot = self.slot
        if slot is not None:
            if slot.key.matches(x):
                self.reused = 1
                return slot
            self.stores = self.decision.held > 0
        return None

    def collect(self) -> None:
        """Do what was left to do when the turn was taken in a compiled graph."""
        if self._traced is None:  # it was taken in eager mode
            return
        key, self._traced, self.slot = Key(*self._traced), None, None
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
