"""The generic adapter on the transformers of diffusers: what it finds, and that it runs them as the plan says."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models import transformers
from torch import Tensor, nn

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig, ops
from pab_kernels.adapters import evidence, finder, generic
from pab_kernels.analysis import analyze
from pab_kernels.rules.plan import Sublayer
from tests.adapters.classes import RUN, UNKNOWN_FLOPS, UNLIKE, family, parameters
from tests.adapters.expected_models import EXPECTED
from tests.adapters.outputs import outputs, same
from tests.adapters.tiny_models import Tiny
from tests.adapters.tiny_pipes import named
from tests.oracle import Rule
from tests.record_and_replay import RecordAndReplay

pytestmark = [
    pytest.mark.flops,
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),  # diffusers' own use
    pytest.mark.filterwarnings("ignore:(?s)In CPU autocast:UserWarning"),  # Mochi asks for float32 in autocast
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # diffusers' schedulers and numpy
    pytest.mark.filterwarnings(
        "ignore:flex_attention called without torch.compile:UserWarning"
    ),  # AnyFlowFAR, Kandinsky6SR, Wan-Animate 2
]

EVERY_SECOND = Broadcast(2, (0, 1))
STEPS = 4
CONTEXTS = ("cond", "uncond")


def test_every_class_is_run() -> None:
    """Latte is run by the tests of its own adapter."""
    assert {tiny.name for tiny in RUN} | {"LatteTransformer3DModel"} == set(EXPECTED)
    assert {tiny.name for tiny in RUN} > set(UNLIKE)


def test_no_class_is_special_cased_on_the_generic_path() -> None:
    for module in (evidence, finder, generic):
        code = Path(inspect.getfile(module)).read_text()
        assert "diffusers" not in code and not any(name in code for name in EXPECTED)


def _without_numbers(name: str) -> str:
    return re.sub(r"\.(\d+|\*)(?=\.|$)", "", name)


HERE = [tiny for tiny in RUN if hasattr(transformers, tiny.name)]
"""Those that the installed diffusers has."""
FUSED = ("AllegroTransformer3DModel",)
"""Those that have an adapter of their own."""


@pytest.mark.parametrize("tiny", HERE, ids=lambda t: t.name)
def test_the_sublayers_of_a_family_are_found(tiny: Tiny) -> None:
    sublayers = pab.sublayers(tiny.build())
    kinds = {(_without_numbers(s.name), s.kind) for s in sublayers if s.kind != "block"}
    assert kinds == {(_without_numbers(name), kind) for name, kind in tiny.kinds.items()}
    if tiny.name in FUSED:
        assert all(s.how == "fused" for s in sublayers)
    else:
        assert all(s.why and s.how == "module" for s in sublayers)
    inside = [s for s in sublayers if s.block is not None]
    assert all(s.name.startswith(f"{s.block}.") and s.block.endswith(f".{s.layer}") for s in inside)


@pytest.mark.parametrize("tiny", parameters(HERE))
def test_a_family_of_diffusers(tiny: Tiny) -> None:
    model = tiny.build()
    sublayers = pab.sublayers(model)
    kinds = {s.kind for s in sublayers}
    before = {name: dict(vars(m)) for name, m in model.named_modules()}
    plain = {seed: outputs(model, tiny(seed)) for seed in range(4)}
    assert all(out.isfinite().all() for outs in plain.values() for out in outs)

    one = Broadcast(1)
    pab.enable(model, PABConfig(one, one, one, one, one), num_steps=STEPS)
    assert all(same(outputs(model, tiny(seed)), plain[seed]) for seed in range(4))
    assert set(pab.summary(model).contexts["#0"]) == kinds

    # Two contexts with inputs of their own: the first call of each is the model's own, the second says its attention
    # again.
    rules = PABConfig(EVERY_SECOND, EVERY_SECOND, EVERY_SECOND, EVERY_SECOND)
    replayed = [s for s in sublayers if s.kind != "block"]
    twin = tiny.build()
    pab.disable(model)
    check(tiny, model, twin, rules, replayed, plain)
    pab.disable(model)
    if tiny.streams:
        check(
            tiny,
            model,
            twin,
            PABConfig(block=EVERY_SECOND),
            [s for s in sublayers if s.kind == "block"],
            plain,
            exact=False,
        )
    else:
        pab.enable(model, PABConfig(block=EVERY_SECOND), num_steps=STEPS)
        with pytest.raises(TypeError, match="a stream continues exactly one; leave out the rule for blocks"):
            outputs(model, tiny(0))
    pab.disable(model)
    assert same(outputs(model, tiny(0)), plain[0])
    assert {name: dict(vars(m)) for name, m in model.named_modules()}.keys() == before.keys()
    assert all("forward" not in vars(m) for m in model.modules())


@contextlib.contextmanager
def counted_runs(model: nn.Module, sublayers: list[Sublayer]) -> Iterator[Counter[str]]:
    """How many modules run inside of each sublayer, while it is called: none where its output is reused."""
    runs: Counter[str] = Counter()
    called: list[str] = []  # others use parts of a sublayer too: DiT the embedding of its first block

    def inside(name: str) -> None:
        runs.update([name] if name in called else ())

    def leave(*_: Any) -> None:
        called.pop()

    handles = []
    for s in sublayers:
        module = model.get_submodule(s.name)
        handles.append(module.register_forward_pre_hook(lambda *_, name=s.name: called.append(name)))
        handles.append(module.register_forward_hook(leave))
        handles += [
            m.register_forward_pre_hook(lambda *_, name=s.name: inside(name))
            for m in module.modules()
            if m is not module
        ]
    try:
        yield runs
    finally:
        for handle in handles:
            handle.remove()


def check(
    tiny: Tiny,
    model: Any,
    twin: Any,
    rules: PABConfig,
    sublayers: list[Sublayer],
    plain: dict[int, list[Tensor]],
    exact: bool = True,
) -> None:
    kinds = {s.kind for s in sublayers}
    with counted_runs(twin, sublayers) as once:
        outputs(twin, tiny(0))
    pab.enable(model, rules, num_steps=STEPS)
    runs: Counter[str] = Counter()
    replay = RecordAndReplay(twin, sublayers, dict.fromkeys(kinds, Rule(2, (0, 1))), lambda: range(STEPS))
    counted, known = 0, tiny.name not in UNKNOWN_FLOPS
    for step in range(STEPS):
        for place, name in enumerate(CONTEXTS):
            seed = (step + 2 * place) % 4
            flops = ops.flop_counter() if known else contextlib.nullcontext()
            with pab.context(model, name), flops as counter, counted_runs(model, sublayers) as ran:
                got = outputs(model, tiny(seed))
            runs += ran
            counted += counter.get_total_flops() if counter else 0
            replay.at(step, name)
            with replay.running():
                wanted = outputs(twin, tiny(seed))
            if step % 2 == 0:
                assert same(got, plain[seed])
            else:
                assert not same(got, plain[seed])
            if exact:
                assert same(got, wanted)
            else:
                for a, b in zip(got, wanted, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    summary = pab.summary(model)
    assert summary.forced == 0 and summary.cache_bytes == 0
    assert once.keys() == replay.runs.keys()
    assert runs == {name: 2 * STEPS // 2 * number for name, number in once.items()}  # two contexts, every second step
    saved = [tally.flops_saved for tallies in summary.contexts.values() for tally in tallies.values()]
    if not known:
        assert summary.flops == summary.flops_without == sum(saved) == 0 and "FLOPs" not in str(summary)
    else:
        with ops.flop_counter() as counter:
            outputs(twin, tiny(0))
        assert summary.flops == counted < summary.flops_without == 2 * STEPS * counter.get_total_flops()
        assert sum(saved) == summary.flops_without - counted
    counts = {
        (name, kind, what): getattr(tallies[kind], what)
        for name, tallies in summary.contexts.items()
        for kind in kinds
        for what in ("computed", "reused", "forced")
    }
    assert Counter(counts) == replay.counts and replay.counts.total() > 0


@torch.no_grad()
def test_a_projection_shared_by_attention_and_mlp_runs_where_attention_is_reused() -> None:
    """In Flux' single blocks: what is kept is the attention before it."""
    tiny = family("FluxTransformer2DModel")
    model, ran = tiny.build(), Counter[str]()
    for name in ("norm", "proj_mlp", "proj_out", "attn.to_q"):
        module = model.get_submodule(f"single_transformer_blocks.0.{name}")
        module.register_forward_hook(lambda module, args, out, name=name: ran.update([name]))
    pab.enable(model, PABConfig(spatial=EVERY_SECOND), num_steps=STEPS)
    for seed in range(STEPS):
        outputs(model, tiny(seed))
    assert ran == {"norm": STEPS, "proj_mlp": STEPS, "proj_out": STEPS, "attn.to_q": STEPS // 2}


@pytest.mark.parametrize("name", ["WanPipeline", "CogVideoXPipeline"])
def test_a_pipeline_without_an_adapter_of_its_own_is_analysed(name: str) -> None:
    """Its samplings under PAB are those of tests/broadcast/test_pipelines.py.

    Guidance here is a call a branch, and batched.
    """
    tiny = named(name)
    pipe = tiny.build()
    plain = tiny.sample(pipe)
    found = analyze(pipe, lambda: tiny.sample(pipe))
    assert {d.context for d in found.differences} == set(tiny.contexts) and found.num_steps == 6
    assert torch.equal(tiny.sample(pipe), plain)
