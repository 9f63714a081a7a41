"""Sublayers of Latte run exactly as often as the rules say, whatever the scheduler."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from tests.adapters.tiny_latte import (
    FRAMES,
    LAYERS,
    TEXT,
    TOKENS,
    counted_calls,
    counted_operations,
    noise,
    prompt,
    sample,
    tiny_latte,
    tiny_pipe,
)
from tests.oracle import Oracle, Rule

# diffusers' schedulers hand tensors to numpy in a way that numpy deprecates
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SCHEDULERS = {
    "DDIM": DDIMScheduler,
    "DPM++": DPMSolverMultistepScheduler,
    "PNDM": lambda: PNDMScheduler(skip_prk_steps=True),
    "Heun": HeunDiscreteScheduler,
    "Euler": EulerDiscreteScheduler,
    "UniPC": UniPCMultistepScheduler,
}
RULES = {"spatial": Rule(2), "temporal": Rule(3), "cross": Rule(4), "mlp": Rule(3, (0.4, 0.7))}
CONFIG = PABConfig(**{kind: Broadcast(rule.range, rule.window) for kind, rule in RULES.items()})
STEPS = 10

SUBLAYER_OF = {  # the kind of each module of a block, by group and first part of its name
    ("spatial", "norm1"): "spatial",
    ("spatial", "attn1"): "spatial",
    ("spatial", "attn2"): "cross",
    ("spatial", "norm2"): "mlp",
    ("spatial", "ff"): "mlp",
    ("temporal", "norm1"): "temporal",
    ("temporal", "attn1"): "temporal",
    ("temporal", "norm2"): "mlp",
    ("temporal", "ff"): "mlp",
}


def computed_steps(kind: str, timesteps: Any, first: int = 0) -> list[int]:
    return [i for i in range(first, len(timesteps)) if not RULES[kind].reuses(i, first, timesteps)]


def expected_calls(timesteps: Any, first: int, step: int) -> dict[tuple[str, str], int]:
    """By group and first part, the calls of one module summed over the layers, up to and including `step`."""
    return {
        key: LAYERS * sum(i <= step for i in computed_steps(kind, timesteps, first))
        for key, kind in SUBLAYER_OF.items()
    }


def assert_calls(counts: Counter[tuple[str, str]], timesteps: Any, first: int, step: int) -> None:
    expected = expected_calls(timesteps, first, step)
    assert {group for group, _ in counts} == {"spatial", "temporal"}
    for (group, part), count in counts.items():
        assert count == expected[group, part.split(".")[0]], (group, part, step)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_modules_run_as_often_as_the_rules_say_and_the_second_run_is_the_first(name: str) -> None:
    pipe = tiny_pipe(SCHEDULERS[name]())
    pab.enable(pipe, CONFIG)
    runs = []
    for _ in range(2):
        with counted_calls(pipe.transformer) as counts:

            def after_step(pipe: Any, i: int, t: Any, tensors: dict[str, Any], counts: Any = counts) -> dict[str, Any]:
                assert_calls(counts, pipe.scheduler.timesteps, 0, i)
                return tensors

            latents = sample(pipe, STEPS, callback_on_step_end=after_step)
        timesteps = pipe.scheduler.timesteps
        assert len(timesteps) >= STEPS
        assert_calls(counts, timesteps, 0, len(timesteps) - 1)
        summary = pab.summary(pipe)
        assert summary.forced == 0 and summary.cache_bytes == 0 and summary.peak_cache_bytes > 0
        runs.append((latents, dict(counts), summary))
    assert torch.equal(runs[0][0], runs[1][0])
    assert runs[0][1:] == runs[1][1:]
    assert runs[0][0].isfinite().all()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_fused_operations_run_as_often_as_the_rules_say(name: str) -> None:
    """No module has a hook here: projections and norms go through the fused operations."""
    pipe = tiny_pipe(SCHEDULERS[name]())
    model = pipe.transformer
    pab.enable(pipe, CONFIG)
    linears = {m.weight: path for path, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    plain_linear = torch.nn.functional.linear
    for _ in range(2):
        projected: Counter[str] = Counter()

        def linear(x: Any, weight: Any, bias: Any = None, projected: Any = projected) -> Any:
            projected[linears[weight]] += 1
            return plain_linear(x, weight, bias)

        with counted_operations() as operations, mock.patch.object(torch.nn.functional, "linear", linear):
            sample(pipe, STEPS)
        timesteps = pipe.scheduler.timesteps
        runs = {kind: len(computed_steps(kind, timesteps)) for kind in RULES}
        for group, own in (("transformer_blocks", "spatial"), ("temporal_transformer_blocks", "temporal")):
            for layer in range(LAYERS):
                for path, count in projected.items():
                    if path.startswith(f"{group}.{layer}."):
                        kind = "mlp" if ".ff." in path else "cross" if ".attn2." in path else own
                        assert count == runs[kind], path
        assert len(projected) == len(linears)
        shapes = Counter((c.args[1].shape[1], c.args[2].shape[1]) for c in operations["attention"].call_args_list)
        assert shapes == {
            (TOKENS, TOKENS): LAYERS * runs["spatial"],
            (FRAMES, FRAMES): LAYERS * runs["temporal"],
            (TOKENS, TEXT): LAYERS * runs["cross"],
        }
        norms = [c for c in operations["broadcast_residual"].call_args_list if c.args[0].norm is not None]
        assert len(norms) == LAYERS * (runs["spatial"] + runs["temporal"] + 2 * runs["mlp"])
        outputs = LAYERS * (runs["spatial"] + runs["temporal"] + runs["cross"] + 2 * runs["mlp"])
        assert operations["project_residual"].call_count == outputs


def sample_from_the_middle(pipe: Any, first: int, *, tell: bool, steps: int = STEPS) -> Any:
    """Image-to-image, as diffusers' pipelines do it.

    Where they tell the scheduler its place, some scale the model's timesteps.
    """
    scheduler, model = pipe.scheduler, pipe.transformer
    scheduler.set_timesteps(steps)
    if tell:
        scheduler.set_begin_index(first)
    x, text = noise(), torch.cat([prompt(2), prompt(1)])
    for t in scheduler.timesteps[first:]:
        # Not called, it leaves the scheduler without an index before its first step.
        inputs = scheduler.scale_model_input(torch.cat([x, x]), t) if tell else torch.cat([x, x])
        timestep = t[None].expand(2) / (1000 if tell else 1)
        out = model(hidden_states=inputs, timestep=timestep, encoder_hidden_states=text, return_dict=False)[0]
        uncond, cond = out.chunk(2)[0][:, :4], out.chunk(2)[1][:, :4]
        x = scheduler.step(uncond + 4 * (cond - uncond), t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("tell", [True, False], ids=["begin index set", "not set"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_schedule_entered_in_the_middle_keeps_its_place(name: str, tell: bool) -> None:
    pipe = tiny_pipe(SCHEDULERS[name]())
    if tell and not hasattr(pipe.scheduler, "set_begin_index"):
        tell = False  # DDIM and PNDM find their place by the timestep
    pab.enable(pipe, CONFIG)
    first = 6 if name == "Heun" else 4  # a second-order scheduler is entered at a whole step
    finals = []
    for _ in range(2):
        with counted_calls(pipe.transformer) as counts:
            finals.append(sample_from_the_middle(pipe, first, tell=tell))
        timesteps = pipe.scheduler.timesteps
        assert_calls(counts, timesteps, first, len(timesteps) - 1)
        summary = pab.summary(pipe)
        assert summary.plan is not None and summary.plan.schedule.begin == first
        assert summary.plan.schedule.num_steps == len(timesteps)
        assert summary.forced == 0 and summary.cache_bytes == 0
    assert torch.equal(*finals)


@pytest.mark.parametrize("tell", [True, False], ids=["begin index set", "not set"])
def test_a_line_begins_anew_where_the_schedule_is_entered(tell: bool) -> None:
    rules = {kind: replace(rule, reuse="linear") for kind, rule in RULES.items()}
    pipe = tiny_pipe(EulerDiscreteScheduler())
    pab.enable(
        pipe, PABConfig(**{kind: Broadcast(rule.range, rule.window, reuse="linear") for kind, rule in rules.items()})
    )
    got = sample_from_the_middle(pipe, 4, tell=tell)
    summary = pab.summary(pipe)
    assert summary.plan is not None and summary.plan.schedule.begin == 4
    assert any(len(d.reads) > 1 for row in summary.plan.rows.values() for d in row)
    assert summary.forced == 0 and summary.cache_bytes == 0
    pab.disable(pipe)
    model, timesteps = pipe.transformer, pipe.scheduler.timesteps.tolist()
    oracle, step = Oracle(tiny_latte(), rules, timesteps, first=4), iter(range(4, len(timesteps)))
    with mock.patch.object(model, "forward", lambda return_dict=False, **kwargs: (oracle("", next(step), **kwargs),)):
        assert torch.equal(sample_from_the_middle(pipe, 4, tell=tell), got)


def test_a_place_is_found_by_a_timestep_that_was_rounded_to_the_models_dtype() -> None:
    pipe = tiny_pipe(DDIMScheduler())
    pab.enable(pipe, CONFIG)
    pipe.scheduler.set_timesteps(45)
    t = pipe.scheduler.timesteps[7:8].to(torch.bfloat16)
    assert float(t) != float(pipe.scheduler.timesteps[7])
    pipe.transformer(hidden_states=noise(), timestep=t, encoder_hidden_states=prompt())
    plan = pab.summary(pipe).plan
    assert plan is not None and plan.schedule.begin == 7


@pytest.mark.parametrize("tell", [True, False], ids=["begin index set", "not set"])
def test_pab_enabled_in_the_middle_of_a_run_starts_there(tell: bool) -> None:
    pipe = tiny_pipe(EulerDiscreteScheduler())

    def after_step(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if tell:
            pipe.scheduler.set_begin_index(0)
        if i == 2:
            pab.enable(pipe, CONFIG)
        return tensors

    sample(pipe, STEPS, callback_on_step_end=after_step)
    summary = pab.summary(pipe)
    assert summary.plan is not None and summary.plan.schedule.begin == 3
    assert summary.cache_bytes == 0 and summary.forced == 0
