"""Norms of q and k: passed to attention where it supports them, else called as modules."""

from __future__ import annotations

from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..broadcast.fusing import is_plain
from ..ops import QKNorm


def with_norm(x: Tensor, norm: nn.Module | None) -> tuple[Tensor, QKNorm | None]:
    """What to pass to attention for `norm(x)`: x and the norm, or the normed x and None.

    Attention supports a plain `nn.LayerNorm`, `nn.RMSNorm` or diffusers `RMSNorm` over a head's channels, and an RMS
    norm across heads with its reciprocal root. Any other module is called, and so are norms with hooks or with weights
    in another dtype than x.

    Args:
        x: `[*batch, N, H, D]`, H and D side by side in memory.
        norm: over D channels or, across heads, over H * D.
    """
    if norm is None:
        return x, None
    heads, head_dim = x.shape[-2:]
    across = heads > 1 and _width(norm) == heads * head_dim
    kind, eps = _kind(norm), getattr(norm, "eps", None)
    eps = eps if isinstance(eps, float) else torch.finfo(torch.float32).eps  # torch's default in float32
    fits = x.dtype != torch.float64 and all(p.dtype == x.dtype and p.device == x.device for p in norm.parameters())
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if kind is None or not fits or (across and kind == "layer"):
        y = norm(x.flatten(-2)).unflatten(-1, (heads, head_dim)) if across else norm(x)
        return y.to(x.dtype), None
    if not across:
        return x, QKNorm(kind, weight, bias, eps)
    mean_square = x.flatten(-2).float().pow(2).mean(-1)
    weight = None if weight is None else weight.unflatten(0, (heads, head_dim))
    return x, QKNorm("rms", weight, None, eps, rstd=torch.rsqrt(mean_square + eps))


def _width(norm: Any) -> int | None:
    """The number of channels that a norm is over, if it is known."""
    for name in ("normalized_shape", "dim"):  # in torch and in diffusers
        shape = getattr(norm, name, None)
        if isinstance(shape, tuple):
            return prod(shape)
    weight = getattr(norm, "weight", None)
    return weight.numel() if isinstance(weight, Tensor) else None


def _kind(norm: nn.Module) -> Literal["layer", "rms"] | None:
    """The kind of a norm in `QKNorm`; None if attention does not support it."""
    if not is_plain(norm, type(norm)):
        return None
    if type(norm) is nn.LayerNorm:
        return "layer"
    of_diffusers = (type(norm).__module__, type(norm).__name__) == ("diffusers.models.normalization", "RMSNorm")
    return "rms" if type(norm) is nn.RMSNorm or (of_diffusers and norm.bias is None) else None
