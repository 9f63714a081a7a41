"""Turns: what each sublayer does in a call of the model, decided before the model runs, and its counts.

Eager modules and compiled graphs read the same object. A compiled graph depends on what its sublayers do (compute,
store, reuse) and on nothing else that changes from step to step: reused outputs enter it as tensors, and outputs to
keep leave it in an attribute.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..ops.quantized import Quantized
from ..rules.plan import Action, Decision, Plan, Sublayer
from .costs import place as place_of
from .lending import Lending, Receiver
from .slots import CACHE_DTYPES, Extrapolation, Key, Slot, pack

if TYPE_CHECKING:
    from .call import Call

_COMPUTE = Decision(Action.COMPUTE)


class CurrentTurn(threading.local):
    """The turn of one sublayer in the current call of each thread; None if the sublayer runs plainly."""

    def __init__(self) -> None:  # not a class attribute, which torch.compile would treat as a constant
        self.turn: Turn | None = None


class CurrentCall(threading.local):
    """The call of the model that each thread is in, and whether it was opened around a compiled model."""

    def __init__(self) -> None:
        self.call: Call | None = None
        self.enclosed = False
        self._turns = self._placed = NO_TURNS

    def turns(self, sublayers: Sequence[Sublayer]) -> Turns:
        """Turns for a new call: those of the last call in this thread, unless it still runs."""
        if self._turns.sublayers != sublayers or self._turns.call is not None:
            self._turns = Turns(sublayers)
        return self._turns

    def enter(self, call: Call | None, current: Mapping[str, CurrentTurn]) -> None:
        """Give the sublayers their turns in `call`, in this thread; without a call they run plainly.

        Args:
            call: the call, or None.
            current: the holder of each sublayer's turn, by name.
        """
        self.call = call
        turns = self._placed if call is None else call.turns
        if turns is not self._placed:
            self.place(turns, current)

    def place(self, turns: Turns, current: Mapping[str, CurrentTurn]) -> None:
        """Put each turn into the holder of its sublayer."""
        for name, place in current.items():
            place.turn = turns.by_name.get(name)
        self._placed = turns


class Turns:
    """The turns of all sublayers, used by one call after another.

    Args:
        sublayers: the model's sublayers.
    """

    def __init__(self, sublayers: Sequence[Sublayer]) -> None:
        self.sublayers = sublayers
        self.by_name = {sublayer.name: Turn(sublayer) for sublayer in sublayers}
        self.call: Call | None = None
        """The current call."""


NO_TURNS = Turns(())
"""The turns of a model that runs plainly."""


class Span:
    """Where a block is among blocks in a row that share a slot: the last one's, of the change that all of them make.

    Sublayers in a row on the stream of one block share a slot in the same way.

    Args:
        before: that of the block before it; None for the first.
        last: whether it is the last one.
    """

    def __init__(self, before: Turn | None, last: bool) -> None:
        self.before = before
        self.last = last
        self.passed: Sequence[tuple[torch.Tensor, torch.Tensor]] = ()
        """Each output of the block that goes on to the next one, and the stream where the span begins, of its dtype."""

    @staticmethod
    def of(plan: Plan, name: str, turns: Mapping[str, Turn]) -> Span | None:
        """That of a sublayer; None if it has a slot of its own."""
        names = plan.spans.get(name)
        if names is None:
            return None
        at = names.index(name)
        return Span(turns[names[at - 1]] if at else None, name == names[-1])

    def begin(self, x: torch.Tensor) -> torch.Tensor | None:
        """The stream where the span begins, for the input x of a block; None if x is no output of the block before."""
        if self.before is None:
            return x
        before = self.before.span
        return None if before is None else next((begin for out, begin in before.passed if out is x), None)

    def hand_on(self, passed: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Set what goes on to the next block."""
        if self.before is not None and self.before.span is not None:
            self.before.span.passed = ()
        # Reused, a block returns its input, which the next one would not know in another dtype.
        self.passed = () if self.last else [(out, begin) for out, begin in passed if out.dtype == begin.dtype]


class Turn:
    """One sublayer in one call: it reads `slot` instead of computing, or computes and, if `stores`, keeps the output.

    A sublayer that runs several times in a call (chunks, two streams, layers that share a module) has a slot for each
    run, distinguished by their order; in a compiled graph only for the first run.

    Args:
        sublayer: the sublayer.
    """

    def __init__(self, sublayer: Sublayer) -> None:
        self.sublayer = sublayer
        self.call: Any = None
        """The current `Call`; None between two calls, and for a sublayer that is never reused: it runs plainly."""
        self.decision = _COMPUTE
        self.slot: Slot | Extrapolation | None = None
        """The output to reuse, or the `Extrapolation` of several; None if the sublayer computes."""
        self.stores = False
        self.dtype: torch.dtype | None = None
        """The dtype of 8 or 4 bits that outputs are kept in, or None for their own."""
        self.lends = False
        """Whether the result of `take` is handed out itself: nothing else reads it, or its receiver does not write to
        it; always False in a graph, which serves other steps too."""
        self.receiver: Receiver | None = None
        """Who gets a copy of the result of `take` and is watched, or None."""
        self.lending: Lending | None = None
        """What is lent of the sublayer; None if nothing is."""
        self.runs = self.reused = self.stored = 0
        self._place = sublayer.name
        self._key: Key | None = None
        self._traced: tuple[tuple[int, ...], torch.dtype, torch.device] | None = None
        """Shape, dtype and device of the input, if the turn was taken in a compiled graph."""
        self._kept: Any = None
        self._own_dtype: torch.dtype | None = None
        self.span: Span | None = None
        """Where the block or sublayer is in a span, if it shares a slot with others."""
        self._plan: Plan | None = None

    def decide(self, call: Call, decision: Decision, slot: Slot | Extrapolation | None) -> None:
        """Set what it does in a call."""
        self.call, self.decision, self.slot = call, decision, slot
        if self._plan is not call.plan:
            self._plan, self.dtype = call.plan, CACHE_DTYPES[call.plan.cache_dtype(self.sublayer.name)]
            self.span = Span.of(call.plan, self.sublayer.name, call.turns.by_name)
            lending, moves = call.generation.lending, call.offload is not None and call.plan.on_host(self.sublayer.name)
            self.lending = None if lending is None or moves else lending[self.sublayer.name]
        if slot is not None and slot.written:
            self._lost()
            self.slot = slot = None
        self.stores = _stores(decision, slot)

    def end(self) -> None:
        """Reset it after the call."""
        self.call, self.decision, self.slot, self.stores = None, _COMPUTE, None, False
        self.runs = self.reused = self.stored = 0
        self.lends, self.receiver, self._place, self._kept = False, None, self.sublayer.name, None
        if self.span is not None:
            self.span.passed = ()

    def take(self, x: torch.Tensor) -> Slot | Extrapolation | None:
        """The output to reuse instead of computing on input `x`, of which only shape, dtype and device are used.

        A slot that is read for the last time is released. If the result is None, the sublayer computes, and `stores`
        is whether to keep its output.
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
            if slot.written:
                self._lost()
            elif slot.key.matches(x):
                self._reuse(held, slot)
                if call.offload is not None:
                    slot, own = call.offload.take(slot), slot
                    self.lends |= slot is not own
                return slot
            self.stores = held > 0
        # If the plan skips this sublayer but its block was forced to run, the slots held are still needed later.
        call.arena.release(self._place, held - self.stores)
        if self.stores:
            self._key = Key.of(x)
        return None

    @property
    def adds(self) -> bool:
        """Whether a reuse adds to the stream; in a span only the last member does."""
        return self.span is None or self.span.last

    @property
    def gated(self) -> bool:
        """Whether outputs are kept after the gate."""
        return self.call.generation.config.cache_point == "post_gate"

    @property
    def unprojected(self) -> bool:
        """Whether attention is kept before its output projection, if the module can be split there."""
        return self.call.generation.config.cache_point == "unprojected"

    @property
    def store(self) -> Turn | None:
        """The turn itself if the output is to be kept, else None."""
        return self if self.stores else None

    def put(self, value: Any, shared: Sequence[torch.Tensor] = ()) -> None:
        """Keep an output, quantised to `dtype` unless it already is.

        Args:
            value: the output.
            shared: its tensors, if others get them, now or when it is reused, and torch counts the writes to them.
        """
        kept, own = pack(value, self.dtype), value.dtype if isinstance(value, torch.Tensor) else None
        if torch.compiler.is_dynamo_compiling():
            self._kept, self._own_dtype = kept, own
        else:
            assert self._key is not None
            self._keep(kept, self._key, own)
            slot = self.call.arena.get(self._place) if shared and not self.call.arena.fixed else None
            if slot is not None and not slot.on_host:
                slot.versions = [(tensor, tensor._version) for tensor in shared]

    def _again(self) -> None:
        """Prepare for another run of the sublayer in the same call."""
        self.collect()
        self._place = place_of(self.sublayer.name, self.runs - 1)
        self.slot = self.call.read(self.sublayer.name, self.decision, self._place)
        self.stores = _stores(self.decision, self.slot)

    def _lost(self) -> None:
        """Release the outputs, as somebody wrote to one of them."""
        self.call.arena.release(self._place)
        if self.lending is not None:
            self.lending.lost("an output that was kept for later steps was written to; it is computed again")

    def _reuse(self, held: int, slot: Slot | Extrapolation) -> None:
        """Count a reuse, and release the outputs that no later step reads."""
        call, arena = self.call, self.call.arena
        self.reused += 1
        call.reused.append(self._place)
        arena.release(self._place, held)
        self.lends, self.receiver = not (held or arena.fixed), None
        if not self.lends and self.lending is not None and isinstance(slot, Slot) and slot.versions:
            receiver = self.lending.reused
            self.lends = receiver.lends
            self.receiver = None if receiver.lends or receiver.refused else receiver

    def _keep(self, value: Any, key: Key, own: torch.dtype | None) -> None:
        self.stored += 1
        own = key.dtype if own is None and isinstance(value, Quantized) else own
        call, sent = self.call, None
        if call.offload is not None:
            value, sent = call.offload.send(self, value, key.device)
        call.arena.put(self._place, self.sublayer.kind, value, key, call.step, own, self.decision.held, sent)

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
        """Do the bookkeeping of a turn that was taken in a compiled graph."""
        if self._traced is None:  # taken in eager mode
            return
        key, slot, self._traced, self.slot = Key(*self._traced), self.slot, None, None
        if self.reused:
            assert slot is not None
            self.reused = 0
            self._reuse(self.decision.held, slot)
            return
        stores = self._kept is not None
        self.call.arena.release(self._place, self.decision.held - stores)
        if stores:
            self._keep(self._kept, key, self._own_dtype)
            self._kept = None


def _stores(decision: Decision, slot: Slot | Extrapolation | None) -> bool:
    """Whether to keep the output if it is computed: as planned, or because the output to reuse is not there."""
    return decision.action is Action.STORE or (decision.action is Action.REUSE and slot is None and decision.held > 0)
