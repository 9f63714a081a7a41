from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")

from pab_kernels.analysis.diffusers_pab import diffusers_pab, timesteps_around
from pab_kernels.models.demo.pipeline import load
from pab_kernels.rules.config import DEFAULT_WINDOW, PABConfig
from pab_kernels.rules.plan import Plan
from pab_kernels.rules.schedule import Schedule


@pytest.mark.parametrize("steps", [1, 3, 4, 7, 20, 50])
def test_the_bounds_enclose_the_windows_steps_and_no_other(steps: int):
    schedule = Schedule.of(timesteps=[999 - i * (1000 / steps) for i in range(steps)])
    low, high = timesteps_around(schedule, DEFAULT_WINDOW)
    inside = [i for i, t in enumerate(schedule.timesteps or ()) if low < t < high]
    assert inside == [i for i in range(steps) if DEFAULT_WINDOW[0] <= i / steps < DEFAULT_WINDOW[1]]


def test_it_computes_what_the_plan_of_the_same_ranges_computes_and_leaves_nothing_behind():
    demo = load(device="cpu")
    transformer, schedule = demo.pipe.transformer, demo.schedule(7)
    with diffusers_pab(demo.pipe, (2, 3, 4), schedule) as observed:
        demo.generate(["a red circle"], seeds=[0], steps=7)
    planned = Plan(PABConfig(spatial=2, temporal=3, cross=4), schedule).step_counts()
    assert observed.computed["transformer_blocks.0.attn1"] == planned["spatial"].computed
    assert observed.computed["temporal_transformer_blocks.3.attn1"] == planned["temporal"].computed
    assert observed.computed["transformer_blocks.3.attn2"] == planned["cross"].computed
    assert len(observed.computed) == 12
    assert observed.cache_bytes == 12 * 2 * 8 * 64 * 144 * 4  # modules, guidance, frames, patches, channels, bytes
    assert not transformer.is_cache_enabled and not transformer._forward_hooks
    assert not any(module._forward_hooks for module in transformer.modules())


def test_an_interrupted_run_leaves_nothing_behind_either():
    demo = load(device="cpu")
    plain = demo.generate(["a red circle"], seeds=[0], steps=2)

    def interrupt(*_: object) -> dict[str, torch.Tensor]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), diffusers_pab(demo.pipe, (2, 2, 2), demo.schedule(2)):
        demo.generate(["a red circle"], seeds=[0], steps=2, callback=interrupt)
    assert not demo.pipe.transformer.is_cache_enabled
    assert torch.equal(demo.generate(["a red circle"], seeds=[0], steps=2), plain)
