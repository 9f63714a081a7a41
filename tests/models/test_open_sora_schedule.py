"""Open-Sora's noise levels and sizes, and the scheduler that steps through them."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import FlowMatchEulerDiscreteScheduler

import pab_kernels as pab
from pab_kernels.models.open_sora.schedule import latent_size, shift, sigmas
from pab_kernels.rules.schedule import Schedule

COMPUTED = {
    (51, 480, 854): (21, 17, 16),
    (102, 480, 854): (22, 18, 17),
    (204, 480, 854): (22, 18, 17),
    (51, 720, 1280): (22, 18, 17),
    (102, 720, 1280): (23, 19, 18),
}
"""Computed steps of spatial, temporal and cross attention in 30 steps of the published PAB, by clip size."""


def timesteps(frames: int, height: float, width: float, steps: int) -> list[float]:
    """Written out in float64."""
    n = 1 if frames == 1 else frames // 17 * 5
    r = math.sqrt(height * width / 512**2) * math.sqrt(n)
    found = []
    for i in range(steps):
        t = 1000 * (1 - i / steps)
        found.append(1000 * (r * t / 1000) / (1 + (r - 1) * t / 1000))
    return found


@pytest.mark.parametrize("size", [*COMPUTED, (1, 1024, 1024), (1, 144, 256), (40, 240, 426)])
@pytest.mark.parametrize("steps", [1, 7, 30])
def test_timesteps_are_the_shifted_ones(size: tuple[int, int, int], steps: int) -> None:
    expected = torch.tensor(timesteps(*size, steps), dtype=torch.float64)
    levels = sigmas(steps, shift(*size))
    torch.testing.assert_close(1000 * torch.tensor(levels, dtype=torch.float64), expected, rtol=1e-14, atol=0)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=levels)
    torch.testing.assert_close(scheduler.timesteps.double(), expected, rtol=2**-23, atol=0)
    # A step is z + v dt with v = data - noise, of which the scheduler takes the negative.
    z, v = (torch.randn(3, dtype=torch.float64) for _ in range(2))
    for i, t in enumerate(scheduler.timesteps):
        stepped = scheduler.step(-v, t, z, return_dict=False)[0]
        after = expected[i + 1] if i + 1 < steps else 0
        torch.testing.assert_close(stepped, z + v * (expected[i] - after) / 1000, rtol=1e-6, atol=1e-6)


def test_the_first_level_is_exactly_1() -> None:
    """A frame with the mask 1 is free from the first step on."""
    for frames in (1, 17, 51, 102):
        for side in range(16, 1024, 24):
            assert sigmas(3, shift(frames, side, side + 8))[0] == 1


def test_rounded_sizes_are_those_of_bfloat16_sampling() -> None:
    def number(x: float) -> torch.Tensor:
        return torch.tensor([x], dtype=torch.bfloat16)

    for frames, height, width in (*COMPUTED, (1, 1024, 1024), (1, 144, 256)):
        space = (number(height) * number(width) / (512 * 512)).sqrt()
        n = torch.ones_like(number(frames)) if frames == 1 else number(frames) // 17 * 5
        assert shift(frames, height, width, rounded=True) == float(space * n.sqrt())
    assert shift(51, 480, 854, rounded=True) == 4.84375


@pytest.mark.parametrize(("frames", "latents"), [(1, 1), (4, 1), (5, 2), (17, 5), (18, 6), (51, 15), (60, 18)])
def test_latents_are_five_frames_for_seventeen(frames: int, latents: int) -> None:
    assert latent_size(frames, 480, 854) == (latents, 60, 106)


def test_clips_too_short_for_the_shift_are_refused() -> None:
    with pytest.raises(ValueError, match="got 16 frames; supported are 1, an image, and 17 or more"):
        shift(16, 480, 854)


@pytest.mark.parametrize("size", COMPUTED)
@pytest.mark.parametrize("rounded", [False, True])
def test_the_published_plan_computes_as_many_steps_as_published(size: tuple[int, int, int], rounded: bool) -> None:
    steps = Schedule.of(timesteps=[1000 * level for level in sigmas(30, shift(*size, rounded=rounded))])
    config = pab.PABConfig.preset("open-sora-1.2")
    counts = []
    for kind in ("spatial", "temporal", "cross"):
        rule = config.rule(kind, 0)
        assert rule is not None
        counts.append(30 - len(rule.reused(steps)))
    assert tuple(counts) == COMPUTED[size]
