"""Launches of the attention kernels at the geometries of real models, each with the tiles of its architecture."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pab_kernels.ops import QKNorm, Rope
from pab_kernels.ops.attention import Attention
from pab_kernels.ops.attention.prepare import prepare
from pab_kernels.ops.attention.triton import attend_in_tiles, tiles
from tests.kernels.compilation import Launch


def _meta(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(sizes, dtype=dtype, device="meta")


def _packed(*sizes: int) -> list[Tensor]:
    """q, k, v in spatial order from `[*batch, S, 3, H, D]`."""
    whole = _meta(*sizes)
    return [whole.select(-3, i) for i in range(3)]


def _attend(
    arch: int, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None, store: torch.dtype | None = None
) -> None:
    chosen = tiles(q.shape[-3], q.shape[-1], divmod(arch, 10))
    call = Attention(q, k, v, key_lengths=lengths, store_dtype=store)
    attend_in_tiles(call, call.empty(), chosen)


def _prepare(x: Tensor, interleaved: bool) -> None:
    """RMS norm and rotary embedding."""
    tokens, _, head_dim = x.shape[-3:]
    tables = (_meta(tokens, head_dim // 2, dtype=torch.float32) for _ in range(2))
    prepare(x, QKNorm(weight=_meta(head_dim)), Rope(*tables, interleaved))


def _attend_and_store(arch: int, *sizes: int, dtype: torch.dtype = torch.int8) -> None:
    """Packed attention that keeps a quantised copy."""
    _attend(arch, *_packed(*sizes), store=dtype)


# By name: narrowest access in bytes, and the call. The last 16 channels of a tile of 64 keys are 8 bytes a lane, of 32
# keys 4; a scale a head is 4.
CALLS: dict[str, tuple[int, Callable[[int], None]]] = {
    "open_sora_480p": (8, lambda arch: _attend(arch, *_packed(2, 15, 1590, 3, 16, 72))),
    "open_sora_cross_lengths": (
        8,
        lambda arch: _attend(
            arch, _meta(2, 15 * 1590, 16, 72), *_packed(2, 300, 3, 16, 72)[1:], _meta(2, dtype=torch.int64)
        ),
    ),
    "latte": (8, lambda arch: _attend(arch, *(_meta(32, 1024, 16, 72, dtype=torch.float16) for _ in range(3)))),
    "open_sora_plan_int8": (4, lambda arch: _attend_and_store(arch, 1, 28 * 900, 3, 24, 96)),
    "open_sora_480p_int4": (2, lambda arch: _attend_and_store(arch, 2, 15, 1590, 3, 16, 72, dtype=torch.int4)),
    "cogvideox": (16, lambda arch: _attend(arch, *(_meta(2, 17776, 48, 64) for _ in range(3)))),
    "flux": (16, lambda arch: _attend(arch, *_packed(1, 4608, 3, 24, 128))),
    "head_40": (8, lambda arch: _attend(arch, *_packed(2, 4096, 3, 8, 40))),
    "head_112": (4, lambda arch: _attend(arch, *_packed(2, 1024, 3, 16, 112))),
    "head_80_int8": (4, lambda arch: _attend_and_store(arch, 2, 4096, 3, 8, 80)),
    "few_queries_88_int8": (2, lambda arch: _attend_and_store(arch, 2, 1024, 60, 3, 8, 88)),
    "few_queries_128_int8": (4, lambda arch: _attend_and_store(arch, 2, 1024, 60, 3, 8, 128)),
    "few_queries": (16, lambda arch: _attend(arch, *_packed(2, 1024, 60, 3, 16, 72))),
}

LAUNCHES = {
    f"{name}_sm{arch}": Launch(partial(call, arch), dots=True, pipelined=True, wide=wide, archs=(arch,))
    for name, (wide, call) in CALLS.items()
    for arch in (80, 90, 100)
} | {
    "prepare_open_sora_half_split": Launch(lambda: _prepare(_packed(2, 15, 3600, 3, 16, 72)[0], False), wide=8),
    "prepare_flux_interleaved": Launch(lambda: _prepare(_packed(1, 4608, 3, 24, 128)[0], True)),
}
