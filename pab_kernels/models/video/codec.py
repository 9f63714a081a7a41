"""The video model's autoencoder: a fixed orthonormal cosine transform of blocks of pixels, without training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

from .network import BLOCK, Z_CHANNELS


def cosines(n: int) -> torch.Tensor:
    """The orthonormal DCT-II matrix `[n, n]`, float64: `C[k, i] = s_k cos(pi (i + 1/2) k / n)`, `C C^T = 1`."""
    k, i = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    rows = torch.cos(math.pi * (i + 0.5) * k / n) * math.sqrt(2 / n)
    rows[0] = math.sqrt(1 / n)
    return rows


class BlockCosines(ModelMixin, ConfigMixin):
    """Video to the cosine coefficients of its blocks of 4 frames, 2 rows, 2 columns and 3 colours, and back.

        z = (C_3 x C_4 x C_2 x C_2) pixels of a block        (x: Kronecker product; C_n: `cosines`)

    As in Wan's autoencoder, `k + 1` latent frames stand for `4 k + 1` frames: of the first block only the last frame
    is shown.

    Args:
        latents_mean: of each channel, subtracted before the diffusion; `WanPipeline` adds it.
        latents_std: of each channel, divided by before the diffusion; `WanPipeline` multiplies by it.
        z_dim: number of channels.
        scale_factor_temporal: frames of a block.
        scale_factor_spatial: rows and columns of a block.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        latents_mean: Sequence[float] = (0.0,) * Z_CHANNELS,
        latents_std: Sequence[float] = (1.0,) * Z_CHANNELS,
        z_dim: int = Z_CHANNELS,
        scale_factor_temporal: int = BLOCK[0],
        scale_factor_spatial: int = BLOCK[1],
    ) -> None:
        super().__init__()
        colour, time, space = cosines(3), cosines(scale_factor_temporal), cosines(scale_factor_spatial)
        basis = torch.kron(torch.kron(torch.kron(colour, time), space), space)  # [z, pixels of a block]
        self.basis = torch.nn.Parameter(basis.float(), requires_grad=False)

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        """Coefficients `[batch, z, frames / 4, height / 2, width / 2]` of all frames of `video` `[batch, 3, frames,
        height, width]`."""
        t, s = self.config.scale_factor_temporal, self.config.scale_factor_spatial
        blocks = video.unflatten(4, (-1, s)).unflatten(3, (-1, s)).unflatten(2, (-1, t))
        blocks = blocks.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)  # [batch, T, H, W, pixels of a block]
        return (blocks @ self.basis.T).movedim(-1, 1)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """All frames `[batch, 3, 4 T, height, width]` of `latents` `[batch, z, T, height / 2, width / 2]`."""
        t, s = self.config.scale_factor_temporal, self.config.scale_factor_spatial
        blocks = (latents.movedim(1, -1) @ self.basis).unflatten(-1, (3, t, s, s))
        return blocks.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def decode(self, latents: torch.Tensor, return_dict: bool = True) -> SimpleNamespace | tuple[torch.Tensor]:
        """The frames of `forward` without the first three, as `.sample` or in a tuple."""
        video = self(latents)[:, :, self.config.scale_factor_temporal - 1 :]
        return SimpleNamespace(sample=video) if return_dict else (video,)
