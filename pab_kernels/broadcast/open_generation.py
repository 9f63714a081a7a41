"""A generation with an unknown schedule: each step is decided by the timestep that a callback returns.

A plan made in advance keeps only outputs that a later step reads; here every output that might be reused is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from ..rules.config import Broadcast, PABConfig
from ..rules.plan import Action, Decision, Plan, Sublayer
from ..rules.schedule import MOST_STEPS, Schedule
from .generation import Generation
from .slots import Meters


class OpenPlan(Plan):
    """The decisions of the current step; none is known in advance.

    Rules hold outputs, in windows of unrounded timesteps.
    """

    timestep: float

    @property
    def steps(self) -> range:
        """Empty: no step is planned."""
        return range(0)

    @cached_property
    def rows(self) -> dict[str, tuple[Decision, ...]]:
        """An empty row for each sublayer."""
        return {s.name: () for s in self.sublayers}

    @cached_property
    def runs(self) -> dict[str, range]:
        """Every step that there can be."""
        return {s.name: range(MOST_STEPS) for s in self.sublayers}

    @cached_property
    def decided(self) -> frozenset[str]:
        """Names of the sublayers whose runs are decided: all that take part."""
        return frozenset(self.rows)

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """Empty: rules without effect cannot be found without a schedule."""
        return ()

    @cached_property
    def _rules(self) -> dict[str, Broadcast]:
        rules = {
            s.name: self.config.rule(s.kind, s.layer) for s in self.sublayers if self.config.may_reuse(s.kind, s.layer)
        }
        return {name: rule for name, rule in rules.items() if rule is not None}

    def at(self, timestep: float) -> OpenPlan:
        """Set the timestep of the current step, and return the plan."""
        object.__setattr__(self, "timestep", timestep)
        return self

    def decision(self, name: str, step: int) -> Decision:
        """Reuse the last output if the rule asks for it; else compute, and keep the output if a rule may reuse it."""
        rule = self._rules.get(name)
        if rule is None:
            return Decision(Action.COMPUTE)
        reused = step % (rule.range or 1) and rule.covers(self.timestep)
        return Decision(Action.REUSE, (0,), held=1) if reused else Decision(Action.STORE, held=1)

    def decisions(self, step: int) -> list[Decision]:
        """The decision of each sublayer."""
        return [self.decision(name, step) for name in self.rows]

    def program(self, step: int) -> list[tuple[str, Decision]]:
        """Name and decision of each sublayer."""
        return list(zip(self.rows, self.decisions(step), strict=True))

    def __str__(self) -> str:
        return "decided step by step: the schedule is not known"


class OpenGeneration(Generation):
    """A generation without a schedule; a rising timestep begins another run in it.

    Args:
        config: rules with windows in timesteps.
        sublayers: the model's sublayers.
        clock: returns the timestep; called once a step, for which the host may wait for the device.
        timed: whether seconds are measured by kind.

    Raises:
        ValueError: `clock` returns no number.
    """

    def __init__(
        self, config: PABConfig, sublayers: Sequence[Sublayer], clock: Callable[[], Any], *, timed: bool = False
    ) -> None:
        super().__init__(config, sublayers, num_steps=MOST_STEPS, timed=timed)
        self._clock = clock
        self._plan = OpenPlan(config, Schedule(MOST_STEPS), self.sublayers).at(self._asked())
        self.plan = self._plan

    def _asked(self) -> float:
        given = self._clock()
        try:
            return float(given)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(
                f"current_timestep_callback must give the timestep, one number; it gave {given!r}"
            ) from None

    def advance(self, to: int | None = None) -> None:
        """Begin the next step, or another run if the timestep rises."""
        before, now = self._plan.timestep, self._asked()
        super().advance()
        if now > before:
            self.release()
            self.contexts, self.meter, self.step, self.plain_calls = {}, Meters(), 0, 0
            self._costs, self._fuses, self._decided = {}, {}, {}
        self._plan.at(now)
