"""The definition of `attention` in pure torch, on `F.scaled_dot_product_attention`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quantize import Quantized, quantize
from ..stored import copy_stored
from .layout import inverse, memory_order
from .options import QKNorm, Rope, normalise, rotate

MAX_BATCH = 65535
"""CUDA's kernels for it put the batch into a grid dimension that ends here."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None,
    key_lengths: Tensor | None,
    q_norm: QKNorm | None,
    k_norm: QKNorm | None,
    rope: Rope | None,
    store_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | Quantized | None]:
    order = memory_order(q)
    shape, same_length = q.shape, q.shape[-3] == k.shape[-3]
    if q_norm is not None:
        q = normalise(q, q_norm)
    if k_norm is not None:
        k = normalise(k, k_norm)
    if rope is not None:
        q, k = rotate(q, rope), rotate(k, rope) if same_length else k
    mask = valid = None
    if key_lengths is not None:
        lengths = key_lengths.reshape(*key_lengths.shape, *(1,) * (len(shape) - 2 - key_lengths.ndim))  # [*batch, 1] or [B, 1, 1]
        valid = (torch.arange(k.shape[-3], device=k.device) < lengths).expand(*shape[:-3], -1)  # [*batch, M]
        # What lies beyond the length is not read by a kernel: here, not even a NaN passes.
        k, v = (t.masked_fill(~valid[..., None, None], 0) for t in (k, v))
        mask = valid.flatten(0, -2)[:, None, None, :]
    out = _sdpa(_heads_first(q), _heads_first(k), _heads_first(v), mask, softmax_scale).transpose(1, 2).reshape(shape)
    if valid is not None:  # rows without keys: SDPA's kernels differ there
        out = out.masked_fill(~valid[..., :1, None, None], 0)
    ordered = out.permute(order).contiguous()
    back = inverse(order)
    stored: Tensor | Quantized | None = None
    if store_dtype == q.dtype:
        stored = ordered.clone().permute(back)
    elif store_dtype is not None:
        eight = quantize(ordered, store_dtype, group=shape[-1])
        stored = Quantized(eight.data.permute(back), eight.scale.permute(back), eight.group)
    return ordered.permute(back), stored


@torch.no_grad()
def attention_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None,
    key_lengths: Tensor | None,
    q_norm: QKNorm | None,
    k_norm: QKNorm | None,
    rope: Rope | None,
    store_dtype: torch.dtype | None,
    out: Tensor,
    stored_out: Tensor | Quantized | None,
) -> None:
    result, stored = attention(q, k, v, softmax_scale, key_lengths, q_norm, k_norm, rope, store_dtype)
    out.copy_(result)
    copy_stored(stored, stored_out)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """`F.scaled_dot_product_attention` of any batch."""
    if q.shape[0] > MAX_BATCH:
        parts = [slice(i, i + MAX_BATCH) for i in range(0, q.shape[0], MAX_BATCH)]
        return torch.cat([_sdpa(q[part], k[part], v[part], None if mask is None else mask[part], scale) for part in parts])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _heads_first(t: Tensor) -> Tensor:
    """`[*batch, N, H, D]` -> `[batch, H, N, D]`; a copy only where two batch dimensions do not merge."""
    return t.flatten(0, -4).transpose(1, 2)
