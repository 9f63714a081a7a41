"""Launches of the short attention kernel at the geometries of real models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pab_kernels.ops import QKNorm, Rope
from pab_kernels.ops.short_attention import ShortAttention
from pab_kernels.ops.short_attention.triton import launch
from tests.kernels.compilation import Launch


def _attend(
    batch: int, frames: int, places: int, heads: int, head_dim: int, dtype: torch.dtype = torch.bfloat16,
    norm: str | None = None, rope: str | None = None, across: bool = False, store: torch.dtype | None = None,
) -> None:  # fmt: skip
    """One call in temporal order, from `[B, T, S, 3, H, D]`; across: a norm across heads."""

    def meta(*sizes: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    whole = meta(batch, frames, places, 3, heads, head_dim)
    q, k, v = (whole.select(3, i).transpose(1, 2) for i in range(3))
    options: dict[str, Any] = {}
    if norm is not None:
        weight = meta(heads, head_dim) if across else meta(head_dim)
        rstd = meta(*q.shape[:-2], dtype=torch.float32) if across else None
        options |= dict.fromkeys(
            ("q_norm", "k_norm"), QKNorm(norm, weight, meta(head_dim) if norm == "layer" else None, rstd=rstd)
        )
    if rope is not None:
        options["rope"] = Rope(
            *(meta(frames, head_dim // 2, dtype=torch.float32) for _ in range(2)), interleaved=rope == "interleaved"
        )
    call = ShortAttention(q, k, v, **options, store_dtype=store)
    launch(call, call.empty())


CALLS: dict[str, tuple[int, tuple[int, ...], dict[str, Any]]] = {  # by name: the narrowest access, sizes, options
    "open_sora_480p_2s": (16, (2, 15, 1590, 16, 72), {"norm": "rms", "rope": "interleaved"}),
    "open_sora_480p_4s_half_split": (
        8,
        (2, 30, 1590, 16, 72),
        {"norm": "rms", "rope": "half-split"},
    ),  # the second half begins at 36
    "plain_72": (16, (2, 15, 1590, 16, 72), {}),
    "latte_fp16": (16, (2, 16, 1024, 16, 72), {"dtype": torch.float16}),
    "int8": (4, (2, 15, 1590, 16, 72), {"store": torch.int8}),  # a scale a head is 4 bytes
    "int4": (2, (2, 15, 1590, 16, 72), {"store": torch.int4}),  # and of 32 channels 2
    "head_40": (16, (2, 16, 1024, 8, 40), {}),
    "head_64_one_sequence": (16, (2, 64, 1590, 16, 64), {"norm": "rms", "rope": "half-split"}),
    "head_96_layer_norm": (
        8,
        (2, 17, 1024, 24, 96),
        {"norm": "layer", "rope": "half-split"},
    ),  # 16 channels of 64 rows, over 8 warps
    "head_112": (
        8,
        (2, 16, 1024, 16, 112),
        {"norm": "rms", "rope": "interleaved"},
    ),  # 16 channels of 64 rows, over 8 warps
    "head_128_across_heads": (
        4,
        (1, 21, 1560, 24, 128),
        {"norm": "rms", "across": True, "rope": "interleaved"},
    ),  # a root a token
}

LAUNCHES = {
    name: Launch(lambda sizes=sizes, options=options: _attend(*sizes, **options), dots=True, wide=wide)
    for name, (wide, sizes, options) in CALLS.items()
}
