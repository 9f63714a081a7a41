"""Contexts of Latte: none sees what another one computed, whoever names them and whatever changes between calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from pab_kernels.broadcast.broadcaster import broadcaster_of
from tests.adapters.tiny_latte import LAYERS, inputs, noise, prompt, sample, tiny_latte, tiny_pipe
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


def counts(model: Any, kind: str = "spatial") -> dict[str, tuple[int, int, int]]:
    """By context: computed, reused, forced."""
    return {
        name: (t[kind].computed, t[kind].reused, t[kind].forced)
        for name, t in pab.summary(model).contexts.items()
        if kind in t
    }


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
        name: [
            oracle(name, i, (1 - i / 20) * xs[name], torch.tensor([t]), texts[name]) for i, t in enumerate(TIMESTEPS)
        ]
        for name in texts
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


def guided(
    pipe: Any, order: Callable[[int], str], *, steps: int = STEPS, xs: dict[str, Tensor] | None = None
) -> dict[str, list[Tensor]]:
    """A pipeline's loop that calls the model once a branch and names no context.

    `order(step)` says which, such as "uc".
    """
    scheduler, model = pipe.scheduler, pipe.transformer
    scheduler.set_timesteps(steps)
    x = noise() * scheduler.init_noise_sigma
    texts = {"c": COND, "u": UNCOND}
    outs: dict[str, list[Tensor]] = {"c": [], "u": []}
    for i, t in enumerate(scheduler.timesteps):
        for branch in order(i):
            inputs = scheduler.scale_model_input(x, t) if xs is None else xs[branch] * (1 - i / 20)
            outs[branch].append(
                model(hidden_states=inputs, timestep=t[None], encoder_hidden_states=texts[branch], return_dict=False)[0]
            )
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
    assert all(torch.equal(a, b) for a, b in zip(outs, alone, strict=True))
    assert pab.summary(pipe).forced == 0
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
    # Late at step 3: spatial and cross have a reuse there and compute once instead; temporal and MLPs compute at 3
    # anyway.
    forced = {
        name: {k: t.forced for k, t in kinds.items() if t.forced} for name, kinds in pab.summary(model).contexts.items()
    }
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


def test_a_block_that_has_to_run_leaves_alone_what_its_sublayers_hold_for_later() -> None:
    model = tiny_latte()
    config = PABConfig(block=Broadcast(2, (3, 4), "step"), cross=Broadcast(100, (0, 9), "step"))
    pab.enable(model, config, num_steps=9)
    for i in (0, 1, 3, 4):
        with pab.context(model, "c", step=i):
            model(noise(i), torch.tensor([9 - i]), COND)
    # Step 3 would reuse the blocks of step 2, which did not come: all in them runs, and cross attention at 4 still
    # reads step 0.
    assert counts(model, "block")["c"] == (4 * 2 * LAYERS, 0, 2 * LAYERS)
    assert counts(model, "cross")["c"] == (2 * LAYERS, 2 * LAYERS, 0)


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
    """Calls with other inputs from step `at` on: computed anew, counted, and as the oracle has it for a context that
    comes late."""
    model = tiny_latte()
    oracle = Oracle(tiny_latte(), RULES, TIMESTEPS)
    pab.enable(model, CONFIG, num_steps=STEPS)
    for i in range(STEPS):
        inputs = before if i < at else after
        expected = oracle("before" if i < at else "after", i, **inputs)
        with pab.context(model, "c"):
            assert torch.equal(model(**inputs).sample, expected), i
    summary = pab.summary(model)
    late = [kind for kind, rule in RULES.items() if rule.reuses(at, 0, TIMESTEPS)]
    for kind, tally in summary.contexts["c"].items():
        blocks = LAYERS * (2 if kind == "mlp" else 1)
        assert tally.forced == (blocks if kind in late else 0), kind
    assert late and summary.cache_bytes == 0
    return summary


@pytest.mark.parametrize(
    "after",
    [
        {"batch": 1},
        {"batch": 3},
        {"batch": 2, "height": 24},
        {"batch": 2, "height": 8, "width": 32},
        {"batch": 2, "text": 7},
    ],
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
