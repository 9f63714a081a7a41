"""Functions `call` that do not do what they are asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pab_kernels as pab
from tests.analysis.calibration.small_pipe import PROMPTS, STEPS, VALUES, call, loop, pipe_of
from tests.broadcast.forecast_oracle import Denoiser, Pipe

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),  # diffusers' schedulers
    pytest.mark.usefixtures("no_flops"),
]


def of_seed_0(pipe: Any, prompt: float, seed: int, num_steps: int = STEPS) -> Tensor:
    return (call if isinstance(pipe, Pipe) else loop)(pipe, prompt, 0, num_steps)


def of_no_seed(pipe: Any, prompt: float, seed: int, num_steps: int = STEPS) -> Tensor:
    return (call if isinstance(pipe, Pipe) else loop)(pipe, prompt, int(torch.randint(1 << 30, ())), num_steps)


def of_its_own_steps(pipe: Any, prompt: float, seed: int, num_steps: int = STEPS) -> Tensor:
    return (call if isinstance(pipe, Pipe) else loop)(pipe, prompt, seed, STEPS)


def of_twenty_steps(pipe: Pipe, prompt: float, seed: int) -> Tensor:
    return call(pipe, prompt, seed, 20)


def with_noise_of_its_own(pipe: Pipe, prompt: float, seed: int) -> Tensor:
    """The steps of an SDE draw noise without a generator."""
    pipe.stochastic = dict  # type: ignore[method-assign]
    return call(pipe, prompt, seed)


def bare() -> Denoiser:
    return Denoiser().double().eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("make", "wrong", "given", "message"),
    [
        (pipe_of, of_seed_0, {}, "runs with different seeds begin from the same noise; draw it in call from"),
        (bare, of_seed_0, {}, "runs with different seeds begin from the same noise; draw it in call from"),
        (pipe_of, of_no_seed, {}, "two runs with the same prompt and seed differ before anything is changed"),
        (bare, of_no_seed, {}, "two runs with the same prompt and seed differ before anything is changed"),
        (lambda: pipe_of("ddpm"), with_noise_of_its_own, {}, "two runs with the same prompt and seed differ"),
        (pipe_of, of_twenty_steps, {}, "made a schedule of 20 steps and took 20 where num_steps=14 was asked; pass"),
        (pipe_of, of_its_own_steps, {}, "made a schedule of 14 steps and took 14 where num_steps=8 was asked; pass"),
        (bare, of_its_own_steps, {}, "call failed with num_steps=8: the plan has 8 steps .*; pass num_steps on"),
        (pipe_of, call, {"values": (0.0, 1.0)}, "results are numbers from .*, and values=.0, 1.; give black and white"),
    ],
)
def test_a_call_that_is_not_what_it_says_is_refused(make: Any, wrong: Any, given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pab.calibrate(make(), PROMPTS, **{"num_steps": STEPS, "values": VALUES, "call": wrong, "flops": 0.6} | given)


@pytest.mark.parametrize("name", ["euler", "pndm"])
def test_call_gets_the_number_of_steps_and_a_new_scheduler_needs_no_timesteps(name: str) -> None:
    pipe = pipe_of(name)

    def call_of_steps(pipe: Any, prompt: float, seed: int, num_steps: int) -> Tensor:
        return call(pipe, prompt, seed, num_steps)

    found = pab.calibrate(pipe, PROMPTS, num_steps=STEPS + 1, call=call_of_steps, values=VALUES, flops=0.7)
    assert found.verified.share <= 0.7


def test_a_loop_around_a_bare_model_gets_the_number_of_steps() -> None:
    def loop_of_steps(model: Any, prompt: float, seed: int, num_steps: int) -> Tensor:
        return loop(model, prompt, seed, num_steps)

    model = pipe_of().transformer
    found = pab.calibrate(model, PROMPTS, num_steps=STEPS + 1, call=loop_of_steps, values=VALUES, flops=0.7)
    assert found.verified.share <= 0.7
