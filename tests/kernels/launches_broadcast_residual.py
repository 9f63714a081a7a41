"""Launches of the broadcast_residual kernel at the geometries of real models; adaLN unless it says otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pab_kernels.ops import Norm, empty_quantized
from pab_kernels.ops.broadcast_residual import BroadcastResidual
from pab_kernels.ops.broadcast_residual.triton import launch
from pab_kernels.ops.cached_outputs import Line
from tests.kernels.compilation import Launch


def _meta(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(sizes, dtype=dtype, device="meta")


def _add(
    channels: int, *slots: torch.dtype, tokens: int = 15 * 1590, norm: Norm | None = None, lines: bool = False
) -> Callable[[], Any]:
    """x `[2, tokens, C]`, slots of these dtypes or lines through two such, gate, shift and scale of each batch row."""
    x, vector = _meta(2, tokens, channels), _meta(2, 1, channels)
    kept = [_meta(*x.shape) if dtype == x.dtype else empty_quantized(x.shape, dtype, device="meta") for dtype in slots]
    weight = _meta(1, dtype=torch.float32)
    cached = tuple((Line(slot, slot, weight) if lines else slot, vector) for slot in kept)
    call = BroadcastResidual(x, cached, norm or Norm(), vector, vector)
    return lambda: launch(call, call.empty())


def _add_by_frame() -> Callable[[], Any]:
    """Gates of each row, frame and token; nothing is normed; float32."""
    sizes = (2, 16, 1024, 1152)
    x, gates = _meta(*sizes, dtype=torch.float32), [_meta(2, 1, 1, 1152), _meta(16, 1, 1152), _meta(*sizes)]
    call = BroadcastResidual(x, tuple((x, gate.float()) for gate in gates))
    return lambda: launch(call, call.empty())


BF16, INT8, FP8, INT4 = torch.bfloat16, torch.int8, torch.float8_e4m3fn, torch.int4

LAUNCHES = {
    "open_sora_norm_modulate": Launch(_add(1152), wide=16),
    "open_sora_1_slot": Launch(_add(1152, BF16), wide=16),
    "open_sora_2_slots": Launch(_add(1152, BF16, BF16), wide=16),
    "open_sora_3_slots": Launch(_add(1152, BF16, BF16, BF16), wide=16),
    "open_sora_fp8": Launch(_add(1152, FP8), wide=4, archs=(90, 100)),  # scales are 4 bytes; float8 needs sm_89
    "open_sora_2_int8": Launch(_add(1152, INT8, INT8), wide=4),
    "open_sora_int4": Launch(_add(1152, INT4), wide=2),  # scales are 2 bytes
    "open_sora_2_int4_lines": Launch(_add(1152, INT4, INT4, lines=True), wide=2),
    "open_sora_line": Launch(_add(1152, BF16, lines=True), wide=4),  # weights are 4 bytes
    "open_sora_3_lines": Launch(_add(1152, BF16, BF16, BF16, lines=True), wide=4),
    "open_sora_int8_line": Launch(_add(1152, INT8, lines=True), wide=4),
    "cogvideox_3072_line": Launch(_add(3072, BF16, tokens=17776, lines=True), wide=4),
    "wan_5120_3_int8_lines": Launch(_add(5120, INT8, INT8, INT8, tokens=32760, lines=True), wide=4),
    "pixart_1536_rms": Launch(_add(1536, BF16, tokens=4096, norm=Norm("rms", _meta(1536))), wide=16),
    "1920": Launch(_add(1920, BF16), wide=16),
    "open_sora_plan_2304": Launch(_add(2304, BF16, tokens=28 * 900), wide=16),
    "cogvideox_3072": Launch(_add(3072, BF16, tokens=17776), wide=16),
    "wan_5120_3_int8": Launch(_add(5120, INT8, INT8, INT8, tokens=32760), wide=4),
    "wan_5120_3_int4": Launch(_add(5120, INT4, INT4, INT4, tokens=32760), wide=2),
    "latte_add_float32": Launch(_add_by_frame(), wide=4),
}
