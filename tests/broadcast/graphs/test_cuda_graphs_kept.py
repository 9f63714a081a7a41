"""How long CUDA graphs hold: outputs, weights, modes, other configs, threads, and compiled blocks."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import pab_kernels as pab
from pab_kernels import PABConfig
from pab_kernels.nn import BroadcastModule, PABCrossAttention
from tests.adapters.outputs import outputs, same
from tests.adapters.tiny_latte import noise, prompt
from tests.adapters.tiny_models import FAMILIES
from tests.broadcast.chained import Model, X, directly
from tests.broadcast.graphs.graph_recorder import Recorder
from tests.broadcast.graphs.graphed import (
    CONTEXTS,
    EVERY_SECOND,
    EVERY_THIRD,
    STEPS,
    Odd,
    called,
    config,
    counted,
    generated,
    graphs_of,
    pair,
)
from tests.hang import HANG

pytestmark = [
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),  # diffusers' own use
    pytest.mark.filterwarnings("ignore:(?s)In CPU autocast:UserWarning"),  # Mochi asks for float32 in autocast
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # diffusers' schedulers and numpy
]


def test_outputs_are_the_callers_own(recorders: list[Recorder]) -> None:
    eager, graphed = pair(config())
    kept, wanted = generated(graphed), generated(eager)
    with pab.generation(graphed, num_steps=STEPS):
        again = generated(graphed)
        assert same(kept, wanted) and same(again, wanted)
        assert len({t.data_ptr() for t in kept + again}) == 2 * len(kept)
    x = noise(3)
    with pab.generation(graphed, num_steps=STEPS), pab.generation(eager, num_steps=STEPS):
        for step in range(STEPS):
            out, other = (called(m, step, "cond", hidden_states=x) for m in (graphed, eager))
            assert torch.equal(out, other)
            out.fill_(float("nan"))
            x += 0.1


def test_weights_changed_in_place_are_seen_and_replaced_ones_are_captured_anew(recorders: list[Recorder]) -> None:
    eager, graphed = pair(config())
    (projection, _), others = ([m.transformer_blocks[0].attn1.to_q for m in (graphed, eager)], (eager, graphed))

    def check(captures: int) -> None:
        with pab.generation(eager, num_steps=STEPS), pab.generation(graphed, num_steps=STEPS):
            assert same(generated(graphed), generated(eager))
        assert [len(r.recordings) for r in recorders][-1] == first and len(recorders) == captures

    assert same(generated(graphed), generated(eager))
    first = len(recorders[0].recordings)
    for model in others:
        model.transformer_blocks[0].attn1.to_q.weight.mul_(2)
    check(1)
    for model in others:
        model.transformer_blocks[0].attn1.to_q.weight = nn.Parameter(0.25 * projection.weight, requires_grad=False)
    check(2)
    for model in others:
        model.transformer_blocks[0].attn1.scale = 0.3  # as where the strength of a LoRA is set
    check(3)
    for model in others:
        model.transformer_blocks[0].attn1.processor._attention_backend = None
    check(4)
    check(4)


def test_a_change_in_the_middle_of_a_generation_is_seen_by_the_next_one(recorders: list[Recorder]) -> None:
    def build() -> Odd:
        model = Odd(lambda model, x: model.factor * x)
        model.factor = 1
        return model

    eager, graphed = pair(PABConfig(spatial=EVERY_SECOND), build, 4)
    for model in (eager, graphed):
        for rows in (2, 2, 3, 3):  # what comes with another shape is captured after the change
            model.factor = rows - 1
            model(torch.ones(rows, 4))
    for rows in (2, 3):
        with pab.generation(eager, num_steps=4), pab.generation(graphed, num_steps=4):
            for _ in range(4):
                x = torch.randn(rows, 4)
                assert torch.equal(graphed(x), eager(x)), rows


def test_autocast_and_inference_mode(recorders: list[Recorder]) -> None:
    eager, graphed = pair(config("linear"))
    with torch.inference_mode():
        assert same(generated(graphed), generated(eager))
    with pab.generation(eager, num_steps=STEPS), pab.generation(graphed, num_steps=STEPS):
        assert same(generated(graphed, 1), generated(eager, 1))
    before = len(recorders[0].recordings)
    with (
        pab.generation(eager, num_steps=STEPS),
        pab.generation(graphed, num_steps=STEPS),
        torch.autocast("cpu", torch.bfloat16),
    ):
        assert same(generated(graphed), generated(eager))
    assert len(recorders[0].recordings) == 2 * before and counted(graphed) == counted(eager)


def test_autocast_keeps_no_cast_weights_that_a_graph_would_read_when_they_are_gone(recorders: list[Recorder]) -> None:
    kept: list[bool] = []

    def tell(model: Odd, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            kept.append(torch.is_autocast_cache_enabled())
        return x

    model = Odd(tell)
    pab.enable(model, PABConfig(spatial=2), num_steps=4, cuda_graphs=True)
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.ones(2, 4))
        assert kept == [False, False] and torch.is_autocast_cache_enabled()


def test_cross_attention_of_ours_computes_keys_and_values_of_the_text_where_it_computes(
    recorders: list[Recorder],
) -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.attn = PABCrossAttention(64, 2)

        def forward(self, x: Tensor, text: Tensor) -> Tensor:
            return x + self.attn(x, text)

    eager, graphed = pair(PABConfig(cross=EVERY_SECOND), Cross, 6)
    for seed in range(3):
        text = torch.randn(1, 5, 64)
        with pab.generation(eager, num_steps=6), pab.generation(graphed, num_steps=6):
            for _ in range(6):
                x = torch.randn(1, 7, 64)
                assert torch.equal(graphed(x, text), eager(x, text)), seed
    assert pab.summary(graphed).graphs == 2
    assert pab.summary(graphed).peak_cache_bytes == 7 * 64 * 4 < pab.summary(eager).peak_cache_bytes


def test_what_a_model_makes_when_it_is_first_used_may_come_late(recorders: list[Recorder]) -> None:
    due = []

    def late(model: Odd, x: Tensor) -> Tensor:
        if due:
            model.made = due[0]
        return x + model.mlp(x)

    def build() -> Odd:
        model = Odd(late)
        model.mlp = BroadcastModule(nn.Linear(4, 4), "mlp")
        return model.requires_grad_(False)

    eager, graphed = pair(PABConfig(spatial=EVERY_THIRD, mlp=EVERY_SECOND), build, 6)
    for step in range(6):
        if step == 3:
            due.append(1)
        x = torch.randn(2, 4)
        assert torch.equal(graphed(x), eager(x)), step
    assert counted(graphed) == counted(eager)
    (recorder,) = recorders
    assert recorder.warm_ups == len(recorder.recordings) + 1
    assert pab.summary(graphed).graphs == 3, "those from before may read what is no more"


def test_an_exception_leaves_nothing_behind_and_the_graphs_usable(recorders: list[Recorder]) -> None:
    eager, graphed = pair(config("linear"))
    generated(graphed)
    before = len(recorders[0].recordings)
    with pab.generation(graphed, num_steps=STEPS), pytest.raises(RuntimeError):
        generated(graphed, steps=range(4))
        called(graphed, 4, "cond", encoder_hidden_states=prompt()[..., :3])
    assert pab.summary(graphed).cache_bytes == 0 and len(recorders[0].recordings) == before
    with pab.generation(eager, num_steps=STEPS), pab.generation(graphed, num_steps=STEPS):
        assert same(generated(graphed, 1), generated(eager, 1))
    assert len(recorders[0].recordings) == before


def test_another_config_and_disable_let_the_graphs_go(recorders: list[Recorder]) -> None:
    eager, graphed = pair(config())
    generated(graphed)
    pab.enable(graphed, config(), num_steps=STEPS)
    generated(graphed)
    assert len(recorders) == 1, "the same config keeps them"
    first = weakref.ref(graphs_of(graphed))
    for model in (eager, graphed):
        pab.enable(model, config("linear"), num_steps=STEPS)
    gc.disable()  # without cycles nothing has to look for them
    try:
        assert same(generated(graphed, 1), generated(eager, 1))
        assert first() is None and len(recorders) == 2
        second = weakref.ref(graphs_of(graphed))
        pab.enable(graphed, num_steps=STEPS, cuda_graphs=False)
        generated(graphed)
        assert second() is None and pab.summary(graphed).graphs is None
        pab.enable(graphed, num_steps=STEPS, cuda_graphs=True)
        generated(graphed)
        third, model = weakref.ref(graphs_of(graphed)), weakref.ref(graphed)
        assert "CUDA graphs, " in str(pab.summary(graphed))
        pab.disable(graphed)
        assert third() is None
        del graphed
        assert model() is None
    finally:
        gc.enable()


def test_threads_that_share_a_model_have_graphs_of_their_own(recorders: list[Recorder]) -> None:
    eager, model = pair(config("linear"))
    wanted = [generated(eager)]
    with pab.generation(eager, num_steps=STEPS):
        wanted.append(generated(eager, 1))
    barrier = threading.Barrier(2, timeout=HANG)
    found: list[Any] = [None, None]
    begun = [
        contextlib.nullcontext(),
        pab.generation(model, num_steps=STEPS),
    ]  # the first takes what `enable` began in this thread

    def run(i: int) -> None:
        try:
            with torch.no_grad(), begun[i]:
                out = []
                for step in range(STEPS):
                    barrier.wait()  # their calls alternate
                    out += [called(model, step, name, i) for name in CONTEXTS]
                found[i] = out
        except BaseException as error:
            found[i] = error
            barrier.abort()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG)
    for out, other in zip(found, wanted, strict=True):
        assert isinstance(out, list), out
        assert same(out, other)
    assert len(recorders) == 2


@pytest.mark.parametrize("what", ["blocks.0", ""], ids=["a block", "the model"])
def test_what_is_compiled_is_captured_and_not_compiled_again(
    what: str, recorders: list[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Recorder, "strict", False)
    tiny = next(t for t in FAMILIES if t.name.startswith("Wan"))

    def build() -> Any:
        model = tiny.build()
        model.blocks = model.blocks[:1]
        return model

    eager, graphed = pair(PABConfig(cross=EVERY_THIRD), build, 6)
    counter = CompileCounter()
    graphed.get_submodule(what).compile(fullgraph=True, backend=counter)
    for _ in range(2):
        with pab.generation(eager, num_steps=6), pab.generation(graphed, num_steps=6):
            assert all(same(outputs(graphed, tiny(seed % 4)), outputs(eager, tiny(seed % 4))) for seed in range(6))
        assert counted(graphed) == counted(eager)
        plan = pab.summary(graphed).plan
        assert plan is not None and len(recorders[0].recordings) == counter.frame_count == plan.patterns > 2


@pytest.mark.flops
def test_a_budget_holds_for_the_places_of_slots(recorders: list[Recorder]) -> None:
    budget = 30_000
    eager, graphed = pair(config(budget=budget))
    for seed in range(2):
        with pab.generation(eager, num_steps=STEPS), pab.generation(graphed, num_steps=STEPS):
            generated(eager, seed), generated(graphed, seed)
        plan = pab.summary(graphed).plan
        assert plan is not None and plan.given_up is not None and plan.given_up.computed
        assert graphs_of(graphed).place_bytes == plan.given_up.peak <= budget
    captured = len(graphs_of(graphed))
    generated(graphed, 2)
    assert len(graphs_of(graphed)) == captured == 2 * plan.patterns


@pytest.mark.flops
def test_blocks_that_share_a_slot_have_one_place(recorders: list[Recorder]) -> None:
    eager, graphed = Model(directly), Model(directly)
    pab.enable(eager, PABConfig(block=EVERY_THIRD), num_steps=STEPS, budget=3 * X.nbytes)
    pab.enable(graphed, PABConfig(block=EVERY_THIRD), num_steps=STEPS, budget=3 * X.nbytes, cuda_graphs=True)
    for seed in range(2):
        with pab.generation(eager, num_steps=STEPS), pab.generation(graphed, num_steps=STEPS):
            for step in range(STEPS):
                outs = graphed(X + seed + step), eager(X + seed + step)
                torch.testing.assert_close(*outs, rtol=0, atol=1e-12)
        plan = pab.summary(graphed).plan
        assert plan is not None and plan.given_up is not None and [len(s) for s in plan.given_up.spans] == [4]
        assert graphs_of(graphed).place_bytes == plan.given_up.peak == 2 * X.nbytes
        assert pab.summary(graphed).forced == 0
