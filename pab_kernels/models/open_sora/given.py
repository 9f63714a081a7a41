"""Latent frames of a clip that are given: an image that a video begins with, or the end of the clip before.

A mask has a number for every latent frame: 1 is free, 0 is given and kept; a frame in between, its *edit ratio*, is
kept while the noise level is above it, and then sampled from the given frame, noised to that level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class MaskStep:
    """The given frames at one step.

    Args:
        free: bool `[B, T]`, the frames that the step changes: `x_mask` of STDiT3.
        noised: bool `[B, 1, T, 1, 1]`, the given frames that are noised before it; None if there are none.
    """

    free: Tensor
    noised: Tensor | None


def mask_steps(mask: Tensor, sigmas: Sequence[float], device: torch.device) -> list[MaskStep]:
    """What a mask means at every step. Steps with equal masks share a tensor.

    Args:
        mask: `[B, T]` in [0, 1], on the CPU.
        sigmas: the noise levels of the steps.
        device: of the results.
    """
    steps: list[MaskStep] = []
    before = mask == 1
    free = before.to(device)
    for sigma in sigmas:
        now = mask >= sigma
        new = now & ~before
        if not now.equal(before):
            free = now.to(device)
        steps.append(MaskStep(free, new[:, None, :, None, None].to(device) if new.any() else None))
        before = now
    return steps


def place(latents: Tensor, given: Tensor, at: int, mask: Any = None) -> tuple[Tensor, Tensor]:
    """Put given latent frames into those of a clip.

    Args:
        latents: `[B, C, T, h, w]`.
        given: `[B or 1, C, t, h, w]`.
        at: the latent frame of the clip at which they begin; negative values count from the end.
        mask: `[T]` or `[B, T]`, see above; default 0 for the given frames and 1 for all others.

    Returns:
        The latents with the given ones, and the mask `[B, T]`, float64 on the CPU.

    Raises:
        ValueError: shapes or positions do not fit, or a number of the mask is not in [0, 1].
    """
    batch, channels, frames, height, width = latents.shape
    start = at + frames if at < 0 else at
    end = start + given.shape[2] if given.ndim == 5 else 0
    size = (channels, height, width)
    if given.ndim != 5 or given.shape[0] not in (1, batch) or (given.shape[1], *given.shape[3:]) != size:
        expected = f"[{batch} or 1, {channels}, t, {height}, {width}]"
        raise ValueError(f"the given latents have shape {list(given.shape)}; {expected} is supported")
    if not 0 <= start < end <= frames:
        raise ValueError(f"{given.shape[2]} given latent frames at {at} do not fit into a clip of {frames}")
    placed = latents.clone()
    placed[:, :, start:end] = given.to(latents)
    numbers = torch.ones(frames, dtype=torch.float64)
    numbers[start:end] = 0
    if mask is not None:
        numbers = torch.as_tensor(mask, dtype=torch.float64, device="cpu")
    if numbers.shape not in ((frames,), (batch, frames)) or not bool(((numbers >= 0) & (numbers <= 1)).all()):
        got = f"a mask of shape {list(numbers.shape)}"
        raise ValueError(f"got {got}; [{frames}] or [{batch}, {frames}] with numbers from 0 to 1 is supported")
    return placed, numbers.expand(batch, frames)
