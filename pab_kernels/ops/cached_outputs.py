"""The cached outputs that an operation adds to the residual stream: up to three terms, each a slot or the line through two, with a gate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import check_broadcasts, check_kind, check_operand
from .dequantize.reference import dequantize
from .quantize import GROUP, Quantized, check_quantized


@dataclass(frozen=True, eq=False)
class Line:
    """The straight line through two outputs, read beyond the newest: `newest + weight (newest - before)`, one term of an operation.

    In float32 (float64 where the operation's tensors are) and rounded once, as a slot is when it is dequantised: nothing in between can
    overflow, and where both outputs are equal the value is exactly theirs.

    Args:
        newest, before: `[..., C]`, each as a slot: a tensor or a `Quantized`.
        weight: one float32 number on their device, shape `()` or `(1,)`.
    """

    newest: Tensor | Quantized
    before: Tensor | Quantized
    weight: Tensor

    @property
    def shape(self) -> torch.Size:
        """Shape of the value, `[..., C]`."""
        return self.newest.shape


class CachedOutput(NamedTuple):
    """One term: a slot `[..., C]` and the gate that broadcasts to it; on a line, also the slot before it and the one-element weight."""

    slot: Tensor | Quantized
    gate: Tensor | None = None
    before: Tensor | Quantized | None = None
    weight: Tensor | None = None


CACHED_SCHEMA = "Tensor?[] slots, Tensor?[] slot_scales, Tensor?[] gates, Tensor?[] weights"


def check_cached_outputs(op: str, x: Tensor, slots: Sequence[Any], gates: Sequence[Any] | None, limit: int) -> tuple[CachedOutput, ...]:
    """The slots and gates of a call as checked `CachedOutput`s."""
    for name, values in (("slots", slots), ("gates", gates)):
        if not isinstance(values, (list, tuple)) and (values is not None or name == "slots"):
            raise TypeError(f"{op}: {name} is a {type(values).__name__}; a list or tuple is supported: put it into one")
        if values is not None and len(values) != len(slots):
            raise ValueError(f"{op}: {name} has length {len(values)}; one entry (or None) per slot, {len(slots)}, is supported: match them")
    if len(slots) > limit:
        raise ValueError(f"{op}: slots has length {len(slots)}; up to {limit} are supported: add the others in a broadcast_residual before")
    cached = []
    for i, slot in enumerate(slots):
        gate = gates[i] if gates else None
        if gate is not None:
            check_broadcasts(op, f"gates[{i}]", gate, x)
        if isinstance(slot, Line):
            for part, of_line in (("newest", slot.newest), ("before", slot.before)):
                _check_slot(op, f"slots[{i}].{part}", of_line, x)
            _check_weight(op, f"slots[{i}].weight", slot.weight, x)
            cached.append(CachedOutput(slot.newest, gate, slot.before, slot.weight))
        else:
            _check_slot(op, f"slots[{i}]", slot, x)
            cached.append(CachedOutput(slot, gate))
    return tuple(cached)


def _check_slot(op: str, name: str, slot: Any, x: Tensor) -> None:
    if isinstance(slot, Quantized):
        check_quantized(op, name, slot, x.shape, GROUP, x.device)
    else:
        check_operand(op, name, slot, x.shape, x.dtype, x.device)


def _check_weight(op: str, name: str, weight: Any, x: Tensor) -> None:
    check_kind(op, name, weight, torch.float32, x.device)
    if weight.numel() != 1 or weight.ndim > 1:
        raise ValueError(f"{op}: {name} has shape {tuple(weight.shape)}; () and (1,) are supported: pass one number on the device")


def flatten_cached_outputs(cached: Sequence[CachedOutput]) -> tuple[tuple[Any, ...], ...]:
    """Slots, their scales, gates and weights, as `CACHED_SCHEMA` and kernels have them: a slot for each term and, where any term is a
    line, after all of these as many more, the ones before them or None."""
    slots: list[Tensor | Quantized | None] = [c.slot for c in cached]
    if any(c.weight is not None for c in cached):
        slots += [c.before for c in cached]
    return (
        tuple(slot.data if isinstance(slot, Quantized) else slot for slot in slots),
        tuple(slot.scale if isinstance(slot, Quantized) else None for slot in slots),
        tuple(c.gate for c in cached),
        tuple(c.weight for c in cached),
    )


def holds_float8(cached: Sequence[CachedOutput]) -> bool:
    """Whether any slot is float8."""
    return any(isinstance(slot, Quantized) and slot.data.dtype == torch.float8_e4m3fn for c in cached for slot in (c.slot, c.before))


def unflatten_cached_outputs(
    slots: Sequence[Any], scales: Sequence[Any], gates: Sequence[Any], weights: Sequence[Any]
) -> tuple[CachedOutput, ...]:
    joined = [slot if scale is None else Quantized(slot, scale) for slot, scale in zip(slots, scales, strict=True)]
    before = joined[len(gates) :] or [None] * len(gates)
    return tuple(map(CachedOutput, joined[: len(gates)], gates, before, weights))


def extrapolate(newest: Tensor | Quantized, older: Sequence[Tensor | Quantized], weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """`newest + sum_k weights_k (newest - older_k)` in float32, or float64 where `dtype` is, rounded once to `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    c, *before = (dequantize(slot, wide) if isinstance(slot, Quantized) else slot.to(wide) for slot in (newest, *older))
    value = c
    for weight, c_k in zip(weights, before, strict=True):
        value = value + weight * (c - c_k)
    return value.to(dtype)


def term_value(term: CachedOutput, dtype: torch.dtype) -> Tensor:
    """A term before its gate: a slot, dequantised to `dtype`, or the value on a line, rounded to it."""
    if term.before is not None and term.weight is not None:
        return extrapolate(term.slot, [term.before], [term.weight], dtype)
    return dequantize(term.slot, dtype) if isinstance(term.slot, Quantized) else term.slot


def add_cached_outputs(x: Tensor, cached: Sequence[CachedOutput]) -> Tensor:
    """x plus every term, in their order; every assignment rounds to x's dtype."""
    for term in cached:
        c = term_value(term, x.dtype)
        if term.gate is not None:
            c = term.gate * c
        x = c + x
    return x


def add_in_float32(x: Tensor, cached: Sequence[CachedOutput]) -> Tensor:
    """x, in float32, plus every term as kernels compute it: nothing rounds to a shorter dtype."""
    for term in cached:
        c = term_value(term, torch.float32).float()
        if term.gate is not None:
            c = term.gate.float() * c
        x = x + c
    return x
