"""STDiT3 under CUDA graphs, on the CPU, with a recorder in place of CUDA's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pab_kernels as pab
from pab_kernels import PABConfig
from tests.adapters.outputs import same
from tests.adapters.tiny_stdit3 import CHANNELS, conditions, given_frames, noise, text, tiny_stdit3
from tests.broadcast.graphs.graph_recorder import Recorder
from tests.broadcast.graphs.graphed import CONTEXTS, EVERY_THIRD, STEPS, config, counted, graphs_of, pair


def generated(model: Any) -> list[Tensor]:
    fixed, texts = conditions() | {"x_mask": given_frames()}, dict(zip(CONTEXTS, (text(1), text(2)), strict=True))
    found = []
    for step in range(STEPS):
        for name, y in texts.items():
            with pab.context(model, name, step):
                found.append(model(noise(step), torch.full((2,), 900.0 - step), y, **fixed))
    return found


@pytest.mark.parametrize(
    "pab_config",
    [config(cache_point="post_gate"), config("linear"), config(block=2), config(cache_point="unprojected")],
    ids=["post-gate", "linear", "blocks", "unprojected"],
)
def test_the_bits_of_eager_pab_with_a_graph_for_each_pattern_and_context(
    pab_config: PABConfig, recorders: list[Recorder]
) -> None:
    eager, graphed = pair(pab_config, lambda: tiny_stdit3(depth=1))
    assert same(generated(graphed), generated(eager))
    (recorder,) = recorders
    plan = pab.summary(graphed).plan
    assert plan is not None and len(recorder.recordings) == plan.patterns * len(CONTEXTS)
    assert counted(graphed).contexts == counted(eager).contexts and pab.summary(graphed).forced == 0


@pytest.mark.flops
def test_sublayers_that_share_a_slot_have_one_place(recorders: list[Recorder]) -> None:
    rules = PABConfig(temporal=EVERY_THIRD, cross=EVERY_THIRD, mlp=EVERY_THIRD, cache_point="post_gate", budget=200_000)
    eager, graphed = pair(rules, lambda: tiny_stdit3(depth=1))
    for _ in range(2):
        with pab.generation(eager, num_steps=STEPS), pab.generation(graphed, num_steps=STEPS):
            assert same(generated(graphed), generated(eager))
    summary, output = pab.summary(graphed), 2 * 3 * 12 * CHANNELS * 4  # of 2 clips of 3 frames of 12 tokens
    assert summary.plan is not None and summary.plan.given_up is not None and summary.forced == 0
    assert [len(span) for span in summary.plan.given_up.spans] == [2, 3]
    assert graphs_of(graphed).place_bytes == len(CONTEXTS) * 2 * 2 * output  # two spans, of each the last two sums
    assert summary.peak_cache_bytes <= summary.plan.given_up.peak <= 200_000
