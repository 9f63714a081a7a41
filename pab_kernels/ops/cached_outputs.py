"""The terms that an operation adds to the residual stream: slots, or lines through two slots, each with a gate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..limits import MOST_ADDED
from .checks import check_broadcasts, check_kind, check_operand, not_a
from .dequantize.reference import dequantize
from .quantized import Quantized, check_quantized, data_and_scale, stored_of


@dataclass(frozen=True, eq=False)
class Line:
    """The straight line through two outputs, extended beyond the newest, as one term of an operation.

        value = newest + weight * (newest - before)

    In float32 (float64 where the operation's tensors are) and rounded once, like a dequantised slot: no intermediate
    result overflows, and where both outputs are equal the value is exactly theirs.

    Args:
        newest, before: `[..., C]`, each a tensor or a `Quantized`.
        weight: one float32 number on their device, shape `()` or `(1,)`.

    Example:
        >>> from pab_kernels.ops import broadcast_residual
        >>> newest, before, weight = torch.ones(1, 2), torch.zeros(1, 2), torch.tensor(0.5)
        >>> broadcast_residual(torch.zeros(1, 2), [Line(newest, before, weight)])[0]
        tensor([[1.5000, 1.5000]])
    """

    newest: Tensor | Quantized
    before: Tensor | Quantized
    weight: Tensor

    @property
    def shape(self) -> torch.Size:
        """Shape of the value, `[..., C]`."""
        return self.newest.shape


CachedOutput = tuple[Tensor | Quantized | Line, Tensor | None]
"""One term: a slot or a line `[..., C]`, and the gate that broadcasts to it."""

CACHED_SCHEMA = "Tensor?[] slots, Tensor?[] slot_scales, Tensor?[] gates, Tensor?[] weights"

_LISTS = (list, tuple)
_NO_GATES = (None,) * MOST_ADDED


def cached_outputs(op: str, slots: Sequence[Any], gates: Sequence[Any] | None, most: int) -> tuple[CachedOutput, ...]:
    """The terms of a call, whose entries are not checked yet."""
    if (
        isinstance(slots, _LISTS)
        and len(slots) <= most
        and (gates is None or (isinstance(gates, _LISTS) and len(gates) == len(slots)))
    ):
        return tuple(zip(slots, gates or _NO_GATES, strict=False)) if slots else ()
    for name, values in (("slots", slots), ("gates", gates)):
        if not isinstance(values, _LISTS) and (values is not None or name == "slots"):
            raise not_a(op, name, values, "a list or tuple", "put it into one")
        if values is not None and len(values) != len(slots):
            supported = f"one entry (or None) per slot, {len(slots)}, is supported"
            raise ValueError(f"{op}: {name} has length {len(values)}; {supported}: match them")
    advice = "add the others with broadcast_residual first"
    raise ValueError(f"{op}: slots has length {len(slots)}; up to {most} are supported: {advice}")


def check_cached(op: str, x: Tensor, cached: Sequence[CachedOutput]) -> None:
    """Slots, lines and gates that fit x."""
    for i, (slot, gate) in enumerate(cached):
        if gate is not None:
            check_broadcasts(op, f"gates[{i}]", gate, x)
        if isinstance(slot, Line):
            _check_slot(op, f"slots[{i}].newest", slot.newest, x)
            _check_slot(op, f"slots[{i}].before", slot.before, x)
            _check_weight(op, f"slots[{i}].weight", slot.weight, x)
        else:
            _check_slot(op, f"slots[{i}]", slot, x)


def _check_slot(op: str, name: str, slot: Any, x: Tensor) -> None:
    if isinstance(slot, Quantized):
        check_quantized(op, name, slot, x.shape, None, x.device)
    else:
        check_operand(op, name, slot, x.shape, x.dtype, x.device)


def _check_weight(op: str, name: str, weight: Any, x: Tensor) -> None:
    check_kind(op, name, weight, torch.float32, x.device)
    if weight.numel() != 1 or weight.ndim > 1:
        advice = "pass one number on the device"
        raise ValueError(f"{op}: {name} has shape {tuple(weight.shape)}; () and (1,) are supported: {advice}")


def flatten_cached(cached: Sequence[CachedOutput]) -> tuple[tuple[Any, ...], ...]:
    """Slots, their scales, gates and weights, as `CACHED_SCHEMA` and kernels take them.

    There is a slot for each term and, where any term is a line, after all of these the previous output of each or None.
    """
    lines = [slot if isinstance(slot, Line) else None for slot, _ in cached]
    slots: list[Any] = [slot.newest if isinstance(slot, Line) else slot for slot, _ in cached]
    if any(line is not None for line in lines):
        slots += [line and line.before for line in lines]
    data, scales = zip(*map(data_and_scale, slots), strict=True) if slots else ((), ())
    return data, scales, tuple(gate for _, gate in cached), tuple(line and line.weight for line in lines)


def unflatten_cached(
    x: Tensor, slots: Sequence[Any], scales: Sequence[Any], gates: Sequence[Any], weights: Sequence[Any]
) -> tuple[CachedOutput, ...]:
    """The terms that are added to x: the inverse of `flatten_cached`."""
    joined: list[Any] = [stored_of(*tensors, channels=x.shape[-1]) for tensors in zip(slots, scales, strict=True)]
    before = joined[len(gates) :] or [None] * len(gates)
    terms = zip(joined, before, weights, gates, strict=False)
    return tuple((slot if weight is None else Line(slot, last, weight), gate) for slot, last, weight, gate in terms)


def holds(cached: Sequence[CachedOutput], data: torch.dtype) -> bool:
    """Whether the data of any slot has this dtype."""
    return any(slot is not None and slot.dtype == data for slot in flatten_cached(cached)[0])


def extrapolate(
    newest: Tensor | Quantized, older: Sequence[Tensor | Quantized], weights: Sequence[Tensor], dtype: torch.dtype
) -> Tensor:
    """`newest + sum_k weights_k (newest - older_k)` in float32, or float64 if `dtype` is, rounded once to `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    c, *before = (dequantize(slot, wide) if isinstance(slot, Quantized) else slot.to(wide) for slot in (newest, *older))
    value = c
    for weight, c_k in zip(weights, before, strict=True):
        value = value + weight * (c - c_k)
    return value.to(dtype)


def term_value(slot: Tensor | Quantized | Line, dtype: torch.dtype) -> Tensor:
    """A term before its gate, in `dtype`: a slot, dequantised if it is quantised, or the value on a line."""
    if isinstance(slot, Line):
        return extrapolate(slot.newest, [slot.before], [slot.weight], dtype)
    return dequantize(slot, dtype) if isinstance(slot, Quantized) else slot


def add_cached_outputs(x: Tensor, cached: Sequence[CachedOutput]) -> Tensor:
    """x plus every term, in their order; every assignment rounds to x's dtype."""
    for slot, gate in cached:
        c = term_value(slot, x.dtype)
        x = (c if gate is None else gate * c) + x
    return x


def add_in_float32(x: Tensor, cached: Sequence[CachedOutput]) -> Tensor:
    """x, in float32, plus every term as kernels compute it, without rounding to a shorter dtype."""
    for slot, gate in cached:
        c = term_value(slot, torch.float32).float()
        x = x + (c if gate is None else gate.float() * c)
    return x
