"""The definition of `broadcast_residual` in pure torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from ..cached_outputs import CachedOutput, add_cached_outputs, add_in_float32
from ..norm import Norm, apply_norm
from ..registration import not_recorded


def broadcast_residual(
    x: Tensor, cached: Sequence[CachedOutput], norm: Norm | None, shift: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    x_new = add_cached_outputs(x, cached).contiguous() if cached else x
    if norm is None:
        return x_new, None
    y = apply_norm(x_new, norm)
    if scale is not None:
        y = y * (1 + scale)
    if shift is not None:
        y = y + shift
    return x_new, y.contiguous()


@not_recorded
def broadcast_residual_out(
    x: Tensor,
    cached: Sequence[CachedOutput],
    norm: Norm | None,
    shift: Tensor | None,
    scale: Tensor | None,
    x_out: Tensor | None,
    y_out: Tensor | None,
) -> None:
    x_new, y = broadcast_residual(x, cached, norm, shift, scale)
    if x_out is not None:
        x_out.copy_(x_new)
    if y_out is not None and y is not None:
        y_out.copy_(y)


def broadcast_residual_rounded_once(
    x: Tensor, cached: Sequence[CachedOutput], norm: Norm | None, shift: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`broadcast_residual` as the kernels round: everything in float32, the new x rounded once, and y, computed from it, rounded once."""
    x_new = add_in_float32(x.float(), cached).to(x.dtype)
    if norm is None:
        return x_new, None
    weight, bias = (None if t is None else t.float() for t in (norm.weight, norm.bias))
    y = apply_norm(x_new.float(), replace(norm, weight=weight, bias=bias))
    if scale is not None:
        y = y * (1 + scale.float())
    if shift is not None:
        y = y + shift.float()
    return x_new, y.to(x.dtype)
