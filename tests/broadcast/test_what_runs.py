"""What a user runs is what is broadcast, or one warning says why not: loops, models and schedulers are exchanged,
wrapped and copied."""

from __future__ import annotations

import contextlib
import copy
import logging
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler
from torch import Tensor, nn

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from pab_kernels.broadcast import timesteps
from tests.broadcast.toy import CONFIG, EVERY_STEP, ONES, Pipe, Toy, Wrapper, counts, integrate, noise, queries, toy

STEPS = 8
HALF = PABConfig(spatial=Broadcast(2, EVERY_STEP))


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def enabled(config: PABConfig = CONFIG, model: Any = None) -> Pipe:
    pipe = Pipe(model or toy())
    pab.enable(pipe, config)
    return pipe


# Loops that never call the scheduler's `step`


def as_view(t: Tensor) -> Tensor:
    return t.expand(1)


def as_number(t: Tensor) -> float:
    return float(t)


def rescaled(t: Tensor) -> Tensor:
    return t.expand(1) / 1000


def made_for_each_call(t: Tensor) -> Tensor:
    return torch.full((1,), float(t))


@pytest.mark.parametrize("read", [True, False], ids=["on the host", "on a device"])
@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("timestep", [as_view, as_number, rescaled, made_for_each_call])
def test_a_loop_that_integrates_by_itself_is_broadcast(
    timestep: Callable[[Tensor], Any], branches: int, read: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device timesteps are not read, but once a run for the first further call of a step."""
    reads: list[int] = []
    if not read:
        monkeypatch.setattr(timesteps, "_on_host", lambda t: False)
        item = Tensor.item
        monkeypatch.setattr(Tensor, "item", lambda t: (reads.append(1), item(t))[1])
    pipe = enabled(HALF)
    for steps in (STEPS, 2 * STEPS):
        ran = queries(pipe.transformer)
        reads.clear()
        integrate(pipe, steps, timestep, branches=branches)
        assert len(ran) == branches * steps // 2
        summary = pab.summary(pipe)
        assert len(summary.contexts) == branches and summary.forced == 0 and summary.cache_bytes == 0
    waits = len(reads) - (steps if timestep in (as_number, made_for_each_call) else 0)  # of the loop itself
    assert read or waits <= 1 + 2 * branches, "no step may wait for the device"


@pytest.mark.parametrize("whose", ["a scheduler's", "a bare model's"])
def test_timesteps_that_a_loop_leaves_out_are_steps_of_a_scheduler_and_none_of_a_bare_model(whose: str) -> None:
    """Every second step of a schedule is computed: here all that are taken, or every second one of them."""
    pipe = Pipe(toy())
    pipe.scheduler.set_timesteps(STEPS)
    times = pipe.scheduler.timesteps
    of_scheduler = whose == "a scheduler's"
    pab.enable(pipe if of_scheduler else pipe.transformer, HALF, timesteps=None if of_scheduler else times.tolist())
    if of_scheduler:
        pipe.scheduler.set_timesteps(STEPS)
        times = pipe.scheduler.timesteps
    ran = queries(pipe.transformer)
    with torch.no_grad():
        for t in times[::2]:
            pipe.transformer(noise(0), t.expand(1), pipe.prompt)
    assert len(ran) == (STEPS // 2 if of_scheduler else STEPS // 4)


def test_a_loop_whose_steps_cannot_be_told_is_stopped_before_contexts_pile_up() -> None:
    pipe = enabled()
    pipe.scheduler.set_timesteps(40)
    with torch.no_grad(), pytest.raises(RuntimeError, match="17 calls came in one step.*name the calls"):
        for _ in pipe.scheduler.timesteps:
            pipe.transformer(noise(0), torch.tensor([500.0]), pipe.prompt)
    assert len(pab.summary(pipe).contexts) == 16


# Models and schedulers put in place of others


def test_a_transformer_put_in_place_of_the_enabled_one_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    pipe = enabled()
    old, pipe.transformer = pipe.transformer, toy(1)
    plain = Pipe(toy(1)).sample()
    for _ in range(2):
        assert torch.equal(pipe.sample(), plain)
    assert len(said(caplog)) == 1 and "calls another model than the Toy that PAB was enabled on" in said(caplog)[0]
    pab.enable(pipe, CONFIG)
    assert not torch.equal(pipe.sample(), plain)
    pab.disable(pipe)
    for model in (old, pipe.transformer):
        assert not [name for m in model.modules() for name in vars(m) if name == "forward" or name.startswith("_pab")]
    assert "step" not in vars(pipe.scheduler) and not [name for name in vars(pipe) if name.startswith("_pab")]


def test_disable_takes_back_what_the_pipeline_no_longer_holds() -> None:
    pipe = enabled()
    old, scheduler = pipe.transformer, pipe.scheduler
    before = Pipe(toy()).sample()
    pipe.transformer, pipe.scheduler = toy(1), FlowMatchEulerDiscreteScheduler()
    assert pab.summary(pipe).plan is None
    pab.disable(pipe)
    assert "forward" not in vars(old) and "step" not in vars(scheduler) and "step" not in vars(pipe.scheduler)
    pipe.transformer, pipe.scheduler = old, scheduler
    assert torch.equal(pipe.sample(), before)


def test_a_model_wrapped_after_enable_is_broadcast(caplog: pytest.LogCaptureFixture) -> None:
    right = enabled().sample()
    pipe = enabled()
    pipe.transformer = Wrapper(pipe.transformer)
    assert torch.equal(pipe.sample(), right) and not said(caplog)
    pab.disable(pipe)
    assert "forward" not in vars(pipe.transformer.module)


def test_a_model_compiled_after_enable_is_broadcast() -> None:
    right = enabled().sample()
    pipe = enabled()
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    assert torch.allclose(pipe.sample(), right, atol=1e-5)
    assert counts(pipe)["spatial"][1] > 0
    torch._dynamo.reset()


def test_a_scheduler_exchanged_between_runs_is_followed() -> None:
    pipe = enabled()
    pipe.sample()
    pipe.scheduler = DDIMScheduler()
    fresh = Pipe(toy(), DDIMScheduler())
    pab.enable(fresh, CONFIG)
    for _ in range(2):
        assert torch.equal(pipe.sample(), fresh.sample()) and pab.summary(pipe).forced == 0


# Another forward on the model or its blocks


def own_function(module: nn.Module) -> None:
    module.forward = types.MethodType(
        lambda self, *args, **kwargs: 2 * type(self).forward(self, *args, **kwargs), module
    )  # type: ignore[method-assign]


def around_what_was_there(module: nn.Module) -> None:
    inner = module.forward
    module.forward = lambda *args, **kwargs: 2 * inner(*args, **kwargs)  # type: ignore[method-assign]


@pytest.mark.parametrize("where", ["", "blocks.0", "blocks.1.attn"])
@pytest.mark.parametrize("change", [own_function, around_what_was_there])
def test_another_forward_put_on_after_enable_runs_and_is_broadcast(
    change: Any, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = toy()
    change(before.get_submodule(where))
    plain = Pipe(before).sample()
    right = enabled(model=before).sample()
    for config, expected in ((ONES, plain), (CONFIG, right)):
        pipe = enabled(config)
        change(pipe.transformer.get_submodule(where))
        mine = vars(pipe.transformer.get_submodule(where))["forward"]
        for _ in range(2):
            assert torch.equal(pipe.sample(), expected)
        assert not said(caplog)
        pab.disable(pipe)
        assert torch.equal(pipe.sample(), plain) and vars(pipe.transformer.get_submodule(where))["forward"] is mine


@pytest.mark.parametrize("begin", ["a request", "the bare model"])
def test_another_forward_put_on_a_bare_model_is_broadcast_from_the_next_generation_on(begin: str) -> None:
    model, text = toy(), noise(1, 3)
    pab.enable(model, HALF, num_steps=STEPS)
    own_function(model.blocks[0].attn)
    ran = queries(model)
    if begin == "the bare model":
        pab.enable(model, num_steps=STEPS)
    with torch.no_grad(), pab.generation(model, num_steps=STEPS) if begin == "a request" else contextlib.nullcontext():
        for i in range(STEPS):
            model(noise(i), torch.tensor([9.0 - i]), text)
    assert len(ran) == STEPS // 2


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' schedulers
def test_another_step_put_on_a_scheduler_after_enable_is_followed() -> None:
    """Of second order it has each timestep twice, and only its steps part them."""
    pipe = Pipe(toy(), HeunDiscreteScheduler())
    pab.enable(pipe, CONFIG)
    right = pipe.sample()
    own = types.MethodType(lambda self, *args, **kwargs: type(self).step(self, *args, **kwargs), pipe.scheduler)
    pipe.scheduler.step = own
    assert torch.equal(pipe.sample(), right) and len(pab.summary(pipe).contexts) == 1
    pab.disable(pipe)
    assert vars(pipe.scheduler)["step"] is own


def test_a_class_patched_after_enable_runs_as_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, original, called = enabled(ONES), Toy.forward, []
    plain = Pipe(toy()).sample()
    monkeypatch.setattr(
        Toy, "forward", lambda self, *args, **kwargs: (called.append(1), 2 * original(self, *args, **kwargs))[1]
    )
    doubled = pipe.sample()
    assert len(called) == STEPS and not torch.equal(doubled, plain)
    pab.disable(pipe)
    assert torch.equal(pipe.sample(), doubled)


def test_blocks_replaced_within_a_run_compute_and_the_run_says_that_nothing_was_reused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pipe = enabled()
    steps = pipe.steps(STEPS, 0)
    next(steps)
    for block in pipe.transformer.blocks:
        for module in (block.attn, block.cross_attn, block.mlp):
            module.forward = types.MethodType(type(module).forward, module)
    *_, last = steps
    assert torch.equal(last, Pipe(toy()).sample())
    assert len(said(caplog)) == 1 and "reused nothing: the sublayers were not reached" in said(caplog)[0]


# Runs that reuse nothing say why


def test_a_prompt_that_is_another_one_at_every_step_is_named(caplog: pytest.LogCaptureFixture) -> None:
    pipe, texts = enabled(), [noise(i, 3) for i in range(STEPS)]
    plain = Pipe(toy())
    outs = []
    for p in (plain, pipe):
        p.scheduler.set_timesteps(STEPS)
        with torch.no_grad():
            for t, text in zip(p.scheduler.timesteps, texts, strict=True):
                outs.append(p.transformer(noise(5), t.expand(1), encoder_hidden_states=text))
                p.scheduler.step(noise(5), t, noise(5))
    assert all(torch.equal(a, b) for a, b in zip(outs[:STEPS], outs[STEPS:], strict=True))
    assert len(said(caplog)) == 1
    assert f"reused nothing: the argument encoder_hidden_states was another tensor {STEPS - 1} times" in said(caplog)[0]


def test_shapes_that_change_at_every_step_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model, text = toy(), noise(1, 3)
    pab.enable(model, CONFIG)
    with torch.no_grad(), pab.generation(model, num_steps=STEPS):
        for i in range(STEPS):
            model(noise(0, 3 + i), torch.tensor([9.0 - i]), text)
    assert len(said(caplog)) == 1 and "shapes, dtypes, flags or the order of the calls changed" in said(caplog)[0]


def test_a_scheduler_that_steps_while_another_model_is_called_is_told(caplog: pytest.LogCaptureFixture) -> None:
    pipe = enabled()
    other = toy(1)
    pipe.scheduler.set_timesteps(STEPS)
    x = noise(0)
    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            x = pipe.scheduler.step(other(x, t.expand(1), pipe.prompt), t, x).prev_sample
    assert len(said(caplog)) == 1 and "its scheduler stepped and the model was not called under PAB" in said(caplog)[0]


def test_calls_that_each_have_a_name_of_their_own_are_told(caplog: pytest.LogCaptureFixture) -> None:
    pipe = enabled()
    pipe.scheduler.set_timesteps(STEPS)
    with torch.no_grad():
        for i, t in enumerate(pipe.scheduler.timesteps):
            with pab.context(pipe, f"step {i}"):
                pipe.transformer(noise(0), t.expand(1), pipe.prompt)
            pipe.scheduler.step(noise(0), t, noise(0))
    assert len(said(caplog)) == 1 and "reused nothing: every call was in a different context" in said(caplog)[0]


@pytest.mark.parametrize("other", ["pipeline", "transformer_2"])
def test_a_model_that_is_not_called_where_another_one_has_its_scheduler_is_not_told(
    other: str, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = enabled()
    if other == "transformer_2":
        pipe.transformer_2 = toy(1)  # type: ignore[attr-defined]
    twin = Pipe(toy(1), pipe.scheduler) if other == "pipeline" else pipe
    pab.enable(twin, CONFIG)
    pipe.sample()
    assert counts(pipe)["spatial"][1] > 0 and not said(caplog)


def test_a_run_that_records_gradients_is_told_of_them_alone(caplog: pytest.LogCaptureFixture) -> None:
    pipe = enabled()
    pipe.scheduler.set_timesteps(STEPS)
    for t in pipe.scheduler.timesteps:
        out = pipe.transformer(noise(0).requires_grad_(), t.expand(1), pipe.prompt)
        pipe.scheduler.step(out.detach(), t, noise(0))
    assert len(said(caplog)) == 1 and "gradients are recorded" in said(caplog)[0]


@pytest.mark.parametrize("config", [CONFIG, ONES, PABConfig(spatial=Broadcast(2, (0.0, 0.1)))])
def test_a_run_that_reuses_or_plans_nothing_says_nothing(config: PABConfig, caplog: pytest.LogCaptureFixture) -> None:
    pipe = enabled(config)
    caplog.clear()
    pipe.sample()
    next(pipe.steps(STEPS, 0))  # left after a step
    pipe.scheduler.set_timesteps(STEPS)
    assert not [line for line in said(caplog) if "sampling run" in line]


# Copies


def copied(pipe: Pipe) -> Pipe:
    request = copy.copy(pipe)
    request.scheduler = copy.copy(pipe.scheduler)
    return request


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler, DDIMScheduler])
@pytest.mark.parametrize("used", [False, True])
def test_a_request_on_a_shallow_copy_runs_plainly_and_moves_nothing(
    scheduler: Any, used: bool, caplog: pytest.LogCaptureFixture
) -> None:
    plain = Pipe(toy(), scheduler()).sample(9)
    for config in (ONES, CONFIG):
        pipe = Pipe(toy(), scheduler())
        pab.enable(pipe, config)
        if used:
            pipe.sample(6)
        request, before = copied(pipe), pipe.scheduler.timesteps
        assert torch.equal(request.sample(9), plain) and len(request.scheduler.timesteps) == 9
        assert pipe.scheduler.timesteps is before
        right = pipe.sample(6)
        assert torch.equal(request.sample(9), plain) and torch.equal(pipe.sample(6), right)
        pab.disable(pipe)
        assert torch.equal(request.sample(9), plain)
    assert any("has a copy of the scheduler" in line for line in said(caplog))


def test_requests_on_copies_that_were_enabled_are_broadcast() -> None:
    pipe = enabled()
    right = pipe.sample()
    requests = [copied(pipe) for _ in range(2)]
    for request in requests:
        pab.enable(request)
    runs = [request.steps(STEPS, 0) for request in requests]
    for _ in range(STEPS):
        outs = [next(run) for run in runs]
    assert all(torch.equal(out, right) for out in outs)


def test_a_shallow_copy_of_the_model_is_plain_and_can_be_enabled() -> None:
    pipe = enabled()
    right, plain = pipe.sample(), Pipe(toy()).sample()
    other = copy.copy(pipe.transformer)
    assert torch.equal(Pipe(other).sample(), plain)
    assert torch.equal(pipe.sample(), right)
    pab.disable(pipe)
    assert torch.equal(Pipe(other).sample(), plain) and not [name for name in vars(other) if name.startswith("_pab")]


class Forwarding:
    """An object that passes on whatever it is asked for, and takes no attribute of its own."""

    def __init__(self, inner: Any) -> None:
        vars(self)["inner"] = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["inner"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.inner, name, value)


@pytest.mark.parametrize("first", ["proxy", "inner", "both"])
def test_a_scheduler_behind_an_object_that_passes_on_is_followed_once(first: str) -> None:
    right = enabled().sample()
    pipe = Pipe(toy())
    inner, proxy = pipe.scheduler, Forwarding(pipe.scheduler)
    twin = Pipe(pipe.transformer, proxy)
    for p in {"proxy": [twin], "inner": [pipe], "both": [pipe, twin]}[first]:
        pab.enable(p, CONFIG)
    assert torch.equal(twin.sample(), right) and pab.summary(twin).forced == 0
    assert torch.equal(pipe.sample(), right) or first == "proxy"
    pab.disable(twin)
    assert "step" not in vars(inner) and list(vars(proxy)) == ["inner"]
