"""PSNR and SSIM against their definitions."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch

pytest.importorskip("skimage")

from pab_kernels.analysis import compare
from pab_kernels.analysis.quality.psnr_ssim import psnr, ssim


def test_equal_clips_have_infinite_psnr_and_ssim_one():
    clip = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    quality = compare(clip, clip.clone(), lpips=False)
    assert quality.total.psnr == math.inf and quality.total.ssim == pytest.approx(1) and len(quality.frames) == 3
    assert psnr(0) == math.inf and psnr(0.01) == pytest.approx(20)


def test_psnr_of_a_known_error():
    reference = torch.full((2, 3, 16, 16), 0.5, dtype=torch.float64)
    clip = reference.clone()
    clip[0] += 0.1
    quality = compare(clip, reference, lpips=False)
    assert quality.frames[0].psnr == pytest.approx(20) and quality.frames[1].psnr == math.inf
    assert quality.total.psnr == pytest.approx(
        -10 * math.log10(0.01 / 2)
    )  # of the mean error, not the mean of the frames


def test_ssim_of_flat_frames_is_its_luminance_term():
    a, b, c1 = 0.6, 0.5, 0.01**2
    assert ssim(np.full((3, 9, 9), a), np.full((3, 9, 9), b)) == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1))


def test_ssim_of_inverted_noise_is_negative():
    noise = np.random.default_rng(0).random((1, 32, 32))
    assert ssim(1 - noise, noise) < -0.5


def test_the_data_range_scales_out():
    rng = np.random.default_rng(1)
    a, b = rng.random((2, 3, 11, 13)), rng.random((2, 3, 11, 13))
    ones, bytes_ = compare(a, b, lpips=False), compare(255 * a, 255 * b, values=(0, 255), lpips=False)
    assert ones.total.psnr == pytest.approx(bytes_.total.psnr)
    assert [frame.ssim for frame in ones.frames] == pytest.approx([frame.ssim for frame in bytes_.frames])


def test_ssim_agrees_with_its_definition_at_one_window():
    rng = np.random.default_rng(2)
    x, y = rng.random((7, 7)), rng.random((7, 7))
    n, c1, c2 = 49, 0.01**2, 0.03**2
    cov = ((x - x.mean()) * (y - y.mean())).sum() / (n - 1)
    expected = (2 * x.mean() * y.mean() + c1) * (2 * cov + c2)
    expected /= (x.mean() ** 2 + y.mean() ** 2 + c1) * (x.var(ddof=1) + y.var(ddof=1) + c2)
    assert ssim(x[None], y[None]) == pytest.approx(expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_measures_of_a_clip_are_those_of_its_frames(channels: int):
    rng = np.random.default_rng(0)
    b = rng.random((4, channels, 16, 17))
    a = (b + rng.normal(0, 0.05, b.shape)).clip(0, 1)
    found = compare(a, b, lpips=False)
    assert found.total.psnr == pytest.approx(-10 * math.log10(((a - b) ** 2).mean()))
    assert [f.psnr for f in found.frames] == pytest.approx(
        [-10 * math.log10(((x - y) ** 2).mean()) for x, y in zip(a, b, strict=True)]
    )
    assert [f.ssim for f in found.frames] == pytest.approx([ssim(x, y) for x, y in zip(a, b, strict=True)])
    assert found.total.ssim == pytest.approx(np.mean([f.ssim for f in found.frames]))


@pytest.mark.parametrize(
    ("clip", "reference", "message"),
    [
        (torch.zeros(2, 3, 8, 8), torch.zeros(3, 3, 8, 8), "A has 2 frame(s) and B has 3; the numbers must agree"),
        (
            torch.zeros(8, 8),
            torch.zeros(8, 8),
            "A has the shape [8, 8]; supported are [frames, channels, height, width]",
        ),
        (torch.zeros(2, 8, 8, 2), torch.zeros(2, 8, 8, 2), "A has the shape [2, 8, 8, 2]"),
        (torch.zeros(0, 3, 8, 8), torch.zeros(0, 3, 8, 8), "at least one frame"),
        (
            torch.zeros(2, 3, 6, 8),
            torch.zeros(2, 3, 6, 8),
            "SSIM needs at least 7 x 7 pixels, got frames of 6 x 8",
        ),
        (torch.full((1, 3, 8, 8), math.nan), torch.zeros(1, 3, 8, 8), "not finite"),
    ],
)
def test_what_cannot_be_compared_is_said_in_one_line(clip: torch.Tensor, reference: torch.Tensor, message: str):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        compare(clip, reference, lpips=False)
    assert "\n" not in str(error.value)


def test_half_precision_clips_are_compared_in_full():
    clip = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    assert compare(clip, clip.float(), lpips=False).total.psnr == math.inf
