"""A config to start from, derived from measured differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from ...rules.config import Broadcast, PABConfig

Curves = Mapping[str, Sequence[float | None]]
"""A value for every step, by kind; None if it was not measured."""

PYRAMID = ("spatial", "temporal", "cross")
"""Published order of ranges, the shortest first: cross attention differs least (PAB, arXiv 2408.12588, section 3.1)."""
MIDDLE = (0.15, 0.85)
"""The stable part of the schedule in the paper's measurements (section 3.1), which defines a small difference."""
SMALL = 2.0
"""A difference is small up to this multiple of the median of the middle. A choice of this package."""
LONGEST_RANGE = 6
"""The longest proposed range: that of cross attention in the paper's PAB246."""


@dataclass(frozen=True)
class Start:
    """A config to start from.

    Args:
        window: steps of the window, `lo <= i < hi`.
        config: the rules.
        drift: root of the mean squared difference in the window, by kind.
        follows_order: whether the drift has the published order, spatial largest and cross least.
    """

    window: tuple[int, int]
    config: PABConfig
    drift: dict[str, float]
    follows_order: bool

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return {
            "window": list(self.window),
            "config": self.config.to_dict(),
            "drift": self.drift,
            "follows_order": self.follows_order,
        }


def starting_config(relative: Curves, mse: Curves, num_steps: int) -> Start | None:
    """A window and ranges from measured differences.

    1. A step is calm if for every attention kind its relative difference is at most twice that kind's median over the
       middle 70 % of the schedule. The window is the longest run of calm steps.
    2. A held output drifts by about its difference a step, and the outputs of all kinds are added to the same stream.
       With `drift` the root of a kind's mean squared difference in the window, the kind that drifts most gets range 2,
       and the others may drift as far: `range = 1 + floor(largest drift / own drift)`, at most 6.
    3. Ranges follow the published order, spatial <= temporal <= cross: a longer range is cut to the one after it.

    Args:
        relative: by kind, the relative difference at every step; kinds other than attention get no rule.
        mse: by kind, the mean squared difference at every step.
        num_steps: of the schedule.

    Returns:
        The config, or None if attention was not measured in the middle or is not finite there.
    """
    attention = [kind for kind in PYRAMID if kind in relative]
    inside = middle(num_steps)
    typical = {kind: _present(relative[kind], inside) for kind in attention}
    if not typical or not all(typical.values()):
        return None
    bounds = {kind: SMALL * median(values) for kind, values in typical.items()}

    def calm(i: int) -> bool:
        return all((v := relative[kind][i]) is not None and v <= bounds[kind] for kind in attention)

    window = _longest(list(map(calm, range(num_steps))))
    if window[0] == window[1]:  # the differences are not finite
        return None
    drift = {kind: math.sqrt(mean(_present(mse[kind], range(*window)))) for kind in attention}
    if not all(map(math.isfinite, drift.values())):
        return None
    largest = max(drift.values())
    ranges = {
        kind: LONGEST_RANGE if own == 0 else min(LONGEST_RANGE, 1 + int(largest / own)) for kind, own in drift.items()
    }
    shortest = LONGEST_RANGE
    for kind in reversed(attention):
        shortest = ranges[kind] = min(ranges[kind], shortest)
    fractions = (round(window[0] / num_steps, 4), round(window[1] / num_steps, 4))
    rules: dict[str, Any] = {kind: Broadcast(reach, fractions) for kind, reach in ranges.items()}
    descending = list(drift.values())
    return Start(window, PABConfig(**rules), drift, descending == sorted(descending, reverse=True))


def middle(num_steps: int) -> range:
    """The steps of `MIDDLE`."""
    return range(round(MIDDLE[0] * num_steps), round(MIDDLE[1] * num_steps))


def _present(curve: Sequence[float | None], steps: range) -> list[float]:
    return [v for i in steps if (v := curve[i]) is not None]


def _longest(flags: Sequence[bool]) -> tuple[int, int]:
    """The longest run of True, as `lo <= i < hi`."""
    best, begin = (0, 0), 0
    for i, flag in enumerate([*flags, False]):
        if not flag:
            best = max(best, (begin, i), key=lambda run: run[1] - run[0])
            begin = i + 1
    return best
