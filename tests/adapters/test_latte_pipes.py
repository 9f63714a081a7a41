"""Several pipelines, schedulers and threads around one Latte, or one each: none disturbs another."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from tests.adapters.tiny_latte import (
    LAYERS,
    counted_operations,
    inputs,
    noise,
    prompt,
    run_model,
    sample,
    tiny_latte,
    tiny_pipe,
)
from tests.hang import HANG
from tests.oracle import Oracle, Rule

# diffusers' schedulers hand tensors to numpy in a way that numpy deprecates
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

RULES: dict[str, Any] = {
    "spatial": Rule(2, (0, 1)),
    "temporal": Rule(3, (0, 1)),
    "cross": Rule(6, (0, 1)),
    "mlp": Rule(3, (0.2, 0.8)),
}
CONFIG = PABConfig(**{kind: Broadcast(rule.range, rule.window) for kind, rule in RULES.items()})
TIMESTEPS = list(range(900, -1, -100))
STEPS = len(TIMESTEPS)
COND, UNCOND = prompt(1), prompt(2)


class OnPurpose(Exception):
    pass


def in_threads(*work: Callable[[], Any]) -> list[Any]:
    results: list[Any] = [None] * len(work)

    def run(i: int) -> None:
        try:
            with torch.no_grad():
                results[i] = work[i]()
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


@pytest.mark.parametrize("shared", [False, True], ids=["a transformer each", "one transformer"])
def test_pipelines_in_two_threads_do_not_touch_each_other(shared: bool) -> None:
    model = tiny_latte()
    pipes = [
        tiny_pipe(scheduler(), model if shared else tiny_latte())
        for scheduler in (DDIMScheduler, EulerDiscreteScheduler)
    ]
    settings = [{"steps": 8, "seed": 1}, {"steps": 8, "seed": 2, "guidance": 1.0}]
    for pipe in pipes:
        pab.enable(pipe, CONFIG)
    alone = [sample(pipe, **kwargs) for pipe, kwargs in zip(pipes, settings, strict=True)]
    barrier = threading.Barrier(2, timeout=HANG)

    def step_by_step(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        barrier.wait()  # both are after step i: their calls alternate
        return tensors

    def work(i: int) -> Any:
        out = sample(pipes[i], **settings[i], callback_on_step_end=step_by_step)
        summary = pab.summary(pipes[i])
        assert summary.forced == 0 and summary.peak_cache_bytes > 0
        return out

    together = in_threads(lambda: work(0), lambda: work(1))
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a, b)
    assert all(pab.summary(pipe).cache_bytes == 0 for pipe in pipes)


def test_an_error_in_one_thread_leaves_the_other_alone() -> None:
    model = tiny_latte()
    pipes = [tiny_pipe(DDIMScheduler(), model) for _ in range(2)]
    for pipe in pipes:
        pab.enable(pipe, CONFIG)
    alone = sample(pipes[1], 8)
    barrier = threading.Barrier(2, timeout=HANG)

    def wait(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if i < 4:
            barrier.wait()
        if pipe is pipes[0] and i == 3:
            raise OnPurpose
        return tensors

    def fails() -> None:
        with pytest.raises(OnPurpose):
            sample(pipes[0], 8, seed=7, callback_on_step_end=wait)

    results = in_threads(fails, lambda: sample(pipes[1], 8, callback_on_step_end=wait))
    assert torch.equal(results[1], alone)


def test_a_generation_of_the_bare_model_is_that_of_all_threads() -> None:
    model = tiny_latte()
    pab.enable(model, CONFIG, num_steps=2)

    def refused() -> None:
        with pytest.raises(RuntimeError, match="the plan has 2 steps"):
            model(**inputs())

    for _ in range(2):
        in_threads(lambda: model(**inputs()))
    in_threads(refused)
    refused()


def test_one_transformer_in_two_pipes_in_turn() -> None:
    model = tiny_latte()
    first, second = tiny_pipe(DDIMScheduler(), model), tiny_pipe(EulerDiscreteScheduler(), model)
    pab.enable(first, CONFIG)
    pab.enable(second)
    alone = []
    for scheduler in (DDIMScheduler, EulerDiscreteScheduler):
        pipe = tiny_pipe(scheduler())
        pab.enable(pipe, CONFIG)
        alone.append(sample(pipe, 7))
    for _ in range(2):
        for pipe, expected in zip((first, second), alone, strict=True):
            assert torch.equal(sample(pipe, 7), expected)
            assert pab.summary(pipe).forced == 0 and pab.summary(pipe).cache_bytes == 0
    pab.disable(second)
    assert "step" not in vars(first.scheduler) and "step" not in vars(second.scheduler)


def test_a_pipe_that_shares_the_model_and_was_not_enabled_runs_plainly_and_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = tiny_latte()
    first, second = tiny_pipe(DDIMScheduler(), model), tiny_pipe(DDIMScheduler(), model)
    pab.enable(first, CONFIG)
    plain = sample(tiny_pipe(DDIMScheduler()), 4)
    assert torch.equal(sample(second, 4), plain)
    clean = sample(first, 4)
    assert torch.equal(sample(second, 4), plain) and not torch.equal(clean, plain)
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 1 and "pab.enable every pipeline that calls the model" in said[0]
    assert torch.equal(sample(first, 4), clean)
    pab.enable(second)
    assert torch.equal(sample(second, 4), clean)


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, HeunDiscreteScheduler])
def test_a_scheduler_exchanged_after_enable_is_followed(scheduler: Any) -> None:
    expected = tiny_pipe(scheduler())
    pab.enable(expected, CONFIG)
    clean = sample(expected, 6)
    pipe = tiny_pipe(DDIMScheduler())
    pab.enable(pipe, CONFIG)
    before = sample(pipe, 6)
    old = pipe.scheduler
    pipe.scheduler = scheduler()
    for _ in range(2):
        assert torch.equal(sample(pipe, 6), clean)
        assert pab.summary(pipe).forced == 0 and pab.summary(pipe).cache_bytes == 0
        assert "step" not in vars(old), "nobody holds it any more"
    new, pipe.scheduler = pipe.scheduler, old
    assert torch.equal(sample(pipe, 6), before)
    assert torch.equal(sample(pipe, 6), before)
    pab.disable(pipe)
    assert "step" not in vars(old) and "step" not in vars(new)


@pytest.mark.parametrize("used", [False, True], ids=["new", "used before"])
@pytest.mark.parametrize("when", ["before the run", "in the run"])
@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, HeunDiscreteScheduler])
def test_a_scheduler_exchanged_on_an_idle_pipe_does_not_disturb_the_other(
    scheduler: Any, when: str, used: bool
) -> None:
    model = tiny_latte()
    idle, busy = tiny_pipe(DDIMScheduler(), model), tiny_pipe(DDIMScheduler(), model)
    pab.enable(idle, CONFIG)
    pab.enable(busy)
    clean = sample(busy, 6)
    other = scheduler()
    if used:
        other.set_timesteps(5)

    def exchange(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if i == 2:
            idle.scheduler = other
        return tensors

    if when == "before the run":
        idle.scheduler = other
        assert torch.equal(sample(busy, 6), clean)
    else:
        assert torch.equal(sample(busy, 6, callback_on_step_end=exchange), clean)
    assert pab.summary(busy).forced == 0
    assert sample(idle, 6).isfinite().all()
    assert len(pab.summary(idle).plan.steps) == len(other.timesteps)


def test_a_scheduler_that_two_pipes_share_steps_each_of_them_once() -> None:
    pipes = [tiny_pipe(DDIMScheduler())]
    pipes.append(tiny_pipe(pipes[0].scheduler, tiny_latte(seed=1)))
    alone = []
    for pipe in pipes:
        pab.enable(pipe, CONFIG)
        alone.append(sample(pipe, 6))
    for pipe, expected in zip(pipes, alone, strict=True):
        assert torch.equal(sample(pipe, 6), expected)
    pab.disable(pipes[0])
    assert torch.equal(sample(pipes[1], 6), alone[1])


def test_a_scheduler_that_steps_does_not_move_a_generation_of_the_bare_model() -> None:
    pipe = tiny_pipe(DDIMScheduler())
    pab.enable(pipe, CONFIG)
    pipe.scheduler.set_timesteps(4)
    with pab.generation(pipe, num_steps=4):
        for t in pipe.scheduler.timesteps:
            pipe.transformer(**inputs())
            pipe.scheduler.step(noise(), t, noise())
    assert pab.summary(pipe).forced == 0 and len(pab.summary(pipe).plan.steps) == 4


def test_a_pipeline_whose_blocks_all_reuse_runs_no_attention_at_that_step() -> None:
    pipe = tiny_pipe()
    both = Broadcast(2, (0, 1))
    pab.enable(pipe, PABConfig(both, both, both))
    calls: list[int] = []
    with counted_operations() as operations:

        def after_step(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            calls.append(operations["attention"].call_count)
            return tensors

        sample(pipe, 4, callback_on_step_end=after_step)
    assert calls == [3 * LAYERS, 3 * LAYERS, 6 * LAYERS, 6 * LAYERS]


def test_the_oracle_and_the_loop_see_the_same_rules() -> None:
    model = tiny_latte()
    expected = run_model(Oracle(model, RULES, TIMESTEPS), TIMESTEPS, noise(), {"": COND})
    pab.enable(model, CONFIG, num_steps=STEPS)
    assert torch.equal(
        run_model(lambda name, step, *a, **k: model(*a, **k).sample, TIMESTEPS, noise(), {"": COND}), expected
    )
