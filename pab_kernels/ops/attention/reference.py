"""The definition of `attention` in pure torch, on `F.scaled_dot_product_attention`."""

from __future__ import annotations

from collections.abc import Callable
from math import log

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quantize import Quantized
from ..quantize.reference import quantize
from ..registration import not_recorded
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
    order, shape = memory_order(q), q.shape
    q, k = prepared(q, k, q_norm, k_norm, rope)
    mask = valid = None
    if key_lengths is not None:
        valid = _valid_keys(k, key_lengths)
        # What lies beyond the length is not read by a kernel: here, not even a NaN passes.
        k, v = (t.masked_fill(~valid[..., None, None], 0) for t in (k, v))
        mask = valid.flatten(0, -2)[:, None, None, :]

    def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=softmax_scale)

    out = in_parts(sdpa, _heads_first(q), _heads_first(k), _heads_first(v), mask).transpose(1, 2).reshape(shape)
    if valid is not None:  # rows without keys: SDPA's kernels differ there
        out = out.masked_fill(~valid[..., :1, None, None], 0)
    return finished(out, order, store_dtype)


@not_recorded
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


def prepared(q: Tensor, k: Tensor, q_norm: QKNorm | None, k_norm: QKNorm | None, rope: Rope | None) -> tuple[Tensor, Tensor]:
    """q and k with their norms and rotation."""
    same_length = q.shape[-3] == k.shape[-3]
    if q_norm is not None:
        q = normalise(q, q_norm)
    if k_norm is not None:
        k = normalise(k, k_norm)
    if rope is not None:
        q, k = rotate(q, rope), rotate(k, rope) if same_length else k
    return q, k


def finished(out: Tensor, order: list[int], store_dtype: torch.dtype | None) -> tuple[Tensor, Tensor | Quantized | None]:
    """The output with its dimensions in this order in memory, and what is stored of it."""
    ordered = out.permute(order).contiguous()
    back = inverse(order)
    stored: Tensor | Quantized | None = None
    if store_dtype == out.dtype:
        stored = ordered.clone().permute(back)
    elif store_dtype is not None:
        eight = quantize(ordered, store_dtype, group=out.shape[-1])
        stored = Quantized(eight.data.permute(back), eight.scale.permute(back), eight.group)
    return ordered.permute(back), stored


def in_parts(function: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    """The function of tensors of one batch, of any size: of `MAX_BATCH` at a time."""
    batch = next(t.shape[0] for t in tensors if t is not None)
    if batch <= MAX_BATCH:
        return function(*tensors)
    starts = range(0, batch, MAX_BATCH)
    return torch.cat([function(*(None if t is None else t[i : i + MAX_BATCH] for t in tensors)) for i in starts])


def online_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None,
    key_lengths: Tensor | None,
    q_norm: QKNorm | None,
    k_norm: QKNorm | None,
    rope: Rope | None,
    store_dtype: torch.dtype | None,
    step: int,
) -> tuple[Tensor, Tensor | Quantized | None]:
    """`attention` with a running maximum, `step` keys at a time, rounding where the Triton kernel does.

        1. norm and rotation as in `attention`; then, for each step, in float32:
        2. s = softmax_scale log2(e) q k^T;  m' = max(m, max s);  p = 2^(s - m')
        3. l = 2^(m - m') l + sum p;  o = 2^(m - m') o + round(p) v
        4. out = round(o / l), 0 where there are no keys or all scores are -inf; stored as in `attention`

    Algorithm 1 of FlashAttention-2 (arXiv 2307.08691), for one tile of queries.
    """
    order, shape, dtype = memory_order(q), q.shape, q.dtype
    scale = (shape[-1] ** -0.5 if softmax_scale is None else softmax_scale) / log(2)
    q, k = prepared(q, k, q_norm, k_norm, rope)
    valid = _valid_keys(k, torch.full(shape[:-3], k.shape[-3], device=k.device) if key_lengths is None else key_lengths)
    k, v = (t.masked_fill(~valid[..., None, None], 0) for t in (k, v))
    q, k, v = (_heads_first(t).float() for t in (q, k, v))  # [batch, H, N, D]
    mask = valid.flatten(0, -2)[:, None, None, :]  # [batch, 1, 1, M]
    peak, total, out = q.new_full((*q.shape[:-1], 1), torch.finfo(torch.float32).min), q.new_zeros(*q.shape[:-1], 1), torch.zeros_like(q)
    for start in range(0, k.shape[-2], step):
        here = slice(start, start + step)
        scores = (q @ k[..., here, :].mT * scale).masked_fill(~mask[..., here], -torch.inf)
        new_peak = peak.maximum(scores.amax(-1, keepdim=True))
        p, decay = (scores - new_peak).exp2(), (peak - new_peak).exp2()
        total = total * decay + p.sum(-1, keepdim=True)
        out = out * decay + p.to(dtype).float() @ v[..., here, :]
        peak = new_peak
    out = (out / total.masked_fill(total == 0, 1)).to(dtype).transpose(1, 2).reshape(shape)
    return finished(out.masked_fill(~valid[..., :1, None, None], 0), order, store_dtype)


def _valid_keys(k: Tensor, key_lengths: Tensor) -> Tensor:
    """Which keys are within the lengths, `[*batch, M]`."""
    lengths = key_lengths.reshape(*key_lengths.shape, *(1,) * (k.ndim - 2 - key_lengths.ndim))  # [*batch, 1] or [B, 1, 1]
    return (torch.arange(k.shape[-3], device=k.device) < lengths).expand(*k.shape[:-3], -1)


def _heads_first(t: Tensor) -> Tensor:
    """`[*batch, N, H, D]` -> `[batch, H, N, D]`; a copy only where two batch dimensions do not merge."""
    return t.flatten(0, -4).transpose(1, 2)
