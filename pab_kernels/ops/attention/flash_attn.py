"""`attention` on the package flash-attn; norms, rotary embedding and what is stored are those of the reference."""

from __future__ import annotations

import torch
from flash_attn import flash_attn_func  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

from ..dispatch import Outputs
from . import Attention
from .reference import finished, in_parts, prepared


def refusal(call: Attention) -> str | None:
    """Why flash-attn cannot serve; None where it can."""
    q, softmax_scale = call.q, call.softmax_scale
    if q.device.type != "cuda":
        return f"flash-attn runs on CUDA devices; the tensors are on {q.device}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"q is {q.dtype}; float16 and bfloat16 are supported"
    if q.shape[-1] % 8:
        return f"the head dimension is {q.shape[-1]}; multiples of 8 are supported"
    if softmax_scale is not None and softmax_scale < 0:  # its maximum is that of the scores before they are scaled
        return f"softmax_scale is {softmax_scale}; one that is not negative is supported"
    if call.key_lengths is not None:
        return (
            "key_lengths is given; flash-attn takes packed keys, and to pack them the lengths would have to be read on "
            "the host"
        )
    return None


def compute(call: Attention) -> Outputs:
    q, k, v = prepared(call)

    def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_func(q, k, v, softmax_scale=call.softmax_scale)

    if q.numel() == 0:
        return finished(call, torch.empty_like(q))
    out = in_parts(
        flash, *(t.flatten(0, -4) for t in (q, k, v))
    )  # [batch, N, H, D], copied where two batch dimensions do not merge
    return finished(call, out.reshape(q.shape))
