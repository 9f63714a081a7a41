"""The definition of `short_attention`: that of `attention` without key lengths."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention.options import QKNorm, Rope
from ..attention.reference import attention
from ..quantize import Quantized
from ..registration import not_recorded
from ..stored import copy_stored


def short_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None,
    q_norm: QKNorm | None,
    k_norm: QKNorm | None,
    rope: Rope | None,
    store_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | Quantized | None]:
    return attention(q, k, v, softmax_scale, None, q_norm, k_norm, rope, store_dtype)


@not_recorded
def short_attention_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None,
    q_norm: QKNorm | None,
    k_norm: QKNorm | None,
    rope: Rope | None,
    store_dtype: torch.dtype | None,
    out: Tensor,
    stored_out: Tensor | Quantized | None,
) -> None:
    result, stored = short_attention(q, k, v, softmax_scale, q_norm, k_norm, rope, store_dtype)
    out.copy_(result)
    copy_stored(stored, stored_out)
