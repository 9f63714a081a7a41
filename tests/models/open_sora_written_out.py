"""Open-Sora's autoencoder written out, from weights by the names of its checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.models.autoencoder_parts import Weights, normed, swish

TINY: dict[str, Any] = {
    "block_out_channels": (4, 8, 8, 8),
    "layers_per_block": 1,
    "temporal_channels": (4, 8, 8, 12),
    "temporal_res_blocks": 2,
    "norm_num_groups": 2,
}
"""Arguments of a small `OpenSoraVAE`."""
SCALE, SHIFT = (3.85, 2.32, 2.33, 3.06), (-0.10, 0.34, 0.27, 0.98)


class Temporal:
    """The temporal half of Open-Sora's autoencoder."""

    def __init__(self, w: Weights, blocks: int, groups: int) -> None:
        self.w, self.blocks, self.groups = w, blocks, groups

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        kernel = self.w[f"{name}.conv.weight"]
        k = kernel.shape[-1]
        if k > 1:
            x = torch.cat([torch.zeros_like(x[:, :, :1])] * (k - stride) + [x], 2)
        x = F.pad(x, [k // 2] * 4)
        return F.conv3d(x, kernel, self.w.get(f"{name}.conv.bias"), (stride, 1, 1))

    def norm(self, name: str, x: Tensor) -> Tensor:
        return swish(normed(self.w, name, x, self.groups, 1e-5))

    def res(self, name: str, x: Tensor) -> Tensor:
        for i in range(self.blocks):
            block = f"{name}.{i}"
            h = self.conv(f"{block}.conv1", self.norm(f"{block}.norm1", x))
            h = self.conv(f"{block}.conv2", self.norm(f"{block}.norm2", h))
            x = h + (self.conv(f"{block}.conv3", x) if f"{block}.conv3.conv.weight" in self.w else x)
        return x

    def moments(self, x: Tensor) -> Tensor:
        while x.shape[2] % 4:
            x = torch.cat([torch.zeros_like(x[:, :, :1]), x], 2)
        x = self.res("encoder.block_res_blocks.0", self.conv("encoder.conv_in", x))
        x = self.res("encoder.block_res_blocks.1", x)
        x = self.res("encoder.block_res_blocks.2", self.conv("encoder.conv_blocks.1", x, 2))
        x = self.res("encoder.block_res_blocks.3", self.conv("encoder.conv_blocks.2", x, 2))
        x = self.norm("encoder.norm1", self.res("encoder.res_blocks", x))
        return self.conv("quant_conv", self.conv("encoder.conv2", x))

    def frames(self, z: Tensor, number: int) -> Tensor:
        def twice(name: str, x: Tensor) -> Tensor:
            pairs = self.conv(name, x)
            frames = [pairs[:, i::2, t] for t in range(x.shape[2]) for i in range(2)]
            return torch.stack(frames, 2)

        x = self.res("decoder.res_blocks", self.conv("decoder.conv1", self.conv("post_quant_conv", z)))
        x = twice("decoder.conv_blocks.2", self.res("decoder.block_res_blocks.3", x))
        x = twice("decoder.conv_blocks.1", self.res("decoder.block_res_blocks.2", x))
        x = self.res("decoder.block_res_blocks.0", self.res("decoder.block_res_blocks.1", x))
        return self.conv("decoder.conv_out", self.norm("decoder.norm1", x))[:, :, x.shape[2] - number :]


def chunks(frames: int) -> list[int]:
    """Numbers of frames of Open-Sora's chunks."""
    return [17] * (frames // 17) + [frames % 17] * (frames % 17 > 0)


def per_channel(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).reshape(1, -1, 1, 1, 1)


def open_sora_moments(temporal: Temporal, spatial: Any, video: Tensor) -> tuple[Tensor, Tensor]:
    """Means and logarithms of variances of latents of one clip, from the means of its frames' latents."""
    x = torch.stack([spatial.encode(f).latent_dist.mode() * 0.18215 for f in video.unbind(2)], 2)
    mean, logvar = torch.cat([temporal.moments(part) for part in x.split(chunks(x.shape[2]), 2)], 2).split(4, 1)
    return (mean - per_channel(SHIFT)) / per_channel(SCALE), logvar - per_channel(SCALE).square().log()


def open_sora_video(temporal: Temporal, spatial: Any, latents: Tensor, frames: int) -> Tensor:
    """The clip of latents."""
    z, parts = latents * per_channel(SCALE) + per_channel(SHIFT), []
    for number in chunks(frames):
        size = -(-number // 4)
        parts.append(temporal.frames(z[:, :, :size], number))
        z = z[:, :, size:]
    assert not z.shape[2]
    return torch.stack([spatial.decode(f / 0.18215).sample for f in torch.cat(parts, 2).unbind(2)], 2)
