"""Open-Sora 1.2's STDiT3 in the original's order of operations, and PAB on it in VideoSys' way: a baseline.

It takes the weights of `pab_kernels.models.stdit3.STDiT3` by their names. Sequences that are longer than the batch run
on a fused kernel, others in separate operations with a float32 softmax, and the host reads the clip's size and the
lengths of the texts in each call, as in Open-Sora v1.2.0. Texts of equal lengths are attended to in one fused call, in
place of one over packed tokens. Patches are 1 x 2 x 2, and given frames (`x_mask`) are not supported.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WINDOW, RANGES = (450, 930), {"spatial": 2, "temporal": 4, "cross": 6}
POINTS, POINT_LAYERS, POINT_REUSES = (676, 788, 864), 5, 2
"""The published PAB: timesteps (exclusive) and ranges of attention; timesteps at which the MLPs of the first layers are
kept, and for how many steps."""


class PublishedPAB:
    """PAB of one block as in VideoSys: the last output of each sublayer, with its gate, and a counter of its calls."""

    def __init__(self, kind: str, layer: int, steps: int) -> None:
        self.ranges = {"attn": RANGES[kind], "cross_attn": RANGES["cross"]}
        self.counts = {"attn": 0, "cross_attn": 0}
        self.points = POINTS if layer < POINT_LAYERS else ()
        self.steps, self.mlp_left = steps, 0
        self.outputs: dict[str, Tensor] = {}

    def __call__(self, name: str, timestep: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        """The sublayer's output, kept or computed."""
        t = int(timestep[0].bfloat16())  # the host waits for the device, once for each sublayer
        if name == "mlp":
            keep = t in self.points
            self.mlp_left = POINT_REUSES if keep else self.mlp_left - 1
            if not keep and self.mlp_left >= 0:
                return self.outputs[name] if self.mlp_left else self.outputs.pop(name)
        else:
            keep, count = True, self.counts[name]
            self.counts[name] = (count + 1) % self.steps
            if WINDOW[0] < t < WINDOW[1] and count % self.ranges[name]:
                return self.outputs[name]
        out = compute()
        if keep:
            self.outputs[name] = out
        return out


class OriginalSTDiT3:
    """The transformer with the weights of an `STDiT3`.

    Args:
        weights: by name, as in the checkpoint.
        heads: of attention.
        pab_steps: of a generation under the published PAB; None: without PAB.
    """

    def __init__(self, weights: Mapping[str, Tensor], heads: int, pab_steps: int | None = None) -> None:
        self.w = dict(weights)
        self.blocks: list[Block] = []  # in the order in which they run
        depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("spatial_blocks"))
        for layer, kind in itertools.product(range(depth), ("spatial", "temporal")):
            prefix = f"{kind}_blocks.{layer}."
            own = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
            block_pab = None if pab_steps is None else PublishedPAB(kind, layer, pab_steps)
            self.blocks.append(Block(own, heads, kind, block_pab))
        self.peak_cache_bytes = 0
        self._tables: dict[Any, Tensor] = {}

    def __call__(
        self, x: Tensor, t: Tensor, y: Tensor, mask: Tensor, x_mask: None, *, fps: Tensor, height: Tensor, width: Tensor
    ) -> Tensor:
        """See `STDiT3.forward`; the mask is `[B or B / n, L]`, height and width are tensors."""
        w, dtype, (batch, _, frames, *size) = self.w, self.w["t_block.1.weight"].dtype, x.shape
        timestep = t.to(dtype)
        rows, columns = (-(-n // 2) for n in size)
        scale = (height[0].item() * width[0].item()) ** 0.5 / 512
        speed = _embedded(w, "fps_embedder", fps.to(dtype))
        t = _embedded(w, "t_embedder", timestep) + speed.repeat(batch // len(speed), 1)
        m = _linear(w, "t_block.1", F.silu(t))
        y = _mlp(w, "y_embedder.y_proj", y.to(dtype)).squeeze(1)
        mask = mask.repeat(batch // len(mask), 1)
        text = y.masked_select(mask[..., None] != 0).view(-1, y.shape[-1])  # [tokens of all samples, C]
        lengths = mask.sum(1).tolist()
        x = F.pad(x.to(dtype), (0, 2 * columns - size[1], 0, 2 * rows - size[0]))
        x = F.conv3d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=(1, 2, 2)).flatten(2).mT
        x = (x.unflatten(1, (frames, -1)) + self._positions(rows, columns, scale, x)).flatten(1, 2)  # [B, T S, C]
        angle = torch.arange(frames, device=x.device)[:, None] * w["rope.freqs"].float().repeat_interleave(2)
        for block in self.blocks:
            x = block(x, text, m, lengths, frames, angle, timestep)
        kept = sum(out.nbytes for block in self.blocks if block.pab for out in block.pab.outputs.values())
        self.peak_cache_bytes = max(self.peak_cache_bytes, kept)
        shift, out_scale = (w["final_layer.scale_shift_table"][None] + t[:, None]).chunk(2, 1)
        x = _linear(w, "final_layer.linear", _norm(x) * (1 + out_scale) + shift)
        x = x.view(batch, frames, rows, columns, 2, 2, 8).permute(0, 6, 1, 2, 4, 3, 5)
        return x.reshape(batch, 8, frames, 2 * rows, 2 * columns)[..., : size[0], : size[1]].float()

    def _positions(self, rows: int, columns: int, scale: float, x: Tensor) -> Tensor:
        """The table of positions `[S, C]`, made once for each size."""
        key = (rows, columns, scale)
        if key not in self._tables:
            quarter, edge = x.shape[-1] // 4, round(math.sqrt(rows * columns))
            frequency = 10000.0 ** (-torch.arange(quarter, device=x.device) / quarter)
            of = [torch.arange(n, device=x.device)[:, None] * (edge / n / scale) * frequency for n in (columns, rows)]
            along_w, along_h = (torch.cat([a.sin(), a.cos()], -1) for a in of)
            self._tables[key] = torch.cat([along_w.repeat(rows, 1), along_h.repeat_interleave(columns, 0)], -1)
        return self._tables[key].to(x.dtype)


class Block(nn.Module):
    """A spatial or temporal block."""

    def __init__(self, weights: dict[str, Tensor], heads: int, kind: str, block_pab: PublishedPAB | None) -> None:
        super().__init__()
        self.w, self.heads, self.kind, self.pab = weights, heads, kind, block_pab

    def forward(
        self, x: Tensor, text: Tensor, m: Tensor, lengths: list[int], frames: int, angle: Tensor, timestep: Tensor
    ) -> Tensor:
        """The stream `[B, T S, C]` after the block; `m` is `[B, 6 C]`, `angle` `[T, head dim]`."""
        modulation = self.w["scale_shift_table"][None] + m.reshape(len(x), 6, -1)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, 1)

        def run(name: str, compute: Callable[[], Tensor]) -> Tensor:
            return compute() if self.pab is None else self.pab(name, timestep, compute)

        x = x + run("attn", lambda: gate * self.attend(_norm(x) * (1 + scale) + shift, frames, angle))
        x = x + run("cross_attn", lambda: self.attend_text(x, text, lengths))
        return x + run("mlp", lambda: gate_mlp * _mlp(self.w, "mlp", _norm(x) * (1 + scale_mlp) + shift_mlp))

    def attend(self, x: Tensor, frames: int, angle: Tensor) -> Tensor:
        """Attention over space or over time, `[B, T S, C]`."""
        shape, temporal = x.shape, self.kind == "temporal"
        x = x.unflatten(1, (frames, -1))
        x = (x.transpose(1, 2) if temporal else x).flatten(0, 1)  # [sequences, tokens, C]
        q, k, v = _linear(self.w, "attn.qkv", x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = (_rms_norm(part, self.w[f"attn.{name}_norm.weight"]) for name, part in (("q", q), ("k", k)))
        if temporal:
            q, k = _rotated(q, angle), _rotated(k, angle)  # [sequences, heads, tokens, head dim]
        if x.shape[1] > x.shape[0]:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = _wide((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1).to(v.dtype) @ v
        out = _linear(self.w, "attn.proj", out.transpose(1, 2).reshape(x.shape))
        return out.unflatten(0, (shape[0], -1)).transpose(1, 2).reshape(shape) if temporal else out.view(shape)

    def attend_text(self, x: Tensor, text: Tensor, lengths: list[int]) -> Tensor:
        """Attention of every token to its sample's text, `[B, T S, C]`."""
        if len(set(lengths)) > 1:
            samples = zip(x.split(1), text.split(lengths), lengths, strict=True)
            return torch.cat([self.attend_text(a, b, [n]) for a, b, n in samples])
        q = _linear(self.w, "cross_attn.q_linear", x)
        k, v = _linear(self.w, "cross_attn.kv_linear", text).unflatten(0, (len(x), -1)).chunk(2, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v)
        return _linear(self.w, "cross_attn.proj", out.transpose(1, 2).reshape(x.shape))


def _linear(w: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def _mlp(w: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return _linear(w, f"{name}.fc2", F.gelu(_linear(w, f"{name}.fc1", x), approximate="tanh"))


def _embedded(w: Mapping[str, Tensor], name: str, value: Tensor) -> Tensor:
    """Cosines, then sines, of `[B]`, and an MLP over them: `[B, C]`."""
    angle = value[:, None].float() * torch.exp(-math.log(10000) * torch.arange(128, device=value.device) / 128)
    waves = torch.cat([angle.cos(), angle.sin()], -1).to(value.dtype)
    return _linear(w, f"{name}.mlp.2", F.silu(_linear(w, f"{name}.mlp.0", waves)))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = _wide(x)
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def _rotated(x: Tensor, angle: Tensor) -> Tensor:
    """Pairs of neighbouring channels of `[..., T, D]`, rotated."""
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return (x * angle.cos() + turned * angle.sin()).to(x.dtype)
