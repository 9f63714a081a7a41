"""Forecasts of the whole model on diffusers' schedulers, against the equations written out in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from pab_kernels.broadcast.coordinates import solver
from tests.broadcast.forecast_oracle import (
    AT,
    NOISY,
    RULE,
    SCHEDULERS,
    STEPS,
    Pipe,
    lagrange,
    level,
    noise_in,
    written_out,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers' schedulers


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_pipeline_gives_what_the_equations_give(name: str) -> None:
    pipe = Pipe(SCHEDULERS[name]())
    plain = pipe.sample()
    count, calls = len(pipe.scheduler.timesteps), pipe.transformer.calls
    computed = (set(AT) | {STEPS + 1, count - 1}) & set(range(count))
    rule = Broadcast(at=sorted(computed), unit="step", reuse="forecast")
    wanted = written_out(Pipe(SCHEDULERS[name]()), computed, frozenset() if name in NOISY else None, name in NOISY)
    pab.enable(pipe, PABConfig(model=rule))
    found = pipe.sample()
    assert pipe.transformer.calls - calls == 2 * len(computed)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(found, plain, rtol=1e-4, atol=1e-4), "it would show nothing"
    assert torch.equal(pipe.sample(), found)
    pab.disable(pipe)
    assert torch.equal(pipe.sample(), plain)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_coordinates_are_those_of_the_schedulers_own_noise(name: str) -> None:
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(STEPS)
    found = solver(scheduler)
    assert found.exact is (name not in NOISY)
    x, v = torch.randn(2, 3, 3).double()
    for t, at in zip(scheduler.timesteps, found.steps, strict=False):
        alpha, sigma = level(scheduler, t)
        if alpha == 0:
            assert at is None
            continue
        assert at is not None
        assert at.position == pytest.approx(math.log(alpha / sigma), rel=1e-4, abs=1e-4)
        noise = noise_in(scheduler, x, v, alpha, sigma)
        wanted = (x - sigma * noise) / alpha if name in NOISY else noise
        torch.testing.assert_close(at.a * x + at.b * v, wanted, rtol=1e-4, atol=1e-4 * (1 + sigma / alpha))


@pytest.mark.parametrize("guidance", ["none", "batched", "rescaled", "interval"])
@pytest.mark.parametrize("name", ["ddim v", "dpm++ 2 v", "flow euler"])
def test_guidance_of_every_kind_is_part_of_what_is_predicted(name: str, guidance: str) -> None:
    """In the interval, guidance is on from step 3 to 8, and no step is predicted from outputs without it."""
    computed = {0, 1, 2, 3, 4, 6, 8, 9, 10} if guidance == "interval" else set(AT)
    wanted = written_out(Pipe(SCHEDULERS[name](), guidance), computed)
    pipe = Pipe(SCHEDULERS[name](), guidance)
    pab.enable(pipe, PABConfig(model=Broadcast(at=sorted(computed), unit="step", reuse="forecast")))
    torch.testing.assert_close(pipe.sample(), wanted, rtol=1e-6, atol=1e-6)


def test_where_other_branches_are_called_than_before_the_last_outputs_are_held() -> None:
    """Guidance is on from step 3 to 8. Steps 3 and 9 are the first with and without it."""
    pipe = Pipe(SCHEDULERS["ddim epsilon"](), "interval")
    stepped: list[Tensor] = []
    outputs: list[Tensor] = []
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda v, *args, **kwargs: (stepped.append(v), step(v, *args, **kwargs))[1]  # of other names
    pipe.transformer.register_forward_hook(lambda module, args, out: outputs.append(out))
    pab.enable(pipe, PABConfig(model=Broadcast(at=[0, 1, 4, 5, 8], unit="step", reuse="forecast")))
    for _ in pipe.steps():
        pass
    uncond, cond = outputs[-5:-3]  # of step 8, before three steps of one branch
    assert pipe.transformer.calls == 10 and not torch.equal(cond, uncond)
    assert all(torch.equal(v, cond) for v in stepped[-3:]), "of the branch that is called, which another place had"


def test_a_scheduler_whose_step_has_other_arguments_is_refused() -> None:
    class Odd(diffusers.DDIMScheduler):  # type: ignore[misc]
        def step(self, noise: Tensor, when: Tensor, latents: Tensor, **kwargs: Any) -> Any:
            return super().step(noise, when, latents, **kwargs)

    pipe = Pipe(Odd(clip_sample=False))
    pab.enable(pipe, PABConfig(model=RULE))
    with pytest.raises(TypeError, match=r"Odd.step takes noise, when, latents, kwargs; reuse='forecast' needs"):
        pipe.sample()


def edited(pipe: Pipe) -> Pipe:
    pipe.edit = lambda step, x: x.clone()
    return pipe


def edited_in_place(pipe: Pipe) -> Pipe:
    pipe.edit = lambda step, x: x.add_(0)
    return pipe


@pytest.mark.parametrize("edit", [edited, edited_in_place])
def test_latents_that_the_pipeline_edits_are_not_corrected(edit: Callable[[Pipe], Pipe]) -> None:
    wanted = written_out(Pipe(SCHEDULERS["unipc"]()), frozenset(AT), frozenset())
    pipe = edit(Pipe(SCHEDULERS["unipc"]()))
    pab.enable(pipe, PABConfig(model=RULE))
    torch.testing.assert_close(pipe.sample(), wanted, rtol=1e-6, atol=1e-6)


def test_latents_edited_before_some_steps_are_corrected_at_the_others() -> None:
    pipe = Pipe(SCHEDULERS["ddim v"]())
    pipe.edit = lambda step, x: x.clone() if step == 9 else x  # between the computed steps 8 and 11
    wanted = written_out(Pipe(SCHEDULERS["ddim v"]()), frozenset(AT), {4, 7})
    pab.enable(pipe, PABConfig(model=RULE))
    torch.testing.assert_close(pipe.sample(), wanted, rtol=1e-6, atol=1e-6)


def test_a_scheduler_without_known_conversions_is_predicted_on_the_line_and_not_corrected() -> None:
    class Mine:
        """Euler steps of a flow, and state outside of its attributes."""

        init_noise_sigma = 1.0

        def set_timesteps(self, count: int) -> None:
            self.num_inference_steps = count
            self.sigmas = torch.linspace(1, 0, count + 1).double()
            self.timesteps = 1000 * self.sigmas[:-1]
            self.step_index = 0

        def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, return_dict: bool = True) -> Any:
            before, after = self.sigmas[self.step_index : self.step_index + 2]
            self.step_index += 1
            return (sample + (after - before) * model_output,)

    pipe = Pipe(Mine())
    pab.enable(pipe, PABConfig(model=RULE))
    found = pipe.sample()
    pab.disable(pipe)
    scheduler = Mine()
    scheduler.set_timesteps(STEPS)
    x, known = pipe.noise(), {}
    with torch.no_grad():
        for step, t in enumerate(scheduler.timesteps):
            v = pipe.guided(x, t, step) if step in AT else lagrange(dict(list(known.items())[-2:]), step)
            if step in AT:
                known[step] = v
            (x,) = scheduler.step(v, t, x)
    torch.testing.assert_close(found, x, rtol=1e-9, atol=1e-9)


def test_a_tensor_that_is_handed_from_step_to_step_prevents_correction() -> None:
    pipe = Pipe(diffusers.CogVideoXDPMScheduler(prediction_type="v_prediction", clip_sample=False))
    scheduler, stepped = pipe.scheduler, []
    step = scheduler.step
    scheduler.step = lambda *args, **kwargs: (stepped.append(1), step(*args, **kwargs))[1]
    pab.enable(pipe, PABConfig(model=RULE))
    scheduler.set_timesteps(STEPS)
    x, old, times = pipe.noise(), None, scheduler.timesteps
    with torch.no_grad():
        for i, t in enumerate(times):
            x, old = scheduler.step(pipe.guided(x, t, i), old, t, times[i - 1] if i else None, x, return_dict=False)
    assert pipe.transformer.calls == 2 * len(AT)
    assert len(stepped) == STEPS and torch.isfinite(x).all()


def test_in_inference_mode_outputs_are_predicted_only() -> None:
    wanted = written_out(Pipe(SCHEDULERS["ddim v"]()), frozenset(AT), frozenset())
    pipe = Pipe(SCHEDULERS["ddim v"]())
    pab.enable(pipe, PABConfig(model=RULE))
    with torch.inference_mode():
        found = pipe.sample()
    torch.testing.assert_close(found.clone(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler"])
def test_consistency_models_are_refused(name: str) -> None:
    pipe = Pipe(getattr(diffusers, name)())
    pab.enable(pipe, PABConfig(model=RULE))
    with pytest.raises(ValueError, match=f"{name} begins from new noise at every step"):
        pipe.sample()
    assert pab.summary(pipe).cache_bytes == 0


class Summing(diffusers.DDIMScheduler):  # type: ignore[misc]
    """Somebody's own, with a sum that it adds to in place."""

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.sum = getattr(self, "sum", torch.zeros_like(sample))
        self.sum.add_(model_output)
        return super().step(model_output + 0.01 * self.sum, timestep, sample, *args, **kwargs)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Summing(beta_start=1e-4, beta_end=0.02, clip_sample=False),
        lambda: diffusers.PNDMScheduler(beta_start=1e-4, beta_end=0.02),
    ],
    ids=["subclass", "PNDM with Runge-Kutta steps"],
)
def test_schedulers_that_change_their_state_in_place_are_not_stepped_again(make: Callable[[], Any]) -> None:
    pipe = Pipe(make())
    scheduler, stepped = pipe.scheduler, []
    step = scheduler.step
    scheduler.step = lambda *args, **kwargs: (stepped.append(1), step(*args, **kwargs))[1]
    pab.enable(pipe, PABConfig(model=RULE))
    pipe.sample()
    assert len(stepped) == len(scheduler.timesteps)


def test_only_what_steps_change_is_taken_back_in_a_scheduler() -> None:
    pipe = Pipe(SCHEDULERS["unipc"]())
    log: list[int] = []
    pipe.scheduler.log = log

    def note(step: int, x: Tensor) -> Tensor:
        pipe.scheduler.note = step
        log.append(step)
        pipe.scheduler.register_to_config(mine=step)
        return x

    pipe.edit = note
    pab.enable(pipe, PABConfig(model=RULE))
    found = pipe.sample()
    assert pipe.scheduler.note == pipe.scheduler.config.mine == STEPS - 1
    assert pipe.scheduler.log is log and log == list(range(STEPS))
    torch.testing.assert_close(found, written_out(Pipe(SCHEDULERS["unipc"]()), frozenset(AT)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("at", [0, 1, 5])
def test_a_step_that_fails_leaves_no_bytes(at: int) -> None:
    pipe = Pipe(SCHEDULERS["ddim v"]())
    step = pipe.scheduler.step
    steps: list[int] = []

    def fails(*args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        if len(steps) == at + 1:
            raise ArithmeticError("on purpose")
        return step(*args, **kwargs)

    pipe.scheduler.step = fails
    pab.enable(pipe, PABConfig(model=RULE))
    with pytest.raises(ArithmeticError):
        pipe.sample()
    assert pab.summary(pipe).cache_bytes == 0


@pytest.mark.parametrize("step", [4, 5], ids=["at a computed step", "at a skipped one"])
@pytest.mark.parametrize("branches", [(0, 1), (0,)], ids=["both", "the second"])
def test_outputs_for_another_prompt_are_not_predicted_from(branches: tuple[int, ...], step: int) -> None:
    pipe, plain = Pipe(SCHEDULERS["ddim v"]()), Pipe(SCHEDULERS["ddim v"]())
    outputs: list[Tensor] = []
    pipe.transformer.register_forward_hook(lambda module, args, out: outputs.append(out))
    stepped: list[tuple[Tensor, Tensor, Tensor]] = []
    original = pipe.scheduler.step

    def noted(v: Tensor, t: Tensor, x: Tensor, **kwargs: Any) -> Any:
        stepped.append((v, t, x))
        return original(v, t, x, **kwargs)

    def exchange(now: int, x: Tensor) -> Tensor:
        if now == step:
            cond, other = (p + 1 if i in branches else p for i, p in enumerate(pipe.prompts))
            pipe.prompts = plain.prompts = cond, other
        return x

    pipe.edit, pipe.scheduler.step = exchange, noted
    pab.enable(pipe, PABConfig(model=RULE))
    runs = pipe.steps()
    for _ in range(step):
        next(runs)
    before = len(stepped)
    next(runs)
    assert len(stepped) == before + 1, "nothing is corrected across the exchange"
    v, t, x = stepped[-1]
    wanted = plain.guided(x, t, step)
    if step == 5 and branches == (0,):  # the first branch was not computed: it returned its last output
        held = outputs[2 * 4]  # of step 4
        wanted = held + 2 * (plain.transformer(x, t, plain.prompts[0]) - held)
    torch.testing.assert_close(v, wanted, rtol=1e-6, atol=1e-6)


def test_timesteps_that_somebody_shortened_are_predicted_on_the_line() -> None:
    """A loop of image to image that enters the schedule at step 4 by cutting the table."""
    pipe, plain = Pipe(SCHEDULERS["ddim v"]()), Pipe(SCHEDULERS["ddim v"]())
    computed = (4, 5, 7, 8, 11)
    pab.enable(pipe, PABConfig(model=Broadcast(at=computed, unit="step", reuse="forecast")))
    results = []
    for loop in (pipe, plain):
        scheduler, known = loop.scheduler, {}
        scheduler.set_timesteps(STEPS)
        scheduler.timesteps = scheduler.timesteps[4:]
        x = loop.noise()
        with torch.no_grad():
            for step, t in enumerate(scheduler.timesteps, 4):
                if loop is pipe or step in computed:
                    known[step] = v = loop.guided(x, t, step)
                else:
                    v = lagrange(dict(list(known.items())[-2:]), step)
                x = scheduler.step(v, t, x, return_dict=False)[0]
        results.append(x)
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)
    assert pipe.transformer.calls == plain.transformer.calls == 2 * len(computed)
