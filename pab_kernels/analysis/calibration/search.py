"""The search for the steps at which the model runs: a dynamic programme over Gram matrices of recorded runs.

Written as coefficients of the recorded outputs V_i and samples X_i, with W_i the change of the final sample with V_i, A
that of the samples, and g_i the gains (how much more a wrong V_i moves the final sample where the model runs on): the
cost of a gap, the skipped steps j between the computed steps s and e, with p the one computed before s, is

    | sum_j g_j W_j (V'_j - V_j) |^2

V'_j is the interpolation through e, s and p with which steps are taken again. Where they are not, before another model
takes over, and after the last computed step, it is the prediction on the predicted samples
X_j + sum_k A[j, k] (V'_k - V_k), with k the skipped steps before j: both exactly as in `broadcast/forecaster.py`.
Squares are mean products, from the mean Gram matrix of the recordings: the programme costs seconds on the host,
whatever the size of the samples.

That the model runs on a predicted sample at e is left out of account.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from .influence import Influence

LONGEST_GAP = 10
"""Steps from one computed step to the next, at most."""

_Place = tuple[int, int]
"""The computed step before the current one (-1 for none), and the current one."""


@dataclass(frozen=True)
class Costs:
    """What the search knows of a sampling.

    Args:
        influence: of the outputs on the samples.
        gram: `[2K, 2K]` of the outputs and the samples, a mean over recordings; `[K, K]` where samples are not known.
        gains: g, `[K]`.
        holds: whether the last output stands for a skipped one, and no prediction.
    """

    influence: Influence
    gram: np.ndarray
    gains: np.ndarray
    holds: bool = False
    _gaps: dict[tuple[int, int, int], np.ndarray] = field(default_factory=dict, repr=False)

    @cached_property
    def factor(self) -> np.ndarray:
        """F, `[2K, 2K]` with `F F^T = gram`: the mean square of `c V` is that of `c F`, summed."""
        values, vectors = np.linalg.eigh(self.gram)
        return vectors * np.sqrt(np.maximum(values, 0.0))

    @cached_property
    def _outputs(self) -> np.ndarray:
        return self.factor[: self.num_steps]

    @cached_property
    def _samples(self) -> np.ndarray:
        """Zeros where samples are not known."""
        known = self.factor[self.num_steps :]
        return known if len(known) else np.zeros_like(self._outputs)

    @property
    def num_steps(self) -> int:
        """K."""
        return self.influence.num_steps

    def gap(self, p: int, s: int, e: int) -> np.ndarray:
        """The error of the final sample by the skipped steps between s and e, as a vector of which squares are summed.

        Args:
            p: computed before s; -1 for none.
            s: the computed step before the gap.
            e: the next computed step; K for none.
        """
        key = p, s, e
        if key not in self._gaps:
            self._gaps[key] = self._error(p, s, e)
        return self._gaps[key]

    def _error(self, p: int, s: int, e: int) -> np.ndarray:
        known, v, x = self.influence, self._outputs, self._samples
        corrected = known.corrects and e not in (known.handover, self.num_steps)
        errors: list[np.ndarray] = []
        total = np.zeros(v.shape[1])
        for j in range(s + 1, e):
            if corrected:
                stands = self._interpolation(p, s, e, j)
            else:
                moved = sum((known.of_output[j, s + 1 + i] * d for i, d in enumerate(errors)), x[j])
                stands = self._prediction(p, s, j, moved)
            errors.append(stands - v[j])
            total += self.gains[j] * known.final[j] * errors[-1]
        return total

    def _prediction(self, p: int, s: int, j: int, sample: np.ndarray) -> np.ndarray:
        places, v, x = self.influence.places, self._outputs, self._samples
        if p < 0 or self.holds:
            return v[s]
        at_j, at_s, at_p = (self.influence.coordinates[k] for k in (j, s, p))
        if at_j is None or at_s is None or at_p is None:
            w = (places[j] - places[s]) / (places[s] - places[p])
            return (1 + w) * v[s] - w * v[p]
        w = (at_j.position - at_s.position) / (at_s.position - at_p.position)
        noise = (1 + w) * (at_s.a * x[s] + at_s.b * v[s]) - w * (at_p.a * x[p] + at_p.b * v[p])
        return (noise - at_j.a * sample) / at_j.b

    def _interpolation(self, p: int, s: int, e: int, j: int) -> np.ndarray:
        places = self.influence.places
        through = {places[k]: self.factor[k] for k in (p, s, e) if k >= 0}
        total = np.zeros(self.factor.shape[1])
        for at, output in through.items():
            total += math.prod((places[j] - other) / (at - other) for other in through if other != at) * output
        return total

    def of(self, place: _Place, e: int) -> float:
        """The cost of the gap from a place to e."""
        error = self.gap(*place, e)
        return float(error @ error)

    def after(self, place: _Place, e: int) -> _Place:
        """Where the programme is after it has computed e."""
        p, s = place
        if e == self.influence.handover:
            return -1, e
        return (p if self.influence.places[s] == self.influence.places[e] else s), e

    def total(self, computed: Iterable[int]) -> float:
        """The cost of a schedule; its steps begin with 0, and have the step of a handover."""
        steps = [*sorted(computed), self.num_steps]
        place, cost = (-1, steps[0]), 0.0
        for e in steps[1:]:
            cost += self.of(place, e)
            place = self.after(place, e) if e < self.num_steps else place
        return cost


def best_schedules(
    costs: Costs, longest: int = LONGEST_GAP, beginning: int = 1, early: int = 0
) -> dict[int, tuple[int, ...]]:
    """The schedule of least cost for every number of computed steps that the longest gaps allow.

    Args:
        costs: of the sampling.
        longest: steps from one computed step to the next, at most.
        beginning: the first steps, of which all are computed.
        early: the first steps, of which no two in a row are skipped.

    Returns:
        The computed steps by their number.
    """
    count = costs.num_steps
    layers: list[dict[_Place, tuple[float, _Place | None]]] = [{(-1, 0): (0.0, None)}]
    ends: dict[int, tuple[float, _Place]] = {}
    for number in range(1, count + 1):
        now: dict[_Place, tuple[float, _Place | None]] = {}
        for place, (cost, _) in layers[-1].items():
            _, s = place
            reach = 1 if s + 1 < beginning else min(2, longest) if s + 2 < early else longest
            handover = costs.influence.handover
            stop = count if handover is None or s >= handover else handover
            for e in range(s + 1, min(s + reach, stop) + 1):
                total = cost + costs.of(place, e)
                if e == count:
                    if number not in ends or total < ends[number][0]:
                        ends[number] = total, place
                    continue
                to = costs.after(place, e)
                if to not in now or total < now[to][0]:
                    now[to] = total, place
        layers.append(now)
    return {number: _traced(layers, number, place) for number, (_, place) in sorted(ends.items())}


def _traced(layers: Sequence[dict[_Place, tuple[float, _Place | None]]], number: int, place: _Place) -> tuple[int, ...]:
    steps: list[int] = []
    at: _Place | None = place
    for layer in reversed(layers[:number]):
        assert at is not None
        steps.append(at[1])
        at = layer[at][1]
    return tuple(reversed(steps))
