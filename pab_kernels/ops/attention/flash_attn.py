"""`attention` on the package flash-attn, with norms, rotary embedding and stored copy of the reference."""

from __future__ import annotations

import torch
from flash_attn import flash_attn_func  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

from ..dispatch import Outputs
from . import Attention
from .options import refuse_heads
from .reference import finished, in_parts, prepared


def refusal(call: Attention) -> str | None:
    """Why flash-attn cannot serve; None where it can."""
    q, softmax_scale = call.q, call.softmax_scale
    if q.device.type != "cuda":
        return f"flash-attn runs on CUDA devices; the tensors are on {q.device}"
    if softmax_scale is not None and softmax_scale < 0:  # it takes the maximum before it scales
        return f"softmax_scale is {softmax_scale}; 0 or more is supported"
    if call.key_lengths is not None:
        return "key_lengths is given; flash-attn takes packed keys, and packing would read the lengths on the host"
    return refuse_heads(q)


def compute(call: Attention) -> Outputs:
    q, k, v = prepared(call)

    def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_func(q, k, v, softmax_scale=call.softmax_scale)

    if q.numel() == 0:
        return finished(call, torch.empty_like(q))
    # [batch, N, H, D], copied where two batch dimensions do not merge
    out = in_parts(flash, *(t.flatten(0, -4) for t in (q, k, v)))
    return finished(call, out.reshape(q.shape))
