"""Candidates for the steps at which the model runs, by the number of these steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np

from ...rules.config import Broadcast, PABConfig
from ...rules.plan import Plan
from ...rules.presets import FEWEST_STEPS, SKIPPING
from ...rules.schedule import Schedule
from .gains import monotone
from .generations import Way, decibels
from .influence import Influence
from .recording import Recording
from .search import Costs, best_schedules

SUBLAYERS = ("spatial", "temporal", "cross", "mlp")
SEARCHED, LATE, PRESET, UNIFORM = "searched", "late", "preset", "uniform"


@dataclasses.dataclass(frozen=True)
class Schedules:
    """The search of one sampling.

    Args:
        recordings: of full runs.
        gains: measured on them, `[K]`.
        reuse: what stands for an output.
        asked: the number of steps that the call gets.
        takes_steps: whether it takes others.
        kinds: of the model's sublayers.
    """

    recordings: Sequence[Recording]
    gains: np.ndarray
    reuse: str
    asked: int
    takes_steps: bool = False
    kinds: Collection[str] = ()

    @property
    def influence(self) -> Influence:
        """That of the recordings, whose schedules are equal."""
        return self.recordings[0].influence

    @property
    def num_steps(self) -> int:
        """K."""
        return self.influence.num_steps

    @cached_property
    def costs(self) -> Costs:
        """With gains that fall: early steps move the result most, also where that was not measured."""
        gram = sum((r.gram() for r in self.recordings[1:]), self.recordings[0].gram()) / len(self.recordings)
        return Costs(self.influence, gram.numpy(), monotone(self.gains), holds=self.reuse == "hold")

    @cached_property
    def best(self) -> dict[int, tuple[int, ...]]:
        """The best schedule for every number of computed steps.

        It skips no early step where every second one of the others, without the last, are enough.
        """
        early, last = round(_EARLY * self.num_steps), self.num_steps - 1
        others = best_schedules(self.costs, early=round(_EARLY / 2 * self.num_steps))
        careful = best_schedules(self.costs, early=early)
        decided = best_schedules(self.costs, longest=2, beginning=early)
        return others | careful | {number: at for number, at in decided.items() if at[-1] == last}

    def searched(self, number: int) -> Way:
        """The best schedule for a number of computed steps."""
        return self._way(SEARCHED, self.best[number])

    def uniform(self, number: int) -> Way:
        """A range in a window, at most `number` computed steps: the most, and of these the cheapest."""
        found: dict[tuple[int, ...], float] = {}
        windows = product((2, 3, 4, 5, 6), (0.0, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6), (0.8, 0.85, 0.9, 0.95))
        for reach, lo, hi in windows:
            steps = self._computed(Broadcast(reach, (lo, hi)))
            if len(steps) < self.num_steps and len(steps) <= number and steps not in found:
                found[steps] = self.costs.total(steps)
        if not found:
            return self._way(UNIFORM, self.best[number])
        cheapest = min(found, key=lambda at: (-len(at), found[at]))
        return self._way(UNIFORM, cheapest)

    def fewer(self, number: int) -> Way | None:
        """As many steps as cost the same without PAB; None if the pipeline is not sampled with other numbers."""
        steps = min(math.floor(number / self.num_steps * self.asked + 1e-6), self.asked - 1)
        return Way(f"{steps} steps", None, steps, steps / self.asked) if self.takes_steps and steps else None

    def shorter(self, number: int, part: float) -> Way | None:
        """A sampling of fewer steps, of which every second one at the end is skipped, at most a part of those computed.

        None where steps of the recordings are not those of the call: its computed steps could not be named.
        """
        steps = min(2 * number - 2, round((1 + part) * number))
        at = late(steps, number) if self.takes_steps and FEWEST_STEPS <= steps < self.asked else None
        if at is None or self.num_steps != self.asked or self.recordings[0].begin:
            return None
        rule = Broadcast(at=at, unit="step", reuse=self.reuse, num_steps=steps)
        return Way(f"{steps} steps, {number} computed", PABConfig(model=rule), steps, number / self.asked)

    def preset(self, number: int) -> Way | None:
        """Of the presets that skip the model, the one with most computed steps, at most `number`; None if none has."""
        rules = (PABConfig.preset(name).rule("model", 0) for name in SKIPPING)
        fitting = [at for rule in rules if rule is not None and len(at := self._computed(rule)) <= number]
        return self._way(PRESET, max(fitting, key=len)) if fitting else None

    def ways(self, number: int) -> list[Way]:
        """What is compared at the cost of a number of computed steps, the most promising first; equal ones once."""
        most, few = (self.shorter(number, part) for part in _SKIPPED)
        rules = (self.late(number), most, self.searched(number), self.preset(number))
        listed = (*rules, self.fewer(number), few, self.uniform(number))
        different = {(str(way.config), way.num_steps): way for way in reversed(listed) if way is not None}
        return list(reversed(different.values()))

    def late(self, number: int) -> Way:
        """Every second one of the late steps is skipped; the searched schedule if that is not possible.

        What a clip shows is decided early: with all early steps computed, clips differ least in how close they stay.
        More of the last steps than two are computed where that costs less, if no early step is skipped for it.
        """
        latest, *others = [late(self.num_steps, number, ending) for ending in range(2, self.num_steps)]
        if latest is None or self.num_steps != self.asked or self.influence.handover not in (None, *latest):
            return self.searched(number)
        early = set(range(round(_EARLY * self.num_steps)))
        known = [at for at in others if at and early <= set(at) and self.influence.handover in (None, *at)]
        return self._way(LATE, min([latest, *known], key=self.costs.total))

    @property
    def fewest_late(self) -> int:
        """The fewest computed steps of a plan for a floor: a late schedule then skips none of the first 30 %."""
        number = math.ceil((1 + _DECIDED) * self.num_steps / 2 + 0.5)
        return number if self.late(number).title == LATE else min(self.best)

    def _computed(self, rule: Broadcast) -> tuple[int, ...]:
        reused = rule.reused(Schedule(self.num_steps)) - {self.influence.handover}
        return tuple(i for i in range(self.num_steps) if i not in reused)

    def _way(self, title: str, steps: Sequence[int]) -> Way:
        return Way(title, PABConfig(model=self._rule(steps)), self.asked, len(steps) / self.num_steps)

    def _rule(self, steps: Sequence[int]) -> Broadcast:
        begin = self.recordings[0].begin
        at, total = tuple(begin + i for i in steps), begin + self.num_steps
        return Broadcast(at=at, unit="step", reuse=self.reuse, num_steps=total)

    def expected(self, number: int) -> float:
        """What the search expects of the best schedule, in dB up to a constant."""
        return decibels(self.costs.total(self.best[number]))

    def tiers(self, share: float) -> list[Way]:
        """Schedules with more computed steps, at some of which sublayers or blocks are reused, at the same FLOPs."""
        line = Broadcast(2, (0.3, 0.9), reuse="linear")
        groups = {"searched and sublayers 2 linear": SUBLAYERS, "searched and blocks 2 linear": ("block",)}
        found = {}
        for title, group in groups.items():
            rules: dict[str, Any] = {kind: line for kind in group if kind in self.kinds}
            if not rules:
                continue
            config, kind = PABConfig(**rules), next(iter(rules))
            most = 0.0
            for number in range(math.floor(share * self.num_steps) + 1, self.num_steps):
                if number not in self.best:
                    continue
                both = dataclasses.replace(config, model=self._rule(self.best[number]))
                reused = Plan(both, Schedule(self.recordings[0].begin + self.num_steps)).step_counts()[kind].reused
                runs = number - _PART_OF_MODEL * reused
                if most < runs <= share * self.num_steps:
                    found[title], most = Way(title, both, self.asked, runs / self.num_steps), runs
        return list(found.values())


def late(num_steps: int, computed: int, ending: int = 2) -> tuple[int, ...] | None:
    """The computed steps where every second one of the last steps is skipped, but not the last `ending`.

    Returns:
        None if steps of other numbers than every second one would have to be skipped, or none.
    """
    first = num_steps + 1 - ending - 2 * (num_steps - computed)
    if first < 1 or computed >= num_steps:
        return None
    return (*range(first), *range(first + 1, num_steps - ending, 2), *range(num_steps - ending, num_steps))


_EARLY = 0.5
"""The part of the schedule in which no step is skipped where few are, and else no two in a row; half of it where that
leaves none. An error there decides what is drawn, on some clips and not on others, and few recordings do not tell on
which."""
_DECIDED = 0.3
"""The part of the schedule of which plans for a floor skip no step. With some skipped, a few clips of a hundred are far
off, too few to show among those that verify."""
_SKIPPED = (1.0, 0.25)
"""Skipped steps for each computed one, in samplings of fewer steps."""
_PART_OF_MODEL = 0.97
"""What a step is taken to save of the FLOPs where all sublayers or blocks are reused; the run tells what it did."""
