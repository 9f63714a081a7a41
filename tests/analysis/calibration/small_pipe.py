"""A pipeline whose prompts are numbers, in float64, and a bare model sampled by a loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import pab_kernels as pab
from pab_kernels.analysis.calibration.sampler import Clip
from tests.broadcast.forecast_oracle import SCHEDULERS, SHAPE, Pipe

STEPS = 14
PROMPTS = [0.5, -0.3, 0.2, 0.8, -0.6, 0.1, 0.4]
VALUES = (-400.0, 400.0)


def pipe_of(name: str = "ddim v", guidance: str = "batched") -> Pipe:
    return Pipe(SCHEDULERS[name](), guidance)


def call(pipe: Pipe, prompt: float, seed: int, num_steps: int = STEPS) -> Tensor:
    """The latents after the last step."""
    cond, uncond = pipe.prompts
    pipe.prompts = torch.full_like(cond, prompt), uncond
    generator = torch.Generator().manual_seed(seed)
    scale = float(getattr(pipe.scheduler, "init_noise_sigma", 1.0))
    pipe.noise = lambda: torch.randn(SHAPE, generator=generator).double() * scale  # type: ignore[method-assign]
    try:
        return pipe.sample(num_steps)
    finally:
        pipe.prompts = cond, uncond
        del pipe.noise


CLIP = Clip(0.5, 3)


def sampled(pipe: Pipe, clip: Clip = CLIP) -> Tensor:
    return call(pipe, clip.prompt, clip.seed)


def run_of(pipe: Pipe, clip: Clip = CLIP) -> Any:
    return lambda: sampled(pipe, clip)


def loop(model: Any, prompt: float, seed: int, num_steps: int = STEPS) -> Tensor:
    """Euler steps of a flow with guidance, by two calls in each; PAB is enabled, if only without rules."""
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).double()
    cond = torch.full(SHAPE[1:], prompt).double()
    for i in range(num_steps):
        t = torch.tensor(1000.0 * (1 - i / num_steps))
        with pab.context(model, "uncond"):
            u = model(x, t, torch.zeros_like(cond))
        with pab.context(model, "cond"):
            c = model(x, t, cond)
        x = x - (u + 2 * (c - u)) / num_steps
    return x
