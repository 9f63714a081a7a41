"""`broadcast_residual` in CUDA: csrc/broadcast_residual.cu, which rounds where the Triton kernel does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..cached_outputs import CachedOutput, Line
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


_TERM = ("slot", "slot_scale", "gate")
_LINE = (*_TERM, "before", "before_scale", "weight")


def _schema(slots: int, term: Sequence[str]) -> str:
    added = (f"Tensor? {name}_{i}=None" for i in range(slots) for name in term)
    norm = "int norm, float norm_eps, Tensor? norm_weight, Tensor? norm_bias"
    return f"Tensor x, {norm}, Tensor? shift, Tensor? scale, Tensor(a!)? x_out, Tensor(b!)? y_out, {', '.join(added)}"


# Most calls have one slot or none and no line, and every argument of an operation costs.
_kernel_one = kernel("broadcast_residual_one", _schema(1, _TERM), tells=True)
_kernel = kernel("broadcast_residual", _schema(MAX_SLOTS, _TERM), tells=True)
_kernel_lines = kernel("broadcast_residual_lines", _schema(MAX_SLOTS, _LINE), tells=True)


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
    lines = any(c.weight is not None for c in cached)
    slots: list[Tensor | None] = []
    for slot, gate, before, weight in cached:
        slots += (*_parts(slot), gate, *_parts(before), weight) if lines else (*_parts(slot), gate)
    _launch(x, slots, lines, norm, shift, scale, x_out, y_out)


def _parts(slot: Any) -> tuple[Any, Any]:
    """Data and scale."""
    return (slot.data, slot.scale) if isinstance(slot, Quantized) else (slot, None)


def _launch(
    x: Tensor,
    slots: list[Any],
    lines: bool,
    norm: Norm | None,
    shift: Tensor | None,
    scale: Tensor | None,
    x_out: Tensor | None,
    y_out: Tensor | None,
) -> bool:
    """Whether it ran. `slots`: three entries each, six where there are lines."""
    call = _kernel_lines if lines else _kernel_one if len(slots) <= 3 else _kernel
    if norm is None:
        return call(x, 0, 0.0, None, None, shift, scale, x_out, y_out, *slots)
    return call(x, _KINDS[norm.kind], norm.eps, norm.weight, norm.bias, shift, scale, x_out, y_out, *slots)


def attempt(x: Any, slots: Any, gates: Any, norm: Any, shift: Any, scale: Any, x_out: Any, y_out: Any) -> bool:
    """`broadcast_residual_out` of arguments that nobody has checked: C++ does, at a tenth of what it costs in Python.

    False, and nothing is launched, where something is not as it is to be; then the checks in Python say what.
    """
    for out in (x_out, y_out):  # what C++ cannot ask
        if isinstance(out, Tensor) and (out.requires_grad or out.is_inference()):
            return False
    return _attempt(x, slots, gates, norm, shift, scale, x_out, y_out)


def _attempt(x: Any, slots: Any, gates: Any, norm: Any, shift: Any, scale: Any, x_out: Any, y_out: Any) -> bool:
    if not isinstance(slots, _LISTS) or len(slots) > MAX_SLOTS:
        return False
    if gates is not None and not (isinstance(gates, _LISTS) and len(gates) == len(slots)):
        return False
    try:
        if norm is not None and (type(norm) is not Norm or norm.kind not in _KINDS or type(norm.eps) is not float):
            return False
        flat: list[Any] = []
        for i, slot in enumerate(slots):
            if isinstance(slot, Quantized):
                if slot.group != GROUP:
                    return False
                flat += (slot.data, slot.scale, gates and gates[i])
            elif isinstance(slot, Line):
                return _attempt_lines(x, slots, gates, norm, shift, scale, x_out, y_out)
            else:
                flat += (slot, None, gates and gates[i])
        return refuse(x) is None and _launch(x, flat, False, norm, shift, scale, x_out, y_out)
    except (AttributeError, RuntimeError, TypeError):
        return False


def _attempt_lines(x: Any, slots: Any, gates: Any, norm: Any, shift: Any, scale: Any, x_out: Any, y_out: Any) -> bool:
    """`attempt` where any slot is a line."""
    flat: list[Any] = []
    for i, slot in enumerate(slots):
        newest, before, weight = (slot.newest, slot.before, slot.weight) if isinstance(slot, Line) else (slot, None, None)
        if any(isinstance(read, Quantized) and read.group != GROUP for read in (newest, before)):
            return False
        flat += (*_parts(newest), gates and gates[i], *_parts(before), weight)
    return refuse(x) is None and _launch(x, flat, True, norm, shift, scale, x_out, y_out)


def attempt_new(x: Any, slots: Any, gates: Any, norm: Any, shift: Any, scale: Any) -> tuple[Tensor, Tensor | None] | None:
    """`broadcast_residual` as `attempt` does it, or None."""
    if not isinstance(x, Tensor):
        return None
    x_out = torch.empty_like(x, memory_format=torch.contiguous_format) if slots else None
    y_out = torch.empty_like(x, memory_format=torch.contiguous_format) if norm is not None else None
    served = _attempt(x, slots, gates, norm, shift, scale, x_out, y_out)
    return (x if x_out is None else x_out, y_out) if served else None
