"""`broadcast_residual` in CUDA: csrc/broadcast_residual.cu, which rounds where the Triton kernel does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..cached_outputs import CachedOutput
from ..cuda_library import kernel, refuse
from ..norm import Norm
from ..quantize import Quantized

MAX_CHANNELS = 8192
"""What the threads of a token hold in registers."""

MAX_TOKENS = 2**31 - 5
"""Tokens are counted in 32 bits, the last block's beyond them too."""

MAX_DIMS = 5
"""Channels, and as many leading dimensions as may lie in any order."""

_KINDS = {"layer": 1, "rms": 2}

_ABSENT = (None, None, None, None)

_SLOTS = ", ".join(f"Tensor? slot_{i}, Tensor? slot_scale_{i}, Tensor? gate_{i}, Tensor? weight_{i}" for i in range(3))

_kernel = kernel(
    "broadcast_residual",
    f"Tensor x, {_SLOTS}, int norm, Tensor? norm_weight, Tensor? norm_bias, float norm_eps, Tensor? shift, Tensor? scale, "
    "Tensor(a!)? x_out, Tensor(b!)? y_out",
)


def refusal(x: Tensor, cached: Sequence[CachedOutput], norm: Norm | None, shift: Tensor | None, scale: Tensor | None) -> str | None:
    """Why this kernel cannot serve; None where it can."""
    if x.dtype == torch.float64:
        return "x is torch.float64; float16, bfloat16 and float32 are supported"
    *leading, channels = x.shape
    if channels > MAX_CHANNELS:
        return f"x has {channels} channels; up to {MAX_CHANNELS} are supported"
    if len(leading) >= MAX_DIMS:
        return f"x has {len(leading) + 1} dimensions; up to {MAX_DIMS} are supported"
    if x.numel() > MAX_TOKENS * channels:
        return f"x has {x.numel() // channels} tokens; up to {MAX_TOKENS} are supported"
    return refuse(x)


def broadcast_residual(
    x: Tensor, cached: Sequence[CachedOutput], norm: Norm | None, shift: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    x_out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if cached else None
    y_out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if norm is not None else None
    broadcast_residual_out(x, cached, norm, shift, scale, x_out, y_out)
    return x if x_out is None else x_out, y_out


def broadcast_residual_out(
    x: Tensor,
    cached: Sequence[CachedOutput],
    norm: Norm | None,
    shift: Tensor | None,
    scale: Tensor | None,
    x_out: Tensor | None,
    y_out: Tensor | None,
) -> None:
    if x.numel() == 0:
        return
    slots: list[Tensor | None] = []
    for slot, gate, weight in cached:
        slots += (slot.data, slot.scale, gate, weight) if isinstance(slot, Quantized) else (slot, None, gate, weight)
    slots += _ABSENT * (3 - len(cached))
    if norm is None:
        _kernel(x, *slots, 0, None, None, 0.0, shift, scale, x_out, y_out)
    else:
        _kernel(x, *slots, _KINDS[norm.kind], norm.weight, norm.bias, norm.eps, shift, scale, x_out, y_out)
