"""The cached outputs that an operation adds to the residual stream: up to three slots, each with a gate and a weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import check_broadcasts, check_kind, check_operand
from .dequantize.reference import dequantize
from .quantize import GROUP, Quantized, check_quantized


class CachedOutput(NamedTuple):
    """One slot `[..., C]`, the gate that broadcasts to it and the one-element weight."""

    slot: Tensor | Quantized
    gate: Tensor | None
    weight: Tensor | None


CACHED_SCHEMA = "Tensor[] slots, Tensor?[] slot_scales, Tensor?[] gates, Tensor?[] weights"


def check_cached_outputs(
    op: str, x: Tensor, slots: Sequence[Any], gates: Sequence[Any] | None, weights: Sequence[Any] | None, limit: int
) -> tuple[CachedOutput, ...]:
    """The slots, gates and weights of a call as checked `CachedOutput`s."""
    for name, values in (("slots", slots), ("gates", gates), ("weights", weights)):
        if not isinstance(values, (list, tuple)) and (values is not None or name == "slots"):
            raise TypeError(f"{op}: {name} is a {type(values).__name__}; a list or tuple is supported: put it into one")
        if values is not None and len(values) != len(slots):
            raise ValueError(f"{op}: {name} has length {len(values)}; one entry (or None) per slot, {len(slots)}, is supported: match them")
    if len(slots) > limit:
        raise ValueError(f"{op}: slots has length {len(slots)}; up to {limit} are supported: add the others in a broadcast_residual before")
    empty = (None,) * len(slots)
    cached = tuple(map(CachedOutput, slots, gates or empty, weights or empty))
    for i, (slot, gate, weight) in enumerate(cached):
        if isinstance(slot, Quantized):
            check_quantized(op, f"slots[{i}]", slot, x.shape, GROUP, x.device)
        else:
            check_operand(op, f"slots[{i}]", slot, x.shape, x.dtype, x.device)
        if gate is not None:
            check_broadcasts(op, f"gates[{i}]", gate, x)
        if weight is not None:
            check_kind(op, f"weights[{i}]", weight, torch.float32, x.device)
            if weight.numel() != 1 or weight.ndim > 1:
                raise ValueError(
                    f"{op}: weights[{i}] has shape {tuple(weight.shape)}; () and (1,) are supported: pass one number on the device"
                )
    return cached


def flatten_cached_outputs(cached: Sequence[CachedOutput]) -> tuple[list[Any], ...]:
    """The cached outputs as `CACHED_SCHEMA` has them."""
    return (
        [c.slot.data if isinstance(c.slot, Quantized) else c.slot for c in cached],
        [c.slot.scale if isinstance(c.slot, Quantized) else None for c in cached],
        [c.gate for c in cached],
        [c.weight for c in cached],
    )


def unflatten_cached_outputs(slots: list[Tensor], scales: list[Any], gates: list[Any], weights: list[Any]) -> tuple[CachedOutput, ...]:
    joined = [slot if scale is None else Quantized(slot, scale) for slot, scale in zip(slots, scales, strict=True)]
    return tuple(map(CachedOutput, joined, gates, weights))


def add_cached_outputs(x: Tensor, cached: Sequence[CachedOutput]) -> Tensor:
    """x plus every cached output, in their order; every line rounds to x's dtype."""
    for slot, gate, weight in cached:
        c = dequantize(slot, x.dtype) if isinstance(slot, Quantized) else slot
        if weight is not None:
            c = (weight * c.float()).to(x.dtype)
        if gate is not None:
            c = gate * c
        x = c + x
    return x
