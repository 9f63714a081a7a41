"""Compiled blocks of a parallel model: as many graphs as on one rank, and the same numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.testing._internal.distributed.fake_pg import FakeStore

import pab_kernels as pab
from tests.parallel.frames_runs import PLANS, STEPS, Case
from tests.parallel.processes import run_on

CASES = [Case("stdit3", "hold", 5), Case("latte", "in step", 16, (12, 12))]
ONE_LAYER = [replace(case, layers=1) for case in CASES]
"""As small as it gets: tracing a whole model takes its time."""
GROUPS = {
    "stdit3": ("spatial_blocks", "temporal_blocks"),
    "latte": ("transformer_blocks", "temporal_transformer_blocks"),
}


@pytest.fixture
def eight_fake_ranks() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=8)
    yield
    dist.destroy_process_group()


def compiled(model: nn.Module, case: Case, backend: Any) -> nn.Module:
    """The model with each of its blocks compiled."""
    torch._dynamo.reset()
    for group in GROUPS[case.model]:
        for block in model.get_submodule(group):
            block.compile(backend=backend, fullgraph=True)
    return model


def sampled(case: Case, parallel: bool, backend: Any = None) -> torch.Tensor:
    """One sampling run under PAB."""
    model = pab.enable(case.build(), PLANS[case.plan])
    if parallel:
        pab.parallelize(model)
    if backend is not None:
        compiled(model, case, backend)
    pab.enable(model, PLANS[case.plan], num_steps=STEPS)
    return case.sample(model)


@pytest.mark.parametrize("case", CASES, ids=[case.model for case in CASES])
@torch.no_grad()
def test_eight_ranks_have_as_many_graphs_as_one(case: Case, eight_fake_ranks: None) -> None:
    counts = []
    for parallel in (False, True):
        counter = CompileCounter()
        sampled(case, parallel, counter)
        counts.append(counter.frame_count)
    assert counts[0] == counts[1] > 1


def on_two_ranks(rank: int, case: Case) -> tuple[float, Any]:
    """The difference of compiled blocks on two ranks from eager ones on one, and what was sent in both."""
    alone = case.sample(pab.enable(case.build(), PLANS[case.plan], num_steps=STEPS))
    model = pab.parallelize(pab.enable(case.build(), PLANS[case.plan]))
    sent = []
    for backend in (None, "aot_eager"):
        if backend is not None:
            compiled(model, case, backend)
        pab.enable(model, PLANS[case.plan], num_steps=STEPS)
        found = case.sample(model)
        sent.append(pab.summary(model).traffic)
    return float((alone - found).abs().max()), sent


def test_two_ranks_compiled() -> None:
    for difference, (eager, compiled_) in run_on(2, on_two_ranks, CASES[0]):
        assert difference < 1e-6
        assert eager == compiled_
        assert eager.share < 1


def whole_on_two_ranks(rank: int, case: Case) -> tuple[float, Any]:
    """The difference of the whole model compiled on two ranks from one rank, and what was sent."""
    model = case.build()
    alone = case.sample(pab.enable(model, PLANS[case.plan], num_steps=STEPS))
    pab.parallelize(model)
    torch._dynamo.reset()
    whole = torch.compile(model, backend="eager", fullgraph=True)
    pab.enable(whole, PLANS[case.plan], num_steps=STEPS)
    return float((alone - case.sample(whole)).abs().max()), pab.summary(model).traffic


@pytest.mark.parametrize("case", ONE_LAYER, ids=[case.model for case in ONE_LAYER])
def test_the_whole_model_compiled_on_two_ranks(case: Case) -> None:
    for difference, sent in run_on(2, whole_on_two_ranks, case):
        assert difference < 1e-12
        assert [step.messages > 0 for step in sent.sent["temporal"]] == [True, False, False, True, False, False]


def on_two_ranks_in_sizes(rank: int) -> list[float]:
    """The difference of compiled blocks on two ranks from eager ones on one, for clips of several lengths in a row."""
    found = []
    model = compiled(pab.parallelize(Case("stdit3", "hold", 3).build()), CASES[0], "eager")
    config = pab.PABConfig(temporal=pab.Broadcast(2, (0, 1)))
    for frames in (3, 4, 5):
        case = Case("stdit3", "hold", frames)
        alone = case.sample(pab.enable(case.build(), config, num_steps=STEPS))
        found.append(float((alone - case.sample(pab.enable(model, config, num_steps=STEPS))).abs().max()))
    return found


def test_compiled_blocks_serve_clips_of_other_lengths() -> None:
    assert all(max(found) < 1e-6 for found in run_on(2, on_two_ranks_in_sizes))
