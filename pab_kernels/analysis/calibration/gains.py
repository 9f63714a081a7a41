"""Gains: how much more a wrong output moves the final sample where the model runs on, than through the scheduler alone.

At a few steps i, the error dv_i of the prediction from the two steps before is added to the recorded output, and the
run goes on from there:

    g_i = |dx_final| / (|W_i| |dv_i|)

with W_i the influence of output i on the final sample, or 1 where it is not known. The gains are geometric means over
recordings, interpolated in the logarithm between the steps, and at least 1 where W is known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from .influence import Influence
from .recording import Recording

PARTS = (0.15, 0.35)
"""The steps at which gains are measured, as parts of the schedule. Gains fall to 1 in its second half."""
PARTS_OF_MODULES = (0.1, 0.35, 0.6, 0.85)
"""Those where nothing is known of a scheduler, and gains are the whole change of the result."""


def gain_steps(influence: Influence, parts: Sequence[float] = PARTS) -> tuple[int, ...]:
    """The steps at which gains are measured: two steps of other noise levels lie before each, and one after it."""
    count = influence.num_steps
    possible = [i for i in range(count - 1) if sources(influence.places, i) is not None]
    return tuple(sorted({min(possible, key=lambda i: abs(i - part * count)) for part in parts})) if possible else ()


def sources(places: Sequence[int], step: int) -> tuple[int, int] | None:
    """The two steps before `step` that its output is predicted from: the newest ones of two other noise levels.

    Args:
        places: for each step the number of different noise levels before it.
        step: the first one of its noise level.

    Returns:
        The newer one first; None if there are none, or if `step` is not the first of its level.
    """
    if step < 1 or places[step - 1] == places[step]:
        return None
    older = [k for k in range(step - 1) if places[k] < places[step - 1]]
    return (step - 1, older[-1]) if older else None


def prediction_error(recording: Recording, step: int) -> torch.Tensor:
    """What predicting an output from the two before it misses, on recorded samples, float64."""
    known = recording.influence
    found = sources(known.places, step)
    assert found is not None, "one of `gain_steps`"
    steps = step, *found
    at_j, at_s, at_p = (known.coordinates[k] for k in steps)
    v_j, v_s, v_p = (recording.outputs[k].double() for k in steps)
    if at_j is None or at_s is None or at_p is None:
        return 2 * v_s - v_p - v_j
    x_j, x_s, x_p = (recording.samples[k].double() for k in steps)
    w = (at_j.position - at_s.position) / (at_s.position - at_p.position)
    noise = (1 + w) * (at_s.a * x_s + at_s.b * v_s) - w * (at_p.a * x_p + at_p.b * v_p)
    return (noise - at_j.a * x_j) / at_j.b - v_j


def interpolated(measured: Mapping[int, Sequence[float]], num_steps: int, least: float) -> np.ndarray:
    """Geometric means at some steps, interpolated in the logarithm for all steps, and at least `least`."""
    steps = sorted(measured)
    if not steps:
        return np.full(num_steps, max(least, 1.0))
    logs = [np.mean([math.log(max(value, 1e-6)) for value in measured[step]]) for step in steps]
    return np.maximum(np.exp(np.interp(np.arange(num_steps), steps, logs)), least)


def with_usual(gains: np.ndarray) -> np.ndarray:
    """Geometric means of measured gains and of usual ones, `1 + 7 exp(-(i / 0.2 K)^2)`.

    Gains of one step differ from clip to clip, and few clips are measured.
    """
    at = np.arange(len(gains)) / len(gains)
    return np.sqrt(gains * (1 + 7 * np.exp(-((at / 0.2) ** 2))))


def monotone(values: np.ndarray) -> np.ndarray:
    """The values where none is less than a later one: the first steps move the result most."""
    return np.maximum.accumulate(values[::-1])[::-1]
