"""Calls of `short_attention` for the tests of its kernels, and what each must come to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pab_kernels.ops import QKNorm, Rope
from pab_kernels.ops.attention.reference import compute, online_attention
from pab_kernels.ops.short_attention import ShortAttention
from tests.ops.tensors import KERNEL_DEVICE, assert_accurate, assert_same, draws


def temporal(
    frames: int,
    *,
    places: int = 2,
    heads: int = 2,
    dim: int = 40,
    dtype: torch.dtype = torch.bfloat16,
    b: int = 2,
    device: str = KERNEL_DEVICE,
    seed: int = 0,
) -> list[Tensor]:
    """q, k, v `[B, S, T, H, D]`: views of a packed projection `[B, T, S, 3, H, D]`, which lies between NaN."""
    around = torch.full((b + 2, frames, places, 3, heads, dim), torch.nan, dtype=dtype, device=device)
    around[1:-1] = draws(dtype, seed, device)(b, frames, places, 3, heads, dim)
    return [around[1:-1].select(3, i).transpose(1, 2) for i in range(3)]


def tables(frames: int, pairs: int, interleaved: bool, device: str = KERNEL_DEVICE) -> Rope:
    theta = draws(seed=2, device=device)(frames, pairs) * 3
    return Rope(theta.cos(), theta.sin(), interleaved)


def across(q: Tensor, weighted: bool = True, seed: int = 4) -> QKNorm:
    """A norm across heads: its reciprocal root has strides of its own."""
    rstd = q.float().square().mean((-2, -1)).add(1e-6).rsqrt()
    rstd = torch.stack([rstd, torch.full_like(rstd, torch.nan)], 1).select(1, 0)
    return QKNorm("rms", draws(q.dtype, seed, str(q.device))(*q.shape[-2:]) if weighted else None, rstd=rstd)


def everything(
    frames: int,
    dim: int = 40,
    dtype: torch.dtype = torch.bfloat16,
    interleaved: bool = True,
    device: str = KERNEL_DEVICE,
) -> dict[str, Any]:
    draw = draws(dtype, 1, device)
    return {
        "softmax_scale": 0.2,
        "q_norm": QKNorm("rms", draw(dim), None, 1e-5),
        "k_norm": QKNorm("layer", draw(dim), draw(dim), 1e-5),
        "rope": tables(frames, dim // 2, interleaved, device),
    }


def plain(kind: Any, dim: int = 40, device: str = KERNEL_DEVICE) -> QKNorm:
    return QKNorm(kind, eps=1e-3)


def affine(kind: Any, dim: int = 40, device: str = KERNEL_DEVICE) -> QKNorm:
    draw = draws(torch.bfloat16, 5, device)
    return QKNorm(kind, draw(dim), draw(dim) if kind == "layer" else None)


def double(norm: QKNorm | None) -> QKNorm | None:
    return norm and QKNorm(
        norm.kind, *(t if t is None else t.double() for t in (norm.weight, norm.bias)), norm.eps, norm.rstd
    )


def check(
    call: Callable[..., Any],
    inputs: list[Tensor],
    softmax_scale: float | None = None,
    q_norm: QKNorm | None = None,
    k_norm: QKNorm | None = None,
    rope: Rope | None = None,
) -> Tensor:
    """The error of the kernel that `call` calls against float64 is about that of torch, and it rounds where its
    reference rounds."""
    before = [t.clone() for t in inputs]
    out, stored = call(*inputs, softmax_scale=softmax_scale, q_norm=q_norm, k_norm=k_norm, rope=rope)
    assert stored is None
    assert_same(inputs, before, strides=False)
    wide = [t.double() for t in inputs]
    exact, _ = compute(ShortAttention(*wide, softmax_scale, None, double(q_norm), double(k_norm), rope))
    given = ShortAttention(*inputs, softmax_scale, None, q_norm, k_norm, rope)
    assert_accurate(out, compute(given)[0], exact)
    expected, _ = online_attention(given, step=64)
    assert_same(torch.zeros_like(out), torch.zeros_like(expected))  # strides
    eps = torch.finfo(out.dtype).eps
    torch.testing.assert_close(out.float(), expected.float(), atol=4 * eps, rtol=2 * eps)
    assert (out != expected).sum() <= 8 + 0.03 * out.numel()
    return out
