"""enable, disable, generation, context, sublayers, summary: what they accept, refuse, leave behind and say."""

from __future__ import annotations

import gc
import inspect
import logging
import os
import re
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, LatteTransformer3DModel
from torch import nn

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from pab_kernels.broadcast.broadcaster import ATTRIBUTE, broadcaster_of
from pab_kernels.nn import BroadcastModule
from tests.adapters.tiny_latte import LAYERS, TOKENS, noise, prompt, sample, tiny_latte, tiny_pipe

# diffusers' schedulers hand tensors to numpy in a way that numpy deprecates
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

HALF = PABConfig(*(Broadcast(2, (0, 1)),) * 4)
INPUTS = {"hidden_states": noise(), "timestep": torch.tensor([500]), "encoder_hidden_states": prompt()}


def attributes(*roots: Any) -> dict[str, Any]:
    """Every attribute of these objects, and of the modules in them, with the identity of what could change how they run."""
    found: dict[str, Any] = {}
    for number, root in enumerate(roots):
        for path, owner in root.named_modules() if isinstance(root, nn.Module) else [("", root)]:
            for name, value in vars(owner).items():
                kept = id(value) if callable(value) else tuple(value) if isinstance(value, dict) else None
                found[f"{number}.{path}.{name}"] = (kept, value)  # the value is held: an identity is not given twice
    return {name: kept for name, (kept, _) in found.items()} | {"held": [v for _, v in found.values() if callable(v)]}


@pytest.fixture
def pipe() -> Any:
    """A pipeline that has run: diffusers leaves things of its own on the model in the first run."""
    made = tiny_pipe(EulerDiscreteScheduler())
    sample(made, 3)
    return made


def enable_and_run(pipe: Any) -> None:
    pab.enable(pipe, HALF)
    sample(pipe, 3)


def enable_twice(pipe: Any) -> None:
    pab.enable(pipe)
    pab.enable(pipe, HALF)
    pab.enable(pipe)


def enable_model_and_pipe(pipe: Any) -> None:
    pab.enable(pipe.transformer, HALF, num_steps=3)
    pab.enable(pipe)
    sample(pipe, 3)


def enable_in_another_pipe_too(pipe: Any) -> None:
    other = tiny_pipe(DDIMScheduler(), pipe.transformer)
    pab.enable(pipe, HALF)
    pab.enable(other)
    sample(other, 3)


def two_pipes_of_one_scheduler(pipe: Any) -> None:
    other = tiny_pipe(pipe.scheduler)
    pab.enable(pipe, HALF)
    pab.enable(other, HALF)
    sample(pipe, 3)
    sample(other, 3)
    pab.disable(other)
    assert broadcaster_of(pipe.transformer) is not None
    sample(pipe, 3)
    assert pab.summary(pipe).contexts


def fail_in_the_middle(pipe: Any) -> None:
    pab.enable(pipe, HALF)
    handle = pipe.transformer.transformer_blocks[1].register_forward_hook(raise_error)
    with pytest.raises(ArithmeticError):
        sample(pipe, 3)
    handle.remove()


def raise_error(*args: Any) -> Any:
    raise ArithmeticError("on purpose")


@pytest.mark.parametrize(
    "what",
    [enable_and_run, enable_twice, enable_model_and_pipe, enable_in_another_pipe_too, two_pipes_of_one_scheduler, fail_in_the_middle],
    ids=lambda f: f.__name__.replace("_", " "),
)
def test_disable_leaves_nothing_behind(pipe: Any, what: Callable[[Any], None]) -> None:
    plain = sample(pipe, 3)
    before = attributes(pipe.transformer, pipe, pipe.scheduler)
    with torch.no_grad():
        what(pipe)
    assert attributes(pipe.transformer, pipe, pipe.scheduler) != before
    pab.disable(pipe)
    assert attributes(pipe.transformer, pipe, pipe.scheduler) == before
    assert torch.equal(sample(pipe, 3), plain)
    pab.disable(pipe)
    pab.disable(pipe.transformer)
    assert attributes(pipe.transformer, pipe, pipe.scheduler) == before


def test_enable_that_fails_half_way_leaves_nothing_behind(pipe: Any) -> None:
    before = attributes(pipe.transformer, pipe, pipe.scheduler)
    from pab_kernels.adapters import latte

    real = latte.attach_forward
    for fails_at in (0, 2):
        made: list[Any] = []

        def attach(module: Any, replacement: Any, made: list[Any] = made, fails_at: int = fails_at) -> Any:
            if len(made) == fails_at:
                raise ArithmeticError("on purpose")
            made.append(real(module, replacement))
            return made[-1]

        with mock.patch.object(latte, "attach_forward", attach), pytest.raises(ArithmeticError):
            pab.enable(pipe, HALF)
        assert attributes(pipe.transformer, pipe, pipe.scheduler) == before


BAD_CONFIG = PABConfig(spatial=Broadcast(2, (100, 800), "timestep"))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"config": BAD_CONFIG, "num_steps": 5}, "counts in timesteps, but only num_steps=5 is known"),
        ({"num_steps": 0}, "num_steps must be a whole number of at least 1, got 0"),
        ({"num_steps": "5"}, "num_steps must be a whole number of at least 1, got '5'"),
        ({"num_steps": 5, "timesteps": [3, 2]}, "num_steps=5 does not fit 2 timesteps"),
        ({"timesteps": []}, r"timesteps must be a row of finite numbers, got \[\]"),
        ({"timesteps": ["a"]}, "timesteps must be a row of finite numbers, got"),
        ({"timesteps": 5}, "timesteps must be a row of finite numbers, got 5"),
        ({"config": PABConfig(cache_point="unprojected")}, "supported are 'pre_gate', 'post_gate'"),
    ],
)
def test_enable_that_is_refused_changes_nothing(kwargs: dict[str, Any], message: str) -> None:
    model = tiny_latte()
    before = attributes(model)
    with pytest.raises(ValueError, match=message):
        pab.enable(model, **kwargs)
    assert attributes(model) == before
    with torch.no_grad():
        pab.enable(model, HALF, num_steps=2)
        model(**INPUTS)
        during = attributes(model)
        with pytest.raises(ValueError, match=message):
            pab.enable(model, **kwargs)
        assert attributes(model) == during
        model(**INPUTS)  # the generation goes on
        assert pab.summary(model).contexts["#0"]["spatial"].reused == LAYERS
        with pab.generation(model, num_steps=2):  # and so do the rules
            model(**INPUTS)
            model(**INPUTS)
        assert pab.summary(model).contexts["#0"]["spatial"].reused == LAYERS


class WithoutStep:
    def set_timesteps(self, n: int) -> None:
        self.timesteps = list(range(n))


class Odd:
    """Not a diffusers pipeline, though it looks like one."""

    def __init__(self, transformer: Any, scheduler: Any) -> None:
        self.transformer, self.scheduler = transformer, scheduler


@pytest.mark.parametrize(
    ("what", "kind", "message"),
    [
        (lambda: object(), TypeError, "got object; supported are a torch.nn.Module and a pipeline with a `transformer` and a `scheduler`"),
        (lambda: None, TypeError, "got NoneType; supported are"),
        (lambda: Odd(nn.Linear(1, 1), None), TypeError, "got Odd; supported are"),
        (lambda: Odd("a model", DDIMScheduler()), TypeError, "got Odd; supported are"),
        (lambda: Odd(tiny_latte(), WithoutStep()), TypeError, "got Odd; supported are"),
        (
            lambda: nn.Linear(1, 1),
            TypeError,
            "Linear: no attention was found in it, by projections of queries or by name; name its modules",
        ),
        (lambda: latte_of("layer_norm"), ValueError, "norm_type='layer_norm'; supported is 'ada_norm_single'"),
    ],
)
def test_a_model_that_is_not_supported_is_refused(what: Callable[[], Any], kind: type[Exception], message: str) -> None:
    thing = what()
    for function in (pab.enable, pab.sublayers):
        with pytest.raises(kind, match=message) as info:
            function(thing)
        assert "\n" not in str(info.value)
    assert ATTRIBUTE not in vars(thing) if hasattr(thing, "__dict__") else True


def latte_of(norm_type: str) -> Any:
    return LatteTransformer3DModel(
        num_attention_heads=1, attention_head_dim=8, in_channels=1, patch_size=1, sample_size=2, norm_type=norm_type, caption_channels=4
    )


def test_other_bad_arguments_get_one_line(pipe: Any) -> None:
    model = pipe.transformer
    with pytest.raises(ValueError, match="a pipeline's scheduler gives the steps; leave num_steps and timesteps out"):
        pab.enable(pipe, num_steps=5)
    with pytest.raises(ValueError, match="a pipeline's scheduler gives the steps"):
        pab.enable(pipe, timesteps=[5, 4])
    with pytest.raises(TypeError, match=r"config must be a PABConfig, got str; PABConfig.preset\(name\) gives a named one"):
        pab.enable(pipe, "latte")  # type: ignore[arg-type]
    for function in (pab.summary, lambda m: pab.generation(m, num_steps=2).__enter__(), lambda m: pab.context(m, "cond").__enter__()):
        for thing in (model, pipe):
            with pytest.raises(RuntimeError, match="PAB is not enabled on this LatteTransformer3DModel; call pab.enable first"):
                function(thing)
    with pytest.raises(TypeError, match="got int; supported are"):
        pab.disable(3)
    pab.enable(model, HALF, num_steps=4)
    with pytest.raises(ValueError, match="num_steps= or timesteps=; got neither"), pab.generation(model):
        pass
    for name in ("", None, 3):
        with pytest.raises(ValueError, match=f"a context needs a name, got {name!r}"), pab.context(model, name):  # type: ignore[arg-type]
            pass
    for step in (-1, 1.0, "1", True):
        with pytest.raises(ValueError, match="step must be a whole number from 0, got"), pab.context(model, "a", step=step):  # type: ignore[arg-type]
            pass


@torch.no_grad()
def test_a_call_without_a_generation_says_how_to_begin_one() -> None:
    model = tiny_latte()
    pab.enable(model, HALF)
    with pytest.raises(RuntimeError, match="no generation has begun: call the model inside `with pab.generation"):
        model(**INPUTS)
    with pab.generation(model, num_steps=1):
        model(**INPUTS)
    with pytest.raises(RuntimeError, match="no generation has begun"):
        model(**INPUTS)
    assert str(pab.summary(model)).count("\n") > 1


@torch.no_grad()
@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
def test_a_pipes_model_called_before_any_run_says_how_to_begin(scheduler: Any) -> None:
    pipe = tiny_pipe(scheduler())
    pab.enable(pipe, HALF)
    with pytest.raises(RuntimeError, match="no generation has begun"):
        pipe.transformer(**INPUTS)


@torch.no_grad()
def test_calls_beyond_the_plan_are_refused() -> None:
    model = tiny_latte()
    pab.enable(model, HALF, num_steps=2)
    model(**INPUTS)
    model(**INPUTS)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"the plan has 2 steps and this call would be step 2; begin a further .*pab.generation"):
            model(**INPUTS)
    assert pab.summary(model).cache_bytes == 0
    with pab.generation(model, num_steps=1):
        model(**INPUTS)
    with pab.generation(model, num_steps=3), pab.context(model, "a", step=3), pytest.raises(RuntimeError, match="would be step 3"):
        model(**INPUTS)


@torch.no_grad()
def test_an_explicit_step_beyond_the_plan_spoils_nothing() -> None:
    model = tiny_latte()
    pab.enable(model, HALF, num_steps=2)
    model(**INPUTS)
    with pab.context(model, "a", step=7), pytest.raises(RuntimeError, match="would be step 7"):
        model(**INPUTS)
    model(**INPUTS)
    tally = pab.summary(model).contexts["#0"]["spatial"]
    assert (tally.computed, tally.reused, tally.forced) == (LAYERS, LAYERS, 0)


def test_the_default_config_is_the_preset_of_the_class() -> None:
    pipe = tiny_pipe(DDIMScheduler())
    pab.enable(pipe)
    sample(pipe, 5)
    plan = pab.summary(pipe).plan
    assert plan is not None and plan.config == PABConfig.preset("latte")
    model = tiny_latte()
    pab.enable(model, num_steps=4)
    with torch.no_grad():
        model(**INPUTS)
    plan = pab.summary(model).plan
    assert plan is not None and plan.config == PABConfig.preset("pab246")
    pab.enable(model, timesteps=[900, 500])
    plan = pab.summary(model).plan
    assert plan is not None and plan.config == PABConfig.preset("pab246")  # enabled already: what it has stays


@torch.no_grad()
def test_another_config_counts_from_the_next_generation_on() -> None:
    model = tiny_latte()
    pab.enable(model, HALF, num_steps=4)
    model(**INPUTS)
    pab.enable(model, PABConfig(mlp=Broadcast(2, (0, 1))))
    for _ in range(3):
        model(**INPUTS)
    tallies = pab.summary(model).contexts["#0"]
    assert tallies["spatial"].reused == 2 * LAYERS and pab.summary(model).forced == 0
    with pab.generation(model, num_steps=4):
        for _ in range(4):
            model(**INPUTS)
    tallies = pab.summary(model).contexts["#0"]
    assert tallies["spatial"].reused == 0 and tallies["mlp"].reused == 4 * LAYERS


def test_sublayers_of_latte() -> None:
    pipe = tiny_pipe()
    listed = pab.sublayers(pipe)
    assert [s.name for s in listed[:4]] == [
        "transformer_blocks.0.attn1",
        "transformer_blocks.0.attn2",
        "transformer_blocks.0.ff",
        "transformer_blocks.0",
    ]
    assert {(s.kind, s.layer) for s in listed} == {(k, i) for k in ("spatial", "temporal", "cross", "mlp", "block") for i in range(LAYERS)}
    assert all(s.how == "fused" for s in listed)
    for s in listed:
        pipe.transformer.get_submodule(s.name)
    pab.enable(pipe)
    assert pab.sublayers(pipe) == pab.sublayers(pipe.transformer) == listed


@torch.no_grad()
def test_the_summary_says_what_was_done() -> None:
    model = tiny_latte()
    pab.enable(model, HALF)
    empty = pab.summary(model)
    assert empty.plan is None and empty.contexts == {} and empty.share == 1 and empty.forced == 0
    assert str(empty) == "the model was not called yet\ncache 0.0 MiB now, 0.0 MiB at the peak"
    with pab.generation(model, num_steps=4):
        assert "the model was not called yet" in str(pab.summary(model))
        for step in range(3):
            for name in ("cond", "uncond") if step else ("cond",):
                with pab.context(model, name):
                    model(**INPUTS)
        summary = pab.summary(model)
        assert summary.cache_bytes > 0
    lines = str(summary).splitlines()
    assert lines[0].startswith("4 steps, 2 patterns")
    at = next(i for i, line in enumerate(lines) if line.startswith("context uncond"))
    headings = ["context uncond", "computed", "stored", "reused", "forced", "MiB now", "MiB at the peak", "FLOPs saved"]
    assert re.split(" {2,}", lines[at]) == headings
    assert lines[at + 1].split() == ["spatial", "4", "2", "0", "2", "0.0", "0.0", "0"]
    at = next(i for i, line in enumerate(lines) if line.startswith("context cond"))
    saved = summary.contexts["cond"]["cross"].flops_saved
    assert lines[at + 3].split() == ["cross", "4", "4", "2", "0", "0.0", "0.0", f"{saved:.2e}"] and saved > 0
    assert len({len(line) for line in lines[at : at + 5]}) == 1
    assert summary.forced == (2 + 1 + 2) * LAYERS  # uncond at step 1: attention of both, cross, MLPs of both
    assert f"FLOPs {summary.flops:.3e} of {summary.flops_without:.3e} ({summary.share:.1%})" in lines
    assert pab.summary(model).cache_bytes == 0
    assert summary.cache_bytes > 0  # a summary is a snapshot


@torch.no_grad()
@pytest.mark.parametrize("config", [HALF, PABConfig(cross=Broadcast(3, (0, 1)), block=Broadcast(2, (0, 1), layers=(0,)))])
def test_bytes_and_flops_are_told_by_context_and_kind(config: PABConfig) -> None:
    model = tiny_latte()
    pab.enable(model, config)
    with pab.generation(model, num_steps=5):
        for _ in range(2):
            for name in ("cond", "uncond"):
                with pab.context(model, name):
                    model(**INPUTS)
        early = pab.summary(model)
        for _ in range(3):
            for name in ("cond", "uncond"):
                with pab.context(model, name):
                    model(**INPUTS)
    summary = pab.summary(model)
    tallies = [t for kinds in summary.contexts.values() for t in kinds.values()]
    assert sum(t.flops_saved for t in tallies) == summary.flops_without - summary.flops > 0
    assert sum(t.cache_bytes for kinds in early.contexts.values() for t in kinds.values()) == early.cache_bytes
    assert {t.cache_bytes for t in tallies} == {0} and sum(t.peak_cache_bytes for t in tallies) >= summary.peak_cache_bytes
    cond, slot = summary.contexts["cond"], INPUTS["hidden_states"].shape[2] * TOKENS * 64 * 4  # [frames, tokens, C] float32
    spatial = cond["spatial"]
    assert cond["cross"].peak_cache_bytes == slot * LAYERS and early.contexts["cond"]["cross"].cache_bytes in (0, slot * LAYERS)
    if config is HALF:  # reused in 2 of 5 steps
        assert spatial.flops_saved * 5 == spatial.flops_without * 2 and cond["temporal"].peak_cache_bytes == slot * LAYERS
    else:  # as a part of the block of layer 0
        assert spatial.reused == 0 and spatial.flops_saved * 10 == spatial.flops_without * 2 and cond["block"].flops_saved == 0
        assert cond["block"].peak_cache_bytes == 2 * slot and spatial.peak_cache_bytes == 0


@torch.no_grad()
def test_a_call_of_another_mode_is_not_taken_for_the_branch_in_its_place() -> None:
    """A pass before the first step that fills the model's own cache: calls without names go by their order."""

    class Modes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = BroadcastModule(nn.Linear(2, 2), "spatial")

        def forward(self, x: torch.Tensor, mode: str = "denoise") -> torch.Tensor:
            return self.attn(x)

    model = Modes()
    pab.enable(model, PABConfig(spatial=Broadcast(2, (0, 1))))
    x = torch.ones(1, 2)
    with pab.generation(model, num_steps=2):
        model(3 * x, mode="fill")
        out = model(x)  # the step after, at which the first call of the one before would be reused
        assert torch.equal(out, model.attn.module(x))
    assert pab.summary(model).forced == 1


def test_recorded_gradients_run_plainly_counted_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_latte().requires_grad_(True)
    with torch.no_grad():
        plain = model(**INPUTS).sample
    pab.enable(model, HALF, num_steps=5)
    with caplog.at_level(logging.WARNING, "pab_kernels"):
        for _ in range(2):
            out = model(**INPUTS).sample
            assert torch.equal(out, plain)
        out.sum().backward()
        assert model.transformer_blocks[0].attn1.to_out[0].weight.grad.abs().sum() > 0
        x = noise().requires_grad_()
        model.requires_grad_(False)
        assert model(**{**INPUTS, "hidden_states": x}).sample.requires_grad
    said = [r.getMessage() for r in caplog.records if "gradients are recorded" in r.getMessage()]
    assert len(said) == 1 and "torch.no_grad()" in said[0]
    summary = pab.summary(model)
    assert summary.plain_calls == 3 and "3 calls ran plainly because gradients were recorded" in str(summary)
    assert summary.flops == 0 and all(not kinds for kinds in summary.contexts.values())
    assert torch.equal(model(**INPUTS).sample, plain)  # gradients may be on where nothing asks for them
    summary = pab.summary(model)
    assert summary.plain_calls == 3 and summary.forced == 5 * LAYERS  # step 3 would reuse step 2, which ran plainly


def test_rules_without_effect_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    pipe = tiny_pipe()
    pab.enable(pipe, PABConfig(mlp=Broadcast(3, unit="timestep", at=(3,))))
    with caplog.at_level(logging.WARNING, "pab_kernels"):
        for _ in range(2):
            sample(pipe, 3)
    assert [r.getMessage() for r in caplog.records if r.name == "pab_kernels"] == [
        "mlp: timesteps 3 do not occur in this schedule and have no effect"
    ]


def test_nothing_is_written_unless_logging_is_configured(tmp_path: Path) -> None:
    code = """
import logging, sys, torch
import pab_kernels as pab
from pab_kernels.nn import BroadcastModule
for listening in (False, True):
    if listening:
        print("listening", file=sys.stderr)
        logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.INFO)
    model = torch.nn.Sequential(BroadcastModule(torch.nn.Linear(2, 2), "spatial"))
    pab.enable(model, pab.PABConfig(spatial=2, mlp=2), num_steps=2)
    model(torch.ones(1, 2))
"""
    env = {**os.environ, "PYTHONPATH": str(Path(pab.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == ""
    assert done.stderr.splitlines() == [
        "listening",
        "INFO pab_kernels: Sequential: a generation of 2 steps, 2 patterns; spatial reused 1 of 2",
        "WARNING pab_kernels: mlp: this model has no such sublayers",
        "WARNING pab_kernels: gradients are recorded: the model runs plainly; call it under torch.no_grad() for PAB",
    ]


def test_a_compiled_model_is_its_model() -> None:
    pipe = tiny_pipe()
    model = pipe.transformer
    compiled = torch.compile(model, backend="eager")
    pab.enable(compiled, HALF)
    assert broadcaster_of(model) is not None and pab.sublayers(compiled) == pab.sublayers(model)
    pipe.transformer = compiled
    pab.enable(pipe)
    pab.disable(compiled)
    assert broadcaster_of(model) is None and "step" not in vars(pipe.scheduler)


def test_signatures_that_pipelines_ask_for_stay() -> None:
    pipe = tiny_pipe()
    before = [inspect.signature(f) for f in (pipe.scheduler.step, pipe.scheduler.set_timesteps, pipe.transformer.forward)]
    pab.enable(pipe)
    assert [inspect.signature(f) for f in (pipe.scheduler.step, pipe.scheduler.set_timesteps, pipe.transformer.forward)] == before


def test_a_scheduler_that_outlives_its_pipeline_keeps_no_model() -> None:
    scheduler = DDIMScheduler()
    pipe = tiny_pipe(scheduler)
    pab.enable(pipe, HALF)
    sample(pipe, 3)
    model = weakref.ref(pipe.transformer)
    del pipe
    gc.collect()
    assert model() is None
    plain = sample(tiny_pipe(DDIMScheduler()), 3)
    assert torch.equal(sample(tiny_pipe(scheduler), 3), plain)


def test_disable_in_the_middle_of_a_run_goes_on_plainly() -> None:
    pipe = tiny_pipe()
    pab.enable(pipe, HALF)

    def after_step(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if i == 0:
            pab.disable(pipe)
        return tensors

    assert torch.equal(sample(pipe, 4, callback_on_step_end=after_step), sample(tiny_pipe(), 4))
