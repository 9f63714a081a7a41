"""A generation whose schedule nobody tells: decided step by step, by the timestep that a callback gives.

Where a plan is made in advance, what no later step reads is not kept. Here every output that might be reused is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from ..rules.config import Broadcast, PABConfig
from ..rules.plan import Action, Decision, Plan, Sublayer
from ..rules.schedule import MOST_STEPS, Schedule
from .generation import Generation
from .slots import Meter


class OpenPlan(Plan):
    """The decisions of the step that runs.

    None is known in advance. Rules hold outputs, in windows of timesteps that are not rounded.
    """

    timestep: float

    @property
    def steps(self) -> range:
        """None is planned."""
        return range(0)

    @cached_property
    def rows(self) -> dict[str, tuple[Decision, ...]]:
        """The sublayers, without decisions."""
        return {s.name: () for s in self.sublayers}

    @cached_property
    def idle(self) -> frozenset[str]:
        """Sublayers that are always computed."""
        return frozenset(self.rows) - set(self._rules)

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """Nothing is known to have no effect."""
        return ()

    @cached_property
    def _rules(self) -> dict[str, Broadcast]:
        rules = {s.name: self.config.rule(s.kind, s.layer) for s in self.sublayers}
        return {name: rule for name, rule in rules.items() if rule is not None and rule.range > 1}

    def at(self, timestep: float) -> OpenPlan:
        """This plan, at a step of `timestep`."""
        object.__setattr__(self, "timestep", timestep)
        return self

    def decision(self, name: str, step: int) -> Decision:
        """Reuse what was computed last where the rule asks for it.

        Else compute, and keep it where it may ever be reused.
        """
        rule = self._rules.get(name)
        if rule is None:
            return Decision(Action.COMPUTE)
        reused = step % rule.range and rule.covers(self.timestep)
        return Decision(Action.REUSE, (0,), held=1) if reused else Decision(Action.STORE, held=1)

    def decisions(self, step: int) -> list[Decision]:
        """A decision for each sublayer."""
        return [self.decision(name, step) for name in self.rows]

    def __str__(self) -> str:
        return "decided step by step: the schedule is not known"


class OpenGeneration(Generation):
    """A generation that goes on until it is ended, or until the timestep rises: then another one has begun.

    Args:
        config: rules of windows in timesteps.
        sublayers: the model's.
        clock: gives the timestep; asked once a step, for which the host may wait for the device.
        timed: whether seconds are measured by kind.

    Raises:
        ValueError: `clock` gives no number.
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
        """A further step begins, or another generation."""
        before, now = self._plan.timestep, self._asked()
        super().advance()
        if now > before:
            self.release()
            self.contexts, self.meter, self.step, self.plain_calls = {}, Meter(), 0, 0
            self._costs, self._fuses, self._decided = {}, {}, {}
        self._plan.at(now)
