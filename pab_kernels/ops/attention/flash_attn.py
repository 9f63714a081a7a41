"""`attention` on the package flash-attn; norms, rotary embedding and what is stored are those of the reference."""

from __future__ import annotations

import torch
from flash_attn import flash_attn_func  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

from ..quantize import Quantized
from ..registration import not_recorded
from ..stored import copy_stored
from .layout import memory_order
from .options import QKNorm, Rope
from .reference import finished, in_parts, prepared


def refusal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None,
    key_lengths: Tensor | None,
    q_norm: QKNorm | None,
    k_norm: QKNorm | None,
    rope: Rope | None,
    store_dtype: torch.dtype | None,
) -> str | None:
    """Why flash-attn cannot serve; None where it can."""
    if q.device.type != "cuda":
        return f"flash-attn runs on CUDA devices; the tensors are on {q.device}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"q is {q.dtype}; float16 and bfloat16 are supported"
    if q.shape[-1] % 8:
        return f"the head dimension is {q.shape[-1]}; multiples of 8 are supported"
    if softmax_scale is not None and softmax_scale < 0:  # its maximum is that of the scores before they are scaled
        return f"softmax_scale is {softmax_scale}; one that is not negative is supported"
    if key_lengths is not None:
        return "key_lengths is given; flash-attn takes packed keys, and to pack them the lengths would have to be read on the host"
    return None


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

    def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_func(q, k, v, softmax_scale=softmax_scale)

    if q.numel() == 0:
        return finished(torch.empty_like(q), order, store_dtype)
    out = in_parts(flash, *(t.flatten(0, -4) for t in (q, k, v)))  # [batch, N, H, D], copied where two batch dimensions do not merge
    return finished(out.reshape(shape), order, store_dtype)


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
