"""enable, disable, generation, context, sublayers: what they accept, refuse and leave behind."""

from __future__ import annotations

import gc
import inspect
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    LatteTransformer3DModel,
)
from torch import nn

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from pab_kernels.broadcast.broadcaster import ATTRIBUTE, broadcaster_of
from tests.adapters.tiny_latte import LAYERS, noise, prompt, sample, tiny_latte, tiny_pipe

# diffusers' schedulers hand tensors to numpy in a way that numpy deprecates
pytestmark = [
    pytest.mark.usefixtures("no_flops"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

HALF = PABConfig(*(Broadcast(2, (0, 1)),) * 4)
INPUTS = {"hidden_states": noise(), "timestep": torch.tensor([500]), "encoder_hidden_states": prompt()}


def attributes(*roots: Any) -> dict[str, Any]:
    """Every attribute of these objects, and of the modules in them, with the identity of what could change how they
    run."""
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
    [
        enable_and_run,
        enable_twice,
        enable_model_and_pipe,
        enable_in_another_pipe_too,
        two_pipes_of_one_scheduler,
        fail_in_the_middle,
    ],
    ids=lambda f: f.__name__.replace("_", " "),
)
def test_disable_leaves_nothing_behind(pipe: Any, what: Callable[[Any], None]) -> None:
    plain = sample(pipe, 3)
    before = attributes(pipe.transformer, pipe, pipe.scheduler)
    with torch.no_grad():
        what(pipe)
    assert attributes(pipe.transformer, pipe, pipe.scheduler) != before
    assert pab.enable(pipe) is pipe and pab.enable(pipe.transformer) is pipe.transformer
    pab.disable(pipe)
    assert attributes(pipe.transformer, pipe, pipe.scheduler) == before
    assert torch.equal(sample(pipe, 3), plain)
    pab.disable(pipe)
    pab.disable(pipe.transformer)
    assert attributes(pipe.transformer, pipe, pipe.scheduler) == before


def test_enable_that_fails_half_way_leaves_nothing_behind(pipe: Any) -> None:
    before = attributes(pipe.transformer, pipe, pipe.scheduler)
    from pab_kernels.adapters import generic

    real = generic.attach_forward
    for fails_at in (0, 2):
        made: list[Any] = []

        def attach(*args: Any, made: list[Any] = made, fails_at: int = fails_at, **kwargs: Any) -> Any:
            if len(made) == fails_at:
                raise ArithmeticError("on purpose")
            made.append(real(*args, **kwargs))
            return made[-1]

        with mock.patch.object(generic, "attach_forward", attach), pytest.raises(ArithmeticError):
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
        ({"timesteps": []}, r"timesteps must be a sequence of finite numbers, got \[\]"),
        ({"timesteps": ["a"]}, "timesteps must be a sequence of finite numbers, got"),
        ({"timesteps": 5}, "timesteps must be a sequence of finite numbers, got 5"),
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
        (
            lambda: object(),
            TypeError,
            "got object; supported are a torch.nn.Module and a pipeline with a `transformer` or a `unet`, and a "
            "`scheduler`",
        ),
        (lambda: None, TypeError, "got NoneType; supported are"),
        (lambda: Odd(nn.Linear(1, 1), None), TypeError, "got Odd; supported are"),
        (lambda: Odd("a model", DDIMScheduler()), TypeError, "got Odd; supported are"),
        (lambda: Odd(tiny_latte(), WithoutStep()), TypeError, "got Odd; supported are"),
        (
            lambda: nn.Linear(1, 1),
            TypeError,
            "Linear: no attention was found, neither by projections of queries nor by name; name its modules",
        ),
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
        num_attention_heads=1,
        attention_head_dim=8,
        in_channels=1,
        patch_size=1,
        sample_size=2,
        norm_type=norm_type,
        caption_channels=4,
    )


def test_other_bad_arguments_get_one_line(pipe: Any) -> None:
    model = pipe.transformer
    with pytest.raises(ValueError, match="got num_steps or timesteps with a pipeline, .* leave them out"):
        pab.enable(pipe, num_steps=5)
    with pytest.raises(ValueError, match="got num_steps or timesteps with a pipeline"):
        pab.enable(pipe, timesteps=[5, 4])
    with pytest.raises(
        TypeError, match=r"config must be a PABConfig, got str; PABConfig.preset\(name\) gives a named one"
    ):
        pab.enable(pipe, "latte")  # type: ignore[arg-type]
    for function in (
        pab.summary,
        lambda m: pab.generation(m, num_steps=2).__enter__(),
        lambda m: pab.context(m, "cond").__enter__(),
    ):
        for thing in (model, pipe):
            with pytest.raises(
                RuntimeError, match="PAB is not enabled on this LatteTransformer3DModel; call pab.enable first"
            ):
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
        with (
            pytest.raises(ValueError, match="step must be a whole number from 0, got"),
            pab.context(model, "a", step=step),
        ):  # type: ignore[arg-type]
            pass


@torch.no_grad()
def test_calls_before_and_after_a_generation_run_plainly_and_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_latte()
    plain = model(**INPUTS).sample
    pab.enable(model, HALF)
    assert torch.equal(model(**INPUTS).sample, plain) and pab.summary(model).plain_calls == 1
    with pab.generation(model, num_steps=2):
        model(**INPUTS)
        assert pab.summary(model).plain_calls == 0
    for count in (1, 2):
        assert torch.equal(model(**INPUTS).sample, plain) and pab.summary(model).plain_calls == count
    said = [r.getMessage() for r in caplog.records]
    assert (
        len(said) == 1
        and "no generation has begun: the model runs plainly; call it inside `with pab.generation" in said[0]
    )


@torch.no_grad()
@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
def test_a_pipes_model_called_before_and_after_a_run_runs_plainly(
    scheduler: Any, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = tiny_pipe(scheduler())
    plain = pipe.transformer(**INPUTS).sample
    pab.enable(pipe, HALF)
    assert torch.equal(pipe.transformer(**INPUTS).sample, plain) and pab.summary(pipe).plain_calls == 1
    sample(pipe, 4)
    assert pab.summary(pipe).plain_calls == 0
    assert torch.equal(pipe.transformer(**INPUTS).sample, plain) and pab.summary(pipe).plain_calls == 1
    assert sum("runs plainly" in r.getMessage() for r in caplog.records) == 1


@torch.no_grad()
def test_calls_beyond_the_plan_are_refused() -> None:
    model = tiny_latte()
    pab.enable(model, HALF, num_steps=2)
    model(**INPUTS)
    model(**INPUTS)
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=r"the plan has 2 steps and this call would be step 2; begin a further .*pab.generation"
        ):
            model(**INPUTS)
    assert pab.summary(model).cache_bytes == 0
    with pab.generation(model, num_steps=1):
        model(**INPUTS)
    with (
        pab.generation(model, num_steps=3),
        pab.context(model, "a", step=3),
        pytest.raises(RuntimeError, match="would be step 3"),
    ):
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
    assert {(s.kind, s.layer) for s in listed} == {
        (k, i) for k in ("spatial", "temporal", "cross", "mlp", "block") for i in range(LAYERS)
    }
    assert all(s.how == "fused" for s in listed)
    for s in listed:
        pipe.transformer.get_submodule(s.name)
    pab.enable(pipe)
    assert pab.sublayers(pipe) == pab.sublayers(pipe.transformer) == listed


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
    before = [
        inspect.signature(f) for f in (pipe.scheduler.step, pipe.scheduler.set_timesteps, pipe.transformer.forward)
    ]
    pab.enable(pipe)
    assert [
        inspect.signature(f) for f in (pipe.scheduler.step, pipe.scheduler.set_timesteps, pipe.transformer.forward)
    ] == before


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
