"""`project_residual`: an output projection whose epilogue adds it to the residual stream and stores it."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, Literal, NamedTuple

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
from ..checks import check_activation, check_broadcasts, check_operand, none_of
from ..dispatch import Outputs, run
from ..flops import linear_flops
from ..quantized import Quantized, check_store_dtype, empty_quantized, stored_of
from ..registration import register
from . import reference

OP = "project_residual"


class ProjectResidual(NamedTuple):
    """A call of `project_residual`; its outputs are the new x and the slot. A `store_dtype` of None is x's."""

    a: Tensor
    weight: Tensor
    bias: Tensor | None
    x: Tensor
    gate: Tensor | None = None
    store: Literal["pre_gate", "post_gate"] | None = None
    store_dtype: torch.dtype | None = None
    cached: tuple[CachedOutput, ...] = ()

    @property
    def quantised(self) -> torch.dtype | None:
        """The dtype of the slot, if it is quantised."""
        return None if self.store is None or self.store_dtype in (None, self.x.dtype) else self.store_dtype

    def check(self, op: str) -> None:
        a, weight, bias, x, gate, store, store_dtype, cached = self
        check_activation(op, "x", x)
        check_activation(op, "a", a)
        check_operand(op, "a", a, (*x.shape[:-1], a.shape[-1]), x.dtype, x.device)
        check_operand(op, "weight", weight, (x.shape[-1], a.shape[-1]), x.dtype, x.device)
        if bias is not None:
            check_operand(op, "bias", bias, x.shape[-1:], x.dtype, x.device)
        if gate is not None:
            check_broadcasts(op, "gate", gate, x)
        if store not in (None, "pre_gate", "post_gate"):
            raise ValueError(none_of(op, "store", store, (None, "pre_gate", "post_gate")))
        check_cached(op, x, cached)
        check_store_dtype(op, store_dtype, x.dtype)
        if store is None and store_dtype is not None:
            given = f"store_dtype is {store_dtype} and store is None"
            raise ValueError(f"{op}: {given}; a dtype is supported with a store: pass store='pre_gate'")

    def flatten(self) -> tuple[Any, ...]:
        return *self[:6], self.store_dtype or self.x.dtype, *flatten_cached(self.cached)

    @classmethod
    def unflatten(cls, *flat: Any) -> ProjectResidual:
        a, weight, bias, x, gate, store, store_dtype, *cached = flat
        return cls(a, weight, bias, x, gate, store, store_dtype, unflatten_cached(x, *cached))

    def empty(self) -> Outputs:
        x = self.x
        x_out = torch.empty_like(x, memory_format=torch.contiguous_format)
        if self.quantised is not None:
            return x_out, empty_quantized(x.shape, self.quantised, device=x.device)
        return x_out, None if self.store is None else torch.empty_like(x_out)

    def pack(self, tensors: Sequence[Tensor]) -> Outputs:
        return tensors[0], stored_of(*tensors[1:], channels=self.x.shape[-1])


def project_residual(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    *,
    gate: Tensor | None = None,
    store: Literal["pre_gate", "post_gate"] | None = None,
    store_dtype: torch.dtype | None = None,
    slots: Sequence[Tensor | Quantized | Line] = (),
    gates: Sequence[Tensor | None] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | Quantized | None]:
    """Project a sublayer's output, gate it, add it and up to two cached outputs to the residual stream, and store it.

        1. p = a weight^T + bias
        2. g = gate * p; x = g + x
        3. for each slot: as in `broadcast_residual`
        4. stored = p ("pre_gate") or g ("post_gate"), quantised if store_dtype has 8 or 4 bits

    Every assignment rounds to x's dtype; the product accumulates as in `F.linear`. A quantised slot is made from the
    rounded p or g, and x gets p unquantised. For autograd and compiled graphs see `broadcast_residual`.

    Args:
        a: `[..., K]` in x's dtype, last dimension contiguous, leading dimensions as x.
        weight: `[C, K]` in x's dtype.
        bias: `[C]` in x's dtype, or None.
        x: `[..., C]`, float, last dimension contiguous; never written.
        gate: None or x's dtype, broadcasting to x with all C channels.
        store: which of the two to store, or None.
        store_dtype: x's dtype (also None), torch.int8, torch.float8_e4m3fn or torch.int4.
        slots, gates: as in `broadcast_residual`, up to two.
        backend: "auto", or the name of one.

    Returns:
        x (new, contiguous) and the slot: a contiguous tensor `[..., C]`, a `Quantized` in groups of 128 (32 for int4),
        or None.

    Raises:
        TypeError, ValueError: an argument is not supported.
        BackendError: the backend cannot serve the call.

    Example:
        >>> a, weight, x = torch.randn(2, 6, 32), torch.randn(64, 32), torch.randn(2, 6, 64)
        >>> x, slot = project_residual(a, weight, None, x, store="pre_gate", store_dtype=torch.int8)
    """
    cached = cached_outputs(OP, slots, gates, MOST_ADDED - 1)
    x_new, stored = run(OP, ProjectResidual(a, weight, bias, x, gate, store, store_dtype, cached), backend)
    return x_new, stored


def _flops(a: Sequence[int], weight: Sequence[int], *args: Any, **kwargs: Any) -> int:
    c_out, c_in = weight
    return linear_flops(prod(a[:-1]), c_in, c_out)


register(
    OP,
    ProjectResidual,
    "Tensor a, Tensor weight, Tensor? bias, Tensor x, Tensor? gate, str? store, ScalarType store_dtype, "
    f"{CACHED_SCHEMA}",
    reference.compute,
    _flops,
)
