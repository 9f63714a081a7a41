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
from ...rules.schedule import Schedule
from .gains import monotone
from .generations import decibels
from .influence import Influence
from .recording import Recording
from .search import Costs, best_schedules

SUBLAYERS = ("spatial", "temporal", "cross", "mlp")
SEARCHED, LATER, UNIFORM = "searched", "searched after a fifth", "uniform"


@dataclasses.dataclass(frozen=True)
class Schedules:
    """The search of one sampling.

    Args:
        recordings: of full runs.
        gains: measured on them, `[K]`.
        reuse: what stands for an output.
    """

    recordings: Sequence[Recording]
    gains: np.ndarray
    reuse: str

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
        """The best schedule for every number of computed steps."""
        return self._searched(_BEGINNING)

    @cached_property
    def _later(self) -> dict[int, tuple[int, ...]]:
        """The best of which twice as many steps are computed at the beginning."""
        return self._searched(2 * _BEGINNING)

    def _searched(self, beginning: float) -> dict[int, tuple[int, ...]]:
        count = self.num_steps
        return best_schedules(self.costs, beginning=max(round(beginning * count), 1), early=round(_EARLY * count))

    def uniform(self, number: int) -> tuple[int, ...]:
        """The computed steps of a range in a window, at most `number` of them: the most, and of these the cheapest."""
        found: dict[tuple[int, ...], float] = {}
        windows = product((2, 3, 4, 5, 6), (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6), (0.8, 0.85, 0.9, 0.95))
        for reach, lo, hi in windows:
            reused = Broadcast(reach, (lo, hi)).reused(Schedule(self.num_steps))
            steps = tuple(i for i in range(self.num_steps) if i not in reused)
            if reused and len(steps) <= number and steps not in found:
                found[steps] = self.costs.total(steps)
        if not found:
            return self.best[number]
        return min(found, key=lambda steps: (-len(steps), found[steps]))

    def candidates(self, number: int) -> dict[str, tuple[int, ...]]:
        """Schedules to measure, by their titles; equal ones once."""
        named = {
            SEARCHED: self.best[number],
            LATER: self._later.get(number, self.best[number]),
            UNIFORM: self.uniform(number),
        }
        different = {steps: title for title, steps in reversed(named.items())}
        return {title: steps for steps, title in reversed(different.items())}

    def expected(self, number: int) -> float:
        """What the search expects of the best schedule, in dB up to a constant."""
        return decibels(self.costs.total(self.best[number]))

    def config(self, steps: Sequence[int]) -> PABConfig:
        """The rule that computes at `steps` of the recordings."""
        begin = self.recordings[0].begin
        return PABConfig(model=Broadcast(at=tuple(begin + i for i in steps), unit="step", reuse=self.reuse))

    def tiers(self, share: float, kinds: Collection[str]) -> dict[str, PABConfig]:
        """Schedules with more computed steps, at some of which sublayers or blocks are reused, at the same FLOPs.

        Args:
            share: of the FLOPs, at most.
            kinds: of the model's sublayers.
        """
        line = Broadcast(2, (0.3, 0.9), reuse="linear")
        groups = {"and sublayers 2 linear": SUBLAYERS, "and blocks 2 linear": ("block",)}
        found = {}
        for title, group in groups.items():
            rules: dict[str, Any] = {kind: line for kind in group if kind in kinds}
            if not rules:
                continue
            config, kind = PABConfig(**rules), next(iter(rules))
            most = 0.0
            for number in range(math.floor(share * self.num_steps) + 1, self.num_steps):
                both = dataclasses.replace(config, model=self.config(self.best[number]).model)
                reused = Plan(both, Schedule(self.recordings[0].begin + self.num_steps)).step_counts()[kind].reused
                runs = number - _PART_OF_MODEL * reused
                if most < runs <= share * self.num_steps:
                    found[title], most = both, runs
        return found


_BEGINNING = 0.1
"""The part of the schedule that is always computed: an error there decides what is drawn, on some clips and not on
others, and two recordings do not tell on which."""
_EARLY = 0.25
"""The part in which no two steps in a row are skipped, for the same reason."""
_PART_OF_MODEL = 0.97
"""What a step is taken to save of the FLOPs where all sublayers or blocks are reused; the run tells what it did."""
