"""What the kernels of short_attention must be: 16-byte accesses, and no more products than the head dimension asks
for."""

from __future__ import annotations

from itertools import product

from tests.csrc.compilation import Promise


def _promise(head_dim: int, groups: int, warps: int) -> Promise:
    """Of a kernel whose warps have that many groups of 8 queries, and keys by as many of all warps."""
    tail = head_dim % 32 // 8
    tiles, keys = groups // 2, groups * warps
    scores, values = tiles * keys, tiles * (keys // 2) * (head_dim // 8)
    counts = {"HMMA.16816": scores * (head_dim // 32 * 2) + values, "HMMA.1688.": scores * tail}
    narrow = ("LDG.E.U", "LDG.E.64", "STG.E.U8", *(() if tail else ("STG.E.U",)))
    return Promise(has=("LDG.E.128", "STG.E.128", "STG.E.64", "MOVM"), has_not=narrow, counts=counts, loads_first=True)


KERNELS = {
    f"short_attention_kernel<*, {head_dim}, {groups}, {warps}>": _promise(head_dim, groups, warps)
    for head_dim, (groups, warps) in product((64, 72, 96, 128), ((2, 1), (4, 1), (2, 4)))
}
