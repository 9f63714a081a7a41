"""Requests: runs that share one model, put down and taken up in any order, thread or task, and nothing of one reaches
another."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from tests.broadcast.several_runs import STEPS, alone, bare, call, pair, same
from tests.broadcast.toy import CONFIG, EVERY_STEP, Pipe, Toy, counts, noise, toy
from tests.hang import HANG

NAN = torch.full_like(noise(0, 3), float("nan"))


# Requests on a bare model


def test_three_requests_are_mixed_step_by_step() -> None:
    model = toy()
    pab.enable(model, CONFIG)
    requests = [pab.generation(model, num_steps=STEPS + i) for i in range(3)]
    outs: list[list[Tensor]] = [[], [], []]
    for turn in range(STEPS + 2 + 4):
        for i, request in enumerate(requests):
            step = turn - 2 * i  # each comes two turns after the one before
            if 0 <= step < STEPS + i:
                with request:
                    outs[i].append(bare(model, step, i))
    assert all(same(out, alone(i, STEPS + i)) for i, out in enumerate(outs))
    for i, request in enumerate(requests):
        summary = pab.summary(request)
        assert (
            summary.forced == 0
            and summary.cache_bytes == 0
            and summary.plan is not None
            and len(summary.plan.steps) == STEPS + i
        )
    assert pab.summary(model).cache_bytes == 0


@pytest.mark.parametrize("steps", [None, STEPS], ids=["alone", "besides a generation of the bare model"])
def test_a_nested_request_ends_and_the_outer_one_goes_on(steps: int | None) -> None:
    model = toy()
    pab.enable(model, CONFIG, num_steps=steps)
    out = []
    with pab.generation(model, num_steps=STEPS) as outer:
        for step in range(STEPS):
            out.append(bare(model, step, 0))
            if step == 3:
                inner = pab.generation(model, num_steps=5)
                with inner:
                    for i in range(3):  # left half way, and kept
                        assert bare(model, i, 1, NAN).isnan().all()
        assert outer.step == STEPS - 1
    assert same(out, alone(0)) and pab.summary(outer).forced == 0 and inner.step == 2


def test_the_first_generation_of_a_bare_model_goes_on_after_a_request() -> None:
    model = toy()
    pab.enable(model, CONFIG, num_steps=STEPS)
    out = [bare(model, step, 0) for step in range(3)]
    with pab.generation(model, num_steps=4):
        bare(model, 0, 1, NAN)
    out += [bare(model, step, 0) for step in range(3, STEPS)]
    assert same(out, alone(0))


def test_a_request_goes_on_in_another_thread_and_holds_what_it_kept() -> None:
    model = toy()
    pab.enable(model, CONFIG)
    request, out = pab.generation(model, num_steps=STEPS), []
    pools = [ThreadPoolExecutor(1) for _ in range(3)]

    def one(step: int) -> Tensor:
        with request:
            return bare(model, step, 0)

    for step in range(STEPS):
        out.append(pools[step % 3].submit(one, step).result())
    assert same(out, alone(0)) and pab.summary(request).forced == 0


def test_a_generator_that_holds_a_request_open_is_resumed_in_other_threads() -> None:
    model = toy()
    pab.enable(model, CONFIG)

    def previews(seed: int) -> Iterator[Tensor]:
        with pab.generation(model, num_steps=STEPS):
            for step in range(STEPS):
                yield bare(model, step, seed)

    generator, pools = previews(0), [ThreadPoolExecutor(1) for _ in range(2)]
    out = [pools[step % 2].submit(next, generator).result() for step in range(STEPS)]
    assert pools[0].submit(next, generator, None).result() is None
    assert same(out, alone(0)) and counts(model)["spatial"][2] == 0
    with pab.generation(model, num_steps=STEPS):  # in this thread nothing is left of it
        assert same([bare(model, step, 1) for step in range(STEPS)], alone(1))


def test_tasks_of_one_event_loop_have_requests_of_their_own() -> None:
    model = toy()
    pab.enable(model, CONFIG)

    async def turn() -> None:
        """Let the other tasks run."""
        await asyncio.get_running_loop().run_in_executor(None, lambda: None)

    async def run(seed: int) -> list[Tensor]:
        out = []
        with pab.generation(model, num_steps=STEPS):
            for step in range(STEPS):
                await turn()
                with pab.context(model, "cond"):
                    await turn()
                    out.append(bare(model, step, seed))
        return out

    async def main() -> list[list[Tensor]]:
        return await asyncio.gather(*(run(seed) for seed in range(3)))

    assert all(same(out, alone(seed)) for seed, out in enumerate(asyncio.run(main())))


def test_branches_in_worker_threads_belong_to_the_request_of_the_main_one() -> None:
    model = toy()
    pab.enable(model, CONFIG)
    expected = toy()
    pab.enable(expected, CONFIG, num_steps=STEPS)
    pools = {name: ThreadPoolExecutor(1) for name in ("cond", "uncond")}

    def branch(of: Toy, name: str, step: int) -> Tensor:
        with pab.context(of, name):
            return bare(of, step, len(name))

    with pab.generation(model, num_steps=STEPS):
        for step in range(STEPS):
            both = {name: pool.submit(branch, model, name, step) for name, pool in pools.items()}
            for name, future in both.items():
                assert torch.equal(future.result(), branch(expected, name, step)), (name, step)
    assert counts(model) == counts(expected)


def test_what_a_request_keeps_is_released_when_it_is_closed_fails_or_is_forgotten() -> None:
    model = toy()
    pab.enable(model, CONFIG)

    def begun() -> Any:
        request = pab.generation(model, num_steps=STEPS)
        with request:
            bare(model, 0, 0)
        assert pab.summary(request).cache_bytes == pab.summary(model).cache_bytes > 0
        return request

    closed = begun()
    closed.close()
    assert pab.summary(model).cache_bytes == 0
    failed = begun()
    with pytest.raises(KeyError), failed:
        raise KeyError
    assert pab.summary(model).cache_bytes == 0
    for request in (closed, failed):
        with (
            pytest.raises(RuntimeError, match="this request is closed, or ended by an error; begin another one"),
            request,
        ):
            pass
    gc.disable()
    try:
        del closed, failed, request
        begun()
        assert pab.summary(model).cache_bytes == 0, "nobody holds it"
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "end", [lambda model, request: request.close(), lambda model, request: pab.release(model)], ids=["close", "release"]
)
def test_calls_in_a_request_that_is_over_run_plainly(end: Any) -> None:
    model = toy()
    pab.enable(model, CONFIG)
    with pab.generation(model, num_steps=STEPS) as request:
        bare(model, 0, 0)
        end(model, request)
        assert torch.equal(bare(model, 1, 0), bare(toy(), 1, 0))
    assert pab.summary(model).plain_calls == 1


def test_release_lets_go_of_everything_in_all_threads_and_the_model_stays_enabled() -> None:
    model = toy()
    pab.enable(model, CONFIG)
    requests = [pab.generation(model, num_steps=STEPS) for _ in range(2)]

    def one(request: Any) -> None:
        with request:
            bare(model, 0, 0)

    for request in requests:
        ThreadPoolExecutor(1).submit(one, request).result()
    held = [pab.summary(request).cache_bytes for request in requests]
    assert pab.summary(model).cache_bytes == sum(held) > max(held)
    pab.release(model)
    assert pab.summary(model).cache_bytes == 0
    with pab.generation(model, num_steps=STEPS):
        assert same([bare(model, step, 0) for step in range(STEPS)], alone(0))
    pab.disable(model)
    with pytest.raises(RuntimeError, match="PAB is not enabled"):
        pab.release(model)


# Runs of pipelines that share a model


@pytest.mark.parametrize("scheduler", [None, DDIMScheduler])
@pytest.mark.parametrize("late", [0, 1, 3])
@pytest.mark.parametrize("name", [None, "cond"])
def test_two_runs_interleaved_in_one_thread_are_what_they_are_alone(
    name: str | None, late: int, scheduler: Any
) -> None:
    a, b, right_a, right_b = pair(scheduler)
    of_a, of_b = a.steps(STEPS, 1, name), b.steps(STEPS, 2, name)
    last_a = last_b = None
    for turn in range(STEPS + late):
        last_a = next(of_a, last_a)
        last_b = next(of_b) if turn >= late else None
    assert torch.equal(last_a, right_a) and torch.equal(last_b, right_b)  # type: ignore[arg-type]


def test_a_run_begun_inside_of_another_and_left_there_changes_nothing() -> None:
    a, b, right_a, right_b = pair()
    for whole in (True, False):
        of_a, last = a.steps(STEPS, 1), None
        for step in range(STEPS):
            last = next(of_a)
            if step == 2:
                inner = b.steps(STEPS, 2)
                for _ in range(STEPS if whole else 4):
                    preview = next(inner)
                assert torch.equal(preview, right_b) == whole
        assert last is not None and torch.equal(last, right_a), whole


def test_two_generators_are_resumed_by_whichever_thread_is_free() -> None:
    same_prompt = noise(300, 3)  # only the functions that run tell them apart
    a, b, right_a, right_b = pair(a=same_prompt, b=same_prompt)
    of_a, of_b = a.steps(STEPS, 1), b.steps(STEPS, 2)
    pools = [ThreadPoolExecutor(1) for _ in range(3)]
    for turn in range(STEPS):
        x = pools[turn % 3].submit(next, of_a).result()
        y = pools[(turn * 2 + 1) % 3].submit(next, of_b).result()
    assert torch.equal(x, right_a) and torch.equal(y, right_b)


def test_runs_in_two_threads_with_one_prompt_do_not_mix() -> None:
    same_prompt = noise(300, 3)
    a, b, right_a, right_b = pair(a=same_prompt, b=same_prompt)
    barrier, got = threading.Barrier(2, timeout=HANG), {}

    def work(pipe: Pipe, seed: int) -> None:
        for x in pipe.steps(STEPS, seed):
            barrier.wait()
            got[seed] = x

    threads = [threading.Thread(target=work, args=(pipe, seed)) for pipe, seed in ((a, 1), (b, 2))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(got[1], right_a) and torch.equal(got[2], right_b)


def test_a_call_that_two_runs_can_claim_is_refused_before_anything_is_read() -> None:
    same_prompt = noise(300, 3)
    a, b, right_a, _ = pair(a=same_prompt, b=same_prompt)
    a.scheduler.set_timesteps(STEPS)
    b.scheduler.set_timesteps(STEPS)
    t = a.scheduler.timesteps[0].expand(1)
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match=r"2 sampling runs on this model go on .*pab\.generation.*pab\.release"),
    ):
        call(a.transformer, t, same_prompt)
    pab.release(b)
    assert torch.equal(a.sample(STEPS, 1), right_a)


def test_runs_at_other_timesteps_are_told_apart_before_either_was_called() -> None:
    a, b, right_a, right_b = pair()
    of_a, of_b = a.steps(STEPS, 1), b.steps(STEPS + 3, 2)
    right_b = b.sample(STEPS + 3, 2)
    for _ in range(STEPS):
        last_a, _ = next(of_a), next(of_b)
    *_, last_b = of_b
    assert torch.equal(last_a, right_a) and torch.equal(last_b, right_b)


# Runs that were left


def test_a_run_left_by_an_error_in_its_loop_holds_nothing() -> None:
    from tests.adapters.tiny_latte import sample, tiny_pipe

    pipe = tiny_pipe()
    pab.enable(pipe, CONFIG)

    def gone(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if i == 3:
            assert pab.summary(pipe).cache_bytes > 0
            raise ConnectionError
        return tensors

    for _ in range(2):
        with pytest.raises(ConnectionError):
            ThreadPoolExecutor(1).submit(sample, pipe, 8, callback_on_step_end=gone).result()
        assert pab.summary(pipe).cache_bytes == 0
    pab.disable(pipe)
    assert "progress_bar" not in vars(pipe) and not [name for name in vars(pipe) if name.startswith("_pab")]


class Barred(Pipe):
    def progress_bar(self, steps: Any) -> list[Any]:
        return list(steps)

    def run(self, left_at: int | None = None) -> None:
        """A loop over the progress bar that integrates by itself, with another prompt at every step."""
        self.scheduler.set_timesteps(STEPS)
        prompts = []
        for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            prompts.append(noise(i, 3))
            with torch.no_grad():
                self.transformer(noise(0), t.expand(1), prompts[-1])
            if i == left_at:
                raise ConnectionError


def test_a_run_left_in_a_loop_over_its_progress_bar_holds_nothing(caplog: pytest.LogCaptureFixture) -> None:
    pipe = Barred(toy())
    pab.enable(pipe, PABConfig(spatial=Broadcast(4, EVERY_STEP)))
    with pytest.raises(ConnectionError):
        pipe.run(left_at=0)
    assert pab.summary(pipe).cache_bytes == 0
    with pytest.raises(ConnectionError):
        pipe.run(left_at=3)
    pipe.scheduler.set_timesteps(STEPS)
    assert not caplog.records, "it failed"
    pipe.run()
    pipe.scheduler.set_timesteps(STEPS)
    assert "reused nothing" in caplog.text, "it did not fail"


@pytest.mark.parametrize("where", ["step", "set_timesteps"])
def test_a_run_left_by_an_error_of_its_scheduler_holds_nothing(where: str) -> None:
    pipe = Pipe(toy())
    pab.enable(pipe, CONFIG)
    right = pipe.sample()
    steps = pipe.steps(8, 0)
    for _ in range(3):
        next(steps)
    assert pab.summary(pipe).cache_bytes > 0
    with pytest.raises(Exception, match=".+"):
        getattr(pipe.scheduler, where)("nonsense")
    assert pab.summary(pipe).cache_bytes == 0
    assert torch.equal(pipe.sample(), right)
