"""`broadcast_residual` in CUDA: csrc/broadcast_residual.cu, which rounds where the Triton kernel does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...limits import MOST_ADDED
from ..backend import refuse_stream
from ..cached_outputs import CachedOutput, Line, holds
from ..cuda_library import kernel, refuse
from ..dispatch import Outputs
from ..quantized import INT4, PACKED, Quantized, data_and_scale, refuse_four_bits
from . import BroadcastResidual

MAX_CHANNELS = 8192
"""As many as the threads of a token hold in registers."""

MAX_TOKENS = 2**31 - 5
"""Tokens are counted in 32 bits, with those of the last block."""

MAX_DIMS = 5
"""Dimensions of x: the leading ones may lie in any order in memory."""

_KINDS = {"layer": 1, "rms": 2}

_TERM = ("slot", "slot_scale", "gate")
_LINE = (*_TERM, "before", "before_scale", "weight")


def _schema(slots: int, term: Sequence[str]) -> str:
    added = (f"Tensor? {name}_{i}=None" for i in range(slots) for name in term)
    norm = "int norm, float norm_eps, Tensor? norm_weight, Tensor? norm_bias"
    return f"Tensor x, {norm}, Tensor? shift, Tensor? scale, Tensor(a!)? x_out, Tensor(b!)? y_out, {', '.join(added)}"


# Most calls have one slot or none and no line, and every argument of an operation costs host time.
_kernel_one = kernel("broadcast_residual_one", _schema(1, _TERM))
_kernel = kernel("broadcast_residual", _schema(MOST_ADDED, _TERM))
_kernel_lines = kernel("broadcast_residual_lines", _schema(MOST_ADDED, _LINE))


def refusal(call: BroadcastResidual) -> str | None:
    """Why this kernel cannot serve; None where it can."""
    x = call.x
    if x.ndim > MAX_DIMS:
        return f"x has {x.ndim} dimensions; up to {MAX_DIMS} are supported"
    if holds(call.cached, PACKED):
        return refuse_four_bits("a slot", INT4)
    return refuse_stream(x, MAX_TOKENS, MAX_CHANNELS) or refuse(x)


def launch(call: BroadcastResidual, outputs: Outputs) -> None:
    """Write the outputs. C++ checks the call once more, and launches nothing if it is not valid."""
    x, cached, norm, shift, scale = call
    write = _kernel_one if len(cached) <= 1 else _kernel
    added: list[Any] = []
    for slot, gate in cached:
        if isinstance(slot, Quantized):
            added += (slot.data, slot.scale, gate)
        elif isinstance(slot, Line):
            write, added = _kernel_lines, _lines(cached)
            break
        else:
            added += (slot, None, gate)
    if norm is None:
        write(x, 0, 0.0, None, None, shift, scale, *outputs, *added)
    else:
        write(x, _KINDS[norm.kind], norm.eps, norm.weight, norm.bias, shift, scale, *outputs, *added)


def _lines(cached: Sequence[CachedOutput]) -> list[Any]:
    """The terms where any is a line."""
    added: list[Any] = []
    for slot, gate in cached:
        line = slot if isinstance(slot, Line) else Line(slot, None, None)  # type: ignore[arg-type]
        added += (*data_and_scale(line.newest), gate, *data_and_scale(line.before), line.weight)
    return added
