"""The temporal half of Open-Sora 1.2's video autoencoder: causal 3-D convolutions that shorten time by four.

It follows the architecture of Open-Sora v1.2.0 (`opensora/models/vae/vae_temporal.py`) and the parameter names of its
checkpoint, where it is `temporal_vae.*`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class TemporalVAE(nn.Module):
    """Latents of frames to latents of groups of frames, and back.

        encode: zeros in front up to a multiple of d frames; convolutions, of which some halve time; moments
        decode: convolutions, of which some double time; without the first (-frames mod d) frames

    d = 2 ** (number of levels that halve time), 4 in the checkpoint. A convolution over time sees no later frame, and
    zeros before the first one.

    Args:
        channels: of the latents of a frame.
        latent_channels: of the latents of a group.
        widths: channels of each level.
        res_blocks: residual blocks of a level, and behind the last one.
        downsample: for each level but the last whether time is halved behind it.
        groups: of the group norms.
    """

    def __init__(
        self,
        channels: int = 4,
        latent_channels: int = 4,
        widths: Sequence[int] = (128, 256, 256, 512),
        res_blocks: int = 4,
        downsample: Sequence[bool] = (False, True, True),
        groups: int = 32,
    ) -> None:
        super().__init__()
        self.time_factor: int = 2 ** sum(downsample)
        network = (widths, res_blocks, downsample, groups)
        self.encoder = Encoder(channels, 2 * latent_channels, *network)
        self.quant_conv = CausalConv3d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = CausalConv3d(latent_channels, latent_channels, 1)
        self.decoder = Decoder(channels, latent_channels, *network)

    def encode(self, x: Tensor) -> Tensor:
        """The means and logarithms of variances of `x`.

        Args:
            x: `[B, channels, F, H, W]`.

        Returns:
            `[B, 2 latent_channels, ceil(F / d), H, W]`.
        """
        return self.quant_conv(self.encoder(_behind_zeros(x, -x.shape[2] % self.time_factor)))

    def decode(self, z: Tensor, frames: int) -> Tensor:
        """The latents of the last `frames` of the d T frames that `z` stands for.

        Args:
            z: `[B, latent_channels, T, H, W]`.
            frames: more than d (T - 1), at most d T.

        Returns:
            `[B, channels, frames, H, W]`.
        """
        return self.decoder(self.post_quant_conv(z))[:, :, -frames % self.time_factor :]


class CausalConv3d(nn.Module):
    """A convolution that sees no later frame and keeps the size of a frame."""

    def __init__(self, channels: int, out: int, kernel: int = 3, time_stride: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.before = kernel - time_stride
        side = kernel // 2
        self.conv = nn.Conv3d(channels, out, kernel, (time_stride, 1, 1), (0, side, side), bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, channels, F, H, W]` as `[B, out, F / time_stride, H, W]`."""
        return self.conv(_behind_zeros(x, self.before))


def _behind_zeros(x: Tensor, frames: int) -> Tensor:
    return F.pad(x, (0, 0, 0, 0, frames, 0)) if frames else x


class ResBlock(nn.Module):
    """`x + conv2(silu(norm2(conv1(silu(norm1(x))))))`, with `conv3(x)` for `x` where the channels change."""

    def __init__(self, channels: int, out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels)
        self.conv1 = CausalConv3d(channels, out, bias=False)
        self.norm2 = nn.GroupNorm(groups, out)
        self.conv2 = CausalConv3d(out, out, bias=False)
        self.conv3 = None if channels == out else CausalConv3d(channels, out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, out, F, H, W]`."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv3 is None else self.conv3(x))


def _res_blocks(channels: int, out: int, number: int, groups: int) -> nn.ModuleList:
    return nn.ModuleList([ResBlock(out if i else channels, out, groups) for i in range(number)])


class Encoder(nn.Module):
    """Levels of residual blocks, behind some of them a convolution that halves time; see `TemporalVAE`."""

    def __init__(
        self,
        channels: int,
        out: int,
        widths: Sequence[int],
        res_blocks: int,
        downsample: Sequence[bool],
        groups: int,
    ) -> None:
        super().__init__()
        self.conv_in = CausalConv3d(channels, widths[0], bias=False)
        before = (widths[0], *widths)
        self.block_res_blocks = nn.ModuleList(
            [_res_blocks(before[i], width, res_blocks, groups) for i, width in enumerate(widths)]
        )
        self.conv_blocks = nn.ModuleList(
            [
                CausalConv3d(width, width, time_stride=2) if halves else nn.Identity()
                for width, halves in zip(widths[:-1], downsample, strict=True)
            ]
        )
        self.res_blocks = _res_blocks(widths[-1], widths[-1], res_blocks, groups)
        self.norm1 = nn.GroupNorm(groups, widths[-1])
        self.conv2 = CausalConv3d(widths[-1], out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, channels, F, H, W]` as `[B, out, F / d, H, W]`."""
        x = self.conv_in(x)
        for i, level in enumerate(self.block_res_blocks):
            x = _through(level, x)
            if i < len(self.conv_blocks):
                x = self.conv_blocks[i](x)
        return self.conv2(F.silu(self.norm1(_through(self.res_blocks, x))))


class Decoder(nn.Module):
    """The encoder's levels in reverse order; the convolution in front of a level doubles time where one halved it.

    The doubling convolution has two outputs for each channel, the channel's two frames.
    """

    def __init__(
        self,
        channels: int,
        latent_channels: int,
        widths: Sequence[int],
        res_blocks: int,
        downsample: Sequence[bool],
        groups: int,
    ) -> None:
        super().__init__()
        self.conv1 = CausalConv3d(latent_channels, widths[-1])
        self.res_blocks = _res_blocks(widths[-1], widths[-1], res_blocks, groups)
        above = (*widths[1:], widths[-1])
        self.block_res_blocks = nn.ModuleList(
            [_res_blocks(above[i], width, res_blocks, groups) for i, width in enumerate(widths)]
        )
        self.conv_blocks = nn.ModuleList(
            [
                CausalConv3d(width, 2 * width) if doubles else nn.Identity()
                for width, doubles in zip(widths[1:], downsample, strict=True)
            ]
        )
        self.norm1 = nn.GroupNorm(groups, widths[0])
        self.conv_out = CausalConv3d(widths[0], channels)

    def forward(self, z: Tensor) -> Tensor:
        """`[B, latent_channels, T, H, W]` as `[B, channels, d T, H, W]`."""
        x = _through(self.res_blocks, self.conv1(z))
        for i in reversed(range(len(self.block_res_blocks))):
            x = _through(self.block_res_blocks[i], x)
            if i and not isinstance(self.conv_blocks[i - 1], nn.Identity):
                x = self.conv_blocks[i - 1](x).unflatten(1, (-1, 2))  # [B, C, 2, T, H, W]
                x = x.transpose(2, 3).flatten(2, 3)  # [B, C, 2 T, H, W]
        return self.conv_out(F.silu(self.norm1(x)))


def _through(blocks: nn.Module, x: Tensor) -> Tensor:
    for block in blocks.children():
        x = block(x)
    return x
