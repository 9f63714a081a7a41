"""Generations, contexts and calls: who may read which slot, and what each sublayer's turn is."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ..ops.quantize import Quantized
from .config import PABConfig
from .plan import Action, Plan, Sublayer
from .schedule import Schedule
from .slots import CACHE_DTYPES, Arena, Key, Meter, Slot, pack


@dataclass
class Tally:
    """What the sublayers of one kind did in one context.

    Args:
        computed: runs, those below included.
        stored: runs whose output was kept.
        reused: turns that read a slot instead.
        forced: runs that the plan had as a reuse, but the slot was not the planned source.
    """

    computed: int = 0
    stored: int = 0
    reused: int = 0
    forced: int = 0


class Context:
    """One CFG branch of one generation: its slots and its counts."""

    def __init__(self, name: str, meter: Meter) -> None:
        self.name = name
        self.arena = Arena(meter)
        self.tallies: dict[str, Tally] = {}
        self.flops = 0
        self.flops_without = 0
        self._inputs: Hashable = None
        self._condition: weakref.ref[torch.Tensor] | None = None

    def enter(self, inputs: Hashable, condition: torch.Tensor | None) -> None:
        """A call of the model begins. Where it does not continue the last one, every slot is let go.

        Args:
            inputs: shapes, dtypes and devices of the model's inputs.
            condition: the prompt's tensor, if the context has only the order of the calls for a name: another one than in the last call
                tells that a branch came or went. One made anew for each call is gone by then, and tells nothing.
        """
        last = None if self._condition is None else self._condition()
        changed = condition is not None and last is not None and condition is not last
        if changed or self._inputs not in (None, inputs):
            self.arena.clear()
        self._inputs = inputs
        self._condition = None if condition is None else weakref.ref(condition)

    def count(self, flops: int, *, run: bool) -> None:
        """Count FLOPs of the model, run or saved."""
        self.flops_without += flops
        if run:
            self.flops += flops


@dataclass(frozen=True)
class Store:
    """Where a sublayer's output is to be put.

    Args:
        point: whether it is kept before or after the gate.
        dtype: the 8-bit dtype that it is kept in, or None for its own.
    """

    point: Literal["pre_gate", "post_gate"]
    dtype: torch.dtype | None
    _arena: Arena
    _name: str
    _key: Key
    _step: int

    def put(self, value: Any) -> None:
        """Keep `value`, quantised if it is not yet."""
        own = value.dtype if isinstance(value, torch.Tensor) else self._key.dtype if isinstance(value, Quantized) else None
        self._arena.put(self._name, pack(value, self.dtype), self._key, self._step, own)


@dataclass(frozen=True)
class Turn:
    """One sublayer's turn in a call: read `slot` instead of computing, or compute and, if `store` is given, keep the output."""

    slot: Slot | None = None
    store: Store | None = None


class Call:
    """One call of the model: a context at a step."""

    def __init__(self, generation: Generation, context: Context, step: int) -> None:
        self.generation = generation
        self.context = context
        self.step = step
        self._had_turn: set[str] = set()

    def turn(self, sublayer: Sublayer, x: torch.Tensor, flops: int = 0) -> Turn:
        """What `sublayer`, with input `x`, is to do now; counted, and a slot read for the last time is let go.

        A sublayer that runs several times in one call (chunks, layers that share a module) has its slot for the first time only.

        Args:
            sublayer: one of the plan's.
            x: its input (only shape, dtype and device are read).
            flops: of computing it.
        """
        plan = self.generation.plan
        if plan is None or sublayer.name not in plan.rows:
            self.context.count(flops, run=True)
            return Turn()
        decision = plan.decision(sublayer.name, self.step)
        tally = self.context.tallies.setdefault(sublayer.kind, Tally())
        arena, key = self.context.arena, Key.of(x)
        action = decision.action
        if sublayer.name in self._had_turn:
            tally.computed += 1
            tally.forced += action is Action.REUSE
            self.context.count(flops, run=True)
            return Turn()
        self._had_turn.add(sublayer.name)
        if action is Action.REUSE:
            slot = arena.get(sublayer.name)
            earlier = slot is not None and slot.source < self.step  # steps that are given may go back
            if slot is not None and earlier and decision.source is not None and slot.serves(key, decision.source):
                tally.reused += 1
                self.context.count(flops, run=False)
                if decision.last:
                    arena.release(sublayer.name)
                return Turn(slot=slot)
            tally.forced += 1
            action = Action.COMPUTE if decision.last else Action.STORE
        tally.computed += 1
        self.context.count(flops, run=True)
        if action is not Action.SKIP:  # skipped in the plan, but its block was forced to run: what it holds is still to be read
            arena.release(sublayer.name)
        if action is not Action.STORE:
            return Turn()
        tally.stored += 1
        config = self.generation.config
        point: Literal["pre_gate", "post_gate"] = "post_gate" if config.cache_point == "post_gate" else "pre_gate"
        return Turn(store=Store(point, CACHE_DTYPES[config.cache_dtype], arena, sublayer.name, key, self.step))

    def fuses(self, module: nn.Module, x: torch.Tensor) -> bool:
        """Whether a fused operation may stand for calling `module` (an `nn.Linear` or a norm) on `x`; decided once a generation."""
        return self.generation.fuses(module, x)


class Generation:
    """One sampling run: its plan, its step, its contexts.

    Args:
        config: the rules.
        sublayers: the model's.
        num_steps, timesteps: the full schedule.
        scheduler: whose `step` ends each step; without one, a step ends when a context is called again.
    """

    def __init__(
        self,
        config: PABConfig,
        sublayers: Sequence[Sublayer],
        *,
        num_steps: int | None = None,
        timesteps: Sequence[float] | None = None,
        scheduler: Any = None,
    ) -> None:
        self.config = config
        self.sublayers = tuple(sublayers)
        self.schedule = Schedule.of(num_steps, timesteps)
        self.scheduler = scheduler
        self.plan: Plan | None = None
        self.step = 0
        self.contexts: dict[str, Context] = {}
        self.meter = Meter()
        self.plain_calls = 0
        self._called: dict[str, int] = {}
        self._fuses: dict[tuple[nn.Module, Key], bool] = {}

    @property
    def started(self) -> bool:
        """Whether the model was called."""
        return self.plan is not None

    @property
    def used_up(self) -> bool:
        """Whether every step of the schedule was taken."""
        return self.step >= self.schedule.num_steps

    def start(self, begin: int = 0) -> Plan:
        """Make the plan, for a schedule entered at step `begin`."""
        self.schedule = Schedule(self.schedule.num_steps, self.schedule.timesteps, begin)
        self.plan = Plan(self.config, self.schedule, self.sublayers)
        self.step = begin
        return self.plan

    def open(self, name: str | None = None, step: int | None = None) -> Call:
        """A call of the model in context `name`, at `step` if it is given.

        Raises:
            RuntimeError: all steps of the plan are used.
        """
        if self.plan is None:
            self.start()
        label = (name or "").replace("#", "##")  # a single # parts a name from the order of the call
        if step is None and self.scheduler is None and label in self._called:
            self.advance()
        at = self.step if step is None else step
        if not self.schedule.begin <= at < self.schedule.num_steps:
            first = f" from {self.schedule.begin} on" if self.schedule.begin else ""
            way = (
                "with pab.generation(model, num_steps=...):"
                if self.scheduler is None
                else "set_timesteps on the scheduler of an enabled pipeline; pab.enable every pipeline that shares the model"
            )
            raise RuntimeError(
                f"the plan has {self.schedule.num_steps} steps{first} and this call would be step {at}; begin a further generation: {way}"
            )
        if at != self.step:
            self._called.clear()
            self.step = at
        order = self._called.get(label, 0)
        self._called[label] = order + 1
        key = f"{label}#{order}" if order or not label else label
        if key not in self.contexts:
            self.contexts[key] = Context(key, self.meter)
        return Call(self, self.contexts[key], self.step)

    def advance(self) -> None:
        """End the step; after the last one every slot is let go."""
        self.step += 1
        self._called.clear()
        if self.used_up:
            self.release()

    def release(self) -> None:
        """Let go of every slot."""
        for context in self.contexts.values():
            context.arena.clear()

    def fuses(self, module: nn.Module, x: torch.Tensor) -> bool:
        """See `Call.fuses`."""
        key = (module, Key((x.shape[-1],), x.dtype, x.device))
        if key not in self._fuses:
            self._fuses[key] = is_plain(module, nn.Linear, nn.LayerNorm, nn.RMSNorm) and all(
                type(p) is nn.Parameter and p.device == x.device and p.dtype == x.dtype and p.stride(-1) == 1 for p in module.parameters()
            )
        return self._fuses[key] and not _autocast(x)


def is_plain(module: nn.Module, *classes: type) -> bool:
    """Whether `module` is exactly of one of `classes`, with no hook and no `forward` of its own."""
    return (
        type(module) in classes
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and "forward" not in vars(module)
    )


def _autocast(x: torch.Tensor) -> bool:
    kind = x.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)
