"""`broadcast_residual` in CUDA: csrc/broadcast_residual.cu, which rounds where the Triton kernel does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..cached_outputs import CachedOutput
from ..cuda_library import kernel, refuse
from ..norm import Norm
from ..quantize import GROUP, Quantized

MAX_SLOTS = 3

MAX_CHANNELS = 8192
"""What the threads of a token hold in registers."""

MAX_TOKENS = 2**31 - 5
"""Tokens are counted in 32 bits, the last block's beyond them too."""

MAX_DIMS = 5
"""Channels, and as many leading dimensions as may lie in any order."""

_KINDS = {"layer": 1, "rms": 2}

_LISTS = (list, tuple)


def _schema(slots: int) -> str:
    added = (f"Tensor? slot_{i}=None, Tensor? slot_scale_{i}=None, Tensor? gate_{i}=None, Tensor? weight_{i}=None" for i in range(slots))
    norm = "int norm, float norm_eps, Tensor? norm_weight, Tensor? norm_bias"
    return f"Tensor x, {norm}, Tensor? shift, Tensor? scale, Tensor(a!)? x_out, Tensor(b!)? y_out, {', '.join(added)}"


_kernel = kernel("broadcast_residual", _schema(MAX_SLOTS), tells=True)
_kernel_one = kernel("broadcast_residual_one", _schema(1), tells=True)


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
    _launch(x, slots, norm, shift, scale, x_out, y_out)


def _launch(
    x: Tensor,
    slots: list[Any],
    norm: Norm | None,
    shift: Tensor | None,
    scale: Tensor | None,
    x_out: Tensor | None,
    y_out: Tensor | None,
) -> bool:
    """Whether it ran. `slots`: four entries each."""
    call = _kernel_one if len(slots) <= 4 else _kernel
    if norm is None:
        return call(x, 0, 0.0, None, None, shift, scale, x_out, y_out, *slots)
    return call(x, _KINDS[norm.kind], norm.eps, norm.weight, norm.bias, shift, scale, x_out, y_out, *slots)


def attempt(x: Any, slots: Any, gates: Any, weights: Any, norm: Any, shift: Any, scale: Any, x_out: Any, y_out: Any) -> bool:
    """`broadcast_residual_out` of arguments that nobody has checked: C++ does, at a tenth of what it costs in Python.

    False, and nothing is launched, where something is not as it is to be; then the checks in Python say what.
    """
    if not isinstance(slots, _LISTS) or len(slots) > MAX_SLOTS:
        return False
    for values in (gates, weights):
        if values is not None and not (isinstance(values, _LISTS) and len(values) == len(slots)):
            return False
    if norm is not None and (type(norm) is not Norm or norm.kind not in _KINDS):
        return False
    flat: list[Any] = []
    for i, slot in enumerate(slots):
        gate, weight = gates and gates[i], weights and weights[i]
        if isinstance(slot, Quantized):
            if slot.group != GROUP:
                return False
            flat += (slot.data, slot.scale, gate, weight)
        else:
            flat += (slot, None, gate, weight)
    try:
        if refuse(x) is not None:
            return False
        return _launch(x, flat, norm, shift, scale, x_out, y_out)
    except (AttributeError, RuntimeError):
        return False


def attempt_new(x: Any, slots: Any, gates: Any, weights: Any, norm: Any, shift: Any, scale: Any) -> tuple[Tensor, Tensor | None] | None:
    """`broadcast_residual` as `attempt` does it, or None."""
    if not isinstance(x, Tensor):
        return None
    x_out = torch.empty_like(x, memory_format=torch.contiguous_format) if slots else None
    y_out = torch.empty_like(x, memory_format=torch.contiguous_format) if norm is not None else None
    served = attempt(x, slots, gates, weights, norm, shift, scale, x_out, y_out)
    return (x if x_out is None else x_out, y_out) if served else None
