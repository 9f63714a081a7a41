"""Attention in float64, of as many queries as fit: the truth that the attention benchmarks are checked against."""

from __future__ import annotations

import torch
from torch import Tensor

SCORES = 2**27
"""Scores of one batch row that are held at once: a gigabyte."""


def checked_queries(queries: int, keys: int, heads: int) -> Tensor:
    """Which queries are checked: all where their scores are at most `SCORES`, else as many, evenly from the first to
    the last."""
    count = min(queries, max(2, SCORES // (heads * keys)))
    return torch.linspace(0, queries - 1, count, dtype=torch.float64).round().long()


def exact_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> Tensor:
    """`softmax(D ** -0.5 q k^T) v` in float64 over the first `lengths` keys: `[batch, N, H, D]`, some batch rows at a
    time."""
    out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    rows = max(1, SCORES // (q.shape[1] * k.shape[1] * q.shape[2]))
    for first in range(0, len(q), rows):
        some = slice(first, first + rows)
        queries, keys, values = (t[some].double().transpose(1, 2) for t in (q, k, v))  # [rows, H, N, D]
        scores = queries @ keys.mT * q.shape[-1] ** -0.5
        if lengths is not None:
            beyond = torch.arange(k.shape[1], device=k.device) >= lengths[some, None]  # [rows, M]
            scores = scores.masked_fill(beyond[:, None, None], -torch.inf)
        out[some] = (scores.softmax(-1) @ values).transpose(1, 2)
    return out
