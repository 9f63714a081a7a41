"""Open-Sora 1.2's sizes of latents and its noise levels, which depend on a clip's resolution and length.

The sampler is rectified flow with Euler steps: diffusers' `FlowMatchEulerDiscreteScheduler` with `sigmas` and shift 1,
stepped with the negative of the model's output, as the model predicts data minus noise and the scheduler takes noise
minus data.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

CHUNK_FRAMES, CHUNK_LATENTS = 17, 5
"""The VAE makes 5 latent frames of 17 frames, independently of all others."""
PATCH_FRAMES, PATCH_EDGE = 4, 8
"""Frames of a latent frame at the end of a clip, and pixels along the edge of a latent pixel."""
VIDEO_FPS, IMAGE_FPS = 24.0, 120.0
"""Frames a second that the model is told: of a video by default, and of an image."""


class LatentSize(NamedTuple):
    """Frames, height and width of latents."""

    frames: int
    height: int
    width: int


def latent_size(num_frames: int, height: int, width: int) -> LatentSize:
    """The size of a clip's latents: 17 frames are 5 latent frames, r < 17 further ones ceil(r / 4).

    Height and width are divided by 8 and rounded down: clips of 480 x 854 pixels are decoded to 480 x 848.

    Raises:
        ValueError: height or width is less than 8.

    >>> latent_size(51, 480, 854)
    LatentSize(frames=15, height=60, width=106)
    """
    if min(height, width) < PATCH_EDGE:
        raise ValueError(f"got {height} x {width} pixels; at least {PATCH_EDGE} x {PATCH_EDGE} are supported")
    whole, rest = divmod(num_frames, CHUNK_FRAMES)
    frames = CHUNK_LATENTS * whole + math.ceil(rest / PATCH_FRAMES)
    return LatentSize(frames, height // PATCH_EDGE, width // PATCH_EDGE)


def shift(num_frames: int, height: float, width: float, *, rounded: bool = False) -> float:
    """How far noise levels are shifted up: `r = sqrt(H W / 512^2) sqrt(n)`, n = 5 (F // 17), or 1 for an image.

    Args:
        num_frames: F.
        height, width: H and W in pixels.
        rounded: whether H, W, F and each result are rounded to bfloat16, as in the original's bfloat16 sampling. That
            also rounds r - 1, which is not done here: it matters below r = 0.5, for images of less than 256 x 256.

    Raises:
        ValueError: F is less than 17 and not 1.

    >>> round(shift(51, 480, 854), 5), shift(51, 480, 854, rounded=True)
    (4.84312, 4.84375)
    """
    if num_frames != 1 and num_frames < CHUNK_FRAMES:
        raise ValueError(f"got {num_frames} frames; supported are 1, an image, and {CHUNK_FRAMES} or more")
    dtype = torch.bfloat16 if rounded else torch.float64
    h, w, frames = (torch.tensor(v, dtype=dtype) for v in (height, width, num_frames))
    n = frames if num_frames == 1 else frames // CHUNK_FRAMES * CHUNK_LATENTS
    return float((h * w / 512**2).sqrt() * n.sqrt())


def sigmas(num_steps: int, shift: float) -> list[float]:
    """The noise level of every step, `r u / (1 + (r - 1) u)` at u = 1 - i / N; the timestep is 1000 sigma.

    Args:
        num_steps: N.
        shift: r.

    >>> [round(1000 * sigma, 2) for sigma in sigmas(30, shift(51, 480, 854))[::10]]
    [1000.0, 906.42, 707.74]
    """
    return [shift / (shift + (1 / u - 1)) for u in (1 - i / num_steps for i in range(num_steps))]  # exactly 1 first


def bfloat16(number: float) -> float:
    """`number`, rounded to bfloat16.

    >>> bfloat16(854)
    856.0
    """
    return float(torch.tensor(number, dtype=torch.bfloat16))
