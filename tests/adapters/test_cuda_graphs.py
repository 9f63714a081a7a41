"""CUDA graphs, on the CPU: a recorder in place of CUDA's shows which memory they read and write, and that the host reads none of it."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import re
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from pab_kernels.broadcast import graphs
from pab_kernels.broadcast.broadcaster import broadcaster_of
from pab_kernels.broadcast.signature import tensors_of
from pab_kernels.nn import BroadcastModule, PABCrossAttention
from tests.adapters.test_generic import outputs, same
from tests.adapters.tiny_latte import inputs, noise, prompt, sample, tiny_latte, tiny_pipe
from tests.adapters.tiny_models import FAMILIES
from tests.graph_recorder import Recorder

pytestmark = [
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),  # diffusers' own use
    pytest.mark.filterwarnings("ignore:(?s)In CPU autocast:UserWarning"),  # Mochi asks for float32 in autocast
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # diffusers' schedulers and numpy
]

STEPS = 9
CONTEXTS = ("cond", "uncond")


READ = ("Mochi", "Lumina2")
"""Classes of diffusers whose forward reads from the device,"""

MOVE = ("Chroma", "CogView4", "QwenImage", "ZImage")
"""and those whose forward moves something to it in every call."""


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    """All recorders that are made, the newest last."""
    made: list[Recorder] = []

    def recorder(device: torch.device) -> Recorder:
        made.append(Recorder(device))
        return made[-1]

    monkeypatch.setattr(graphs, "CudaCapture", recorder)
    return made


def config(reuse: Any = "hold", **options: Any) -> PABConfig:
    rules = {"spatial": 2, "temporal": 3, "cross": 4, "mlp": 2}
    return PABConfig(**{kind: Broadcast(reach, reuse=reuse) for kind, reach in rules.items()}, **options)  # type: ignore[arg-type]


EVERY_SECOND = Broadcast(2, (0, 1))
EVERY_THIRD = Broadcast(3, (0, 1), reuse="linear")
CONFIGS = {
    "hold": config(),
    "gated": config(cache_point="post_gate"),
    "linear": config("linear"),
    "linear int8": config("linear", cache_dtype="int8"),
    "fp8": config(cache_dtype="float8_e4m3fn"),
    "blocks": config(block=Broadcast(2, (0.5, 0.95))),
    "linear blocks": PABConfig(spatial=EVERY_SECOND, block=EVERY_THIRD),
}


def pair(pab_config: PABConfig, build: Callable[[], Any] = lambda: tiny_latte(num_layers=1), steps: int = STEPS) -> tuple[Any, Any]:
    """The same model under PAB twice: eager, and with graphs."""
    eager, graphed = build(), build()
    pab.enable(eager, pab_config, num_steps=steps)
    pab.enable(graphed, pab_config, num_steps=steps, cuda_graphs=True)
    return eager, graphed


def called(model: Any, step: int, name: str, seed: int = 0, **arguments: Any) -> Tensor:
    """One call of a Latte, on inputs that differ from one step, context and seed to the next."""
    number = 100 * seed + 10 * CONTEXTS.index(name) + 1
    given = {"hidden_states": noise(number + step), "encoder_hidden_states": prompt(number), "timestep": torch.tensor([900 - 9 * step])}
    with pab.context(model, name, step):
        return model(**given | arguments).sample


def generated(model: Any, seed: int = 0, steps: range = range(STEPS)) -> list[Tensor]:
    return [called(model, step, name, seed) for step in steps for name in CONTEXTS]


def counted(model: Any) -> Any:
    """The summary, but for what only graphs have."""
    return dataclasses.replace(pab.summary(model), graphs=None, graph_bytes=None)


def graphs_of(model: Any) -> Any:
    broadcaster = broadcaster_of(model)
    assert broadcaster is not None and broadcaster.latest is not None
    return broadcaster.latest.graphs


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


@pytest.mark.parametrize("name", CONFIGS)
def test_latte_gives_the_bits_and_counts_of_eager_pab_with_a_graph_for_each_pattern_and_context(
    name: str, recorders: list[Recorder]
) -> None:
    eager, graphed = pair(CONFIGS[name])
    for seed in range(2):
        if seed:
            for model in (eager, graphed):
                broadcaster_of(model).begin(num_steps=STEPS)  # type: ignore[union-attr]
        assert same(generated(graphed, seed), generated(eager, seed))
        assert counted(graphed) == counted(eager)
        (recorder,) = recorders
        plan = pab.summary(graphed).plan
        assert plan is not None
        assert len(recorder.recordings) == recorder.warm_ups == plan.patterns * len(CONTEXTS) == pab.summary(graphed).graphs
    assert len(recorder.replays) == 2 * STEPS * len(CONTEXTS) - len(recorder.recordings)
    assert pab.summary(graphed).graph_bytes == recorder.nbytes + kept_bytes(graphed)


def kept_bytes(model: Any) -> int:
    found = graphs_of(model)
    places = [nest for of_context in found._places.values() for p in of_context.values() for nest in (p.newest, p.before)]
    return sum(t.nbytes for t in tensors_of([places, list(found._inputs.values()), [g.weights for g in found._graphs.values()]]))


@pytest.mark.parametrize("name", ["hold", "linear int8"])
def test_slots_lie_at_the_same_addresses_at_every_step_and_in_every_generation(name: str, recorders: list[Recorder]) -> None:
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
    every = [address for lies in seen.values() for address in lies]
    assert len(set(every)) == len(every), "no two share memory, of one context or of two"


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


@pytest.mark.parametrize("tiny", [t for t in FAMILIES if not t.name.startswith(READ)], ids=lambda t: t.name)
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

    for options in ({}, {"seed": 1}, {"guidance": 1.0}, {"callback_on_step_end": stop}, {"size": 8}, {"seed": 2}, {"steps": 7}):
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


# What a graph depends on


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
    for options in ({"scale": 1, "on": True}, {"scale": 1.0, "on": 1}, {"scale": True, "on": None}, {"scale": 2.5, "on": True}):
        for _ in range(2):
            x = torch.randn(2, 4)
            a, b = eager(x, options), graphed(x, options)
            assert torch.equal(a, b) and a.dtype == b.dtype
    assert len(recorders[0].recordings) == 8


def test_what_no_graph_can_take_is_refused(recorders: list[Recorder]) -> None:
    _, model = pair(config())
    with pytest.raises(TypeError, match="object in what LatteTransformer3DModel was called with; .* leave cuda_graphs out"):
        model(**inputs(), enable_temporal_attentions=object())
    with pytest.raises(TypeError, match="number 500 as timestep, and each number would need a graph"):
        model(**inputs() | {"timestep": 500})
    with pytest.raises(RuntimeError, match=r"called with .*hidden_states.* on meta, .* on cpu; .* on one CUDA device: move them"):
        model(**inputs() | {"hidden_states": noise().to("meta")})

    class Told(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = BroadcastModule(nn.Identity(), "spatial")

        def forward(self, x: Any) -> Any:
            return {"out": self.attn(x), "told": Told}

    told = Told()
    pab.enable(told, PABConfig(spatial=2), num_steps=2, cuda_graphs=True)
    with pytest.raises(TypeError, match="there is a type in the output of Told"):
        told(torch.ones(2, 4))
    pab.disable(told)
    pab.enable(told, PABConfig(spatial=2), num_steps=2, cuda_graphs=True)
    with pytest.raises(RuntimeError, match="called with no tensor; with CUDA graphs"):
        told(1)


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


def test_autocast_and_inference_mode(recorders: list[Recorder]) -> None:
    eager, graphed = pair(config("linear"))
    with torch.inference_mode():
        assert same(generated(graphed), generated(eager))
    with pab.generation(eager, num_steps=STEPS), pab.generation(graphed, num_steps=STEPS):
        assert same(generated(graphed, 1), generated(eager, 1))
    before = len(recorders[0].recordings)
    with pab.generation(eager, num_steps=STEPS), pab.generation(graphed, num_steps=STEPS), torch.autocast("cpu", torch.bfloat16):
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


def test_cross_attention_of_ours_computes_keys_and_values_of_the_text_where_it_computes(recorders: list[Recorder]) -> None:
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


# What cannot be captured


@pytest.mark.parametrize("name", ["Mochi", "Lumina2"])
def test_a_model_that_reads_a_tensor_on_the_host_is_refused_with_the_reason(name: str, recorders: list[Recorder]) -> None:
    tiny = next(t for t in FAMILIES if t.name.startswith(name))
    model = tiny.build()
    plain = outputs(model, tiny(0))
    pab.enable(model, PABConfig(spatial=EVERY_SECOND), num_steps=4, cuda_graphs=True)
    with pytest.raises(RuntimeError, match=rf"{tiny.name} cannot be captured .*: operation not permitted .*: .* leave cuda_graphs out"):
        model(**tiny(0))
    assert pab.summary(model).cache_bytes == 0 == pab.summary(model).graphs
    pab.enable(model, num_steps=4, cuda_graphs=False)
    assert same(outputs(model, tiny(0)), plain)


class Odd(nn.Module):
    """A model with one attention and something odd."""

    def __init__(self, odd: Callable[[Odd, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn = BroadcastModule(nn.Linear(4, 4), "spatial")
        self.odd = odd
        self.calls = [0]
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.odd(self, self.attn(x))


def counting(model: Odd, x: Tensor) -> Tensor:
    model.calls = [model.calls[0] + 1]
    return x


def alternating(model: Odd, x: Tensor) -> Tensor:
    counter.append(1)
    return model.attn(x) if len(counter) % 2 else x


def failing(model: Odd, x: Tensor) -> Tensor:
    counter.append(1)
    if len(counter) == 2:
        raise ValueError("the second call fails\nin two lines")
    return x


counter: list[int] = []


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        (counting, "calls changes with every call"),
        (alternating, "called again with the same inputs it did something else"),
        (failing, r"the second call fails \(at test_cuda_graphs.py:\d+, `raise ValueError\(.*`\)"),
    ],
)
def test_a_model_that_does_more_than_queue_work_is_refused(odd: Any, reason: str, recorders: list[Recorder]) -> None:
    counter.clear()
    model = Odd(odd)
    pab.enable(model, PABConfig(spatial=2), num_steps=4, cuda_graphs=True)
    with pytest.raises(RuntimeError, match=f"Odd cannot be captured as a CUDA graph: {reason}. Its forward may"):
        model(torch.ones(2, 4))
    assert pab.summary(model).graphs == 0


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


def test_hooks_that_work_on_weights_in_every_call_are_refused(recorders: list[Recorder]) -> None:
    model = tiny_latte(num_layers=1)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    pab.enable(model, config(), num_steps=STEPS, cuda_graphs=True)
    with pytest.raises(RuntimeError, match=r"has the hook 'layerwise_casting' \(offloading, casting or another cache\)"):
        called(model, 0, "cond")
    model = tiny_latte(num_layers=1)
    model.proj_out.to("meta")
    pab.enable(model, config(), num_steps=STEPS, cuda_graphs=True)
    with pytest.raises(RuntimeError, match=r"proj_out.weight is on meta and the inputs on cpu \(offloading\)"):
        called(model, 0, "cond")


def test_without_a_gpu_the_first_call_says_so() -> None:
    model = tiny_latte(num_layers=1)
    pab.enable(model, config(), num_steps=STEPS, cuda_graphs=True)
    with pytest.raises(RuntimeError, match="called with tensors on cpu, and CUDA graphs need a CUDA device: move the model and its inputs"):
        called(model, 0, "cond")
    pab.enable(model, num_steps=STEPS, cuda_graphs=False)
    assert called(model, 0, "cond").isfinite().all() and pab.summary(model).graphs is None


def test_seconds_between_sublayers_and_graphs_exclude_each_other() -> None:
    model = tiny_latte(num_layers=1)
    with pytest.raises(ValueError, match="a CUDA graph runs as a whole; .* leave the other out"):
        pab.enable(model, config(), timed=True, cuda_graphs=True)
    pab.enable(model, config(), cuda_graphs=True)
    with pytest.raises(ValueError, match="a CUDA graph runs as a whole"):
        pab.enable(model, timed=True)
    broadcaster = broadcaster_of(model)
    assert broadcaster is not None and broadcaster.cuda_graphs and not broadcaster.timed
    pab.enable(model, timed=True, cuda_graphs=False)


# How long graphs are kept


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
    barrier = threading.Barrier(2, timeout=60)
    found: list[Any] = [None, None]
    begun = [contextlib.nullcontext(), pab.generation(model, num_steps=STEPS)]  # the first takes what `enable` began in this thread

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
        thread.join(120)
    for out, other in zip(found, wanted, strict=True):
        assert isinstance(out, list), out
        assert same(out, other)
    assert len(recorders) == 2


# With a compiler


@pytest.fixture
def _forgotten() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_forgotten")
def test_compiled_blocks_are_captured_and_not_compiled_again(recorders: list[Recorder], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recorder, "strict", False)
    tiny = next(t for t in FAMILIES if t.name.startswith("Wan"))
    eager, graphed = pair(PABConfig(spatial=EVERY_SECOND, cross=EVERY_THIRD), tiny.build, 6)
    counter = CompileCounter()
    graphed.blocks[0].compile(fullgraph=True, backend=counter)
    for _ in range(2):
        with pab.generation(eager, num_steps=6), pab.generation(graphed, num_steps=6):
            assert all(same(outputs(graphed, tiny(seed % 4)), outputs(eager, tiny(seed % 4))) for seed in range(6))
        assert counted(graphed) == counted(eager)
        plan = pab.summary(graphed).plan
        assert plan is not None and len(recorders[0].recordings) == counter.frame_count == plan.patterns


# Which models can be captured


class Moves(TorchFunctionMode):
    """Fails where memory of the host becomes a tensor on the device, which no capture can do. The meta device tells the two apart."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        moved = any(not v.is_meta and v.ndim for v in given) or (not given and func in (torch.tensor, torch.as_tensor))
        if moved and isinstance(out, Tensor) and out.is_meta:
            raise MovesError(f"{func.__name__} moves something to the device")
        return out


class MovesError(AssertionError):
    pass


CLASSES: list[tuple[str, Callable[[], Any], Callable[[], dict[str, Any]]]] = [
    ("Latte", tiny_latte, inputs),
    *((t.name, t.build, partial(t, 0)) for t in FAMILIES if not t.name.startswith(READ)),
]


@pytest.mark.parametrize(("name", "build", "given"), CLASSES, ids=[c[0] for c in CLASSES])
def test_a_forward_moves_nothing_to_the_device(name: str, build: Callable[[], Any], given: Callable[[], dict[str, Any]]) -> None:
    model = build().to("meta")
    arguments = pytree.tree_map(lambda v: v.to("meta") if isinstance(v, Tensor) else v, given())
    pab.enable(model, PABConfig(EVERY_SECOND, EVERY_SECOND, EVERY_THIRD, EVERY_SECOND), num_steps=6)
    with pytest.raises(MovesError) if name.startswith(MOVE) else contextlib.nullcontext():
        for _ in range(6):
            with Moves():
                model(**arguments)


def test_the_page_says_which_can_be_captured() -> None:
    page = Path(pab.__file__).parents[1] / "docs" / "cuda_graphs.md"
    if not page.exists():
        pytest.skip("the pages are not here")
    well, _, badly = page.read_text().partition("classes of diffusers go through: ")[2].partition("They cannot be captured: ")
    for name in ("Latte", *(re.sub(r"(Transformer)?[23]DModel$", "", t.name) for t in FAMILIES)):
        assert re.search(rf"\b{name}\b", badly if name in (*READ, *MOVE) else well), name
