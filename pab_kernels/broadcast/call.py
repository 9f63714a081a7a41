"""One call of the model: a turn for each sublayer, and what was done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..rules.plan import Action, Decision
from .context import Context
from .costs import Arguments
from .slots import Arena, Extrapolation, Slot
from .turn import NO_TURNS, Turns

if TYPE_CHECKING:
    from .generation import Generation


class Call:
    """One call of the model: a context at a step."""

    def __init__(self, generation: Generation, context: Context, step: int) -> None:
        assert generation.plan is not None, "it has begun"
        self.generation = generation
        self.plan = generation.plan
        self.context = context
        self.step = step
        self.stopwatch = context.stopwatch
        self.arguments: Arguments | None = None
        """What the model was called with."""
        self.reused: list[str] = []
        """Places of the outputs that were reused, in their order."""
        self.spared: Counter[str] = Counter()
        """By kind, FLOPs that sublayers which ran did without."""
        self.turns = NO_TURNS
        """One for each sublayer of the plan, once they are decided."""
        self.over = False
        """Whether the model has run."""

    @property
    def arena(self) -> Arena:
        """Its slots."""
        return self.context.arena

    def prepare(self, turns: Turns | None = None) -> None:
        """Decide every turn, before the model runs.

        Args:
            turns: those that are used; default new ones.
        """
        self.turns = Turns(self.plan.sublayers) if turns is None else turns
        idle = self.plan.idle
        for (name, turn), decision in zip(self.turns.by_name.items(), self.plan.decisions(self.step), strict=True):
            turn.idle = name in idle
            turn.decide(decision, self.read(name, decision) if decision.action is Action.REUSE else None)
        self.turns.call = self

    def sources(self, place: str, decision: Decision) -> tuple[Slot, ...]:
        """The slots that a planned reuse reads, the newest first.

        None unless all are there, from the planned steps or later ones.
        """
        held, reads, later = self.arena.held(place), decision.reads, self.step
        if len(reads) == 1:  # as most rules read
            return held[:1] if held and reads[0] <= held[0].source < later else ()
        if not reads or len(held) < len(reads):
            return ()
        for slot, planned in zip(held, reads, strict=False):
            if not planned <= slot.source < later or slot.key != held[0].key:  # steps that are given may go back
                return ()
            later = slot.source
        return held[: len(reads)]

    def weights(self, name: str, slots: Sequence[Slot]) -> tuple[float, ...]:
        """The weights at this step of slots of sublayer `name`."""
        return self.plan.weights(name, self.step, [slot.source for slot in slots])

    def read(self, name: str, decision: Decision, place: str | None = None) -> Slot | Extrapolation | None:
        """What a planned reuse of sublayer `name` reads at a `place` in the arena, by default its first.

        None where it is not there.
        """
        place = place or name
        slots = self.sources(place, decision)
        if len(slots) < 2:
            return slots[0] if slots else None
        if self.arena.fixed:
            return Extrapolation(slots, self.arena.weights[place])
        device = slots[0].key.device
        return Extrapolation(slots, tuple(self.generation.weight(w, device) for w in self.weights(name, slots)))

    @property
    def measured(self) -> str | None:
        """What time belongs to now, where it is measured."""
        return None if torch.compiler.is_dynamo_compiling() or self.stopwatch is None else self.stopwatch.kind

    def mark(self, kind: str | None, device: torch.device | None = None) -> None:
        """From here on time belongs to `kind`, or to nobody. Costs nothing where it is not measured, as in compiled
        graphs.

        Args:
            kind: of sublayers, or `stopwatch.REST`.
            device: on which they run; that of the mark before if it is left out.
        """
        if not torch.compiler.is_dynamo_compiling() and self.stopwatch is not None:
            self.stopwatch.mark(kind, device)

    def spare(self, kind: str, flops: int) -> None:
        """Count FLOPs that a sublayer of this kind does without although it runs."""
        self.spared[kind] += flops

    def finish(self) -> None:
        """The model has run: count the call."""
        self.count()
        self.context.calls[self.arguments, tuple(self.reused), tuple(self.spared.items())] += 1

    def count(self) -> None:
        """Count what its sublayers did."""
        self.over = True
        for turn in self.turns.by_name.values():
            runs, turn.runs = turn.runs, 0
            if runs:
                turn.collect()
                tally = self.context.tally(turn.sublayer.kind)
                computed = runs - turn.reused
                tally.reused += turn.reused
                if computed:
                    tally.computed += computed
                    tally.stored += turn.stored
                    if turn.decision.action is Action.REUSE:
                        tally.forced += computed
            turn.end()
        self.turns.call, self.turns = None, NO_TURNS

    def fuses(self, module: nn.Module, x: torch.Tensor) -> bool:
        """Whether a fused operation may stand for calling `module` (an `nn.Linear` or a norm) on `x`.

        Decided once a generation.
        """
        return self.generation.fuses(module, x)
