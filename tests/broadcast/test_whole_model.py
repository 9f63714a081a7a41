"""Kind `model`: what is kept, on pipelines and bare models, and what composes with it."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from pab_kernels.rules.costs import Cost
from tests.broadcast.forecast_oracle import (
    RULE,
    SCHEDULERS,
    SHAPE,
    Denoiser,
    Pipe,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers' schedulers


def test_what_is_kept_is_counted_and_released_after_the_last_skip() -> None:
    pipe = Pipe(SCHEDULERS["dpm++ 2 v"]())
    pab.enable(pipe, PABConfig(model=Broadcast(at=(0, 1, 3, 4, 6, 7, 8, 9, 10, 11), unit="step", reuse="forecast")))
    latents = math.prod(SHAPE) * 8
    held = []
    for _ in pipe.steps():
        held.append(pab.summary(pipe).cache_bytes / latents)
    # An output of each of two branches before a skip; beside them two guided outputs and two samples.
    assert held[:6] == [2, 6, 4, 4, 6, 4]
    assert held[6:] == [0] * 6
    found = pab.summary(pipe)
    assert found.peak_cache_bytes == 6 * latents
    assert found.plan is not None
    costs = {s.name: Cost(0, latents if s.kind == "model" else 0) for s in found.plan.sublayers}
    forecast = found.plan.forecast(costs, contexts=2, latents_bytes=latents)
    assert [n / latents for n in forecast.cache_bytes] == held and forecast.peak_cache_bytes == 6 * latents
    assert {
        (t.computed, t.stored, t.reused) for c in found.contexts.values() for k, t in c.items() if k == "model"
    } == {(10, 2, 2)}


def test_a_run_that_fails_keeps_nothing_and_the_next_one_is_right() -> None:
    pipe = Pipe(SCHEDULERS["unipc"]())
    pab.enable(pipe, PABConfig(model=RULE))
    wanted = pipe.sample()

    def fail(step: int, x: Tensor) -> Tensor:
        if step == 6:
            raise ArithmeticError("on purpose")
        return x

    pipe.edit = fail
    with pytest.raises(ArithmeticError):
        pipe.sample()
    pipe.edit = lambda step, x: x
    assert torch.equal(pipe.sample(), wanted)
    assert pab.summary(pipe).cache_bytes == 0


def test_a_bare_model_has_no_sampler_to_predict_in() -> None:
    with pytest.raises(ValueError, match="reuse='forecast' predicts what a scheduler's `step` gets"):
        pab.enable(Denoiser(), PABConfig(model=Broadcast(2, reuse="forecast")), num_steps=4)


@pytest.mark.parametrize("kind", ["hold", "linear"])
def test_a_bare_model_gives_back_its_last_output_or_the_line_through_two(kind: str) -> None:
    model, plain = (Pipe(None).transformer for _ in range(2))
    pab.enable(model, PABConfig(model=Broadcast(3, (0, 1), reuse=kind)), num_steps=7)
    xs = [torch.randn(SHAPE, generator=torch.Generator().manual_seed(i)).double() for i in range(7)]
    prompt, known = torch.zeros(SHAPE[1:]).double(), []
    for step, x in enumerate(xs):
        t = torch.tensor(900.0 - 100 * step)
        found = model(x, t, prompt)
        if step % 3 == 0:
            wanted = plain(x, t, prompt)
            known = [(step, wanted), *known[:1]]
        elif kind == "hold" or len(known) == 1:
            wanted = known[0][1]
        else:
            (s, c), (p, before) = known
            wanted = c + (step - s) / (s - p) * (c - before)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
        found.mul_(0)  # whoever gets it may write to it
    assert model.calls == plain.calls == 3
    assert pab.summary(model).contexts["#0"]["model"].reused == 4


def test_other_rules_count_the_steps_at_which_the_model_runs() -> None:
    pipe = Pipe(SCHEDULERS["ddim v"]())
    pab.enable(pipe, PABConfig(model=Broadcast(2, (0, 1), reuse="forecast"), spatial=Broadcast(2, (0, 1))))
    pipe.sample()
    found = pab.summary(pipe).contexts["#0"]
    assert (found["model"].computed, found["model"].reused) == (6, 6)
    assert (found["spatial"].computed, found["spatial"].reused, found["spatial"].forced) == (3, 3, 0)


@pytest.mark.flops
def test_flops_of_skipped_steps_are_saved_whole() -> None:
    pipe = Pipe(SCHEDULERS["ddim v"]())
    pab.enable(pipe, PABConfig(model=Broadcast(2, (0, 1), reuse="forecast")))
    pipe.sample()
    found = pab.summary(pipe)
    assert found.flops_without and found.flops * 2 == found.flops_without


def test_range_1_is_the_model_without_pab() -> None:
    pipe = Pipe(SCHEDULERS["unipc"]())
    plain = pipe.sample()
    pab.enable(pipe, PABConfig(model=Broadcast(1, reuse="forecast")))
    assert torch.equal(pipe.sample(), plain)


def test_two_pipelines_step_by_step_do_not_mix() -> None:
    pipes = [Pipe(SCHEDULERS[name]()) for name in ("ddim v", "unipc")]
    alone = []
    for pipe in pipes:
        pab.enable(pipe, PABConfig(model=RULE))
        alone.append(pipe.sample())
    runs = [pipe.steps() for pipe in pipes]
    *_, together = zip(*runs, strict=True)
    assert all(map(torch.equal, together, alone))


def test_a_pipeline_that_steps_a_second_scheduler_is_refused() -> None:
    pipe: Any = Pipe(SCHEDULERS["flow euler"]())
    pipe.audio_scheduler = copy.deepcopy(pipe.scheduler)
    with pytest.raises(ValueError, match="Pipe also has audio_scheduler; use reuse='linear' or 'hold'"):
        pab.enable(pipe, PABConfig(model=RULE))
    assert not [name for name in vars(pipe) if name.startswith("_pab")]
