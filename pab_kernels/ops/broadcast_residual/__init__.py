"""`broadcast_residual`: add cached outputs to the residual stream, norm and modulate it, in one pass over memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...limits import MOST_ADDED
from ..cached_outputs import (
    CACHED_SCHEMA,
    CachedOutput,
    Line,
    cached_outputs,
    check_cached,
    flatten_cached,
    unflatten_cached,
)
from ..checks import check_activation, check_broadcasts, not_a
from ..dispatch import Outputs, run
from ..norm import NORM_SCHEMA, Norm, check_norm, flatten_norm, unflatten_norm
from ..quantized import Quantized
from ..registration import register
from . import reference

OP = "broadcast_residual"


class BroadcastResidual(NamedTuple):
    """A call of `broadcast_residual`.

    Its outputs are the new x where there are cached outputs, and y where there is a norm.
    """

    x: Tensor
    cached: tuple[CachedOutput, ...] = ()
    norm: Norm | None = None
    shift: Tensor | None = None
    scale: Tensor | None = None

    def check(self, op: str) -> None:
        x, cached, norm, shift, scale = self
        check_activation(op, "x", x)
        check_cached(op, x, cached)
        if norm is not None:
            if type(norm) is not Norm:
                raise not_a(op, "norm", norm, "pab_kernels.ops.Norm", "pass one or None")
            check_norm(op, "norm", norm, x.shape[-1:], x.dtype, x.device)
        elif not cached:
            supported = f"up to {MOST_ADDED} slots, a norm, or both are supported"
            raise ValueError(f"{op}: neither slots nor norm is given; {supported}: pass one")
        for name, t in (("shift", shift), ("scale", scale)):
            if t is not None and norm is None:
                raise ValueError(f"{op}: {name} is given without norm; it is supported with one: pass a norm")
            if t is not None:
                check_broadcasts(op, name, t, x)

    def flatten(self) -> tuple[Any, ...]:
        return self.x, *flatten_cached(self.cached), *flatten_norm(self.norm), self.shift, self.scale

    @classmethod
    def unflatten(cls, *flat: Any) -> BroadcastResidual:
        return cls(flat[0], unflatten_cached(flat[0], *flat[1:5]), unflatten_norm(*flat[5:9]), *flat[9:])

    def empty(self) -> Outputs:
        x, contiguous = self.x, torch.contiguous_format
        x_out = torch.empty_like(x, memory_format=contiguous) if self.cached else None
        return x_out, None if self.norm is None else torch.empty_like(x, memory_format=contiguous)

    def pack(self, tensors: Sequence[Tensor]) -> Outputs:
        return tuple(tensors) if len(tensors) == 2 else (tensors[0], None) if self.cached else (None, tensors[0])


def broadcast_residual(
    x: Tensor,
    slots: Sequence[Tensor | Quantized | Line] = (),
    *,
    gates: Sequence[Tensor | None] | None = None,
    norm: Norm | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Add up to three cached outputs to the residual stream, then norm and modulate it.

        1. for each slot: c = slot, dequantised, or the value on a `Line`; c = gate * c; x = c + x
        2. y = norm(x); y = y * (1 + scale); y = y + shift

    Every assignment rounds to x's dtype; a norm computes in float32. An absent gate, scale or shift is skipped. Memory
    traffic: (6 + 2n) bytes a channel for n bf16 slots, (6 + n) for 8-bit ones, (6 + 0.56 n) for 4-bit ones, 4 for none;
    a line reads two slots. The reference is plain torch and differentiable, in eager mode and in graphs compiled for a
    device without kernels, such as a CPU; other graphs are for inference.

    Args:
        x: `[..., C]`, float, last dimension contiguous.
        slots: up to three, each x's shape and dtype, a `Quantized` in groups of 128 (32 for int4), or a `Line` through
            two such.
        gates: one entry per slot: None or x's dtype, broadcasting to x with all C channels (per batch row, frame or
            token).
        norm: None for no y.
        shift, scale: as a gate.
        backend: "auto", or the name of one.

    Returns:
        x (new and contiguous; without slots x itself, which is never written) and y (contiguous), None without a norm.

    Raises:
        TypeError, ValueError: an argument is not supported.
        BackendError: the backend cannot serve the call.

    Example:
        >>> x, slot, gate = torch.randn(2, 6, 64), torch.randn(2, 6, 64), torch.randn(2, 1, 64)
        >>> x, y = broadcast_residual(x, [slot], gates=[gate], norm=Norm("layer"))
    """
    call = BroadcastResidual(x, cached_outputs(OP, slots, gates, MOST_ADDED), norm, shift, scale)
    x_new, y = run(OP, call, backend)
    return x if x_new is None else x_new, y


register(
    OP,
    BroadcastResidual,
    f"Tensor x, {CACHED_SCHEMA}, {NORM_SCHEMA.format('norm')}, Tensor? shift, Tensor? scale",
    reference.compute,
)
