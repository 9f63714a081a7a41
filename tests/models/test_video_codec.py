from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("diffusers")

from pab_kernels.models.video.codec import BlockCosines, cosines


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
def test_the_cosines_are_orthonormal_and_begin_with_the_mean(n: int) -> None:
    c = cosines(n)
    assert torch.allclose(c @ c.T, torch.eye(n, dtype=torch.float64), atol=1e-14)
    assert torch.allclose(c[0], torch.full((n,), 1 / math.sqrt(n), dtype=torch.float64))


def test_every_frame_returns_from_its_coefficients() -> None:
    video = torch.randn(2, 3, 8, 6, 10, generator=torch.Generator().manual_seed(0))
    codec = BlockCosines()
    latents = codec.encode(video)
    assert latents.shape == (2, 48, 2, 3, 5)
    assert torch.allclose(latents.square().sum(), video.square().sum(), rtol=1e-5)
    assert torch.allclose(codec(latents), video, atol=1e-5)


def test_two_latent_frames_are_shown_as_five_frames() -> None:
    codec = BlockCosines()
    latents = torch.randn(1, 48, 2, 2, 2, generator=torch.Generator().manual_seed(1))
    (shown,) = codec.decode(latents, return_dict=False)
    assert shown.shape == (1, 3, 5, 4, 4) and torch.equal(shown, codec(latents)[:, :, 3:])
    assert torch.equal(codec.decode(latents).sample, shown)


def test_a_plain_block_has_one_coefficient_for_each_colour() -> None:
    grey = BlockCosines().encode(torch.full((1, 3, 4, 2, 2), 0.5)).flatten()
    assert grey[0].item() == pytest.approx(0.5 * math.sqrt(48)) and grey[1:].abs().max() < 1e-6
    red = BlockCosines().encode(torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1, 1).expand(1, 3, 4, 2, 2)).flatten()
    assert red.nonzero().flatten().tolist()[0] == 0
    assert {i for i, value in enumerate(red.tolist()) if abs(value) > 1e-6} == {0, 16, 32}
