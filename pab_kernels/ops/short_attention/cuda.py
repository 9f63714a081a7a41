"""`short_attention` in CUDA: csrc/short_attention.cu, a warp for a head of up to 32 tokens, a block for up to 64.

Every row of q, k and v is read once, 16 bytes at a time, straight from the packed projection. It rounds where the
Triton kernel does. Heads of sequences do not mix: an infinity or NaN in v affects only its channel of its head.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from ..attention import Attention
from ..attention.options import QKNorm
from ..cuda_library import kernel, refuse
from ..dispatch import Outputs
from ..quantized import data_and_scale, refuse_four_bits
from ..strides import aligned

HEAD_DIMS = (64, 72, 96, 128)
MAX_HEADS = 2**31 - 1
"""Heads of sequences are counted in 32 bits."""

_NORM = "int {0}_kind, Tensor? {0}_weight, Tensor? {0}_bias, Tensor? {0}_rstd, float {0}_eps"
_kernel = kernel(
    "short_attention",
    f"Tensor q, Tensor k, Tensor v, float scale, {_NORM.format('q')}, {_NORM.format('k')}, Tensor? cos, Tensor? sin, "
    "bool interleaved, Tensor(a!) out, Tensor(b!)? stored, Tensor(c!)? stored_scale",
)


def refusal(call: Attention) -> str | None:
    """Why this kernel cannot serve; None where it can."""
    q, k, v = call[:3]
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"q is {q.dtype}; float16 and bfloat16 are supported"
    if q.shape[-1] not in HEAD_DIMS:
        return f"the head dimension is {q.shape[-1]}; 64, 72, 96 and 128 are supported"
    if (heads := prod(q.shape[:-3]) * q.shape[-2]) > MAX_HEADS:
        return f"there are {heads} heads of sequences; at most {MAX_HEADS} are supported"
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not aligned(t):
            return f"heads of {name} do not all begin at a multiple of 16 bytes; those of a packed projection do"
    return refuse_four_bits("store_dtype", call.store_dtype) or refuse(q)


def launch(call: Attention, outputs: Outputs) -> None:
    """Write the outputs."""
    (q, k, v, _, _, q_norm, k_norm, rope, _), (out, stored_out) = call, outputs
    if q.numel() == 0:
        return
    stored, stored_scale = data_and_scale(stored_out)
    cos, sin = (None, None) if rope is None or rope.cos.shape[-1] == 0 else (_vectors(rope.cos), _vectors(rope.sin))
    _kernel(
        q, k, v, call.log2_scale, *_norm_arguments(q_norm), *_norm_arguments(k_norm), cos, sin,
        rope is not None and rope.interleaved, out, stored, stored_scale,
    )  # fmt: skip


def _norm_arguments(norm: QKNorm | None) -> tuple[int, Tensor | None, Tensor | None, Tensor | None, float]:
    """Kind (`NormKind` in csrc/short_attention.h), weight, bias, reciprocal root and eps."""
    if norm is None:
        return 0, None, None, None, 0.0
    kind = 3 if norm.rstd is not None else 2 if norm.kind == "layer" else 1
    return kind, _vectors(norm.weight), _vectors(norm.bias), norm.rstd, norm.eps


def _vectors(t: Tensor | None) -> Tensor | None:
    """Contiguous and at a multiple of 16 bytes."""
    if t is None or (t.is_contiguous() and t.data_ptr() % 16 == 0):
        return t
    return t.clone(memory_format=torch.contiguous_format)
