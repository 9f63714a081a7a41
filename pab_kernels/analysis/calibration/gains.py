"""Gains: how much more a wrong output moves the final sample where the model runs on, than through the scheduler alone.

At a few steps i, the error dv_i of the prediction from the two steps before is added to the recorded output, and the
run goes on from there:

    g_i = |dx_final| / (|W_i| |dv_i|)

with W_i the influence of output i on the final sample. The gains are geometric means over recordings, interpolated in
the logarithm between the steps, and at least 1. The same runs give the model's sensitivity at the step after:
k_(i+1) = |dV_(i+1)| / |dX_(i+1)|.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .influence import Influence
from .recording import Recording

PARTS = (0.1, 0.2, 0.35)
"""The steps at which gains are measured, as parts of the schedule. Gains fall to 1 in its second half."""
PARTS_OF_MODULES = (0.1, 0.35, 0.6, 0.85)
"""Those where nothing is known of a scheduler, and gains are the whole change of the result."""


@dataclass(frozen=True)
class Gains:
    """Values for every step, `[K]`.

    Args:
        gains: g, at least 1.
        sensitivity: k.
    """

    gains: np.ndarray
    sensitivity: np.ndarray


def gain_steps(influence: Influence, parts: Sequence[float] = PARTS) -> tuple[int, ...]:
    """The steps at which gains are measured: two steps of other noise levels lie before each, and one after it."""
    count, places = influence.num_steps, influence.places
    found = {min(max(round(part * count), 2), count - 2) for part in parts}
    return tuple(sorted(i for i in found if len({places[i - 2], places[i - 1], places[i]}) == 3))


def prediction_error(recording: Recording, step: int) -> torch.Tensor:
    """What predicting an output from the two before it misses, on recorded samples, float64."""
    known = recording.influence
    at_j, at_s, at_p = (known.coordinates[k] for k in (step, step - 1, step - 2))
    (v_j, v_s, v_p), (x_j, x_s, x_p) = (
        [tensors[k].double() for k in (step, step - 1, step - 2)] for tensors in (recording.outputs, recording.samples)
    )
    if at_j is None or at_s is None or at_p is None:
        return 2 * v_s - v_p - v_j
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


def monotone(values: np.ndarray) -> np.ndarray:
    """The values where none is less than a later one: the first steps move the result most."""
    return np.maximum.accumulate(values[::-1])[::-1]


def rms(t: torch.Tensor) -> float:
    """The root mean square."""
    return float(t.square().mean().sqrt())
