"""Generations under a budget: what they hold, what they give up, and what they return."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from pab_kernels.broadcast.budgeting import free_bytes
from pab_kernels.broadcast.stopwatch import Stopwatch
from pab_kernels.rules.budget import BudgetTooSmall
from tests.adapters.tiny_latte import noise, prompt, tiny_latte
from tests.adapters.tiny_pipes import named
from tests.adapters.tiny_stdit3 import conditions, text, tiny_stdit3
from tests.broadcast.toy import Pipe, toy
from tests.broadcast.toy import noise as toy_noise

pytestmark = [pytest.mark.flops, pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")]

STEPS = 12
RULES = PABConfig(spatial=2, temporal=Broadcast(3, reuse="linear"), cross=4, mlp=2)
FROM_THE_START = PABConfig(spatial=Broadcast(3, (0, 1)), cross=Broadcast(2, (0, 1)))
BOTH = ("cond", "uncond")


def run(model: Any, contexts: tuple[str, ...] = ("cond",), late: int = 0) -> Tensor:
    """The outputs of a sampling run on a bare Latte; all contexts but the first are called from step `late` on."""
    outputs = []
    with torch.no_grad(), pab.generation(model, num_steps=STEPS):
        for step in range(STEPS):
            for i, name in enumerate(contexts[: None if step >= late else 1]):
                given = {"timestep": torch.tensor([step]), "encoder_hidden_states": prompt(i)}
                with pab.context(model, name, step):
                    outputs.append(model(noise(step), **given).sample)
    return torch.stack(outputs)


def peak(model: Any) -> int:
    return pab.summary(model).peak_cache_bytes


def given_up(model: Any) -> Any:
    plan = pab.summary(model).plan
    assert plan is not None and plan.given_up is not None
    return plan.given_up


@pytest.mark.parametrize("rules", [RULES, FROM_THE_START])
@pytest.mark.parametrize(("contexts", "late"), [(("cond",), 0), (BOTH, 0), (BOTH, 5)])
def test_what_is_held_is_what_the_plan_said_and_never_more_than_the_budget(
    rules: PABConfig, contexts: tuple[str, ...], late: int
) -> None:
    model = tiny_latte()
    pab.enable(model, rules)
    run(model, contexts)
    whole = peak(model)
    for share in (1.0, 0.8, 0.45, 0.15):
        pab.disable(model)
        pab.enable(model, rules, budget=int(share * whole))
        for _ in range(2):  # the second knows how many contexts there are
            run(model, contexts, late)
            summary, found = pab.summary(model), given_up(model)
            assert summary.peak_cache_bytes == found.peak <= share * whole or late
            assert summary.peak_cache_bytes <= share * whole and summary.cache_bytes == 0
            assert bool(found.fewer_bits or found.computed) == (share < 1)


@pytest.mark.parametrize("late", [0, 5])
def test_a_context_that_comes_later_leaves_the_others_nothing_to_compute_again(late: int) -> None:
    model = tiny_latte()
    pab.enable(model, FROM_THE_START, budget=40_000)  # of 131,072
    run(model, BOTH, late)
    tallies = pab.summary(model).contexts["cond"].values()
    assert sum(t.reused for t in tallies) > 0 and not any(t.forced for t in tallies)


def test_results_are_those_of_the_same_rules_for_what_is_kept() -> None:
    rules = PABConfig(spatial=2, temporal=Broadcast(3, reuse="linear"), cross=4, cache_dtype="int8")
    model, twin = tiny_latte(), tiny_latte()
    pab.enable(twin, rules)
    everything = run(twin)
    pab.enable(model, rules, budget=peak(twin))
    assert torch.equal(run(model), everything)
    pab.enable(model, budget=peak(twin) // 2)
    out, plan = run(model), pab.summary(model).plan
    assert plan is not None and 0 < len(given_up(model).computed) < 6 and not torch.equal(out, everything)
    kept = [s for s in plan.sublayers if any(d.reads for d in plan.rows[s.name])]
    one_by_one = [(s.kind, rule, s.layer) for s in kept if (rule := rules.rule(s.kind, s.layer)) is not None]
    layers = [(kind, Broadcast(rule.range, reuse=rule.reuse, layers=(at,))) for kind, rule, at in one_by_one]
    pab.enable(twin, PABConfig(rules=tuple(layers), cache_dtype="int8"))  # type: ignore[arg-type]
    assert torch.equal(out, run(twin))


def test_slots_kept_in_8_bits_give_what_a_config_with_8_bits_gives() -> None:
    model, twin = tiny_latte(), tiny_latte()
    rules = PABConfig(spatial=2)
    pab.enable(twin, PABConfig(spatial=2, cache_dtype="int8"))
    eight = run(twin)
    pab.enable(model, rules, budget=peak(twin))
    assert torch.equal(run(model), eight) and len(given_up(model).fewer_bits) == 2


def test_slots_held_when_a_context_comes_are_made_smaller() -> None:
    model, twin = tiny_latte(), tiny_latte()
    rules = PABConfig(spatial=Broadcast(12, (0, 1)))  # stored at step 0, before the second context is known
    pab.enable(twin, PABConfig(spatial=Broadcast(12, (0, 1)), cache_dtype="int8"))
    eight = run(twin, BOTH)
    pab.enable(model, rules, budget=peak(twin))
    out = run(model, BOTH)
    assert peak(model) <= peak(twin) and len(given_up(model).fewer_bits) == 2
    torch.testing.assert_close(out, eight, rtol=0, atol=1e-5)
    assert not any(t.forced for tallies in pab.summary(model).contexts.values() for t in tallies.values())


def test_slots_before_the_projection_have_a_scale_a_head() -> None:
    model = tiny_stdit3()
    rules = {"spatial": Broadcast(2, (0, 1)), "cross": Broadcast(3, (0, 1))}
    pab.enable(model, PABConfig(**rules, cache_point="unprojected"), budget=40_000)
    with torch.no_grad(), pab.generation(model, num_steps=STEPS):
        for step in range(STEPS):
            x = torch.full((1, 4, 3, 6, 6), 0.1 * step)
            model(x, torch.full((1,), 900.0 - step), text(batch=1), **conditions(batch=1))
    assert given_up(model).fewer_bits and peak(model) == given_up(model).peak


def test_a_call_of_another_shape_gets_a_plan_of_its_own() -> None:
    model = tiny_latte()
    pab.enable(model, RULES, budget=150_000)
    with torch.no_grad(), pab.generation(model, num_steps=STEPS):
        for step in range(STEPS):
            x = noise(step, batch=1 if step < 6 else 3)
            t, text = torch.full((len(x),), step), prompt().expand(len(x), -1, -1)
            model(x, timestep=t, encoder_hidden_states=text)
    summary = pab.summary(model)
    assert 75_000 < summary.peak_cache_bytes <= 150_000


def test_a_budget_that_nothing_fits_is_an_error_before_anything_runs_and_says_what_fits() -> None:
    model = tiny_latte()
    pab.enable(model, RULES, budget=100)
    with pytest.raises(BudgetTooSmall, match=r"100 B for kept outputs; the smallest .* KiB \(\d+ bytes") as raised:
        run(model)
    assert not pab.summary(model).contexts["cond"]
    with torch.no_grad(), pab.generation(model, num_steps=STEPS):
        for _ in range(2):
            with pytest.raises(BudgetTooSmall):
                model(noise(), timestep=torch.tensor([0]), encoder_hidden_states=prompt())
    pab.enable(model, budget=raised.value.smallest)
    run(model)
    assert peak(model) == raised.value.smallest


def test_a_call_after_the_error_is_refused_too() -> None:
    model = tiny_latte()
    pab.enable(model, RULES, budget=100)
    with torch.no_grad(), pab.generation(model, num_steps=STEPS):
        for step in range(STEPS):
            with pytest.raises(BudgetTooSmall):
                model(noise(step), timestep=torch.tensor([step]), encoder_hidden_states=prompt())


def test_a_pipeline_with_the_default_rules() -> None:
    pipe = named("LattePipeline").build()
    with pytest.raises(BudgetTooSmall):
        named("LattePipeline").sample(pab.enable(pipe, budget=10), STEPS)
    pab.enable(pipe, budget="1GiB")
    out = named("LattePipeline").sample(pipe, STEPS)
    summary = pab.summary(pipe)
    assert summary.plan is not None and summary.plan.whole is not None
    assert summary.peak_cache_bytes <= given_up(pipe).peak and not given_up(pipe).computed
    pab.enable(pipe)
    assert given_up(pipe).budget == 2**30
    pab.disable(pipe)
    pab.enable(pipe)
    assert torch.equal(named("LattePipeline").sample(pipe, STEPS), out)
    assert "budget" not in str(pab.summary(pipe))


def test_a_budget_stays_until_other_rules_come() -> None:
    model = tiny_latte()
    pab.enable(model, budget=10**6)
    run(model)
    assert given_up(model).budget == 10**6
    pab.enable(model)
    run(model)
    assert given_up(model).budget == 10**6
    pab.enable(model, RULES)
    run(model)
    assert pab.summary(model).plan is not None and pab.summary(model).plan.given_up is None  # type: ignore[union-attr]


def test_what_is_given_up_is_logged_once_and_in_the_summary(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_latte()
    with caplog.at_level(logging.WARNING, "pab_kernels"):
        pab.enable(model, RULES, budget=10**9)
        run(model)
        assert not caplog.messages and "nothing is given up" in str(pab.summary(model))
        pab.enable(model, budget=50_000)
        run(model)
        run(model)
    (message,) = caplog.messages
    assert message.startswith("LatteTransformer3DModel: budget 48.83 KiB") and "computed at every step" in message
    assert message.partition(": ")[2] in str(pab.summary(model))


def test_a_share_is_of_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert free_bytes(torch.device("cpu")) > 0
    with pytest.raises(ValueError, match="not known on meta"):
        free_bytes(torch.device("meta"))
    monkeypatch.setattr("pab_kernels.broadcast.budgeting.free_bytes", lambda device: 200_000)
    model = tiny_latte()
    pab.enable(model, RULES, budget="25%")
    run(model)
    assert given_up(model).budget == 50_000


def test_sizes_that_are_not_known_are_an_error() -> None:
    model = toy()
    pab.enable(model, PABConfig(spatial=Broadcast(2, (0, 1))), budget="1MiB")
    with (
        torch.no_grad(),
        pab.generation(model, num_steps=2),
        pytest.raises(RuntimeError, match="are not known, as some arguments are neither"),
    ):
        model(toy_noise(0), 1.0, toy_noise(1, 3), guidance=object())


def test_requests_that_run_in_turn_have_a_budget_each() -> None:
    model = toy()
    pipes = [Pipe(model), Pipe(model)]
    for pipe in pipes:
        pab.enable(pipe, PABConfig(spatial=Broadcast(2, (0, 1)), mlp=Broadcast(2, (0, 1))), budget=200)
    runs = [pipe.steps(8, seed) for seed, pipe in enumerate(pipes)]
    for pair in zip(*runs, strict=True):
        assert all(isinstance(x, Tensor) for x in pair)
        assert pab.summary(model).cache_bytes <= 400
    assert given_up(model).computed and given_up(model).peak <= 200


def test_after_a_timed_generation_seconds_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rules = toy(), PABConfig(spatial=Broadcast(2, (0, 1)), mlp=Broadcast(2, (0, 1)))
    pipe, seconds = Pipe(model), {"spatial": 1.0, "mlp": 100.0, "cross": 0.0}
    for slowest in ("mlp", "spatial"):
        monkeypatch.setattr(Stopwatch, "seconds", lambda watch: seconds)
        pab.enable(pipe, rules, timed=True)
        pipe.sample()
        pab.enable(pipe, budget=150)  # two of four slots, in 8 bits
        pipe.sample()
        plan = pab.summary(model).plan
        assert plan is not None
        assert {s.kind for s in plan.sublayers if s.name in given_up(model).computed} == {"mlp", "spatial"} - {slowest}
        pab.disable(pipe)
        seconds["spatial"] = 1000.0
