"""One call of the model: its turns and its counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..rules.plan import Action, Decision
from .context import Context
from .inputs import NO_INPUTS, Inputs
from .lending import Comparison, Pairs, Receiver, Watch
from .slots import Arena, Extrapolation, Slot
from .turn import NO_TURNS, Turns

if TYPE_CHECKING:
    from .generation import Generation
    from .offload import Offload


class Call:
    """One call of the model: a context at a step.

    Args:
        generation: the generation that it belongs to, which has started.
        context: its context.
        step: its step of the full schedule.
        inputs: its arguments, of which no tensor is kept alive.
    """

    def __init__(self, generation: Generation, context: Context, step: int, inputs: Inputs = NO_INPUTS) -> None:
        assert generation.plan is not None, "it has started"
        self.generation = generation
        self.plan = generation.plan
        self.context = context
        self.step = step
        self.arguments = inputs.arguments
        """The arguments of the call, for counting FLOPs."""
        self.shape = inputs.latents.shape if isinstance(inputs.latents, torch.Tensor) else torch.Size()
        """Shape of the latents; empty if they are no tensor."""
        self.stopwatch = context.stopwatch
        self.reused: list[str] = []
        """Places of the reused outputs, in order."""
        self.text: tuple[torch.Tensor, ...] = ()
        """During the call, the tensors that the model makes the text from, if keys and values of it may be kept."""
        self.spared: Counter[str] = Counter()
        """FLOPs saved inside sublayers that did run, by kind."""
        self.offload: Offload | None = None
        """During the call, what moves slots to host memory and back, if any are there."""
        self._watches: list[Watch] = []
        self._compared: set[Comparison] = set()
        self._spans: dict[tuple[str, ...], bool] = {}
        self.turns = NO_TURNS
        """One turn for each sublayer of the plan, after `prepare`."""
        self.over = False
        """Whether the model has finished."""

    @property
    def arena(self) -> Arena:
        """The slots of its context."""
        return self.context.arena

    def arena_of(self, name: str) -> Arena:
        """The slots of a sublayer, or those of the whole model, which no CUDA graph writes."""
        return self.context.outputs if name == self.plan.whole else self.context.arena

    def prepare(self, turns: Turns | None = None) -> None:
        """Decide the turns of this call, before the model runs.

        Sublayers that are never reused run plainly, unless time is measured.

        Args:
            turns: the objects to fill; default new ones.
        """
        self.turns = turns = Turns(self.plan.sublayers) if turns is None else turns
        plan, step, by_name = self.plan, self.step, turns.by_name
        timed = self.stopwatch is not None
        for name, decision in zip(by_name, plan.decisions(step), strict=True) if timed else plan.program(step):
            by_name[name].decide(self, decision, self.read(name, decision) if decision.reads else None)
        turns.call = self
        if self.offload is not None:
            self.offload.begin()

    def sources(self, place: str, decision: Decision) -> tuple[Slot, ...]:
        """The slots that a planned reuse reads, newest first.

        Empty unless all of them are there, each written at its planned step or later.
        """
        if place in self.plan.spans and not self._complete(self.plan.spans[place]):
            return ()
        held, reads, later = self.arena_of(place).held(place), decision.reads, self.step
        if not reads or len(held) < len(reads):
            return ()
        for slot, planned in zip(held, reads, strict=False):
            if not planned <= slot.source < later or slot.key != held[0].key:  # steps named by the user may go back
                return ()
            later = slot.source
        return held[: len(reads)]

    def _complete(self, span: tuple[str, ...]) -> bool:
        """Whether all members of a span were stored at the same steps."""
        found = self._spans.get(span)
        if found is None:
            first, *others = ([slot.source for slot in self.arena.held(name)] for name in span)
            found = self._spans[span] = all(sources == first for sources in others)
        return found

    def weights(self, name: str, slots: Sequence[Slot]) -> tuple[float, ...]:
        """The weights of these slots of sublayer `name` at this step."""
        return self.plan.weights(name, self.step, [slot.source for slot in slots])

    def read(self, name: str, decision: Decision, place: str | None = None) -> Slot | Extrapolation | None:
        """The slot or extrapolation that a planned reuse of sublayer `name` reads; None if it is not there.

        Args:
            name: of the sublayer.
            decision: the planned reuse.
            place: key in the arena; default that of the sublayer's first run in a call.
        """
        place = place or name
        if place in self.plan.spans and not self._complete(self.plan.spans[place]):
            return None
        if len(decision.reads) == 1:  # the common case
            newest = self.arena_of(place).get(place)
            return newest if newest is not None and decision.reads[0] <= newest.source < self.step else None
        slots = self.sources(place, decision)
        if not slots:
            return None
        if self.arena_of(place).fixed:
            return Extrapolation(slots, self.arena.weights[place])
        device = slots[0].key.device
        return Extrapolation(slots, tuple(self.generation.weight(w, device) for w in self.weights(name, slots)))

    @property
    def measured(self) -> str | None:
        """The kind that time is attributed to now; None if time is not measured."""
        return None if self.stopwatch is None or torch.compiler.is_dynamo_compiling() else self.stopwatch.kind

    def mark(self, kind: str | None, device: torch.device | None = None) -> None:
        """Attribute time from now on to `kind`. Does nothing if time is not measured, or in a compiled graph.

        Args:
            kind: a kind of sublayers, `stopwatch.REST`, or None to stop.
            device: the device that works; default that of the last mark.
        """
        if self.stopwatch is not None and not torch.compiler.is_dynamo_compiling():
            self.stopwatch.mark(kind, device)

    def spare(self, kind: str, flops: int) -> None:
        """Count FLOPs that were saved inside a sublayer of this kind that ran."""
        self.spared[kind] += flops

    def watch(self, receiver: Receiver, pairs: Pairs) -> None:
        """Watch what a receiver got until the call ends; see `Watch`."""
        comparison = receiver.comparison
        compares = not comparison.begun and comparison not in self._compared
        self._compared.add(comparison)
        self._watches.append(Watch(receiver, pairs, compares))

    def finish(self) -> None:
        """Count the call after the model has run."""
        for watch in self._watches:
            watch.end()
        self.count()
        self.context.calls[self.arguments, tuple(self.reused), tuple(self.spared.items())] += 1

    def count(self) -> None:
        """Count the runs, stores and reuses of all sublayers, and end their turns."""
        self.over, self.text = True, ()
        for turn in self.turns.by_name.values():
            if turn.call is None:
                continue
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
        """Whether a fused operation may replace calling `module` (an `nn.Linear` or a norm) on `x`.

        Decided once a generation.
        """
        return self.generation.fuses(module, x)
