"""The definition of `project_residual` in pure torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cached_outputs import CachedOutput, add_cached_outputs, add_in_float32
from ..quantize import GROUP, Quantized
from ..quantize.reference import quantize
from ..registration import not_recorded
from ..stored import copy_stored


def project_residual(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    gate: Tensor | None,
    store: str | None,
    store_dtype: torch.dtype,
    cached: Sequence[CachedOutput],
) -> tuple[Tensor, Tensor | Quantized | None]:
    p = F.linear(a, weight, bias)
    gated = p if gate is None else gate * p
    x_new = add_cached_outputs(gated + x, cached).contiguous()
    if store is None:
        return x_new, None
    stored = p if store == "pre_gate" else gated
    return x_new, stored.contiguous() if store_dtype == x.dtype else quantize(stored, store_dtype, GROUP)


@not_recorded
def project_residual_out(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    gate: Tensor | None,
    store: str | None,
    store_dtype: torch.dtype,
    cached: Sequence[CachedOutput],
    x_out: Tensor,
    stored_out: Tensor | Quantized | None,
) -> None:
    x_new, stored = project_residual(a, weight, bias, x, gate, store, store_dtype, cached)
    x_out.copy_(x_new)
    copy_stored(stored, stored_out)


def project_residual_rounded_once(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    gate: Tensor | None,
    store: str | None,
    store_dtype: torch.dtype,
    cached: Sequence[CachedOutput],
) -> tuple[Tensor, Tensor | Quantized | None]:
    """`project_residual` as the kernels round: everything in float32; p, what is stored of it and the new x round once each."""
    p = F.linear(a.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
    gated = p.float() if gate is None else gate.float() * p.float()
    x_new = add_in_float32(gated + x.float(), cached)
    if store is None:
        return x_new.to(x.dtype), None
    stored = p if store == "pre_gate" else gated.to(x.dtype)
    return x_new.to(x.dtype), stored.contiguous() if store_dtype == x.dtype else quantize(stored, store_dtype, GROUP)
