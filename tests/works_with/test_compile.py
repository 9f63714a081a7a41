"""torch.compile: the whole model, or its repeated blocks; as many graphs as the plan has patterns, none after the first
generation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch._dynamo.testing import CompileCounter

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from tests.adapters.tiny_latte import sample, tiny_latte, tiny_pipe
from tests.works_with.combination import FLUX, LATTE, ONE, STEPS, TWO, WAN, Subject, counted, replay_in, run, same

pytestmark = [
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),  # diffusers' own use
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # its schedulers
]


def of_one_layer(subject: Subject) -> Subject:
    """As small as it gets: tracing takes its time."""

    def build() -> Any:
        model = subject.build()
        for name, blocks in model.named_children():
            if name.endswith("blocks"):
                setattr(model, name, blocks[:1])
        return model

    return replace(subject, build=build)


SMALL_WAN, SMALL_FLUX, SMALL_LATTE = map(of_one_layer, (WAN, FLUX, LATTE))


@pytest.fixture(autouse=True)
def _forgotten_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_then_enabled(model: Any, backend: Any) -> Any:
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    pab.enable(compiled, ONE, num_steps=STEPS)
    return compiled


def compiled_in_place_then_enabled(model: Any, backend: Any) -> Any:
    model.compile(backend=backend, fullgraph=True)
    pab.enable(model, ONE, num_steps=STEPS)
    return model


def enabled_then_compiled_in_place(model: Any, backend: Any) -> Any:
    pab.enable(model, ONE, num_steps=STEPS)
    model.compile(backend=backend, fullgraph=True)
    return model


WAYS = [compiled_then_enabled, compiled_in_place_then_enabled, enabled_then_compiled_in_place]


def traces(compiled: Any) -> dict[str, Any]:
    return {name: sorted(vars(m)) for name, m in (("", compiled), *compiled.named_modules())}


@pytest.mark.parametrize(
    ("subject", "way"),
    list(zip((SMALL_LATTE, SMALL_WAN, SMALL_FLUX), WAYS, strict=True)),
    ids=lambda v: v.name if isinstance(v, Subject) else v.__name__.replace("_", " "),
)
def test_the_whole_model(subject: Subject, way: Callable[[Any, Any], Any]) -> None:
    plain, twin, counter = subject.build(), subject.build(), CompileCounter()
    replay = replay_in(twin)
    wanted, again = run(subject, plain), run(subject, twin, replay)
    in_place = "in_place" in way.__name__
    if in_place:
        plain.compile(backend="eager")
    before = traces(plain if in_place else torch.compile(plain, backend="eager"))
    model = way(subject.build(), counter)
    assert same(run(subject, model), wanted) and counter.frame_count == 1
    pab.enable(model, TWO)
    for _ in range(2):
        with pab.generation(model, num_steps=STEPS):
            assert same(run(subject, model), again)
        assert counter.frame_count == 1 + 2 and counted(model) == replay.counts
    summary = pab.summary(model)
    assert summary.plan is not None and summary.plan.patterns == 2 and summary.cache_bytes == 0
    pab.disable(model)
    assert same(run(subject, model), wanted) and counter.frame_count == 4
    assert traces(model) == before


def test_a_graph_for_every_pattern() -> None:
    subject = SMALL_WAN
    rule, counter = Broadcast(3, (0, 1), reuse="linear"), CompileCounter()
    config = PABConfig(spatial=rule, cross=rule)
    plain, model = subject.build(), torch.compile(subject.build(), backend=counter, fullgraph=True)
    for m in (plain, model):
        pab.enable(m, config)
    for _ in range(2):
        with pab.generation(plain, num_steps=STEPS), pab.generation(model, num_steps=STEPS):
            for a, b in zip(run(subject, model), run(subject, plain), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert str(pab.summary(model)) == str(pab.summary(plain))
        plan = pab.summary(model).plan
        assert plan is not None and counter.frame_count == plan.patterns > 2


@pytest.mark.parametrize(
    ("subject", "order"), [(SMALL_WAN, "before"), (SMALL_FLUX, "after")], ids=["Wan before", "Flux after"]
)
def test_repeated_blocks(subject: Subject, order: str) -> None:
    """diffusers' regional compilation: blocks of a class share their graphs' limit, and each has one for each
    pattern."""
    twin, model, counter = subject.build(), subject.build(), CompileCounter()
    replay = replay_in(twin)
    again = run(subject, twin, replay)
    if order == "before":
        pab.enable(model, TWO)
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    pab.enable(model, TWO)
    blocks = sum(m._compiled_call_impl is not None for m in model.modules())
    for _ in range(2):
        with pab.generation(model, num_steps=STEPS):
            assert same(run(subject, model), again)
        assert counter.frame_count == 2 * blocks > 0 and counted(model) == replay.counts


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_model_compiled_after_enable_is_refused_until_it_is_enabled_too(fullgraph: bool) -> None:
    model = SMALL_WAN.build()
    pab.enable(model, TWO, num_steps=STEPS)
    compiled = torch.compile(model, backend="eager", fullgraph=fullgraph)
    with pytest.raises(
        Exception, match=r"compiled = torch.compile\(model\) call pab.enable\(compiled\).*model.compile\(\)"
    ):
        WAN.call(compiled, 0)
    pab.enable(compiled)
    assert WAN.call(compiled, 0).isfinite().all()


def test_a_pipeline_with_a_compiled_transformer() -> None:
    eager, pipe, counter = (
        tiny_pipe(DDIMScheduler(), tiny_latte(num_layers=1)),
        tiny_pipe(DDIMScheduler()),
        CompileCounter(),
    )
    pipe.transformer = torch.compile(tiny_latte(num_layers=1), backend=counter)
    plain = sample(pipe, 4)
    for p in (eager, pipe):
        pab.enable(p, TWO)
    wanted, before = sample(eager, 4), counter.frame_count
    for _ in range(2):
        torch.testing.assert_close(sample(pipe, 4), wanted)
        assert pab.summary(pipe) == pab.summary(eager) and counter.frame_count == before + 2
    pab.disable(pipe)
    assert torch.equal(sample(pipe, 4), plain)
