"""The kinds of modules that config.json of Open-Sora-Plan's autoencoder may name, with their parameter names.

They follow Open-Sora-Plan v1.1.0 (`opensora/models/ae/videobase/modules`) and v1.2.0
(`opensora/models/causalvideovae/model/modules`). Kinds of two dimensions treat each frame on its own; those of three
see earlier frames, and the first frame in place of those before it. Names with `_GC` are the same at inference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6
"""Of the group norms."""

Kinds = Mapping[str, Callable[..., nn.Module]]


def make(kinds: Kinds, field: str, kind: str, *arguments: int) -> nn.Module:
    """A module of a kind.

    Raises:
        ValueError: the kind is not in `kinds`; the message lists them.
    """
    if kind not in kinds:
        raise ValueError(f"{field} in config.json names the kind {kind!r}; supported are {', '.join(kinds)}")
    return kinds[kind](*arguments)


def _per_frame(network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    frames = x.transpose(1, 2)  # [B, F, C, H, W]
    return network(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).transpose(1, 2)


def _behind_first(x: Tensor, frames: int) -> Tensor:
    """`x` behind its first frame, repeated `frames` times."""
    return torch.cat([x[:, :, :1].expand(-1, -1, frames, -1, -1), x], 2) if frames else x


class Conv2d(nn.Conv2d):
    """A convolution within each frame."""

    def __init__(self, channels: int, out: int, kernel: int = 3) -> None:
        super().__init__(channels, out, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, out, F, H, W]`."""
        return _per_frame(super().forward, x)


class CausalConv3d(nn.Module):
    """A convolution that sees no later frame; before the first frame it sees the first frame."""

    def __init__(
        self,
        channels: int,
        out: int,
        kernel: int | tuple[int, int, int] = 3,
        stride: int | tuple[int, int, int] = 1,
        padding: int | None = None,
    ) -> None:
        super().__init__()
        kernel = (kernel,) * 3 if isinstance(kernel, int) else kernel
        self.before = kernel[0] - 1
        side = kernel[1] // 2 if padding is None else padding
        self.conv = nn.Conv3d(channels, out, kernel, stride, (0, side, side))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, channels, F, H, W]` as `[B, out, F', H', W']`."""
        return self.conv(_behind_first(x, self.before))


class ResnetBlock(nn.Module):
    """`x + conv2(silu(norm2(conv1(silu(norm1(x))))))`, with `nin_shortcut(x)` for `x` where the channels change."""

    conv: ClassVar[Callable[..., nn.Module]]

    def __init__(self, channels: int, out: int, groups: int) -> None:
        super().__init__()
        conv = type(self).conv
        self.norm1 = nn.GroupNorm(groups, channels, EPS)
        self.conv1 = conv(channels, out)
        self.norm2 = nn.GroupNorm(groups, out, EPS)
        self.conv2 = conv(out, out)
        self.nin_shortcut = None if channels == out else conv(channels, out, 1)

    def norm(self, norm: nn.Module, x: Tensor) -> Tensor:
        """`x` normed over all frames."""
        return norm(x)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, out, F, H, W]`."""
        h = self.conv1(F.silu(self.norm(self.norm1, x)))
        h = self.conv2(F.silu(self.norm(self.norm2, h)))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class ResnetBlock3D(ResnetBlock):
    """Convolutions in space and time, norms over all frames."""

    conv = CausalConv3d


class ResnetBlock2D(ResnetBlock):
    """Convolutions and norms within a frame."""

    conv = Conv2d

    def norm(self, norm: nn.Module, x: Tensor) -> Tensor:
        """`x` normed frame by frame."""
        return _per_frame(norm, x)


class AttnBlock3DFix(nn.Module):
    """`x + proj_out(softmax(q k^T / sqrt(C)) v)` of the normed x, with one head over the places of a frame."""

    conv: ClassVar[Callable[..., nn.Module]] = CausalConv3d

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, EPS)
        self.q, self.k, self.v, self.proj_out = (type(self).conv(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, F, H, W]`."""
        h = self.normed(x)
        q, k, v = (self.sequences(part(h)) for part in (self.q, self.k, self.v))
        return x + self.proj_out(self.frames(F.scaled_dot_product_attention(q, k, v), x))

    def normed(self, x: Tensor) -> Tensor:
        """`x` normed over all frames."""
        return self.norm(x)

    def sequences(self, x: Tensor) -> Tensor:
        """`[B, C, F, H, W]` as `[B F, 1, H W, C]`."""
        return x.movedim(1, -1).flatten(2, 3).flatten(0, 1)[:, None]

    def frames(self, out: Tensor, like: Tensor) -> Tensor:
        """`[B F, 1, H W, C]` as `[B, C, F, H, W]`."""
        batch, _, frames, height, width = like.shape
        return out.reshape(batch, frames, height, width, -1).movedim(-1, 1)


class AttnBlock3D(AttnBlock3DFix):
    """The same with the frames and channels of q, k and v in each other's place, as in old checkpoints.

    Of a sequence, channel c of frame f is channel `(f C + c) // F` of frame `(f C + c) % F`.
    """

    def sequences(self, x: Tensor) -> Tensor:
        """`[B, C, F, H, W]` as `[B F, 1, H W, C]`, by its order in memory."""
        batch, channels, frames = x.shape[:3]
        return x.reshape(batch * frames, 1, channels, -1).transpose(2, 3)

    def frames(self, out: Tensor, like: Tensor) -> Tensor:
        """`[B F, 1, H W, C]` as `[B, C, F, H, W]`, by its order in memory."""
        return out.transpose(2, 3).reshape(like.shape)


class AttnBlock(AttnBlock3DFix):
    """The same with norms and projections within a frame."""

    conv = Conv2d

    def normed(self, x: Tensor) -> Tensor:
        """`x` normed frame by frame."""
        return _per_frame(self.norm, x)


class Resampler(nn.Module):
    """Changes the number of frames and the size of a frame.

    `factors` are those of time and of space.
    """

    factors: ClassVar[tuple[int, int]]


def _behind_zeros(x: Tensor) -> Tensor:
    """With a row of zeros below and a column to the right."""
    return F.pad(x, (0, 1, 0, 1))


class Downsample(Resampler):
    """Halves a frame, without its neighbours in time."""

    factors = (1, 2)

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, F, H / 2, W / 2]`."""
        return _per_frame(self.conv, _behind_zeros(x))


class SpatialDownsample2x(Resampler):
    """`Downsample` as a convolution in three dimensions."""

    factors = (1, 2)

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, (1, 3, 3), (1, 2, 2), 0)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, F, H / 2, W / 2]`."""
        return self.conv(_behind_zeros(x))


class Spatial2xTime2x3DDownsample(Resampler):
    """Halves time and frames by one convolution."""

    factors = (2, 2)

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, 3, 2, 0)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, (F + 1) / 2, H / 2, W / 2]`."""
        return self.conv(_behind_zeros(x))


class TimeDownsample2x(Resampler):
    """The mean of each second frame and the two before it."""

    factors = (2, 1)

    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, (F + 1) / 2, H, W]`."""
        return F.avg_pool3d(_behind_first(x, 2), (3, 1, 1), (2, 1, 1))


class TimeDownsampleRes2x(Resampler):
    """`a mean + (1 - a) conv`, each over every second frame and the two before it; a = sigmoid(mix_factor)."""

    factors = (2, 1)

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, channels, 3, (2, 1, 1), (0, 1, 1))
        self.mix_factor = nn.Parameter(torch.tensor([2.0]))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, (F + 1) / 2, H, W]`."""
        x = _behind_first(x, 2)
        return torch.lerp(self.conv(x), F.avg_pool3d(x, (3, 1, 1), (2, 1, 1)), self.mix_factor.sigmoid())


def _longer(x: Tensor, space: int) -> Tensor:
    """Frames interpolated to twice their size in time, but for the first one, and `space` times in space."""
    first = F.interpolate(x[:, :, :1], scale_factor=(1, space, space), mode="trilinear") if space > 1 else x[:, :, :1]
    if x.shape[2] == 1:
        return first
    return torch.cat([first, F.interpolate(x[:, :, 1:], scale_factor=(2, space, space), mode="trilinear")], 2)


class SpatialUpsample2x(Resampler):
    """Repeats each pixel, then a convolution within a frame."""

    factors = (1, 2)

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, (1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, F, 2 H, 2 W]`."""
        return self.conv(F.interpolate(x, scale_factor=(1, 2, 2), mode="nearest"))


class Spatial2xTime2x3DUpsample(Resampler):
    """Interpolates time and frames, then a convolution; the first frame stays one."""

    factors = (2, 2)

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, 2 F - 1, 2 H, 2 W]`."""
        return self.conv(_longer(x, 2))


class TimeUpsample2x(Resampler):
    """Interpolates time; the first frame stays one."""

    factors = (2, 1)

    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, 2 F - 1, H, W]`."""
        return _longer(x, 1)


class TimeUpsampleRes2x(Resampler):
    """`a x' + (1 - a) conv(x')` of the x' of `TimeUpsample2x`; a = sigmoid(mix_factor)."""

    factors = (2, 1)

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels)
        self.mix_factor = nn.Parameter(torch.tensor([2.0]))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, 2 F - 1, H, W]`."""
        x = _longer(x, 1)
        return torch.lerp(self.conv(x), x, self.mix_factor.sigmoid())


CONVS: Kinds = {"Conv2d": Conv2d, "CausalConv3d": CausalConv3d, "CausalConv3d_GC": CausalConv3d}
RESNETS: Kinds = {"ResnetBlock2D": ResnetBlock2D, "ResnetBlock3D": ResnetBlock3D, "ResnetBlock3D_GC": ResnetBlock3D}
ATTENTIONS: Kinds = {"AttnBlock3DFix": AttnBlock3DFix, "AttnBlock3D": AttnBlock3D, "AttnBlock": AttnBlock}
SPATIAL_DOWN: Kinds = {
    "Downsample": Downsample,
    "SpatialDownsample2x": SpatialDownsample2x,
    "Spatial2xTime2x3DDownsample": Spatial2xTime2x3DDownsample,
}
TEMPORAL_DOWN: Kinds = {"TimeDownsample2x": TimeDownsample2x, "TimeDownsampleRes2x": TimeDownsampleRes2x}
SPATIAL_UP: Kinds = {
    "SpatialUpsample2x": SpatialUpsample2x,
    "SpatialUpsample2x_GC": SpatialUpsample2x,
    "Spatial2xTime2x3DUpsample": Spatial2xTime2x3DUpsample,
}
TEMPORAL_UP: Kinds = {"TimeUpsample2x": TimeUpsample2x, "TimeUpsampleRes2x": TimeUpsampleRes2x}
