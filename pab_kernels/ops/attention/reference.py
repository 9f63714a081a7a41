"""The definition of `attention` in pure torch, on `F.scaled_dot_product_attention`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import Outputs
from ..quantize.reference import quantize
from ..quantized import Quantized, head_group
from .layout import inverse, memory_order
from .options import normalise, rotate

if TYPE_CHECKING:
    from . import Attention

MAX_BATCH = 65535
"""CUDA kernels of SDPA put the batch into a grid dimension that ends here."""


def compute(call: Attention) -> Outputs:
    q, k, v = prepared(call)
    mask = valid = None
    if call.key_lengths is not None:
        valid = _valid_keys(k, call.key_lengths)
        # Kernels do not read keys beyond the length: here, even a NaN there must have no effect.
        k, v = (t.masked_fill(~valid[..., None, None], 0) for t in (k, v))
        mask = valid.flatten(0, -2)[:, None, None, :]

    def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=call.softmax_scale)

    out = in_parts(sdpa, _heads_first(q), _heads_first(k), _heads_first(v), mask).transpose(1, 2).reshape(call.q.shape)
    if valid is not None:  # SDPA's kernels differ in rows without keys
        out = out.masked_fill(~valid[..., :1, None, None], 0)
    return finished(call, out)


def prepared(call: Attention) -> tuple[Tensor, Tensor, Tensor]:
    """q and k with their norms and rotation, and v."""
    q, k, v, rope = call.q, call.k, call.v, call.rope
    same_length = q.shape[-3] == k.shape[-3]
    if call.q_norm is not None:
        q = normalise(q, call.q_norm)
    if call.k_norm is not None:
        k = normalise(k, call.k_norm)
    if rope is not None:
        q, k = rotate(q, rope), rotate(k, rope) if same_length else k
    return q, k, v


def finished(call: Attention, out: Tensor) -> Outputs:
    """The output with its dimensions in q's order in memory, and its stored copy."""
    order, store_dtype = memory_order(call.q), call.store_dtype
    ordered, back = out.permute(order).contiguous(), inverse(order)
    if store_dtype is None:
        return ordered.permute(back), None
    if store_dtype == out.dtype:
        return ordered.permute(back), ordered.clone().permute(back)
    q = quantize(ordered, store_dtype, head_group(store_dtype, out.shape[-1]))
    return ordered.permute(back), Quantized(q.data.permute(back), q.scale.permute(back), q.group, q.channels)


def in_parts(function: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    """The function of tensors with one batch dimension of any size, on `MAX_BATCH` rows at a time."""
    batch = next(t.shape[0] for t in tensors if t is not None)
    if batch <= MAX_BATCH:
        return function(*tensors)
    starts = range(0, batch, MAX_BATCH)
    return torch.cat([function(*(None if t is None else t[i : i + MAX_BATCH] for t in tensors)) for i in starts])


def online_attention(call: Attention, step: int) -> Outputs:
    """`attention` with a running maximum, `step` keys at a time, rounding where the Triton kernel does.

        1. norm and rotation as in `attention`; then, for each step, in float32:
        2. s = softmax_scale log2(e) q k^T;  m' = max(m, max s);  p = 2^(s - m')
        3. l = 2^(m - m') l + sum p;  o = 2^(m - m') o + round(p) v
        4. out = round(o / l), 0 where there are no keys or all scores are -inf; stored as in `attention`

    Algorithm 1 of FlashAttention-2 (arXiv 2307.08691), for one tile of queries.
    """
    shape, dtype = call.q.shape, call.q.dtype
    q, k, v = prepared(call)
    every = torch.full(shape[:-3], k.shape[-3], device=k.device)
    valid = _valid_keys(k, every if call.key_lengths is None else call.key_lengths)
    k, v = (t.masked_fill(~valid[..., None, None], 0) for t in (k, v))
    q, k, v = (_heads_first(t).float() for t in (q, k, v))  # [batch, H, N, D]
    mask = valid.flatten(0, -2)[:, None, None, :]  # [batch, 1, 1, M]
    peak = q.new_full((*q.shape[:-1], 1), torch.finfo(torch.float32).min)
    total, out = torch.zeros_like(peak), torch.zeros_like(q)
    for start in range(0, k.shape[-2], step):
        here = slice(start, start + step)
        scores = (q @ k[..., here, :].mT * call.log2_scale).masked_fill(~mask[..., here], -torch.inf)
        new_peak = peak.maximum(scores.amax(-1, keepdim=True))
        p, decay = (scores - new_peak).exp2(), (peak - new_peak).exp2()
        total = total * decay + p.sum(-1, keepdim=True)
        out = out * decay + p.to(dtype).float() @ v[..., here, :]
        peak = new_peak
    out = (out / total.masked_fill(total == 0, 1)).to(dtype).transpose(1, 2).reshape(shape)
    return finished(call, out.masked_fill(~valid[..., :1, None, None], 0))


def _valid_keys(k: Tensor, key_lengths: Tensor) -> Tensor:
    """Which keys are within the lengths, `[*batch, M]`."""
    lengths = key_lengths[(...,) + (None,) * (k.ndim - 2 - key_lengths.ndim)]  # [*batch, 1] or [B, 1, 1]
    return (torch.arange(k.shape[-3], device=k.device) < lengths).expand(*k.shape[:-3], -1)


def _heads_first(t: Tensor) -> Tensor:
    """`[*batch, N, H, D]` -> `[batch, H, N, D]`; a copy only where two batch dimensions do not merge."""
    return t.flatten(0, -4).transpose(1, 2)
