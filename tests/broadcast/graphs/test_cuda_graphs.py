"""CUDA graphs, on the CPU: a recorder in place of CUDA's shows which memory they read and write, and that the host
reads none of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from pab_kernels.broadcast.broadcaster import broadcaster_of
from pab_kernels.broadcast.signature import tensors_of
from pab_kernels.nn import BroadcastModule
from pab_kernels.rules.reuse import REUSES
from tests.adapters.classes import parameters
from tests.adapters.outputs import outputs, same
from tests.adapters.tiny_latte import noise, sample, tiny_latte, tiny_pipe
from tests.adapters.tiny_models import FAMILIES
from tests.broadcast.graphs.graph_recorder import Recorder
from tests.broadcast.graphs.graphed import (
    CONFIGS,
    CONTEXTS,
    EVERY_SECOND,
    EVERY_THIRD,
    READ,
    STEPS,
    Odd,
    called,
    config,
    counted,
    generated,
    graphs_of,
    pair,
)
from tests.broadcast.parabola import Parabola

pytestmark = [
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),  # diffusers' own use
    pytest.mark.filterwarnings("ignore:(?s)In CPU autocast:UserWarning"),  # Mochi asks for float32 in autocast
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # diffusers' schedulers and numpy
]


def addresses(model: Any) -> dict[tuple[str, str, int], tuple[int, ...]]:
    """Where every slot lies that is held now, by context, sublayer and age."""
    broadcaster = broadcaster_of(model)
    assert broadcaster is not None and broadcaster.latest is not None
    return {
        (name, place, age): tuple(t.data_ptr() for t in tensors_of(slot.value))
        for name, context in broadcaster.latest.contexts.items()
        for place, slots in context.arena._slots.items()
        for age, slot in enumerate(slots)
    }


def kept_bytes(model: Any) -> int:
    found = graphs_of(model)
    places = [nest for of_context in found._places.values() for p in of_context.values() for nest in p.values]
    return sum(
        t.nbytes
        for t in tensors_of([places, list(found._inputs.values()), [g.weights for g in found._graphs.values()]])
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_latte_gives_the_bits_and_counts_of_eager_pab_with_a_graph_for_each_pattern_and_context(
    name: str, recorders: list[Recorder]
) -> None:
    eager, graphed = pair(CONFIGS[name])
    for seed in range(2):
        if seed:
            for model in (eager, graphed):
                broadcaster_of(model).prepare(num_steps=STEPS)  # type: ignore[union-attr]
        assert same(generated(graphed, seed), generated(eager, seed))
        assert counted(graphed) == counted(eager)
        (recorder,) = recorders
        plan = pab.summary(graphed).plan
        assert plan is not None
        assert (
            len(recorder.recordings)
            == recorder.warm_ups
            == plan.patterns * len(CONTEXTS)
            == pab.summary(graphed).graphs
        )
    skipped = plan.step_counts()["model"].reused if plan.whole is not None else 0
    assert len(recorder.replays) == 2 * (STEPS - skipped) * len(CONTEXTS) - len(recorder.recordings)
    assert pab.summary(graphed).graph_bytes == recorder.nbytes + kept_bytes(graphed)


@pytest.mark.parametrize("name", ["hold", "linear int8"])
def test_slots_lie_at_the_same_addresses_at_every_step_and_in_every_generation(
    name: str, recorders: list[Recorder]
) -> None:
    _, model = pair(CONFIGS[name])
    seen: dict[tuple[str, str, int], tuple[int, ...]] = {}
    for seed in range(2):
        with pab.generation(model, num_steps=STEPS):
            for step in range(STEPS):
                for context in CONTEXTS:
                    called(model, step, context, seed)
                    for slot, lies in addresses(model).items():
                        assert seen.setdefault(slot, lies) == lies
    assert {age for _, _, age in seen} == ({0, 1} if "linear" in name else {0})
    places = [place for of_context in graphs_of(model)._places.values() for place in of_context.values()]
    assert places and all((len(place.values) == 2) is ("linear" in name) for place in places), (
        "one place for what is held"
    )
    every = [address for lies in seen.values() for address in lies]
    assert len(set(every)) == len(every), "no two share memory, of one context or of two"


@pytest.mark.parametrize("cache_dtype", [None, "int8"])
def test_a_reuse_of_three_outputs_finds_them_where_the_graph_reads(
    cache_dtype: Any, recorders: list[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(REUSES, "parabola", Parabola())
    rule = Broadcast(2, (0.2, 1), reuse="parabola")
    rules = PABConfig(spatial=rule, temporal=Broadcast(3, (0, 1), reuse="parabola"), mlp=rule, cache_dtype=cache_dtype)
    timesteps = [900.0 - 9 * step - step**2 for step in range(STEPS)]
    eager, graphed = tiny_latte(num_layers=1), tiny_latte(num_layers=1)
    pab.enable(eager, rules, timesteps=timesteps)
    pab.enable(graphed, rules, timesteps=timesteps, cuda_graphs=True)
    for seed in range(2):
        if seed:
            for model in (eager, graphed):
                broadcaster_of(model).prepare(timesteps=timesteps)  # type: ignore[union-attr]
        assert same(generated(graphed, seed), generated(eager, seed))
        assert counted(graphed) == counted(eager)
    places = [place for of_context in graphs_of(graphed)._places.values() for place in of_context.values()]
    assert {len(place.values) for place in places} == {3}
    assert recorders[0].replays


def test_a_capture_in_a_further_generation_would_read_and_write_the_same_memory(recorders: list[Recorder]) -> None:
    _, model = pair(config())
    generated(model)
    (recorder,) = recorders
    first = [r.foreign_pointers() for r in recorder.recordings]
    graphs_of(model)._graphs.clear()
    with pab.generation(model, num_steps=STEPS):
        generated(model, 1)
    again = [r.foreign_pointers() for r in recorder.recordings[len(first) :]]
    assert again == first and all(first)


@pytest.mark.parametrize("tiny", parameters(t for t in FAMILIES if not t.name.startswith(READ)))
def test_a_family_of_diffusers_gives_the_bits_of_eager_pab(tiny: Any, recorders: list[Recorder]) -> None:
    thorough = tiny.name.startswith(("CogVideoX", "Wan", "Flux", "ZImage"))
    steps, contexts, generations = (6, CONTEXTS, 2) if thorough else (4, CONTEXTS[:1], 1)
    blocks = EVERY_SECOND if tiny.name.startswith("Flux") else None
    eager, graphed = pair(PABConfig(EVERY_SECOND, EVERY_SECOND, EVERY_THIRD, EVERY_SECOND, blocks), tiny.build, steps)
    for _ in range(generations):
        with pab.generation(eager, num_steps=steps), pab.generation(graphed, num_steps=steps):
            for step in range(steps):
                for place, context in enumerate(contexts):
                    seed = (step + 2 * place) % 4
                    with pab.context(eager, context), pab.context(graphed, context):
                        assert same(outputs(graphed, tiny(seed)), outputs(eager, tiny(seed)))
        assert counted(graphed) == counted(eager)
        plan = pab.summary(graphed).plan
        assert plan is not None and len(recorders[0].recordings) == plan.patterns * len(contexts)
    # A model that makes something when it is first used runs once more.
    assert recorders[0].warm_ups == len(recorders[0].recordings) + tiny.name.startswith("ZImage")


def test_pipelines_with_batched_guidance_interrupted_and_of_another_size(recorders: list[Recorder]) -> None:
    eager, graphed = tiny_pipe(DDIMScheduler()), tiny_pipe(DDIMScheduler())
    pab.enable(eager, config())
    pab.enable(graphed, config(), cuda_graphs=True)

    def stop(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 4:
            raise KeyboardInterrupt
        return tensors

    for options in (
        {},
        {"seed": 1},
        {"guidance": 1.0},
        {"callback_on_step_end": stop},
        {"size": 8},
        {"seed": 2},
        {"steps": 7},
    ):
        before = [len(r.recordings) for r in recorders]
        found = []
        for pipe in (eager, graphed):
            try:
                found.append(sample(pipe, **{"steps": STEPS} | options))
            except KeyboardInterrupt:
                found.append(torch.zeros(0))
        assert torch.equal(*found), options
        assert counted(graphed) == counted(eager)
        if options in ({"seed": 1}, {"callback_on_step_end": stop}, {"seed": 2}):
            assert [len(r.recordings) for r in recorders] == before, "graphs of another run are taken"
    assert len(recorders) == 1


def test_a_context_that_comes_late_a_step_left_out_and_another_shape_half_way(recorders: list[Recorder]) -> None:
    eager, graphed = pair(config("linear", block=Broadcast(2, (0.6, 0.95))))
    found: list[list[Tensor]] = []
    for model in (eager, graphed):
        found.append([])
        for step in (0, 1, 2, 4, 5, 6, 7, 8):
            for name in CONTEXTS[: 1 + (step > 3)]:
                found[-1].append(called(model, step, name, hidden_states=noise(step, height=8 if step == 5 else 16)))
    assert same(*found) and counted(graphed) == counted(eager)
    assert pab.summary(graphed).forced > 0


def test_a_forced_computation_is_kept_where_a_later_step_reads_it(recorders: list[Recorder]) -> None:
    eager, graphed = pair(PABConfig(spatial=Broadcast(3, (0, 1))), lambda: Odd(lambda model, x: x), 6)
    for begun_at in (2, 1, 5, 4, 0):  # the second reuse is the last one
        with pab.generation(eager, num_steps=6), pab.generation(graphed, num_steps=6):
            for step in range(begun_at, 6):
                x = torch.randn(2, 4)
                with pab.context(eager, "cond", step), pab.context(graphed, "cond", step):
                    assert torch.equal(graphed(x), eager(x)), (begun_at, step)
        assert counted(graphed) == counted(eager)


def test_what_autocast_kept_is_read_as_that(recorders: list[Recorder]) -> None:
    eager, graphed = pair(PABConfig(spatial=EVERY_SECOND), lambda: Odd(lambda model, x: x), 2)
    for cast in ((True, False), (False, False), (False, True), (True, True), (True, False)):
        with pab.generation(eager, num_steps=2), pab.generation(graphed, num_steps=2):
            for enabled in cast:
                x = torch.randn(2, 4)
                with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                    assert same([graphed(x)], [eager(x)]), cast


def test_numbers_among_the_arguments_are_part_of_a_graph(recorders: list[Recorder]) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.attn = BroadcastModule(nn.Linear(4, 4), "spatial")

        def forward(self, x: Tensor, options: dict[str, Any]) -> Tensor:
            return self.attn(x) * (options["scale"] if options["on"] else 0)

    eager, graphed = pair(PABConfig(spatial=EVERY_SECOND), Scaled, 8)
    for options in (
        {"scale": 1, "on": True},
        {"scale": 1.0, "on": 1},
        {"scale": True, "on": None},
        {"scale": 2.5, "on": True},
    ):
        for _ in range(2):
            x = torch.randn(2, 4)
            a, b = eager(x, options), graphed(x, options)
            assert torch.equal(a, b) and a.dtype == b.dtype
    assert len(recorders[0].recordings) == 8
