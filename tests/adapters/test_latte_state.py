"""Generations and contexts of Latte: nothing leaks from one to another, whatever happens in between."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler
from torch import Tensor

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from pab_kernels.broadcast.broadcaster import broadcaster_of
from tests.adapters.tiny_latte import LAYERS, counted_operations, noise, prompt, run_model, sample, tiny_latte, tiny_pipe
from tests.oracle import Oracle, Rule

# diffusers' schedulers hand tensors to numpy in a way that numpy deprecates
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

RULES: dict[str, Any] = {"spatial": Rule(2, (0, 1)), "temporal": Rule(3, (0, 1)), "cross": Rule(6, (0, 1)), "mlp": Rule(3, (0.2, 0.8))}
CONFIG = PABConfig(**{kind: Broadcast(rule.range, rule.window) for kind, rule in RULES.items()})
TIMESTEPS = list(range(900, -1, -100))
STEPS = len(TIMESTEPS)
COND, UNCOND = prompt(1), prompt(2)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def held(model: Any) -> list[weakref.ref[Tensor]]:
    """Weak references to all that is kept in slots now. They are to die without the garbage collector."""
    broadcaster = broadcaster_of(model)
    assert broadcaster is not None and broadcaster.latest is not None
    slots = [slot for context in broadcaster.latest.contexts.values() for slot in context.arena._slots.values()]
    return [weakref.ref(slot.value) for slot in slots]


def assert_freed(tensors: list[weakref.ref[Tensor]]) -> None:
    assert tensors and not [t for t in tensors if t() is not None]


def counts(model: Any, kind: str = "spatial") -> dict[str, tuple[int, int, int]]:
    """By context: computed, reused, forced."""
    return {name: (t[kind].computed, t[kind].reused, t[kind].forced) for name, t in pab.summary(model).contexts.items() if kind in t}


# Contexts


def by_context(model: Any, name: str, step: int) -> Any:
    return pab.context(model, name)


def by_cache_context(model: Any, name: str, step: int) -> Any:
    return model.cache_context(name)


def by_context_and_step(model: Any, name: str, step: int) -> Any:
    return pab.context(model, name, step=step)


@pytest.mark.parametrize("poisoned", ["first", "second"])
@pytest.mark.parametrize("named", [by_context, by_cache_context, by_context_and_step], ids=lambda f: f.__name__)
def test_named_contexts_never_see_each_other(named: Callable[..., Any], poisoned: str) -> None:
    model = tiny_latte()
    texts = {"first": prompt(1), "second": prompt(2)}
    xs = {name: noise(seed) for seed, name in enumerate(texts)}
    xs[poisoned].fill_(float("nan"))
    oracle = Oracle(model, RULES, TIMESTEPS)
    expected = {
        name: [oracle(name, i, (1 - i / 20) * xs[name], torch.tensor([t]), texts[name]) for i, t in enumerate(TIMESTEPS)] for name in texts
    }
    pab.enable(model, CONFIG, num_steps=STEPS)
    for i, t in enumerate(TIMESTEPS):
        for name, text in texts.items():
            with named(model, name, i):
                out = model((1 - i / 20) * xs[name], torch.tensor([t]), text).sample
            if name == poisoned:
                assert out.isnan().all()
            else:
                assert torch.equal(out, expected[name][i])
    assert list(pab.summary(model).contexts) == list(texts)
    assert pab.summary(model).forced == 0


def guided(pipe: Any, order: Callable[[int], str], *, steps: int = STEPS, xs: dict[str, Tensor] | None = None) -> dict[str, list[Tensor]]:
    """A pipeline's loop that calls the model once a branch and names no context. `order(step)` says which, such as "uc"."""
    scheduler, model = pipe.scheduler, pipe.transformer
    scheduler.set_timesteps(steps)
    x = noise() * scheduler.init_noise_sigma
    texts = {"c": COND, "u": UNCOND}
    outs: dict[str, list[Tensor]] = {"c": [], "u": []}
    for i, t in enumerate(scheduler.timesteps):
        for branch in order(i):
            inputs = scheduler.scale_model_input(x, t) if xs is None else xs[branch] * (1 - i / 20)
            outs[branch].append(model(hidden_states=inputs, timestep=t[None], encoder_hidden_states=texts[branch], return_dict=False)[0])
        out = outs[order(i)[-1]][-1][:, :4]
        x = scheduler.step(out.nan_to_num(), t, x, return_dict=False)[0]
    return outs


@pytest.mark.parametrize("poisoned", ["c", "u"])
@pytest.mark.parametrize("order", ["cu", "uc"])
def test_contexts_told_by_their_order_never_see_each_other(order: str, poisoned: str) -> None:
    xs = {"c": noise(3), "u": noise(4)}
    xs[poisoned].fill_(float("nan"))
    pipe = tiny_pipe(DDIMScheduler())
    plain = guided(pipe, lambda i: order, xs=xs)
    pab.enable(pipe, CONFIG)
    alone = guided(pipe, lambda i: "c" if poisoned == "u" else "u", xs=xs)
    outs = guided(pipe, lambda i: order, xs=xs)
    well = "c" if poisoned == "u" else "u"
    assert all(out.isfinite().all() for out in outs[well]) and all(out.isnan().all() for out in outs[poisoned])
    for a, b in zip(outs[well], alone[well], strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(outs[well][1], plain[well][1])
    assert len(pab.summary(pipe).contexts) == 2 and pab.summary(pipe).forced == 0


@pytest.mark.parametrize("order", ["cu", "uc"])
def test_guidance_switched_off_half_way_leaves_the_other_branch_alone(order: str) -> None:
    """Without names only the order of the calls, and their prompts, tell the branches apart."""
    pipe = tiny_pipe(DDIMScheduler())
    xs = {"c": noise(3), "u": torch.full_like(noise(), float("nan"))}
    pab.enable(pipe, CONFIG)
    alone = guided(pipe, lambda i: "c", xs=xs)["c"]
    outs = guided(pipe, lambda i: order if i < 5 else "c", xs=xs)["c"]
    assert all(out.isfinite().all() for out in outs)
    if order == "cu":
        assert all(torch.equal(a, b) for a, b in zip(outs, alone, strict=True))
        assert pab.summary(pipe).forced == 0
    else:
        assert all(torch.equal(a, b) for a, b in zip(outs[:5], alone[:5], strict=True))
        assert pab.summary(pipe).forced > 0
    assert pab.summary(pipe).cache_bytes == 0


def test_guidance_switched_on_half_way_leaves_the_other_branch_alone() -> None:
    pipe = tiny_pipe(DDIMScheduler())
    xs = {"c": torch.full_like(noise(), float("nan")), "u": noise(3)}
    pab.enable(pipe, CONFIG)
    outs = guided(pipe, lambda i: "c" if i < 5 else "uc", xs=xs)["u"]
    assert len(outs) == 5 and all(out.isfinite().all() for out in outs)
    assert pab.summary(pipe).forced > 0 and pab.summary(pipe).cache_bytes == 0


def test_a_prompt_embedded_anew_at_every_step_is_the_same_context() -> None:
    pipe = tiny_pipe(DDIMScheduler())
    pab.enable(pipe, CONFIG)
    pipe.scheduler.set_timesteps(STEPS)
    for t in pipe.scheduler.timesteps:
        pipe.transformer(hidden_states=noise(), timestep=t[None], encoder_hidden_states=COND + 0)
        pipe.scheduler.step(noise(), t, noise())
    assert pab.summary(pipe).forced == 0


@pytest.mark.parametrize("named", [by_context, by_context_and_step], ids=lambda f: f.__name__)
def test_a_context_that_ends_early_and_one_that_comes_late_are_computed_and_counted(named: Callable[..., Any]) -> None:
    model = tiny_latte()
    oracle = Oracle(tiny_latte(), RULES, TIMESTEPS)
    pab.enable(model, CONFIG, num_steps=STEPS)
    here = {"early": range(5), "late": range(3, STEPS), "always": range(STEPS)}
    for i, t in enumerate(TIMESTEPS):
        for name in (n for n, steps in here.items() if i in steps):
            args = (noise(i), torch.tensor([t]), prompt(len(name)))
            expected = oracle(name, i, *args)
            with named(model, name, i):
                assert torch.equal(model(*args).sample, expected), (name, i)
    # Late at step 3: spatial and cross have a reuse there and compute once instead; temporal and MLPs compute at 3 anyway.
    forced = {name: {k: t.forced for k, t in kinds.items() if t.forced} for name, kinds in pab.summary(model).contexts.items()}
    assert forced == {"early": {}, "always": {}, "late": {"spatial": LAYERS, "cross": LAYERS}}


def test_explicit_steps_may_leave_some_out_and_what_is_too_old_is_computed_again() -> None:
    """As where a step cache skips whole calls of the model."""
    model = tiny_latte()
    config = PABConfig(spatial=Broadcast(3, (0, 1)), cross=Broadcast(100, (0, 1)))
    pab.enable(model, config, num_steps=9)
    for i in (0, 1, 4, 5, 6, 8):
        with pab.context(model, "c", step=i):
            model(noise(i), torch.tensor([9 - i]), COND)
    # Step 4 would reuse step 3, which did not come: it computes, and 5 reads that.
    assert counts(model)["c"] == (3 * LAYERS, 3 * LAYERS, LAYERS)
    assert counts(model, "cross")["c"] == (LAYERS, 5 * LAYERS, 0)


def test_a_step_given_again_reads_nothing_from_later_steps() -> None:
    model = tiny_latte()
    oracle = Oracle(tiny_latte(), {"spatial": Rule(4, (0, 1))}, TIMESTEPS)
    pab.enable(model, PABConfig(spatial=Broadcast(4, (0, 1))), num_steps=STEPS)
    expected = None
    for seed, i in enumerate((4, 5, 1)):
        args = (noise(seed), torch.tensor([500]), COND)
        with pab.context(model, "c", step=i):
            out = model(*args).sample
        expected = oracle(f"run {i < 4}", i, *args)
        assert torch.equal(out, expected)
    assert counts(model)["c"] == (2 * LAYERS, LAYERS, LAYERS)


def test_context_names_cannot_collide_with_the_order_of_calls() -> None:
    model = tiny_latte()
    pab.enable(model, PABConfig(spatial=Broadcast(4, (0, 1))), num_steps=3)
    outs = []
    for step in range(2):
        for name in ("a", "a", "a#1"):
            with pab.context(model, name, step=step):
                outs.append(model(noise(len(outs)), torch.tensor([5]), COND).sample)
    assert len(pab.summary(model).contexts) == 3
    assert len(broadcaster_of(model).latest.contexts) == 3  # type: ignore[union-attr]


# What may change in the middle


def assert_change_is_survived(before: dict[str, Any], after: dict[str, Any], at: int = 4) -> Any:
    """Calls with other inputs from step `at` on: computed anew, counted, and as the oracle has it for a context that comes late."""
    model = tiny_latte()
    oracle = Oracle(tiny_latte(), RULES, TIMESTEPS)
    pab.enable(model, CONFIG, num_steps=STEPS)
    for i in range(STEPS):
        inputs = before if i < at else after
        expected = oracle("before" if i < at else "after", i, **inputs)
        assert torch.equal(model(**inputs).sample, expected), i
    summary = pab.summary(model)
    late = [kind for kind, rule in RULES.items() if rule.reuses(at, 0, TIMESTEPS)]
    for kind, tally in summary.contexts["#0"].items():
        blocks = LAYERS * (2 if kind == "mlp" else 1)
        assert tally.forced == (blocks if kind in late else 0), kind
    assert late and summary.cache_bytes == 0
    return summary


def inputs(*, batch: int = 1, height: int = 16, width: int = 16, text: int = 5) -> dict[str, Any]:
    return {
        "hidden_states": noise(batch=batch, height=height, width=width),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": prompt(text=text).expand(batch, -1, -1),
    }


@pytest.mark.parametrize(
    "after",
    [{"batch": 1}, {"batch": 3}, {"batch": 2, "height": 24}, {"batch": 2, "height": 8, "width": 32}, {"batch": 2, "text": 7}],
    ids=["guidance switched off", "larger batch", "larger", "turned, as many tokens", "longer prompt"],
)
@pytest.mark.parametrize("at", [4, 5])
def test_other_shapes_in_the_middle_are_computed_and_counted(after: dict[str, int], at: int) -> None:
    assert_change_is_survived(inputs(batch=2), inputs(**after), at)


def test_shapes_and_steps_may_change_between_generations() -> None:
    pipe = tiny_pipe()
    pab.enable(pipe, CONFIG)
    first = [sample(pipe, 6), sample(pipe, 4, size=24), sample(pipe, 5, guidance=1.0), sample(pipe, 6)]
    assert torch.equal(first[0], first[-1])
    for steps, kwargs in ((6, {}), (4, {"size": 24}), (5, {"guidance": 1.0})):
        other = tiny_pipe()
        pab.enable(other, CONFIG)
        assert torch.equal(sample(other, steps, **kwargs), first[(6, 4, 5).index(steps)])
        assert pab.summary(other).forced == 0 and pab.summary(other).cache_bytes == 0
    sample(pipe, 7)
    assert pab.summary(pipe).forced == 0 and pab.summary(pipe).plan.schedule.num_steps == 7


# What may go wrong in the middle


class OnPurpose(Exception):
    pass


def fail_in_a_block(pipe: Any) -> Any:
    calls: list[int] = []

    def fail(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 5:
            raise OnPurpose

    return pipe.transformer.temporal_transformer_blocks[1].register_forward_pre_hook(fail).remove, {}


def fail_in_a_callback(pipe: Any) -> Any:
    def fail(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if i == 4:
            raise OnPurpose
        return tensors

    return (lambda: None), {"callback_on_step_end": fail}


def fail_in_the_step(pipe: Any) -> Any:
    """Inside of the scheduler's `step`, where it asks for its own variance."""
    scheduler, calls = pipe.scheduler, []

    def fail(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise OnPurpose
        return type(scheduler)._get_variance(scheduler, *args, **kwargs)

    scheduler._get_variance = fail
    return lambda: delattr(scheduler, "_get_variance"), {}


@pytest.mark.parametrize("fail", [fail_in_a_block, fail_in_a_callback, fail_in_the_step], ids=lambda f: f.__name__.replace("_", " "))
def test_an_error_in_the_middle_leaves_nothing_for_the_next_run(fail: Callable[[Any], Any]) -> None:
    pipe = tiny_pipe(DDIMScheduler())
    pab.enable(pipe, CONFIG)
    clean = sample(pipe, 8)
    tensors: list[Any] = []
    handle = pipe.transformer.register_forward_pre_hook(lambda *_: tensors.__setitem__(slice(None), held(pipe.transformer)))
    undo, kwargs = fail(pipe)
    with pytest.raises(OnPurpose):
        sample(pipe, 8, seed=5, **kwargs)
    undo()
    handle.remove()
    assert tensors, "slots were held when it failed"
    if fail is fail_in_a_block:
        assert pab.summary(pipe).cache_bytes == 0  # elsewhere nobody tells PAB before the next run
        assert_freed(tensors)
    pipe.scheduler.set_timesteps(8)
    assert pab.summary(pipe).cache_bytes == 0
    assert_freed(tensors)
    assert torch.equal(sample(pipe, 8), clean)
    assert pab.summary(pipe).forced == 0 and pab.summary(pipe).cache_bytes == 0


def test_an_error_on_a_bare_model_lets_go_of_every_slot() -> None:
    model = tiny_latte()
    pab.enable(model, CONFIG)
    with pytest.raises(OnPurpose), pab.generation(model, num_steps=STEPS):
        model(**inputs())
        tensors = held(model)
        raise OnPurpose
    assert pab.summary(model).cache_bytes == 0
    assert_freed(tensors)
    with pytest.raises(RuntimeError, match="no generation has begun"):
        model(**inputs())


def test_an_interrupted_pipeline_holds_nothing_afterwards() -> None:
    pipe = tiny_pipe()
    pab.enable(pipe, CONFIG)
    tensors: list[Any] = []

    def interrupt(pipe: Any, i: int, t: Any, kept: dict[str, Any]) -> dict[str, Any]:
        if i == 3:
            tensors.extend(held(pipe.transformer))
            pipe._interrupt = True
        return kept

    sample(pipe, 8, callback_on_step_end=interrupt)
    assert pab.summary(pipe).cache_bytes == 0
    assert_freed(tensors)
    sample(pipe, 8)
    assert pab.summary(pipe).forced == 0


def test_a_new_generation_frees_the_old_one() -> None:
    pipe = tiny_pipe()
    pab.enable(pipe, CONFIG)
    pipe.scheduler.set_timesteps(8)
    pipe.transformer(**inputs())
    tensors = held(pipe.transformer)
    assert pab.summary(pipe).cache_bytes > 0
    pipe.scheduler.set_timesteps(8)
    assert pab.summary(pipe).cache_bytes == 0
    assert_freed(tensors)
    model = tiny_latte()
    pab.enable(model, CONFIG, num_steps=8)
    model(**inputs())
    tensors = held(model)
    with pab.generation(model, num_steps=2):
        assert_freed(tensors)
        model(**inputs())
        tensors = held(model)
        assert pab.summary(model).cache_bytes > 0
    assert pab.summary(model).cache_bytes == 0
    assert_freed(tensors)
    pab.enable(model, num_steps=8)
    model(**inputs())
    tensors = held(model)
    pab.disable(model)
    assert_freed(tensors)


def test_slots_are_let_go_after_their_last_reuse_and_all_of_them_after_the_last_step() -> None:
    pipe = tiny_pipe()
    pab.enable(pipe, PABConfig(spatial=Broadcast(3, (0, 6), "step"), cross=Broadcast(9, (0, 100), "step")))
    now: list[int] = []

    def after_step(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        now.append(pab.summary(pipe).cache_bytes)
        return tensors

    sample(pipe, 8, callback_on_step_end=after_step)
    one = 2 * LAYERS * 4 * 16 * 64 * 4  # guidance, layers, frames, tokens, channels, float32
    assert now == [2 * one, 2 * one, one, 2 * one, 2 * one, one, one, 0]


# Pipelines, schedulers and threads


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
        thread.join(60)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


@pytest.mark.parametrize("shared", [False, True], ids=["a transformer each", "one transformer"])
def test_pipelines_in_two_threads_do_not_touch_each_other(shared: bool) -> None:
    model = tiny_latte()
    pipes = [tiny_pipe(scheduler(), model if shared else tiny_latte()) for scheduler in (DDIMScheduler, EulerDiscreteScheduler)]
    settings = [{"steps": 8, "seed": 1}, {"steps": 8, "seed": 2, "guidance": 1.0}]
    for pipe in pipes:
        pab.enable(pipe, CONFIG)
    alone = [sample(pipe, **kwargs) for pipe, kwargs in zip(pipes, settings, strict=True)]
    barrier = threading.Barrier(2, timeout=60)

    def step_by_step(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        barrier.wait()  # both are after step i: their calls alternate
        return tensors

    def work(i: int) -> Any:
        out = sample(pipes[i], **settings[i], callback_on_step_end=step_by_step)
        broadcaster = broadcaster_of(pipes[i].transformer)
        assert broadcaster is not None
        own = broadcaster._thread.generation
        assert own is not None and own.meter.now == 0 and own.meter.peak > 0
        assert all(t.forced == 0 for c in own.contexts.values() for t in c.tallies.values())
        return out

    together = in_threads(lambda: work(0), lambda: work(1))
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a, b)


def test_an_error_in_one_thread_leaves_the_other_alone() -> None:
    model = tiny_latte()
    pipes = [tiny_pipe(DDIMScheduler(), model) for _ in range(2)]
    for pipe in pipes:
        pab.enable(pipe, CONFIG)
    alone = sample(pipes[1], 8)
    barrier = threading.Barrier(2, timeout=60)

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


def test_a_generation_prepared_in_one_thread_is_taken_by_the_first_that_calls() -> None:
    model = tiny_latte()
    pab.enable(model, CONFIG, num_steps=2)

    def refused() -> None:
        with pytest.raises(RuntimeError, match="no generation has begun"):
            model(**inputs())

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


def test_a_pipe_that_shares_the_model_and_was_not_enabled_is_told() -> None:
    model = tiny_latte()
    first, second = tiny_pipe(DDIMScheduler(), model), tiny_pipe(DDIMScheduler(), model)
    pab.enable(first, CONFIG)
    with pytest.raises(RuntimeError, match="no generation has begun.*pass the pipeline to pab.enable"):
        sample(second, 4)
    clean = sample(first, 4)
    with pytest.raises(RuntimeError, match="the plan has 4 steps.*pab.enable every pipeline that shares the model"):
        sample(second, 4)
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
    pipe.scheduler = old
    assert torch.equal(sample(pipe, 6), before)
    pab.disable(pipe)
    assert "step" not in vars(old) and "step" not in vars(pipe.scheduler)


@pytest.mark.parametrize("used", [False, True], ids=["new", "used before"])
@pytest.mark.parametrize("when", ["before the run", "in the run"])
@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, HeunDiscreteScheduler])
def test_a_scheduler_exchanged_on_an_idle_pipe_does_not_disturb_the_other(scheduler: Any, when: str, used: bool) -> None:
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
    assert torch.equal(run_model(lambda name, step, *a, **k: model(*a, **k).sample, TIMESTEPS, noise(), {"": COND}), expected)
