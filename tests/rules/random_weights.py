"""Weights as `pab.fit` would give them, but at random."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from pab_kernels.rules.config import PABConfig
from pab_kernels.rules.fitted import FittedRow, FittedWeights
from pab_kernels.rules.plan import Plan, Sublayer
from pab_kernels.rules.schedule import Schedule


def with_random_weights(
    config: PABConfig, sublayers: Sequence[Sublayer], schedule: Schedule, seed: int = 0
) -> PABConfig:
    """The config with a weight for every linear reuse of the sublayers."""
    drawn = random.Random(seed)
    plan = Plan(config, schedule, tuple(sublayers))
    rows = []
    for name, row in plan.rows.items():
        reads = tuple((i, *d.reads) for i, d in zip(plan.steps, row, strict=True) if len(d.reads) == 2)
        if reads:
            rows.append(FittedRow(reads, {name: tuple(drawn.uniform(-0.5, 1.5) for _ in reads)}))
    return replace(config, fitted=FittedWeights(schedule.num_steps, tuple(rows), schedule.timesteps))
