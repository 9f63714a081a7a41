"""STDiT3 written out in float64 from its weights, token by token and head by head, with a place for a replay."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Sublayer = Callable[[str, str, int, Callable[[], Tensor]], Tensor]
"""What is added to the stream, by name, kind and layer of a sublayer and by what computes it, with its gate."""


def computed(name: str, kind: str, layer: int, compute: Callable[[], Tensor]) -> Tensor:
    """Every sublayer is computed."""
    return compute()


def plain(
    w: dict[str, Tensor],
    heads: int,
    x: Tensor,
    timestep: Tensor,
    y: Tensor,
    mask: Tensor,
    fps: Tensor,
    height: Tensor,
    width: Tensor,
    sublayer: Callable[[int], Sublayer] = lambda sample: computed,
) -> Tensor:
    """The model's output, for patches of 1 x 2 x 2.

    Args:
        w: state of the model in float64.
        heads: of attention.
        x, timestep, y, mask, fps, height, width: as the model's.
        sublayer: by the number of a sample in the batch, stands between every sublayer and the stream.
    """
    channels = w["x_embedder.proj.bias"].numel()

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def embedded(name: str, v: Tensor) -> Tensor:
        a = v[:, None].float() * torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
        return linear(f"{name}.mlp.2", F.silu(linear(f"{name}.mlp.0", torch.cat([a.cos(), a.sin()], 1).double())))

    def normed(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    def of_heads(x: Tensor) -> Sequence[Tensor]:
        return x.split(channels // heads, -1)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [..., tokens, C]
        parts = zip(of_heads(q), of_heads(k), of_heads(v), strict=True)
        return torch.cat([(a @ b.mT / math.sqrt(channels // heads)).softmax(-1) @ c for a, b, c in parts], -1)

    def qk(name: str, x: Tensor, rotate: bool) -> Tensor:
        out = []
        for h in of_heads(x):
            h = h / (h.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"]
            if rotate:
                a = torch.arange(h.shape[-2])[:, None].float() * w["rope.freqs"].float()
                even, odd = h[..., ::2], h[..., 1::2]
                h = torch.stack([even * a.cos() - odd * a.sin(), even * a.sin() + odd * a.cos()], -1).flatten(-2)
            out.append(h)
        return torch.cat(out, -1)

    def self_attention(name: str, x: Tensor, rotate: bool) -> Tensor:
        q, k, v = linear(f"{name}.qkv", x).split(channels, -1)
        return linear(f"{name}.proj", attend(qk(f"{name}.q_norm", q, rotate), qk(f"{name}.k_norm", k, rotate), v))

    frames, h, wide = x.shape[2], -(-x.shape[3] // 2), -(-x.shape[4] // 2)
    layers = sum(name.startswith("spatial_blocks") and name.endswith("scale_shift_table") for name in w)
    results = []
    for b in range(len(x)):
        sub = sublayer(b)
        clip = F.pad(x[b], (0, 2 * wide - x.shape[4], 0, 2 * h - x.shape[3]))
        t = embedded("t_embedder", timestep[b : b + 1]) + embedded("fps_embedder", fps)
        m = linear("t_block.1", F.silu(t)).reshape(6, channels)
        text = y[b, 0][mask[b] != 0]
        text = linear("y_embedder.y_proj.fc2", F.gelu(linear("y_embedder.y_proj.fc1", text), approximate="tanh"))
        s = torch.empty(frames, h, wide, channels, dtype=torch.float64)
        scale, edge = math.sqrt(height.item() * width.item()) / 512, round(math.sqrt(h * wide))
        f = 10000.0 ** -(torch.arange(channels // 4, dtype=torch.float32) / (channels // 4))
        for i in range(h):
            for j in range(wide):
                patch = clip[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].transpose(0, 1).flatten(1)  # [T, 16]
                s[:, i, j] = patch @ w["x_embedder.proj.weight"].flatten(1).T + w["x_embedder.proj.bias"]
                at_w, at_h = f * (j / scale * edge / wide), f * (i / scale * edge / h)
                s[:, i, j] += torch.cat([at_w.sin(), at_w.cos(), at_h.sin(), at_h.cos()]).double()
        s = s.flatten(1, 2)  # [T, S, C]
        for layer in range(layers):
            for kind in ("spatial", "temporal"):
                name = f"{kind}_blocks.{layer}"
                a, c, g, a2, c2, g2 = w[f"{name}.scale_shift_table"] + m

                def own(s: Tensor = s, a: Tensor = a, c: Tensor = c, g: Tensor = g, n: str = f"{name}.attn") -> Tensor:
                    z = normed(s) * (1 + c) + a
                    if n.startswith("spatial"):
                        return g * self_attention(n, z, False)
                    return g * self_attention(n, z.transpose(0, 1), True).transpose(0, 1)

                s = s + sub(f"{name}.attn", kind, layer, own)

                def to_text(s: Tensor = s, n: str = f"{name}.cross_attn", text: Tensor = text) -> Tensor:
                    k, v = linear(f"{n}.kv_linear", text).split(channels, -1)
                    return linear(f"{n}.proj", attend(linear(f"{n}.q_linear", s), k, v))

                s = s + sub(f"{name}.cross_attn", "cross", layer, to_text)

                def mlp(
                    s: Tensor = s, a: Tensor = a2, c: Tensor = c2, g: Tensor = g2, n: str = f"{name}.mlp"
                ) -> Tensor:
                    hidden = F.gelu(linear(f"{n}.fc1", normed(s) * (1 + c) + a), approximate="tanh")
                    return g * linear(f"{n}.fc2", hidden)

                s = s + sub(f"{name}.mlp", "mlp", layer, mlp)
        shift, scale_out = w["final_layer.scale_shift_table"] + t
        out = linear("final_layer.linear", normed(s) * (1 + scale_out) + shift).reshape(frames, h, wide, 2, 2, -1)
        out = out.permute(5, 0, 1, 3, 2, 4).reshape(-1, frames, 2 * h, 2 * wide)
        results.append(out[:, :, : x.shape[3], : x.shape[4]])
    return torch.stack(results).float()
