"""Generations of Latte: slots are let go in time, and an error or another run in between leaves nothing behind."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from pab_kernels.broadcast.broadcaster import broadcaster_of
from tests.adapters.tiny_latte import LAYERS, inputs, prompt, sample, tiny_latte, tiny_pipe
from tests.oracle import Rule

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


def held(model: Any) -> list[weakref.ref[Tensor]]:
    """Weak references to all that is kept in slots now. They are to die without the garbage collector."""
    broadcaster = broadcaster_of(model)
    assert broadcaster is not None and broadcaster.latest is not None
    slots = [
        slot
        for context in broadcaster.latest.contexts.values()
        for kept in context.arena._slots.values()
        for slot in kept
    ]
    return [weakref.ref(slot.value) for slot in slots]


def assert_freed(tensors: list[weakref.ref[Tensor]]) -> None:
    assert tensors and not [t for t in tensors if t() is not None]


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


@pytest.mark.parametrize(
    "fail", [fail_in_a_block, fail_in_a_callback, fail_in_the_step], ids=lambda f: f.__name__.replace("_", " ")
)
def test_an_error_in_the_middle_leaves_nothing_for_the_next_run(fail: Callable[[Any], Any]) -> None:
    pipe = tiny_pipe(DDIMScheduler())
    pab.enable(pipe, CONFIG)
    clean = sample(pipe, 8)
    tensors: list[Any] = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda *_: tensors.__setitem__(slice(None), held(pipe.transformer))
    )
    undo, kwargs = fail(pipe)
    with pytest.raises(OnPurpose):
        sample(pipe, 8, seed=5, **kwargs)
    undo()
    handle.remove()
    assert tensors, "slots were held when it failed"
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
    model(**inputs())
    assert pab.summary(model).plain_calls == 1


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
    pab.enable(model, num_steps=8)
    assert pab.summary(model).cache_bytes == 0
    assert_freed(tensors)
    with pab.generation(model, num_steps=2):
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
