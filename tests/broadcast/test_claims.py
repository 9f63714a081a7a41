"""Whose call it is, where only one thing tells: the prompt, the timestep, the thread that began a run, or the request
that is taken up."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

import pab_kernels as pab
from tests.broadcast.several_runs import STEPS, alone, bare, call, pair, same
from tests.broadcast.toy import CONFIG, Pipe, noise, toy


def _step(pipe: Pipe, i: int) -> Tensor:
    """A call at step `i` from a function that holds neither the pipeline nor its scheduler, and the scheduler's
    step."""
    t = pipe.scheduler.timesteps[i]
    out = call(pipe.transformer, t.expand(1), pipe.prompt)
    pipe.scheduler.step(out, t, noise(1))
    return out


def _held_step(pipe: Pipe, i: int) -> Tensor:
    t = pipe.scheduler.timesteps[i]
    with torch.no_grad():
        out = pipe.transformer(noise(1), t.expand(1), pipe.prompt)
    pipe.scheduler.step(out, t, noise(1))
    return out


def _whole(pipe: Pipe) -> list[Tensor]:
    pipe.scheduler.set_timesteps(STEPS)
    return [_step(pipe, i) for i in range(STEPS)]


def test_the_prompt_tells_two_runs_in_lockstep_apart() -> None:
    a, b, *_ = pair()
    right = _whole(a), _whole(b)
    a.scheduler.set_timesteps(STEPS)
    outs: tuple[list[Tensor], list[Tensor]] = [_step(a, 0)], []
    b.scheduler.set_timesteps(STEPS)
    for i in range(STEPS):
        outs[1].append(_step(b, i))
        if i + 1 < STEPS:
            outs[0].append(_step(a, i + 1))
    assert same(outs[0], right[0]) and same(outs[1], right[1])


def test_the_thread_that_began_a_run_tells_whose_its_first_call_is() -> None:
    """Also where another run was last called with the same prompt."""
    same_prompt = noise(300, 3)
    a, b, *_ = pair(a=same_prompt, b=same_prompt)
    right = _whole(a)
    pools = [ThreadPoolExecutor(1) for _ in range(2)]
    for pool, pipe in zip(pools, (a, b), strict=True):
        pool.submit(pipe.scheduler.set_timesteps, STEPS).result()
    t, outs = a.scheduler.timesteps[0], []
    for pool, pipe in zip(pools, (a, b), strict=True):
        outs.append(pool.submit(call, pipe.transformer, t.expand(1), same_prompt).result())
    assert same(outs, [right[0]] * 2) and pab.summary(a).plain_calls == 0
    for pipe, out in zip((a, b), outs, strict=True):
        pipe.scheduler.step(out, t, noise(1))
    for i in range(1, STEPS):
        assert same([_held_step(pipe, i) for pipe in (a, b)], [right[i]] * 2), i


def test_the_timestep_tells_apart_two_runs_that_were_not_called_yet() -> None:
    model, prompt = toy(), noise(300, 3)
    a, b = Pipe(model, prompt=prompt), Pipe(model, DDIMScheduler(), prompt)
    for pipe in (a, b):
        pab.enable(pipe, CONFIG)
    right = _whole(a), _whole(b)
    a.scheduler.set_timesteps(STEPS)
    b.scheduler.set_timesteps(STEPS)
    outs = [(_step(a, i), _step(b, i)) for i in range(STEPS)]
    assert same([x for x, _ in outs], right[0]) and same([y for _, y in outs], right[1])


def test_a_run_at_its_timestep_goes_before_the_bare_model() -> None:
    model = toy()
    pipe = Pipe(model, prompt=noise(300, 3))
    pab.enable(pipe, CONFIG)
    right = _whole(pipe)
    pab.enable(model, CONFIG, num_steps=STEPS)
    pipe.scheduler.set_timesteps(STEPS)
    outs = []
    for i in range(STEPS):
        outs.append((_step(pipe, i), bare(model, i, 0, pipe.prompt)))
    assert same([x for x, _ in outs], right) and same([y for _, y in outs], _alone(pipe.prompt))


def _alone(text: Tensor) -> list[Tensor]:
    model = toy()
    pab.enable(model, CONFIG, num_steps=STEPS)
    return [bare(model, i, 0, text) for i in range(STEPS)]


def test_variables_of_a_module_tell_nothing() -> None:
    """In a notebook a pipeline of an earlier cell is one of them."""
    same_prompt = noise(300, 3)
    a, b, *_ = pair(a=same_prompt, b=same_prompt)
    for pipe in (a, b):
        pipe.scheduler.set_timesteps(STEPS)
    cell = {"pipe": a, "call": (noise(1), a.scheduler.timesteps[0].expand(1), same_prompt)}
    with torch.no_grad(), pytest.raises(RuntimeError, match="2 sampling runs on this model go on"):
        exec("pipe.transformer(*call)", cell)


def test_where_steps_are_told_a_call_at_a_later_timestep_is_no_step() -> None:
    pipe, plain = Pipe(toy()), toy()
    pab.enable(pipe, CONFIG)
    right = list(pipe.steps(STEPS, 0))
    for i, x in enumerate(pipe.steps(STEPS, 0)):
        assert torch.equal(x, right[i])
        if i + 3 < STEPS:
            later = noise(7), pipe.scheduler.timesteps[i + 3].expand(1), noise(8, 3)
            with torch.no_grad():
                assert torch.equal(pipe.transformer(*later), plain(*later)), i
    assert pab.summary(pipe).plain_calls == STEPS - 3


def test_calls_at_timesteps_of_no_schedule_after_timesteps_were_set_are_no_run() -> None:
    pipe, plain = Pipe(toy()), toy()
    pipe.scheduler.set_timesteps(STEPS)
    pab.enable(pipe, CONFIG)
    for i in range(4):
        given = noise(i), torch.tensor([5000.0 + 100 * i]), pipe.prompt
        with torch.no_grad():
            assert torch.equal(pipe.transformer(*given), plain(*given)), i


def test_a_request_here_goes_before_one_that_is_taken_up_elsewhere() -> None:
    model, elsewhere = toy(), ThreadPoolExecutor(1)
    pipe = Pipe(model)
    pab.enable(pipe, CONFIG)
    here, other = (pab.generation(model, num_steps=STEPS) for _ in range(2))
    elsewhere.submit(other.__enter__).result()
    elsewhere.submit(bare, model, 0, 0).result()
    with here:
        out = [bare(model, 0, 0)]
        pipe.scheduler.set_timesteps(STEPS)
        _step(pipe, 0)  # a run that begins inside
        out += [bare(model, step, 0) for step in range(1, STEPS)]
    assert same(out, alone(0))


def test_of_a_bare_model_the_generation_begun_last_goes_on() -> None:
    model = toy()
    pab.enable(model, CONFIG, num_steps=STEPS)
    for step in range(3):
        bare(model, step, 0)
    pab.enable(model, num_steps=STEPS)
    assert pab.summary(model).cache_bytes == 0
    assert same([bare(model, step, 0) for step in range(STEPS)], alone(0))
