"""Compiled STDiT3: one graph for each pattern and class of blocks, and the results of plain blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from tests.adapters.tiny_stdit3 import conditions, given_frames, noise, text, tiny_stdit3

STEPS = 6
EVERY_SECOND = Broadcast(2, (0, 1))
ATTENTION = {"spatial": EVERY_SECOND, "temporal": EVERY_SECOND, "cross": EVERY_SECOND}
SHARED = PABConfig(**ATTENTION, mlp=EVERY_SECOND, cache_point="post_gate", budget=110_000)
"""Within which all sublayers of a block share a slot."""


@pytest.fixture(autouse=True)
def _forgotten_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def outputs(model: Any, **given: Any) -> list[Tensor]:
    fixed, timestep = conditions() | {"y": text()} | given, torch.tensor([900.0, 900.0])
    return [model(noise(step), timestep, **fixed) for step in range(STEPS)]


def counted(model: Any) -> dict[str, Any]:
    """All counts but those of FLOPs: a compiled graph keeps no keys and values of the text."""
    return {kind: replace(tally, flops=0) for kind, tally in pab.summary(model).contexts["#0"].items()}


def shared(model: Any) -> Any:
    """The sublayers that share a slot."""
    plan = pab.summary(model).plan
    assert plan is not None
    return plan.spans


def compiled_blocks(model: Any) -> Any:
    counter = CompileCounter()
    for block in (*model.spatial_blocks, *model.temporal_blocks):
        block.compile(fullgraph=True, backend=counter)
    return counter


@pytest.mark.parametrize(
    ("config", "graphs"),
    [
        (PABConfig(**ATTENTION, mlp=EVERY_SECOND, cache_point="post_gate"), 4),
        pytest.param(SHARED, 4, marks=pytest.mark.flops),
        (PABConfig(**ATTENTION, cache_point="unprojected"), 4),
        (PABConfig(block=EVERY_SECOND), 4),
        (PABConfig(spatial=EVERY_SECOND, cache_dtype="int8"), 3),
    ],
    ids=["post-gate", "shared slots", "unprojected", "blocks", "one class alone"],
)
def test_as_many_graphs_as_patterns_of_each_class_of_blocks(config: PABConfig, graphs: int) -> None:
    eager, model = tiny_stdit3(), tiny_stdit3()
    counter, given = compiled_blocks(model), {"x_mask": given_frames()}
    for _ in range(2):
        for m in (eager, model):
            pab.enable(m, config)
        with pab.generation(eager, num_steps=STEPS), pab.generation(model, num_steps=STEPS):
            for a, b in zip(outputs(model, **given), outputs(eager, **given), strict=True):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        assert counter.frame_count == graphs
        assert counted(model) == counted(eager) and pab.summary(model).forced == 0
    assert len(shared(model)) == (12 if config is SHARED else 0)


@pytest.mark.parametrize(
    "config",
    [PABConfig(**ATTENTION, mlp=EVERY_SECOND, cache_point="post_gate"), pytest.param(SHARED, marks=pytest.mark.flops)],
)
def test_a_model_that_is_compiled_as_a_whole(config: PABConfig) -> None:
    eager, model = tiny_stdit3(depth=1), tiny_stdit3(depth=1)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for m in (eager, compiled):
        pab.enable(m, config, num_steps=STEPS)
    for a, b in zip(outputs(compiled), outputs(eager), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 2 and counted(compiled) == counted(eager)
    assert len(shared(compiled)) == (6 if config is SHARED else 0)
