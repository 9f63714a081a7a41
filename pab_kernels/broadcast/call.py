"""One call of the model: what each sublayer's turn is, and what is kept of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from ..ops.quantize import Quantized
from .context import Context
from .costs import Arguments
from .costs import place as place_of
from .plan import Action, Decision, Sublayer
from .slots import CACHE_DTYPES, Arena, Key, Line, Slot, pack
from .traced import TracedTurn

if TYPE_CHECKING:
    from .generation import Generation


@dataclass(frozen=True)
class Place:
    """Where in an arena an output goes: `Arena.put` without the value."""

    arena: Arena
    name: str
    kind: str
    key: Key
    step: int
    most: int

    def keep(self, value: Any, dtype: torch.dtype | None) -> None:
        """Keep `value` there."""
        own = self.key.dtype if dtype is None and isinstance(value, Quantized) else dtype
        self.arena.put(self.name, self.kind, value, self.key, self.step, own, self.most)


@dataclass(frozen=True)
class Store:
    """Where a sublayer's output is to be put.

    Args:
        point: whether it is kept before or after the gate.
        dtype: the 8-bit dtype that it is kept in, or None for its own.
    """

    point: Literal["pre_gate", "post_gate"]
    dtype: torch.dtype | None
    _place: Place | TracedTurn

    def put(self, value: Any) -> None:
        """Keep `value`, quantised if it is not yet."""
        self._place.keep(pack(value, self.dtype), value.dtype if isinstance(value, torch.Tensor) else None)


@dataclass(frozen=True)
class Turn:
    """One sublayer's turn in a call: read `slot` instead of computing, or compute and, if `store` is given, keep the output.

    Where the reuse is linear, `slot` is the `Line` through the two newest outputs.
    """

    slot: Slot | Line | None = None
    store: Store | None = None


class Call:
    """One call of the model: a context at a step."""

    def __init__(self, generation: Generation, context: Context, step: int) -> None:
        self.generation = generation
        self.context = context
        self.step = step
        self.arguments: Arguments | None = None
        """What the model was called with."""
        self.reused: list[str] = []
        """Places of the outputs that were reused, in their order."""
        self.spared: Counter[str] = Counter()
        """By kind, FLOPs that sublayers which ran did without."""
        self._turns: dict[str, int] = {}
        self._traced: dict[str, TracedTurn] = {}

    def prepare(self) -> None:
        """Decide every turn before the model runs, for the sublayers that take theirs in a compiled graph."""
        plan = self.generation.plan
        assert plan is not None
        for sublayer in self.generation.sublayers:
            action, slot = Action.COMPUTE, None
            if sublayer.name in plan.rows:
                decision = plan.decision(sublayer.name, self.step)
                action = decision.action
                if action is Action.REUSE:
                    slot = self._read(sublayer.name, decision)
                    action = Action.REUSE if slot is not None else self._forced(sublayer.name)
            self._traced[sublayer.name] = TracedTurn(sublayer, action, slot)

    def collect(self) -> None:
        """Account for the turns that were taken in compiled graphs, and keep what these stored."""
        for name, turn in self._traced.items():
            if turn.input is None:
                continue
            key = Key(*turn.input)
            taken = self._account(turn.sublayer, name, key, turn.slot if turn.reused else None)
            for _ in range(turn.runs - 1):
                self._repeated(turn.sublayer)
            if taken.store is not None and turn.kept is not None:
                Place(self.context.arena, name, turn.sublayer.kind, key, self.step, self._held(name)).keep(turn.kept, turn.dtype)
        self._traced.clear()

    def turn(self, sublayer: Sublayer, x: torch.Tensor) -> Turn:
        """What `sublayer`, with input `x`, is to do now; counted, and what is read for the last time is let go.

        A sublayer that runs several times in one call (chunks, two streams or layers that share a module) has a slot for each time, told
        apart by their order; in a compiled graph it has one for the first time only.

        Args:
            sublayer: one of the plan's.
            x: its input (only shape, dtype and device are read).
        """
        if torch.compiler.is_compiling():
            return self._turn_in_graph(sublayer, x)
        self._traced.pop(sublayer.name, None)
        plan = self.generation.plan
        if plan is None or sublayer.name not in plan.rows:
            return Turn()
        self.mark(sublayer.kind, x.device)
        time = self._turns[sublayer.name] = self._turns.get(sublayer.name, -1) + 1
        place = place_of(sublayer.name, time)
        decision, key = plan.decision(sublayer.name, self.step), Key.of(x)
        slot = self._read(place, decision) if decision.action is Action.REUSE else None
        return self._account(sublayer, place, key, slot if slot is not None and slot.key == key else None)

    def _turn_in_graph(self, sublayer: Sublayer, x: torch.Tensor) -> Turn:
        turn = self._traced.get(sublayer.name)
        if turn is None:
            raise RuntimeError(
                f"{sublayer.name} is compiled, and was not reached through the model; call the model under PAB, not its block"
            )
        action = turn.take(x)
        if action == "REUSE":
            return Turn(slot=turn.slot)
        return Turn(store=self._store(turn)) if action == "STORE" else Turn()

    def _store(self, place: Place | TracedTurn) -> Store:
        config = self.generation.config
        return Store("post_gate" if config.cache_point == "post_gate" else "pre_gate", CACHE_DTYPES[config.cache_dtype], place)

    def _account(self, sublayer: Sublayer, place: str, key: Key, slot: Slot | Line | None) -> Turn:
        """Count the turn of a sublayer that reuses `slot` or, without one, runs; let go of what no later step reads at its `place`."""
        plan, arena, held = self.generation.plan, self.context.arena, self._held(sublayer.name)
        if plan is None or sublayer.name not in plan.rows:
            return Turn()
        tally = self.context.tally(sublayer.kind)
        if slot is not None:
            tally.reused += 1
            self.reused.append(place)
            arena.release(place, held)
            return Turn(slot=slot)
        action = plan.decision(sublayer.name, self.step).action
        if action is Action.REUSE:
            tally.forced += 1
            action = self._forced(sublayer.name)
        tally.computed += 1
        stores = action is Action.STORE
        # Where the plan skips it and its block was forced to run, what is held is still to be read.
        arena.release(place, held - stores)
        if not stores:
            return Turn()
        tally.stored += 1
        return Turn(store=self._store(Place(arena, place, sublayer.kind, key, self.step, held)))

    def _repeated(self, sublayer: Sublayer) -> None:
        plan = self.generation.plan
        if plan is not None and sublayer.name in plan.rows:
            tally = self.context.tally(sublayer.kind)
            tally.computed += 1
            tally.forced += plan.decision(sublayer.name, self.step).action is Action.REUSE

    def _held(self, name: str) -> int:
        """How many outputs of a sublayer the plan keeps after this step."""
        plan = self.generation.plan
        return 0 if plan is None or name not in plan.rows else plan.held(name, self.step)

    def _forced(self, name: str) -> Action:
        """What a planned reuse is instead, where what it reads is not there."""
        return Action.STORE if self._held(name) else Action.COMPUTE

    def sources(self, name: str, decision: Decision) -> tuple[Slot, ...]:
        """The slots that a planned reuse reads, the newest first; none unless all are there, from the planned step or a later one."""
        newest, before = self.context.arena.get(name), self.context.arena.get(name, 1)
        if newest is None or decision.source is None:
            return ()
        if not decision.source <= newest.source < self.step:  # steps that are given may go back
            return ()
        if decision.previous is None:
            return (newest,)
        if before is None or before.key != newest.key or not decision.previous <= before.source < newest.source:
            return ()
        return newest, before

    def line_weight(self, newest: Slot, before: Slot) -> float:
        """The weight of a line through two slots at this step."""
        return (self.step - newest.source) / (newest.source - before.source)

    def _read(self, name: str, decision: Decision) -> Slot | Line | None:
        """What a planned reuse reads, or None where it is not there."""
        slots = self.sources(name, decision)
        if len(slots) < 2:
            return slots[0] if slots else None
        if self.context.arena.fixed:
            return Line(slots[0], slots[1], self.context.arena.weights[name])
        return Line(slots[0], slots[1], self.generation.weight(self.line_weight(*slots), slots[0].key.device))

    @property
    def measured(self) -> str | None:
        """What time belongs to now, where it is measured."""
        return None if torch.compiler.is_compiling() or self.context.stopwatch is None else self.context.stopwatch.kind

    def mark(self, kind: str | None, device: torch.device | None = None) -> None:
        """From here on time belongs to `kind`, or to nobody. Costs nothing where it is not measured, as in compiled graphs.

        Args:
            kind: of sublayers, or `stopwatch.REST`.
            device: on which they run; that of the mark before if it is left out.
        """
        if not torch.compiler.is_compiling() and self.context.stopwatch is not None:
            self.context.stopwatch.mark(kind, device)

    def spare(self, kind: str, flops: int) -> None:
        """Count FLOPs that a sublayer of this kind does without although it runs."""
        self.spared[kind] += flops

    def finish(self) -> None:
        """The model has run: count the call."""
        self.collect()
        self.context.calls[self.arguments, tuple(self.reused), tuple(self.spared.items())] += 1

    def fuses(self, module: nn.Module, x: torch.Tensor) -> bool:
        """Whether a fused operation may stand for calling `module` (an `nn.Linear` or a norm) on `x`; decided once a generation."""
        return self.generation.fuses(module, x)
