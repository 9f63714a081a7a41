"""Launches of the project_residual kernel at the geometries of real models, each with the tiles of its architecture."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pab_kernels.ops import Quantized, empty_quantized
from pab_kernels.ops.cached_outputs import Line
from pab_kernels.ops.project_residual import ProjectResidual
from pab_kernels.ops.project_residual.triton import project_in_tiles, tile
from tests.kernels.compilation import Launch

MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}
BF16, FP16, FP32, INT8, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.float8_e4m3fn
INT4 = torch.int4


def _meta(*sizes: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(sizes, dtype=dtype, device="meta")


def _kept(*sizes: int, dtype: torch.dtype, own: torch.dtype) -> Tensor | Quantized:
    """A slot in the activations' own dtype, or quantised."""
    return _meta(*sizes, dtype=dtype) if dtype == own else empty_quantized(sizes, dtype, device="meta")


def _project(
    arch: int, channels: int, tokens: int, store: Any = None, store_dtype: torch.dtype | None = None,
    slots: tuple[torch.dtype, ...] = (), dtype: torch.dtype = BF16, gate: str = "row", lines: bool = False,
    bias: bool = True,
) -> None:  # fmt: skip
    """x `[2, tokens, C]` and a of as many channels, a gate of each batch row or token, slots, or lines, with the gate
    of a row."""
    x, row = _meta(2, tokens, channels, dtype=dtype), _meta(2, 1, channels, dtype=dtype)
    weight, one = _meta(channels, channels, dtype=dtype), _meta(1, dtype=FP32)
    reads = [_kept(*x.shape, dtype=kept, own=dtype) for kept in slots]
    cached = tuple((Line(slot, slot, one) if lines else slot, row) for slot in reads)
    stored = None if store is None else _kept(*x.shape, dtype=store_dtype or dtype, own=dtype)
    chosen = tile(2 * tokens, channels, x.element_size(), divmod(arch, 10), MULTIPROCESSORS[arch])
    gates = {"row": row, "token": x}
    call = ProjectResidual(x, weight, weight[0] if bias else None, x, gates[gate], store, store_dtype, cached)
    project_in_tiles(call, (x, stored), chosen, MULTIPROCESSORS[arch])


OPEN_SORA = {"channels": 1152, "tokens": 15 * 1590}

# The bias is 4 bytes a lane, 2 channels of a tensor core's fragment; so are scales.
CALLS: dict[str, Callable[[int], None]] = {
    "open_sora": partial(_project, **OPEN_SORA),
    "open_sora_no_bias_1_slot": partial(_project, **OPEN_SORA, store="pre_gate", slots=(BF16,), bias=False),
    "open_sora_store": partial(_project, **OPEN_SORA, store="pre_gate"),
    "open_sora_post_gate_int8_2_mixed_slots": partial(
        _project, **OPEN_SORA, store="post_gate", store_dtype=INT8, slots=(BF16, INT8)
    ),
    "latte_fp16_store_2_lines": partial(
        _project, channels=1152, tokens=16 * 1024, store="pre_gate", slots=(FP16, FP16), dtype=FP16, lines=True
    ),
    "latte_fp16_line": partial(_project, channels=1152, tokens=16 * 1024, slots=(FP16,), dtype=FP16, lines=True),
    "open_sora_store_int8_int8_line": partial(
        _project, **OPEN_SORA, store="pre_gate", store_dtype=INT8, slots=(INT8,), lines=True
    ),
    "open_sora_store_int4": partial(_project, **OPEN_SORA, store="pre_gate", store_dtype=INT4),
    "open_sora_post_gate_int4_int4_line": partial(
        _project, **OPEN_SORA, store="post_gate", store_dtype=INT4, slots=(INT4,), lines=True
    ),
    "open_sora_few_tokens": partial(_project, channels=1152, tokens=300, store="pre_gate"),
    "cogvideox_3072_store": partial(_project, channels=3072, tokens=17776, store="pre_gate", gate="token"),
    "wan_5120_post_gate_int8": partial(_project, channels=5120, tokens=32760, store="post_gate", store_dtype=INT8),
    "ragged_1160_int8_2_int8_slots": partial(
        _project, channels=1160, tokens=4096, store="post_gate", store_dtype=INT8, slots=(INT8, INT8), gate="token"
    ),
}
FP8_CALLS: dict[str, Callable[[int], None]] = {  # float8 needs sm_89
    "open_sora_fp8_2_mixed_slots": partial(_project, **OPEN_SORA, store="pre_gate", store_dtype=FP8, slots=(BF16, FP8)),
}
FP32_CALLS: dict[str, Callable[[int], None]] = {  # exact, on no tensor cores
    "float32": partial(_project, **OPEN_SORA, dtype=FP32),
    "float32_post_gate_int8_2_mixed_slots": partial(
        _project, **OPEN_SORA, dtype=FP32, store="post_gate", store_dtype=INT8, slots=(FP32, INT8)
    ),
}

LAUNCHES = {
    f"{name}_sm{arch}": Launch(
        partial(call, arch),
        dots=name not in FP32_CALLS,
        pipelined=True,
        wide=16 if "no_bias" in name else 2 if "int4" in name else 4,  # scales of int4 are 2 bytes
        archs=(arch,),
    )
    for name, call in {**CALLS, **FP8_CALLS, **FP32_CALLS}.items()
    for arch in (80, 90, 100)
    if arch > 80 or name not in FP8_CALLS
}
