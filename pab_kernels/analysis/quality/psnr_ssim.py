"""PSNR and SSIM of a frame against a reference, with black 0 and white 1."""

from __future__ import annotations

import numpy as np

from ...extras import require

SSIM_WINDOW = 7
"""Side of SSIM's uniform window in pixels: small enough for frames of 32 x 32."""


def psnr(squared_error: float) -> float:
    """PSNR in dB of a mean squared error, `10 log10(1 / squared_error)`; infinite at 0."""
    return float("inf") if squared_error == 0 else float(10 * np.log10(1 / squared_error))


def ssim(frame: np.ndarray, reference: np.ndarray) -> float:
    """SSIM (Wang et al. 2004) with a uniform 7 x 7 window, mean over channels.

    Args:
        frame, reference: `[channels, height, width]`, float64.

    Raises:
        ValueError: they are smaller than the window.
    """
    metrics = require("skimage.metrics", "measuring PSNR and SSIM")
    height, width = frame.shape[1:]
    if min(height, width) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs at least {SSIM_WINDOW} x {SSIM_WINDOW} pixels, got frames of {height} x {width}")
    return float(metrics.structural_similarity(reference, frame, data_range=1, channel_axis=0, win_size=SSIM_WINDOW))
