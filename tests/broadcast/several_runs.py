"""Runs on one toy model, and what each of them gives alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import pab_kernels as pab
from tests.broadcast.toy import CONFIG, Pipe, Toy, noise, toy

STEPS = 7


def bare(model: Toy, step: int, seed: int, text: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(
            noise(10 * seed + step), torch.tensor([float(900 - step)]), noise(100 + seed, 3) if text is None else text
        )


def alone(seed: int, steps: int = STEPS) -> list[Tensor]:
    model = toy()
    pab.enable(model, CONFIG, num_steps=steps)
    return [bare(model, i, seed) for i in range(steps)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def pair(scheduler: Callable[[], Any] | None = None, **prompts: Tensor) -> tuple[Pipe, Pipe, Tensor, Tensor]:
    model = toy()
    pipes = [
        Pipe(model, scheduler and scheduler(), prompts.get(name, noise(200 + i, 3))) for i, name in enumerate("ab")
    ]
    for pipe in pipes:
        pab.enable(pipe, CONFIG)
    return *pipes, pipes[0].sample(STEPS, 1), pipes[1].sample(STEPS, 2)  # type: ignore[return-value]


def call(model: Any, t: Tensor, prompt: Tensor) -> Tensor:
    return model(noise(1), t, prompt)
