"""What is measured: a case is an operation at a geometry with options, a candidate something that computes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pab_kernels.ops import Line, Quantized, dequantize

Inputs = dict[str, Any]
"""Tensors, `Quantized` and `Line` by name, or lists of them."""

Outputs = tuple[Any, ...]
"""Tensors, `Quantized` or None."""

Run = Callable[[Inputs], Outputs]
"""Computes a case: takes the inputs and returns the outputs."""


class Unavailable(Exception):
    """A candidate cannot be had here; the message says why."""


@dataclass(frozen=True)
class Candidate:
    """Something that computes a case.

    Args:
        name: as tables show it.
        make: makes what is timed; raises `Unavailable`.
        ours: it is a backend of this package.
    """

    name: str
    make: Callable[[], Run]
    ours: bool = False


@dataclass(frozen=True)
class Case:
    """An operation at a geometry with options.

    Args:
        op, geometry, name: what it is; name tells the options.
        shape: sizes by name, for the reader.
        dtype: of the activations.
        flops: that the case cannot do without.
        draw: makes fresh random inputs.
        plain: the case as a user writes it in torch, in the dtype of the inputs.
        exact: the case in float64, of what `looked_at` looks at.
        looked_at: the part of the outputs that is compared with `exact`, as tensors of floats.
        candidates: what is timed.
    """

    op: str
    geometry: str
    name: str
    shape: dict[str, int]
    dtype: torch.dtype
    flops: int
    draw: Callable[[Draw], Inputs]
    plain: Callable[[Inputs], Outputs]
    exact: Callable[[Inputs], tuple[Tensor, ...]]
    looked_at: Callable[[Outputs], tuple[Tensor, ...]]
    candidates: tuple[Candidate, ...]

    def __str__(self) -> str:
        return f"{self.op} {self.geometry} {self.name}"


class Draw:
    """Draws normal tensors on a device, from one seed."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self.dtype, self.device = dtype, device
        self._generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, *sizes: int, dtype: torch.dtype | None = None) -> Tensor:
        """Another normal tensor of these sizes."""
        return torch.randn(sizes, generator=self._generator, device=self.device, dtype=dtype or self.dtype)


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in inputs or outputs."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Line):
        yield from tensors([value.newest, value.before, value.weight])
    elif isinstance(value, Quantized):
        yield from (value.data, value.scale)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors(part)


def nbytes(value: Any) -> int:
    """Bytes of the tensors in inputs or outputs."""
    return sum(t.nbytes for t in tensors(value))


def doubled(value: Any) -> Any:
    """Inputs in float64: floating tensors converted, 8-bit slots dequantised, all else as it is."""
    if isinstance(value, Quantized):
        return dequantize(value, torch.float32).double()
    if isinstance(value, Line):
        return Line(*map(doubled, (value.newest, value.before, value.weight)))
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: doubled(part) for name, part in value.items()}
    return [doubled(part) for part in value] if isinstance(value, list) else value


def plain_value(slot: Tensor | Quantized | Line, dtype: torch.dtype) -> Tensor:
    """A slot, dequantised, or the value on a line, as a user would write it."""
    if isinstance(slot, Line):
        wide = torch.promote_types(dtype, torch.float32)
        newest, before = (plain_value(output, wide).to(wide) for output in (slot.newest, slot.before))
        return (newest + slot.weight * (newest - before)).to(dtype)
    return dequantize(slot, dtype) if isinstance(slot, Quantized) else slot


def floats(value: Tensor | Quantized) -> Tensor:
    """An output as a tensor of floats."""
    return dequantize(value, torch.float32) if isinstance(value, Quantized) else value


def poison(value: Any) -> None:
    """Fill outputs with what no operation writes: NaN, and -128 in int8."""
    for t in tensors(value):
        if t.dtype == torch.int8:
            t.fill_(-128)
        elif t.dtype.itemsize == 1:
            t.view(torch.uint8).fill_(0xFF)
        else:
            t.fill_(torch.nan)


def poison_free_memory(like: Any) -> None:
    """Poison the memory that the allocator hands out next for outputs like these, to find what is not written there."""
    poison([torch.empty_like(t) for t in tensors(like)])


def unwritten(value: Any) -> bool:
    """Whether an element of the outputs is still poisoned, or not finite."""
    return any(
        bool((t == -128).any()) if t.dtype == torch.int8 else not bool(t.float().isfinite().all())
        for t in tensors(value)
    )
