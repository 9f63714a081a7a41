"""Open-Sora-Plan's autoencoder written out, from weights by the names of its checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.models.autoencoder_parts import Weights, normed, swish


def each_frame(network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.stack([network(frame) for frame in x.unbind(2)], 2)


def doubled(x: Tensor, dim: int) -> Tensor:
    """Linear interpolation at the quarters between neighbours."""
    n = x.shape[dim]
    before, behind = (x.index_select(dim, (torch.arange(n) + i).clamp(0, n - 1)) for i in (-1, 1))
    return torch.stack([0.25 * before + 0.75 * x, 0.75 * x + 0.25 * behind], dim + 1).flatten(dim, dim + 1)


class Plan:
    """Open-Sora-Plan's autoencoder: its kinds of modules, each a function of a name and a clip."""

    def __init__(self, w: Weights, config: Mapping[str, Any]) -> None:
        self.w, self.config = w, config
        self.last = len(config["hidden_size_mult"]) - 1

    def moments(self, video: Tensor) -> Tensor:
        c, x = self.config, self.call(self.config["encoder_conv_in"], "encoder.conv_in", video)
        for i in range(self.last + 1):
            for j in range(c["num_res_blocks"]):
                x = self.call(c["encoder_resnet_blocks"][i], f"encoder.down.{i}.block.{j}", x)
            x = self.call(c["encoder_spatial_downsample"][i], f"encoder.down.{i}.downsample", x)
            x = self.call(c["encoder_temporal_downsample"][i], f"encoder.down.{i}.time_downsample", x)
        x = self.norm("encoder.norm_out", self.mid("encoder", x))
        x = self.call(c["encoder_conv_out"], "encoder.conv_out", x)
        return self.call(c["q_conv"], "quant_conv", x) if c["use_quant_layer"] else x

    def video(self, z: Tensor) -> Tensor:
        c = self.config
        x = self.call(c["q_conv"], "post_quant_conv", z) if c["use_quant_layer"] else z
        x = self.mid("decoder", self.call(c["decoder_conv_in"], "decoder.conv_in", x))
        for i in range(self.last, -1, -1):
            for j in range(c["num_res_blocks"] + 1):
                x = self.call(c["decoder_resnet_blocks"][i], f"decoder.up.{i}.block.{j}", x)
            x = self.call(c["decoder_spatial_upsample"][i], f"decoder.up.{i}.upsample", x)
            x = self.call(c["decoder_temporal_upsample"][i], f"decoder.up.{i}.time_upsample", x)
        return self.call(c["decoder_conv_out"], "decoder.conv_out", self.norm("decoder.norm_out", x))

    def mid(self, part: str, x: Tensor) -> Tensor:
        x = self.call(self.config[f"{part}_mid_resnet"], f"{part}.mid.block_1", x)
        x = self.call(self.config[f"{part}_attention"], f"{part}.mid.attn_1", x)
        return self.call(self.config[f"{part}_mid_resnet"], f"{part}.mid.block_2", x)

    def call(self, kind: str, name: str, x: Tensor) -> Tensor:
        return getattr(self, kind)(name, x) if kind else x

    def norm(self, name: str, x: Tensor) -> Tensor:
        return swish(normed(self.w, name, x, self.config["norm_num_groups"], 1e-6))

    def conv2d(self, name: str, x: Tensor, stride: int = 1, pad: bool = True) -> Tensor:
        w, b = self.w[f"{name}.weight"], self.w[f"{name}.bias"]
        return each_frame(lambda f: F.conv2d(f, w, b, stride, w.shape[-1] // 2 if pad else 0), x)

    def conv3d(self, name: str, x: Tensor, stride: Any = 1, pad: bool = True) -> Tensor:
        w, b = self.w[f"{name}.weight"], self.w[f"{name}.bias"]
        x = torch.cat([x[:, :, :1]] * (w.shape[2] - 1) + [x], 2)
        side = w.shape[-1] // 2 if pad else 0
        return F.conv3d(F.pad(x, [side] * 4), w, b, stride)

    def Conv2d(self, name: str, x: Tensor) -> Tensor:
        return self.conv2d(name, x)

    def CausalConv3d(self, name: str, x: Tensor) -> Tensor:
        return self.conv3d(f"{name}.conv", x)

    def ResnetBlock2D(self, name: str, x: Tensor) -> Tensor:
        h = self.conv2d(f"{name}.conv1", each_frame(lambda f: self.norm(f"{name}.norm1", f), x))
        h = self.conv2d(f"{name}.conv2", each_frame(lambda f: self.norm(f"{name}.norm2", f), h))
        return h + (self.conv2d(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in self.w else x)

    def ResnetBlock3D(self, name: str, x: Tensor) -> Tensor:
        h = self.CausalConv3d(f"{name}.conv1", self.norm(f"{name}.norm1", x))
        h = self.CausalConv3d(f"{name}.conv2", self.norm(f"{name}.norm2", h))
        changes = f"{name}.nin_shortcut.conv.weight" in self.w
        return h + (self.CausalConv3d(f"{name}.nin_shortcut", x) if changes else x)

    def AttnBlock3DFix(self, name: str, x: Tensor) -> Tensor:
        def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [B, C, H, W]
            scores = torch.einsum("bchw,bcij->bhwij", q, k) / q.shape[1] ** 0.5
            return torch.einsum("bhwij,bcij->bchw", scores.flatten(3).softmax(-1).reshape(scores.shape), v)

        h = normed(self.w, f"{name}.norm", x, self.config["norm_num_groups"], 1e-6)
        q, k, v = (self.CausalConv3d(f"{name}.{part}", h) for part in "qkv")
        out = torch.stack([attended(*of) for of in zip(q.unbind(2), k.unbind(2), v.unbind(2), strict=True)], 2)
        return x + self.CausalConv3d(f"{name}.proj_out", out)

    def AttnBlock3D(self, name: str, x: Tensor) -> Tensor:
        """That of old checkpoints: place c of sequence f is number f C + c of all channels' frames."""
        h = normed(self.w, f"{name}.norm", x, self.config["norm_num_groups"], 1e-6)
        _, channels, frames, height, width = x.shape
        q, k, v = (self.CausalConv3d(f"{name}.{part}", h).flatten(1, 2) for part in "qkv")  # [B, C F, H, W]
        out = []
        for f in range(frames):
            one = slice(f * channels, (f + 1) * channels)
            a, b, c = (part[:, one].flatten(2) for part in (q, k, v))
            out.append(c @ (a.mT @ b / channels**0.5).softmax(-1).mT)
        mixed = torch.cat(out, 1).reshape(-1, channels, frames, height, width)
        return x + self.CausalConv3d(f"{name}.proj_out", mixed)

    def Downsample(self, name: str, x: Tensor) -> Tensor:
        return self.conv2d(f"{name}.conv", F.pad(x, (0, 1, 0, 1)), 2, pad=False)

    def SpatialDownsample2x(self, name: str, x: Tensor) -> Tensor:
        return self.conv3d(f"{name}.conv.conv", F.pad(x, (0, 1, 0, 1)), (1, 2, 2), pad=False)

    def Spatial2xTime2x3DDownsample(self, name: str, x: Tensor) -> Tensor:
        return self.conv3d(f"{name}.conv.conv", F.pad(x, (0, 1, 0, 1)), 2, pad=False)

    def TimeDownsample2x(self, name: str, x: Tensor) -> Tensor:
        frames = [x[:, :, max(t - i, 0)] for t in range(0, x.shape[2], 2) for i in range(3)]
        return torch.stack(frames, 2).unflatten(2, (-1, 3)).mean(3)

    def TimeDownsampleRes2x(self, name: str, x: Tensor) -> Tensor:
        a = self.w[f"{name}.mix_factor"].sigmoid()
        side = F.pad(x, (1, 1, 1, 1))
        conv = self.conv3d(f"{name}.conv", side, (2, 1, 1), pad=False)
        return a * self.TimeDownsample2x(name, x) + (1 - a) * conv

    def TimeUpsample2x(self, name: str, x: Tensor) -> Tensor:
        return torch.cat([x[:, :, :1], doubled(x[:, :, 1:], 2)], 2) if x.shape[2] > 1 else x

    def TimeUpsampleRes2x(self, name: str, x: Tensor) -> Tensor:
        a, x = self.w[f"{name}.mix_factor"].sigmoid(), self.TimeUpsample2x(name, x)
        return a * x + (1 - a) * self.CausalConv3d(f"{name}.conv", x)

    def SpatialUpsample2x(self, name: str, x: Tensor) -> Tensor:
        return self.CausalConv3d(f"{name}.conv", x.repeat_interleave(2, 3).repeat_interleave(2, 4))

    def Spatial2xTime2x3DUpsample(self, name: str, x: Tensor) -> Tensor:
        return self.CausalConv3d(f"{name}.conv", doubled(doubled(self.TimeUpsample2x(name, x), 3), 4))
