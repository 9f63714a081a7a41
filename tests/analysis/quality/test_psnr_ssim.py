from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch

pytest.importorskip("skimage")

from pab_kernels.analysis.quality.psnr_ssim import compare


def test_equal_clips_have_infinite_psnr_and_ssim_one():
    clip = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    quality = compare(clip, clip.clone())
    assert quality.psnr == math.inf and quality.ssim == pytest.approx(1) and len(quality.psnr_frames) == len(quality.ssim_frames) == 3


def test_psnr_of_a_known_error():
    reference = torch.full((2, 3, 16, 16), 0.5, dtype=torch.float64)
    clip = reference.clone()
    clip[0] += 0.1
    quality = compare(clip, reference)
    assert quality.psnr_frames[0] == pytest.approx(20) and quality.psnr_frames[1] == math.inf
    assert quality.psnr == pytest.approx(-10 * math.log10(0.01 / 2))  # of the mean error, not the mean of the frames


def test_ssim_of_flat_frames_is_its_luminance_term():
    a, b, c1 = 0.6, 0.5, 0.01**2
    quality = compare(np.full((1, 3, 9, 9), a), np.full((1, 3, 9, 9), b))
    assert quality.ssim == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1))


def test_ssim_of_inverted_noise_is_negative():
    noise = np.random.default_rng(0).random((1, 1, 32, 32))
    assert compare(1 - noise, noise).ssim < -0.5


def test_the_data_range_scales_out():
    rng = np.random.default_rng(1)
    a, b = rng.random((2, 3, 11, 13)), rng.random((2, 3, 11, 13))
    ones, bytes_ = compare(a, b), compare(255 * a, 255 * b, data_range=255)
    assert ones.psnr == pytest.approx(bytes_.psnr) and ones.ssim_frames == pytest.approx(bytes_.ssim_frames)


def test_ssim_agrees_with_its_definition_at_one_window():
    rng = np.random.default_rng(2)
    x, y = rng.random((7, 7)), rng.random((7, 7))
    n, c1, c2 = 49, 0.01**2, 0.03**2
    cov = ((x - x.mean()) * (y - y.mean())).sum() / (n - 1)
    expected = (2 * x.mean() * y.mean() + c1) * (2 * cov + c2)
    expected /= (x.mean() ** 2 + y.mean() ** 2 + c1) * (x.var(ddof=1) + y.var(ddof=1) + c2)
    assert compare(x[None, None], y[None, None]).ssim == pytest.approx(expected)


@pytest.mark.parametrize(
    ("clip", "reference", "message"),
    [
        (torch.zeros(2, 3, 8, 8), torch.zeros(3, 3, 8, 8), "clip [2, 3, 8, 8] and reference [3, 3, 8, 8] must have the same shape"),
        (torch.zeros(3, 8, 8), torch.zeros(3, 8, 8), "clip must be [frames, 1 or 3 channels, height, width]"),
        (torch.zeros(2, 8, 8, 3), torch.zeros(2, 8, 8, 3), "got [2, 8, 8, 3]"),
        (torch.zeros(0, 3, 8, 8), torch.zeros(0, 3, 8, 8), "at least one frame"),
        (torch.zeros(2, 3, 6, 8), torch.zeros(2, 3, 6, 8), "SSIM needs at least 7 x 7 pixels"),
        (torch.full((1, 3, 8, 8), math.nan), torch.zeros(1, 3, 8, 8), "not finite"),
    ],
)
def test_what_cannot_be_compared_is_said_in_one_line(clip: torch.Tensor, reference: torch.Tensor, message: str):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        compare(clip, reference)
    assert "\n" not in str(error.value)


def test_the_data_range_must_be_positive():
    with pytest.raises(ValueError, match="data_range must be positive, got 0"):
        compare(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8), data_range=0)


def test_half_precision_clips_are_compared_in_full():
    clip = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    assert compare(clip, clip.float()).psnr == math.inf
