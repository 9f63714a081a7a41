"""Compiled blocks share their graphs: equal blocks need one for each pattern of the plan, however many blocks there
are."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils import _pytree as pytree

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from pab_kernels.models.stdit3 import STDiT3
from tests.adapters.tiny_latte import inputs, noise, tiny_latte
from tests.adapters.tiny_models import FAMILIES

pytestmark = pytest.mark.usefixtures("no_flops")

STEPS = 6
BLOCKS = 4
RULE = Broadcast(2, (0, 1))

Model = tuple[nn.Module, Callable[[int], dict[str, Any]], list[str]]
"""A model with at least `BLOCKS` blocks of each class, its arguments by the step, and where its blocks are."""


def _family(name: str, *groups: str) -> Model:
    tiny = next(t for t in FAMILIES if t.name == name)
    model = tiny.build()
    for group in groups:
        blocks = model.get_submodule(group)
        while len(blocks) < BLOCKS:
            blocks.append(copy.deepcopy(blocks[0]))
    return model, tiny, list(groups)


def _latte() -> Model:
    return (
        tiny_latte(num_layers=BLOCKS),
        lambda step: inputs() | {"hidden_states": noise(step)},
        [
            "transformer_blocks",
            "temporal_transformer_blocks",
        ],
    )


def _stdit3() -> Model:
    torch.manual_seed(0)
    model = (
        STDiT3(hidden_size=64, num_heads=2, depth=BLOCKS, caption_channels=6, model_max_length=5)
        .eval()
        .requires_grad_(False)
    )

    def arguments(step: int) -> dict[str, Any]:
        g = torch.Generator().manual_seed(step)
        x, y = (
            torch.randn(1, 4, 3, 8, 8, generator=g),
            torch.randn(1, 1, 5, 6, generator=torch.Generator().manual_seed(0)),
        )
        size = {name: torch.tensor([value]) for name, value in (("height", 64.0), ("width", 64.0), ("fps", 24.0))}
        return {"x": x, "timestep": torch.tensor([900.0]), "y": y} | size

    return model, arguments, ["spatial_blocks", "temporal_blocks"]


MODELS: dict[str, tuple[Callable[[], Model], int, int]] = {
    "Latte": (_latte, 3, 4),  # its first block is given the strides of the next
    "STDiT3": (_stdit3, 2, 4),
    "CogVideoX": (lambda: _family("CogVideoXTransformer3DModel", "transformer_blocks"), 2, 3),
    "Wan": (lambda: _family("WanTransformer3DModel", "blocks"), 1, 2),
    "Flux": (lambda: _family("FluxTransformer2DModel", "transformer_blocks", "single_transformer_blocks"), 3, 5),
}
"""By name; with the graphs of plain blocks, and those under a plan of two patterns.

Plain blocks have one for each class, and one where a first block sees its stream with other strides than the next.
"""


@pytest.fixture(autouse=True)
def _forgotten_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.no_grad()
def _run(model: nn.Module, arguments: Callable[[int], dict[str, Any]]) -> list[Tensor]:
    found = []
    for step in range(STEPS):
        found += [v for v in pytree.tree_leaves(model(**arguments(step))) if isinstance(v, Tensor)]
    return found


def _compiled(model: nn.Module, groups: list[str], counter: Any) -> None:
    for group in groups:
        for block in model.get_submodule(group).children():
            block.compile(fullgraph=True, backend=counter)


@pytest.mark.parametrize("name", MODELS)
def test_graphs_are_as_many_as_patterns(name: str) -> None:
    make, without, with_patterns = MODELS[name]
    plain, arguments, groups = make()
    eager, compiled = copy.deepcopy(plain), copy.deepcopy(plain)
    of_plain, counter = CompileCounter(), CompileCounter()
    _compiled(plain, groups, of_plain)
    _run(plain, arguments)
    torch._dynamo.reset()
    for model in (eager, compiled):
        pab.enable(model, PABConfig(spatial=RULE, temporal=RULE, cross=RULE, mlp=RULE), num_steps=STEPS)
    _compiled(compiled, groups, counter)
    for again in range(2):
        if again:
            for model in (eager, compiled):
                pab.enable(model, num_steps=STEPS)
        for a, b in zip(_run(compiled, arguments), _run(eager, arguments), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        summary = pab.summary(compiled)
        assert summary.plan is not None and summary.plan.patterns == 2
        assert (of_plain.frame_count, counter.frame_count) == (without, with_patterns) and summary.forced == 0
        bytes_of_text = pab.summary(eager).peak_cache_bytes - summary.peak_cache_bytes  # kept in eager blocks alone
        assert (bytes_of_text > 0) == (name == "STDiT3")
        assert replace(pab.summary(eager), peak_cache_bytes=summary.peak_cache_bytes) == summary
        assert summary.contexts["#0"]["spatial"].reused > 0
    pab.disable(compiled)


def test_many_blocks_need_no_more_graphs_than_two() -> None:
    counts = []
    for number in (2, 8):
        torch._dynamo.reset()
        model, arguments, (group,) = _family("WanTransformer3DModel", "blocks")
        blocks = model.get_submodule(group)
        model.blocks = nn.ModuleList([copy.deepcopy(blocks[0]) for _ in range(number)])
        counter = CompileCounter()
        pab.enable(model, PABConfig(spatial=RULE, cross=RULE, mlp=RULE), num_steps=STEPS)
        _compiled(model, [group], counter)
        _run(model, arguments)
        plan = pab.summary(model).plan
        assert plan is not None and counter.frame_count == plan.patterns
        counts.append(counter.frame_count)
    assert counts[0] == counts[1]


def test_measuring_seconds_adds_graphs_once() -> None:
    """Every sublayer then has a turn."""
    model, arguments, groups = _family("WanTransformer3DModel", "blocks")
    counter = CompileCounter()
    pab.enable(model, PABConfig(spatial=RULE), num_steps=STEPS)
    _compiled(model, groups, counter)
    found = []
    for timed in (False, True, True):
        pab.enable(model, num_steps=STEPS, timed=timed)
        _run(model, arguments)
        found.append(counter.frame_count)
    assert found == [2, 4, 4]
    assert pab.summary(model).rest_seconds is not None


def test_classes_of_blocks_share_no_limit() -> None:
    """torch keeps graphs by the code of what is compiled: the code of every class is one of its own."""
    model, _, groups = _family("FluxTransformer2DModel", "transformer_blocks", "single_transformer_blocks")
    pab.enable(model, PABConfig(spatial=RULE), num_steps=STEPS)
    codes = [block.forward.__func__.__code__ for group in groups for block in model.get_submodule(group).children()]  # type: ignore[union-attr]
    assert len(set(map(id, codes))) == 2


def test_a_request_in_another_thread_adds_no_graph() -> None:
    from concurrent.futures import ThreadPoolExecutor

    model, arguments, groups = _family("WanTransformer3DModel", "blocks")
    counter = CompileCounter()
    pab.enable(model, PABConfig(spatial=RULE, cross=RULE), num_steps=STEPS)
    _compiled(model, groups, counter)
    wanted = _run(model, arguments)
    request = pab.generation(model, num_steps=STEPS)

    def work() -> list[Tensor]:
        with request:
            return _run(model, arguments)

    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(work).result()
    assert all(map(torch.equal, found, wanted)) and counter.frame_count == 2


@torch.no_grad()
@pytest.mark.parametrize("clips", [1, 2])
def test_the_ranges_of_the_paper_stay_within_the_limit_of_torch(clips: int) -> None:
    """A limit that is passed is an error here, as the blocks are compiled with `fullgraph`."""
    steps = 20
    model, counter = tiny_latte(num_layers=BLOCKS), CompileCounter()
    rules = {kind: Broadcast(reach, (0.1, 0.9)) for kind, reach in (("spatial", 2), ("temporal", 4), ("cross", 6))}
    pab.enable(model, PABConfig(**rules), num_steps=steps)
    _compiled(model, ["transformer_blocks", "temporal_transformer_blocks"], counter)
    for step in range(steps):
        given = inputs(batch=clips)
        model(**given | {"hidden_states": given["hidden_states"] + step})
    plan = pab.summary(model).plan
    assert plan is not None
    columns = [
        [(plan.decision(name, i).action, len(plan.decision(name, i).reads)) for i in plan.steps] for name in plan.rows
    ]
    kinds = [s.kind for s in plan.sublayers]
    spatial, cross, temporal = (columns[kinds.index(kind)] for kind in ("spatial", "cross", "temporal"))
    patterns = len(set(zip(spatial, cross, strict=True))), len(set(temporal))
    assert counter.frame_count == sum(patterns) and max(patterns) <= torch._dynamo.config.recompile_limit


@torch.no_grad()
def test_other_rules_for_the_same_sublayers_share_graphs() -> None:
    model, arguments, groups = _family("WanTransformer3DModel", "blocks")
    counter = CompileCounter()
    _compiled(model, groups, counter)
    late, early = (Broadcast(2, window, "step") for window in ((STEPS - 2, STEPS), (0, 2)))
    found = []
    for config in (PABConfig(spatial=late), PABConfig(spatial=early), PABConfig(spatial=RULE)):
        pab.enable(model, config)
        for _ in range(2):
            with pab.generation(model, num_steps=STEPS):
                _run(model, arguments)
        found.append(counter.frame_count)
    assert found == [3, 3, 3], "computed, stored, reused"


@torch.no_grad()
def test_a_block_that_is_called_by_itself_adds_no_graph_a_call() -> None:
    model, arguments, groups = _family("WanTransformer3DModel", "blocks")
    counter = CompileCounter()
    _compiled(model, groups, counter)
    given: list[Any] = []
    block: Any = model.get_submodule(groups[0])[0]  # type: ignore[index]
    handle = block.register_forward_pre_hook(
        lambda module, args, kwargs: given.append((args, kwargs)), with_kwargs=True
    )
    pab.enable(model, PABConfig(spatial=RULE))
    with pab.generation(model, num_steps=STEPS):
        _run(model, arguments)
    handle.remove()
    args, kwargs = given[0]
    counts = []
    for _ in range(6):
        block(*args, **kwargs)
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1
    assert pab.summary(model).contexts["#0"]["mlp"].computed == STEPS * len(
        list(model.get_submodule(groups[0]).children())
    )
