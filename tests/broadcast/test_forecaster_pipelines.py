"""Kind `model` in diffusers' own pipelines: how often the transformer runs, and that nothing stays."""

from __future__ import annotations

import pytest
import torch

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from tests.adapters.tiny_pipes import PIPES, named

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # diffusers' schedulers
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),
]

UNLIKE = ("WanPipeline", "CogVideoXPipeline", "FluxPipeline", "LattePipeline")
"""Branches called apart, in one batch with a tensor handed from step to step, none, with learned variances."""
STEPS = 8


@pytest.mark.parametrize(
    "name", [pytest.param(p.name, marks=() if p.name in UNLIKE else pytest.mark.all_models) for p in PIPES]
)
def test_a_pipeline_runs_its_transformer_at_computed_steps_alone(name: str) -> None:
    tiny = named(name)
    pipe = tiny.build()
    denoiser = getattr(pipe, tiny.denoiser)
    plain = tiny.sample(pipe, STEPS)
    runs: list[int] = []
    forward = type(denoiser).forward
    first = next(m for m in denoiser.modules() if isinstance(m, torch.nn.Linear))
    first.register_forward_pre_hook(lambda *_: runs.append(1))
    assert torch.equal(tiny.sample(pipe, STEPS), plain)
    whole = len(runs)
    pab.enable(pipe, PABConfig(model=Broadcast(2, (0, 1), reuse="forecast")))
    runs.clear()
    found = tiny.sample(pipe, STEPS)
    assert len(runs) * 2 == whole
    summary = pab.summary(pipe)
    tallies = [t for kinds in summary.contexts.values() for kind, t in kinds.items() if kind == "model"]
    assert all((t.computed, t.reused, t.forced) == (STEPS // 2, STEPS // 2, 0) for t in tallies) and tallies
    assert summary.cache_bytes == 0 < summary.peak_cache_bytes
    assert torch.isfinite(found).all() and not torch.equal(found, plain)
    assert torch.equal(tiny.sample(pipe, STEPS), found)
    pab.disable(pipe)
    assert type(denoiser).forward is forward
    assert torch.equal(tiny.sample(pipe, STEPS), plain)
