"""The transformers of Open-Sora-Plan written out in float64, from weights by the names of their checkpoints.

Source: PKU-YuanGroup/Open-Sora-Plan, `latte/modeling_latte.py` of v1.1.0 and `opensora/modeling_opensora.py` of v1.2.0.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHANNELS = 16
"""Of the text."""
LATTE = {
    "_class_name": "LatteT2V",
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "cross_attention_dim": 24,
    "attention_bias": True,
    "sample_size": [16, 16],
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "caption_channels": CHANNELS,
    "video_length": 5,
    "attention_mode": "xformers",
    "use_rope": False,
    "model_max_length": 300,
    "compress_kv_factor": 1,
}
"""A small config.json of 1.1, with the fields of the published ones."""

PLAN_12 = {
    "_class_name": "OpenSoraT2V",
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "in_channels": 4,
    "out_channels": None,
    "num_layers": 2,
    "cross_attention_dim": 48,
    "attention_bias": True,
    "sample_size": [12, 16],
    "sample_size_t": 3,
    "patch_size": 2,
    "patch_size_t": 1,
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "caption_channels": CHANNELS,
    "interpolation_scale_t": 1.0,
    "interpolation_scale_h": 1.5,
    "interpolation_scale_w": 2.0,
    "attention_mode": "xformers",
    "downsampler": None,
    "use_rope": True,
    "use_stable_fp32": False,
}
"""A small config.json of 1.2."""


def latte(w: dict[str, Tensor], config: dict[str, Any], x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """1.1: `x` `[B, 4, L, H, W]`, `text` `[B, N, channels]` of real tokens."""
    batch, _, frames, height, width = x.shape
    heads, side = config["num_attention_heads"], config["sample_size"][0]
    size = heads * config["attention_head_dim"]
    x = F.conv2d(x.transpose(1, 2).flatten(0, 1), w["pos_embed.proj.weight"], w["pos_embed.proj.bias"], 2)
    rows, columns = x.shape[-2:]
    x = x.flatten(2).transpose(1, 2) + _plane(size, rows, columns, side // 2, max(side // 64, 1))
    e, m = _modulation(w, t)
    text = _caption(w, text).repeat_interleave(frames, 0)
    length = config["video_length"]
    s = max((length - 1) // 16 if length % 2 else length // 16, 1)
    for i in range(config["num_layers"]):
        name = f"transformer_blocks.{i}."
        each = _parts(w, name, m.repeat_interleave(frames, 0))
        x = x + each[2] * _attention(w, f"{name}attn1", _normed(x, *each[:2]), heads)
        x = x + _attention(w, f"{name}attn2", x, heads, text)
        x = x + each[5] * _mlp(w, name, _normed(x, *each[3:5]))
        x = x.unflatten(0, (batch, frames)).transpose(1, 2).flatten(0, 1)
        if i == 0:
            x = x + _line(size, torch.arange(frames) / s)
        name = f"temporal_transformer_blocks.{i}."
        each = _parts(w, name, m.repeat_interleave(rows * columns, 0))
        x = x + each[2] * _attention(w, f"{name}attn1", _normed(x, *each[:2]), heads)
        x = x + each[5] * _mlp(w, name, _normed(x, *each[3:5]))
        x = x.unflatten(0, (batch, rows * columns)).transpose(1, 2).flatten(0, 1)
    shift, scale = (w["scale_shift_table"] + e.repeat_interleave(frames, 0)[:, None]).chunk(2, 1)
    x = F.linear(_normed(x, shift, scale), w["proj_out.weight"], w["proj_out.bias"])
    x = x.view(batch, frames, rows, columns, 2, 2, -1)
    return torch.einsum("bthwpqc->bcthpwq", x).reshape(batch, -1, frames, height, width)


def plan_12(w: dict[str, Tensor], config: dict[str, Any], x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    """1.2: `x` `[B, 4, L, H, W]`, `text` `[B, N, channels]`, `mask` `[B, N]` of zeros and ones."""
    batch, _, frames, height, width = x.shape
    heads = config["num_attention_heads"]
    x = F.conv2d(x.transpose(1, 2).flatten(0, 1), w["pos_embed.proj.weight"], w["pos_embed.proj.bias"], 2)
    rows, columns = x.shape[-2:]
    x = x.flatten(2).transpose(1, 2).reshape(batch, frames * rows * columns, -1)
    e, m = _modulation(w, t)
    text, bias = _caption(w, text), (1 - mask.double())[:, None, None] * -10000
    grid = torch.cartesian_prod(torch.arange(frames), torch.arange(rows), torch.arange(columns)).double()
    places = [grid[:, axis] / config[f"interpolation_scale_{'thw'[axis]}"] for axis in range(3)]
    for i in range(config["num_layers"]):
        name = f"transformer_blocks.{i}."
        each = _parts(w, name, m)
        x = x + each[2] * _attention(w, f"{name}attn1", _normed(x, *each[:2]), heads, places=places)
        x = x + _attention(w, f"{name}attn2", x, heads, text, bias)
        x = x + each[5] * _mlp(w, name, _normed(x, *each[3:5]))
    shift, scale = (w["scale_shift_table"] + e[:, None]).chunk(2, 1)
    x = F.linear(_normed(x, shift, scale), w["proj_out.weight"], w["proj_out.bias"])
    x = x.view(batch, frames, rows, columns, 2, 2, -1)
    return torch.einsum("bthwpqc->bcthpwq", x).reshape(batch, -1, frames, height, width)


def _line(size: int, places: Tensor) -> Tensor:
    angles = places.double()[:, None] * 10000 ** (-torch.arange(size // 2).double() / (size // 2))
    return torch.cat([angles.sin(), angles.cos()], 1)


def _plane(size: int, rows: int, columns: int, base: int, scale: int) -> Tensor:
    """PixArt's table: a half of the columns, then a half of the rows."""
    by_row = _line(size // 2, torch.arange(rows) / (rows / base) / scale)
    by_column = _line(size // 2, torch.arange(columns) / (columns / base) / scale)
    return torch.cat([by_column.repeat(rows, 1), by_row.repeat_interleave(columns, 0)], 1)


def _modulation(w: dict[str, Tensor], t: Tensor) -> tuple[Tensor, Tensor]:
    angles = t.double()[:, None] * 10000 ** (-torch.arange(128).double() / 128)
    name = "adaln_single.emb.timestep_embedder."
    e = torch.cat([angles.cos(), angles.sin()], 1)
    e = F.silu(F.linear(e, w[f"{name}linear_1.weight"], w[f"{name}linear_1.bias"]))
    e = F.linear(e, w[f"{name}linear_2.weight"], w[f"{name}linear_2.bias"])
    return e, F.linear(F.silu(e), w["adaln_single.linear.weight"], w["adaln_single.linear.bias"]).unflatten(1, (6, -1))


def _caption(w: dict[str, Tensor], text: Tensor) -> Tensor:
    name = "caption_projection."
    x = F.gelu(F.linear(text, w[f"{name}linear_1.weight"], w[f"{name}linear_1.bias"]), approximate="tanh")
    return F.linear(x, w[f"{name}linear_2.weight"], w[f"{name}linear_2.bias"])


def _parts(w: dict[str, Tensor], name: str, m: Tensor) -> list[Tensor]:
    """Shift, scale, gate of attention, and of the MLP, `[B, 1, C]`."""
    return list((w[f"{name}scale_shift_table"] + m).chunk(6, 1))


def _normed(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def _mlp(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    x = F.gelu(F.linear(x, w[f"{name}ff.net.0.proj.weight"], w[f"{name}ff.net.0.proj.bias"]), approximate="tanh")
    return F.linear(x, w[f"{name}ff.net.2.weight"], w[f"{name}ff.net.2.bias"])


def _attention(
    w: dict[str, Tensor],
    name: str,
    x: Tensor,
    heads: int,
    text: Tensor | None = None,
    bias: Tensor | None = None,
    places: list[Tensor] | None = None,
) -> Tensor:
    source = x if text is None else text
    q, k, v = (
        F.linear(of, w[f"{name}.to_{p}.weight"], w[f"{name}.to_{p}.bias"]).unflatten(-1, (heads, -1)).transpose(1, 2)
        for p, of in (("q", x), ("k", source), ("v", source))
    )
    if places is not None:
        q, k = _turned(q, places), _turned(k, places)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    out = (scores if bias is None else scores + bias).softmax(-1) @ v
    return F.linear(out.transpose(1, 2).flatten(2), w[f"{name}.to_out.0.weight"], w[f"{name}.to_out.0.bias"])


def _turned(x: Tensor, places: list[Tensor]) -> Tensor:
    """Rotary embedding: a third of a head for time, rows and columns, whose halves are turned."""
    turned = []
    for part, place in zip(x.chunk(3, -1), places, strict=True):
        half = part.shape[-1] // 2
        angles = place[:, None] * 10000 ** (-torch.arange(half).double() / half)
        a, b = part[..., :half], part[..., half:]
        turned += [a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()]
    return torch.cat(turned, -1)
