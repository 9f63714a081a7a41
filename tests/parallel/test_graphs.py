"""CUDA graphs of a parallel model, with a recorder in their place: they hold the collective calls of their pattern."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pab_kernels as pab
from pab_kernels.broadcast.graphs import graphs
from tests.broadcast.graphs.graph_recorder import Recorder
from tests.parallel.frames_runs import PLANS, STEPS, Case
from tests.parallel.processes import run_on


def on_two_ranks(rank: int, case: Case) -> tuple[float, Any, Any, list[int], list[int]]:
    """The difference of graphs from eager calls, what both sent, the collective calls in each graph, the replays."""
    model, config = case.build(), PLANS[case.plan]
    pab.parallelize(model)
    eager = case.sample(pab.enable(model, config, num_steps=STEPS))
    sent = pab.summary(model).traffic
    made: list[Recorder] = []

    def recorder(device: Any) -> Recorder:
        made.append(Recorder(device))
        return made[-1]

    with mock.patch.object(graphs, "CudaCapture", recorder):
        for _ in range(2):
            found = case.sample(pab.enable(model, config, num_steps=STEPS, cuda_graphs=True))
    calls = [
        sum("_c10d_functional" in str(func) and "wait" not in str(func) for func, *_ in recording.operations)
        for recording in made[0].recordings
    ]
    return float((eager - found).abs().max()), sent, pab.summary(model).traffic, calls, made[0].replays


def test_a_graph_holds_the_collective_calls_of_its_pattern() -> None:
    for difference, eager, graphed, calls, replays in run_on(2, on_two_ranks, Case("latte", "hold", 5, (12, 12))):
        assert difference == 0
        assert graphed == eager
        # At temporal attention's two computed steps two layers send twice; the output is always gathered.
        assert sorted(set(calls)) == [1, 5]
        assert len(replays) >= STEPS
