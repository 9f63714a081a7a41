"""The VAE of the demo pipeline, which diffusers saves and loads."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config


class PixelDecoder(ModelMixin, ConfigMixin):
    """The VAE of a model on pixels: decoding is the identity."""

    config_name = "config.json"

    @register_to_config
    def __init__(self, scaling_factor: float = 1.0, block_out_channels: Sequence[int] = (1,)) -> None:
        super().__init__()  # one level of channels means no down-scaling
        self.anchor = torch.nn.Parameter(torch.zeros(1), requires_grad=False)  # has the device and dtype

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Return `latents`."""
        return latents

    def decode(self, latents: torch.Tensor) -> SimpleNamespace:
        """`latents` as `.sample`."""
        return SimpleNamespace(sample=latents)
