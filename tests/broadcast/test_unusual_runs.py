"""Runs as some people write them: generators that hold things open, foreign numbers, prompts in objects, parts that are
gone."""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
import pickle
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from pab_kernels.broadcast.slots import Slot
from tests.broadcast.toy import CONFIG, EVERY_STEP, Pipe, Toy, counts, integrate, noise, toy

STEPS = 8
CROSS = PABConfig(cross=Broadcast(6, EVERY_STEP))
POS, NEG = noise(3, 3), noise(4, 3)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def bare(model: Toy, step: int, seed: int) -> Tensor:
    with torch.no_grad():
        return model(noise(10 * seed + step), torch.tensor([float(900 - 100 * step)]), noise(100 + seed, 3))


def alone(seed: int) -> list[Tensor]:
    model = toy()
    pab.enable(model, CONFIG, num_steps=STEPS)
    return [bare(model, i, seed) for i in range(STEPS)]


# Whose call it is


class Job:
    """Holds its pipeline in an attribute."""

    def __init__(self, pipe: Pipe, seed: int) -> None:
        self.pipe, self.x = pipe, noise(seed)

    def run(self) -> Iterator[Tensor]:
        self.pipe.scheduler.set_timesteps(STEPS)
        for t in self.pipe.scheduler.timesteps:
            with torch.no_grad():
                out = self.pipe.transformer(self.x, t.expand(1), self.pipe.prompt)
            self.x = self.pipe.scheduler.step(out, t, self.x).prev_sample
            yield self.x


def test_a_variable_that_is_left_over_in_an_outer_function_decides_nothing() -> None:
    model, prompt = toy(), noise(300, 3)
    pipes = [Pipe(model, prompt=prompt) for _ in range(2)]
    for pipe in pipes:
        pab.enable(pipe, CONFIG)
    right = [pipe.sample(STEPS, seed) for seed, pipe in enumerate(pipes)]
    runs = [Job(pipe, seed).run() for seed, pipe in enumerate(pipes)]
    for _ in range(STEPS):
        last = [next(run) for run in runs]
    assert all(map(torch.equal, last, right))


@contextlib.contextmanager
def at_once(request: Any, context: Any) -> Iterator[None]:
    with request, context:
        yield


@contextlib.contextmanager
def on_a_stack(request: Any, context: Any) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(request)
        stack.enter_context(context)
        yield


@pytest.mark.parametrize("way", [None, at_once, on_a_stack], ids=lambda way: way and way.__name__)
def test_generators_that_hold_a_request_open_are_resumed_in_turn(way: Any) -> None:
    model = toy()
    pab.enable(model, CONFIG)

    def one(seed: int) -> Iterator[Tensor]:
        request, context = pab.generation(model, num_steps=STEPS), pab.context(model, f"of {seed}")
        if way is None:
            with request, context:
                yield from (bare(model, step, seed) for step in range(STEPS))
        else:
            with way(request, context):
                yield from (bare(model, step, seed) for step in range(STEPS))

    runs = [one(seed) for seed in range(3)]
    outs = [[next(run) for run in runs] for _ in range(STEPS)]
    for seed in range(3):
        assert all(torch.equal(row[seed], right) for row, right in zip(outs, alone(seed), strict=True))


def test_another_thread_at_a_timestep_of_its_own_takes_no_step_of_a_request() -> None:
    model, given = toy(), (noise(5), torch.tensor([123.0]), noise(6, 3))
    pab.enable(model, CONFIG)
    with torch.no_grad(), pab.generation(model, timesteps=[900.0 - 100 * i for i in range(STEPS)]):
        for step in range(STEPS):
            bare(model, step, 0)
            assert torch.equal(ThreadPoolExecutor(1).submit(torch.no_grad()(model), *given).result(), toy()(*given))
    assert pab.summary(model).plain_calls == STEPS and pab.summary(model).forced == 0


def test_a_first_call_in_a_worker_thread_that_two_requests_can_claim_is_refused() -> None:
    model = toy()
    pab.enable(model, CONFIG)
    first, second = (pab.generation(model, num_steps=STEPS) for _ in range(2))
    with first:
        bare(model, 0, 0)
        with second, pytest.raises(RuntimeError, match="2 sampling runs on this model go on"):
            ThreadPoolExecutor(1).submit(bare, model, 0, 0).result()


# Steps and branches


def test_a_named_branch_that_is_called_twice_in_a_step_is_two_branches() -> None:
    pipe, plain = Pipe(toy()), toy()
    pab.enable(pipe, CONFIG)
    pipe.scheduler.set_timesteps(STEPS)
    with torch.no_grad():
        for i, t in enumerate(pipe.scheduler.timesteps):
            for clip in range(2):
                given = noise(2 * i + clip), t.expand(1), pipe.prompt
                with pab.context(pipe, "cond"):
                    out = pipe.transformer(*given)
                assert i or torch.equal(out, plain(*given))
            pipe.scheduler.step(noise(0), t, noise(0))
    assert pab.summary(pipe).forced == 0 and len(pab.summary(pipe).contexts) == 2


@pytest.mark.parametrize("number", [np.float32, np.float64, np.int64, lambda t: [float(t)]])
def test_timesteps_are_numbers_of_any_library(number: Any) -> None:
    pipe = Pipe(toy(), DDIMScheduler())
    pab.enable(pipe, PABConfig(spatial=Broadcast(2, EVERY_STEP)))
    pipe.scheduler.set_timesteps(20)
    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            pipe.transformer(noise(0), number(t), pipe.prompt)
    assert counts(pipe)["spatial"] == (20, 20, 0) and pab.summary(pipe).plain_calls == 0


@pytest.mark.parametrize(
    "way", [lambda t: t * 0.001, lambda t: (t / 1000).bfloat16(), lambda t: (t * 1.0).half() / 1000]
)
@pytest.mark.parametrize("scheduler", [None, DDIMScheduler])
def test_a_timestep_that_is_rounded_on_another_way_is_that_of_its_step(way: Any, scheduler: Any) -> None:
    pipe = Pipe(toy(), scheduler and scheduler())
    pab.enable(pipe, PABConfig(spatial=Broadcast(2, EVERY_STEP)))
    pipe.scheduler.set_timesteps(20)
    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            pipe.scheduler.step(pipe.transformer(noise(0), way(t).expand(1), pipe.prompt), t, noise(0))
    assert counts(pipe)["spatial"] == (20, 20, 0) and pab.summary(pipe).plain_calls == 0


def test_timesteps_set_before_enable_are_followed_without_steps() -> None:
    pipe = Pipe(toy())
    pipe.scheduler.set_timesteps(10)
    pab.enable(pipe, PABConfig(spatial=Broadcast(2, EVERY_STEP)))
    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            pipe.transformer(noise(0), t.expand(1), pipe.prompt)
    assert counts(pipe)["spatial"] == (10, 10, 0) and pab.summary(pipe).plain_calls == 0


# Prompts


@dataclass
class Condition:
    text: Tensor


def in_an_object(i: int, name: str) -> dict[str, Any]:
    return {"guidance": CONDITIONS[name]}


def as_a_number(i: int, name: str) -> dict[str, Any]:
    return {"guidance": 3 if name == "cond" else 10}


def as_views(i: int, name: str) -> dict[str, Any]:
    return {"guidance": BOTH.chunk(2)[name == "cond"]}


CONDITIONS = {"cond": Condition(POS), "uncond": Condition(NEG)}
BOTH = torch.cat([NEG, POS])


@pytest.mark.parametrize(
    ("prompt", "first"), [(in_an_object, 1), (in_an_object, 4), (as_views, 1), (as_views, 4), (as_a_number, 4)]
)  # a number that was there once may be a counter
def test_a_branch_that_comes_late_is_told_by_a_prompt_in_any_form(prompt: Any, first: int) -> None:
    """The text itself is made anew for every call and shows nothing."""

    def sample(config: PABConfig, named: bool) -> list[Tensor]:
        pipe, outs = Pipe(toy()), []
        pab.enable(pipe, config)
        pipe.scheduler.set_timesteps(STEPS)
        for i, t in enumerate(pipe.scheduler.timesteps):
            for name in ("uncond", "cond") if i >= first else ("cond",):
                text = (POS if name == "cond" else NEG) + 0
                with torch.no_grad(), pab.context(pipe, name) if named else torch.no_grad():
                    outs.append(pipe.transformer(noise(i), t.expand(1), text, **prompt(i, name)))
            pipe.scheduler.step(noise(0), t, noise(0))
        return outs

    told, right, plain = sample(CROSS, False), sample(CROSS, True), sample(PABConfig(), False)
    # The negative branch's first call.
    assert torch.equal(told[first], right[first]) and torch.equal(told[first], plain[first])


def test_views_that_are_made_for_every_call_are_the_same_prompt() -> None:
    model = toy()
    pab.enable(model, CROSS)
    with torch.no_grad(), pab.generation(model, num_steps=STEPS):
        for i in range(STEPS):
            model(noise(i), torch.tensor([900.0 - i]), BOTH[1:])
    assert pab.summary(model).forced == 0


# Calls that are no steps


def test_a_checkpointed_training_step_is_plain() -> None:
    pipe = Pipe(toy())
    pab.enable(pipe, CONFIG)
    next(pipe.steps(STEPS, 0))
    x = noise(0).requires_grad_()
    out = checkpoint(pipe.transformer, x, pipe.scheduler.timesteps[1].expand(1), pipe.prompt, use_reentrant=True)
    assert torch.equal(out, toy()(x, pipe.scheduler.timesteps[1].expand(1), pipe.prompt))
    out.sum().backward()
    assert x.grad is not None


def test_transforms_of_functions_run_plainly_within_a_run() -> None:
    pipe, plain = Pipe(toy()), toy()
    pab.enable(pipe, CONFIG)
    next(pipe.steps(STEPS, 0))
    x, t = noise(0), pipe.scheduler.timesteps[1].expand(1)
    for model in (pipe.transformer, plain):
        with torch.no_grad():
            tangent = torch.func.jvp(lambda x, model=model: model(x, t, pipe.prompt), (x,), (x,))
            batched = torch.func.vmap(lambda t, model=model: model(x, t, pipe.prompt))(torch.stack([t, t + 1]))
        if model is pipe.transformer:
            got = (*tangent, batched)
    assert all(map(torch.equal, got, (*tangent, batched)))
    assert pab.summary(pipe).plain_calls == 2


def test_tracing_and_fake_tensors_at_the_next_timestep_are_no_step() -> None:
    pipe, plain = Pipe(toy()), toy()
    pab.enable(pipe, CONFIG)
    next(pipe.steps(STEPS, 0))
    given = noise(0), pipe.scheduler.timesteps[1].expand(1), pipe.prompt
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated, and warns of numbers that it takes for constant
        traced: Any = torch.jit.trace(pipe.transformer, given, check_trace=False)
        assert torch.allclose(traced(*given), plain(*given))
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.no_grad():
        pipe.transformer(*map(fake.from_tensor, given))
    assert pab.summary(pipe).plain_calls == 2


# Parts that are gone, copies, memory


def test_a_pipeline_of_ones_own_is_copied_and_pickled_plain() -> None:
    pipe = Pipe(toy())
    pab.enable(pipe, CONFIG)
    for other in (copy.copy(pipe), copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert set(vars(other)) == {"transformer", "scheduler", "prompt"}
    pab.disable(pipe)
    assert set(vars(pipe)) == {"transformer", "scheduler", "prompt"}


def test_disable_after_the_transformer_was_let_go_takes_everything_back(caplog: pytest.LogCaptureFixture) -> None:
    pipe = Pipe(toy())
    pab.enable(pipe, CONFIG)
    model, pipe.transformer = pipe.transformer, None  # type: ignore[assignment]
    pab.disable(pipe)
    assert "forward" not in vars(model) and "step" not in vars(pipe.scheduler) and not said(caplog)


def test_a_transformer_exchanged_and_freed_is_told_and_leaves_nothing(caplog: pytest.LogCaptureFixture) -> None:
    pipe = Pipe(toy())
    before = set(vars(pipe.scheduler))
    pab.enable(pipe, CONFIG)
    pipe.transformer = toy(1)
    gc.collect()
    assert len(said(caplog)) == 1 and "the Toy of a Pipe on which PAB was enabled is gone" in said(caplog)[0]
    assert set(vars(pipe.scheduler)) == before and set(vars(pipe)) == {"transformer", "scheduler", "prompt"}
    pab.enable(pipe, CONFIG)
    pipe.sample()
    assert counts(pipe)["spatial"][1] > 0


def test_an_error_in_the_model_is_no_run_that_reused_nothing(caplog: pytest.LogCaptureFixture) -> None:
    pipe = Pipe(toy())
    pab.enable(pipe, PABConfig(spatial=Broadcast(2, EVERY_STEP)))
    steps = pipe.steps(STEPS, 0)
    next(steps)
    handle = pipe.transformer.blocks[0].register_forward_pre_hook(lambda *_: 1 / 0)  # before anything is reused
    with pytest.raises(ZeroDivisionError):
        next(steps)
    assert pab.summary(pipe).cache_bytes == 0
    handle.remove()
    pipe.sample()
    assert not said(caplog)


def held() -> int:
    gc.collect()
    return sum(type(o) is Slot for o in gc.get_objects())


@pytest.mark.parametrize("exchanged", [False, True], ids=["a pipeline a request", "a scheduler a request"])
def test_aborted_requests_leave_no_slots(exchanged: bool) -> None:
    model, before = toy(), held()
    pipe = Pipe(model)
    for seed in range(4):
        if exchanged:
            pipe.scheduler = DDIMScheduler()
        else:
            pipe = Pipe(model)
        pab.enable(pipe, CONFIG)
        steps = pipe.steps(STEPS, seed)
        next(steps), next(steps)
        del steps
    first = 4  # of one request: two sublayers in each block
    assert held() - before <= 2 * first
    pipe.sample()
    assert held() == before


def test_release_within_a_call_keeps_nothing_of_that_call() -> None:
    pipe, before = Pipe(toy()), held()
    pab.enable(pipe, CONFIG)
    steps = pipe.steps(STEPS, 0)
    handle = pipe.transformer.blocks[1].register_forward_pre_hook(lambda *_: pab.release(pipe))
    next(steps)
    handle.remove()
    assert held() == before and pab.summary(pipe).cache_bytes == 0
    *_, last = steps
    assert last.isfinite().all() and counts(pipe)["spatial"][1] > 0


def test_an_inversion_and_a_sampling_on_one_scheduler_are_two_runs() -> None:
    pipe = Pipe(toy())
    pab.enable(pipe, PABConfig(spatial=Broadcast(2, EVERY_STEP)))
    integrate(pipe, STEPS, lambda t: t.expand(1))
    assert counts(pipe)["spatial"] == (STEPS, STEPS, 0)
    pipe.sample(STEPS)
    assert counts(pipe)["spatial"] == (STEPS, STEPS, 0)
