"""Real pipelines of diffusers, whole runs: counts, contexts and resets, and what the record-and-replay oracle gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import pab_kernels as pab
from pab_kernels.broadcast.summary import Summary
from tests.adapters.tiny_pipes import PIPES, Pipe
from tests.broadcast.sampled_pipelines import CONFIG, assert_runs_as_the_oracle

pytestmark = [
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),  # diffusers' own use
    pytest.mark.filterwarnings(
        "ignore:__array__ implementation:DeprecationWarning"
    ),  # diffusers' schedulers hand tensors to numpy
]

STEPS = 6

LIKE_OTHERS = {
    "QwenImagePipeline",
    "SkyReelsV2Pipeline",
    "LTXPipeline",
    "StableDiffusion3Pipeline",
    "HunyuanVideoPipeline",
}
"""They call their model as another pipeline does.

Schedulers and transformers are those of the tests against the oracle.
"""

every_pipeline = pytest.mark.parametrize("tiny", PIPES, ids=lambda t: t.name)
unlike_pipelines = pytest.mark.parametrize(
    "tiny",
    [
        pytest.param(tiny, id=tiny.name, marks=pytest.mark.all_models if tiny.name in LIKE_OTHERS else ())
        for tiny in PIPES
    ],
)


class OnPurpose(Exception):
    pass


def enabled(tiny: Pipe) -> Any:
    pipe = tiny.build()
    pab.enable(pipe, CONFIG)
    return pipe


def assert_as_planned(summary: Summary, tiny: Pipe, steps: int = STEPS) -> None:
    """Every context has computed and reused what its plan says and nothing is held any more."""
    assert tuple(summary.contexts) == tiny.contexts
    assert summary.forced == 0 and summary.cache_bytes == 0 and summary.peak_cache_bytes > 0
    assert summary.plan is not None and len(summary.plan.steps) == steps
    planned = summary.plan.counts()
    for tallies in summary.contexts.values():
        assert tallies.keys() == planned.keys()
        for kind, c in planned.items():
            runs, t = tiny.runs.get(kind, 1), tallies[kind]
            assert (t.computed, t.stored, t.reused) == (runs * c.computed, runs * c.stored, runs * c.reused), kind


@every_pipeline
def test_a_pipeline_runs_as_its_plan_says_and_as_the_oracle_does(tiny: Pipe) -> None:
    assert_as_planned(assert_runs_as_the_oracle(tiny, STEPS), tiny)


@unlike_pipelines
def test_another_size_and_another_number_of_steps_are_what_they_are_on_a_new_pipeline(tiny: Pipe) -> None:
    pipe = enabled(tiny)
    first = tiny.sample(pipe, STEPS)
    for steps, call in ((STEPS, tiny.larger), (STEPS + 2, {}), (STEPS + 1, tiny.larger)):
        got = tiny.sample(pipe, steps, **call)
        assert_as_planned(pab.summary(pipe), tiny, steps)
        assert torch.equal(got, tiny.sample(enabled(tiny), steps, **call))
    assert torch.equal(tiny.sample(pipe, STEPS), first)
    assert_as_planned(pab.summary(pipe), tiny)
    assert not torch.equal(tiny.sample(pipe, STEPS, seed=1), first)


def interrupted(pipe: Any, tiny: Pipe) -> None:
    def interrupt(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = i == 2
        return tensors

    tiny.sample(pipe, STEPS, seed=1, callback_on_step_end=interrupt)
    assert pab.summary(pipe).cache_bytes == 0
    assert sum(t.computed for t in pab.summary(pipe).contexts[tiny.contexts[0]].values()) > 0


def failed_in_a_callback(pipe: Any, tiny: Pipe) -> None:
    def fail(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if i == 2:
            raise OnPurpose
        return tensors

    with pytest.raises(OnPurpose):
        tiny.sample(pipe, STEPS, seed=1, callback_on_step_end=fail)


def failed_in_the_model(pipe: Any, tiny: Pipe) -> None:
    calls: list[int] = []
    last = pipe.transformer.get_submodule([s.name for s in pab.sublayers(pipe) if s.kind == "block"][-1])

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 2 * len(tiny.contexts):
            raise OnPurpose

    handle = last.register_forward_pre_hook(fail)
    with pytest.raises(OnPurpose):
        tiny.sample(pipe, STEPS, seed=1)
    handle.remove()
    assert pab.summary(pipe).cache_bytes == 0


@unlike_pipelines
def test_a_run_that_ended_in_the_middle_leaves_nothing_for_the_next(tiny: Pipe) -> None:
    pipe = enabled(tiny)
    clean = tiny.sample(pipe, STEPS)
    ways = [failed_in_the_model]
    ways += [failed_in_a_callback] if tiny.callback else []
    ways += [interrupted] if tiny.callback and hasattr(pipe, "interrupt") else []
    for end in ways:
        end(pipe, tiny)
        assert torch.equal(tiny.sample(pipe, STEPS), clean), end.__name__
        assert_as_planned(pab.summary(pipe), tiny)
