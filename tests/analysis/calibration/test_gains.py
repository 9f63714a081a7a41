"""Gains against the exact derivative of a linear model, and between the measured steps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pab_kernels.analysis.calibration.gains import (
    PARTS,
    gain_steps,
    interpolated,
    monotone,
    prediction_error,
    sources,
    with_usual,
)
from pab_kernels.analysis.calibration.recording import record, rms, run_on
from tests.analysis.calibration.small_pipe import STEPS, pipe_of, run_of
from tests.broadcast.forecast_oracle import Pipe

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers' schedulers

SLOPE = 0.7


class Linear(nn.Module):
    """An output that is a multiple of the sample; the attention makes it a DiT."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(4, 1, batch_first=True)
        self.calls = 0

    def forward(self, hidden_states: Tensor, timestep: Tensor, prompt: Any) -> Tensor:
        self.calls += 1
        return SLOPE * hidden_states + 0.1 * torch.sin(timestep / 100)


def linear_pipe() -> Pipe:
    pipe = pipe_of("flow euler", "none")
    pipe.transformer = Linear()
    return pipe


@pytest.mark.parametrize("step", [2, 5, STEPS - 2])
def test_a_gain_is_the_derivative_of_the_run_over_that_of_the_scheduler(step: int) -> None:
    """With dx = dt v and v = c x, an error of v_i moves the end by dt_i prod_(k > i) (1 + c dt_k)."""
    pipe = linear_pipe()
    recording = record(pipe, run_of(pipe), lambda: None)
    calls = pipe.transformer.calls
    change = prediction_error(recording, step)
    found = run_on(pipe, run_of(pipe), recording, step, change, lambda: None)
    assert pipe.transformer.calls - calls == STEPS - step, "the first step, and those after it"
    sigmas = pipe.scheduler.sigmas.double()
    dt = (sigmas[1:] - sigmas[:-1]).tolist()
    assert recording.influence.final.tolist() == pytest.approx(dt, rel=1e-4)
    gain = found / (abs(dt[step]) * rms(change))
    assert gain == pytest.approx(abs(math.prod(1 + SLOPE * d for d in dt[step + 1 :])), rel=1e-4)
    assert torch.equal(run_of(pipe)(), recording.result) and "step" not in vars(pipe.scheduler)


def test_without_an_error_a_run_goes_on_as_it_was_recorded() -> None:
    pipe = pipe_of("unipc", "apart")
    recording = record(pipe, run_of(pipe), lambda: None)
    nothing = torch.zeros_like(recording.outputs[0])
    assert run_on(pipe, run_of(pipe), recording, 6, nothing, lambda: None) == 0.0


@pytest.mark.parametrize("name", ["ddim v", "heun", "flow heun", "pndm"])
def test_gains_are_measured_where_two_other_noise_levels_lie_before(name: str) -> None:
    pipe = pipe_of(name)
    influence = record(pipe, run_of(pipe), lambda: None).influence
    places, found = influence.places, gain_steps(influence)
    assert 2 <= len(found) <= len(PARTS)
    for step in found:
        s, p = sources(places, step) or (0, 0)
        assert places[p] + 1 == places[s] == places[step] - 1 and s == step - 1


def test_between_the_measured_steps_the_logarithm_is_a_line() -> None:
    found = interpolated({2: [4.0, 1.0], 4: [8.0]}, 6, least=3.0)
    assert found.tolist() == pytest.approx([3, 3, 3, 4, 8, 8])  # the geometric mean at step 2 is 2
    assert monotone(np.array([1.0, 3, 2, 2.5, 1])).tolist() == [3, 3, 2.5, 2.5, 1]
    assert interpolated({}, 2, least=0.0).tolist() == [1, 1]


def test_measured_gains_are_averaged_with_usual_ones_which_fall_to_one() -> None:
    found = with_usual(np.full(20, 4.0))
    assert found[0] == pytest.approx(math.sqrt(4 * 8)) and found[4] == pytest.approx(math.sqrt(4 * (1 + 7 / math.e)))
    assert found[-1] == pytest.approx(2.0)
