"""PSNR and SSIM of a clip against a reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ...extras import require

SSIM_WINDOW = 7
"""Side of SSIM's uniform window in pixels: small enough for frames of 32 x 32."""


@dataclass(frozen=True)
class Quality:
    """How close a clip is to its reference.

    Args:
        psnr: in dB, from the squared error over all frames; infinite where the clips are equal.
        ssim: mean over the frames.
        psnr_frames: PSNR of each frame.
        ssim_frames: SSIM of each frame.
    """

    psnr: float
    ssim: float
    psnr_frames: tuple[float, ...]
    ssim_frames: tuple[float, ...]


def _array(clip: Any, name: str) -> np.ndarray:
    array = np.asarray(clip.detach().float().cpu() if hasattr(clip, "detach") else clip, dtype=np.float64)
    if array.ndim != 4 or array.shape[0] == 0 or array.shape[1] not in (1, 3):
        raise ValueError(f"{name} must be [frames, 1 or 3 channels, height, width] with at least one frame, got {list(array.shape)}")
    if min(array.shape[2:]) < SSIM_WINDOW:
        size = f"{array.shape[2]} x {array.shape[3]}"
        raise ValueError(f"{name} has frames of {size}; SSIM needs at least {SSIM_WINDOW} x {SSIM_WINDOW} pixels")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds values that are not finite")
    return array


def psnr(squared_error: float, data_range: float) -> float:
    """`10 log10(data_range^2 / squared_error)` in dB of a mean squared error; infinite at 0."""
    return float("inf") if squared_error == 0 else float(10 * np.log10(data_range**2 / squared_error))


def compare(clip: Any, reference: Any, data_range: float = 1.0) -> Quality:
    """Measure `clip` against `reference`.

    1. PSNR = 10 log10(data_range^2 / mean((clip - reference)^2)), for every frame and for the whole clip.
    2. SSIM (Wang et al. 2004) of every frame with a uniform 7 x 7 window, mean over channels; the clip's is the mean over frames.

    Args:
        clip: `[frames, channels, height, width]`, a tensor or array, 1 or 3 channels.
        reference: of the same shape.
        data_range: distance from black to white.

    Raises:
        ValueError: the shapes differ or are not supported.

    >>> import numpy as np
    >>> round(compare(np.full((2, 3, 8, 8), 0.6), np.full((2, 3, 8, 8), 0.5)).psnr, 6)
    20.0
    """
    metrics = require("skimage.metrics", "measuring PSNR and SSIM")
    if data_range <= 0:
        raise ValueError(f"data_range must be positive, got {data_range}; it is 1 for values in [0, 1] and 255 for bytes")
    a, b = _array(clip, "clip"), _array(reference, "reference")
    if a.shape != b.shape:
        raise ValueError(f"clip {list(a.shape)} and reference {list(b.shape)} must have the same shape [frames, channels, height, width]")
    errors = ((a - b) ** 2).mean(axis=(1, 2, 3))
    ssim = [
        float(metrics.structural_similarity(y, x, data_range=data_range, channel_axis=0, win_size=SSIM_WINDOW))
        for x, y in zip(a, b, strict=True)
    ]
    return Quality(
        psnr=psnr(float(errors.mean()), data_range),
        ssim=float(np.mean(ssim)),
        psnr_frames=tuple(psnr(float(e), data_range) for e in errors),
        ssim_frames=tuple(ssim),
    )
