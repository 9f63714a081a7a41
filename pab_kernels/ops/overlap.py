"""Outputs lie in memory that nothing else in the call shares: checked from addresses, sizes and strides, without reading a value."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

_OWN_MEMORY = (Tensor, torch.nn.Parameter)
"""Of these classes an address means something: fake tensors and wrappers have none of their own, meta tensors the address 0."""

_PLAIN = (str, float, int, bool, torch.dtype)

_MOST_STEPS = 10_000
"""Where two tensors are interleaved so that it takes more to find out, they are taken to overlap."""

_Term = tuple[int, int, int]  # a stride in bytes, and the least and the greatest multiple of it


def check_apart(
    op: str, outputs: Sequence[tuple[str, Tensor | None]], arguments: Iterable[tuple[str, Any]], in_place: tuple[str, str] | None = None
) -> None:
    """No output shares memory with another output or with an argument.

    Args:
        op: the operation.
        outputs: by name; None for one that is not given.
        arguments: what is read, by name: tensors and whatever holds tensors.
        in_place: an output and an argument that may be one and the same tensor.

    Raises:
        ValueError: one does, or was made in inference mode and is to be written outside of it.
    """
    written: list[tuple[str, Tensor, int, int]] = []
    for name, t in outputs:
        if t is None or type(t) not in _OWN_MEMORY:
            continue
        if t.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(
                f"{op}: {name} was made in inference mode; outside of it other tensors are supported: clone it, or write within that mode"
            )
        if first := t.data_ptr():
            last = first + extent(t)
            for other, u, begin, end in written:
                if first < end and begin < last and overlap(t, u):
                    raise ValueError(_message(op, name, other))
            written.append((name, t, first, last))
    for argument, value in arguments if written else ():
        reads: list[Tensor] = []
        _collect(value, reads)
        for read in reads:
            begin = read.data_ptr()
            end = begin + (read.nbytes if read.is_contiguous() else extent(read))
            for name, t, first, last in written:
                if begin < last and first < end and overlap(t, read) and (in_place != (name, argument) or not _same(t, read)):
                    raise ValueError(_message(op, name, argument, in_place))


def extent(t: Tensor) -> int:
    """Bytes from the first element to the end of the last one."""
    if t.is_contiguous():
        return t.nbytes
    return t.itemsize * (1 + sum([(size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)]))


def overlaps_itself(t: Tensor) -> bool:
    """Whether two elements may share memory: each stride, from the least on, is to reach beyond all that the smaller ones span."""
    if t.is_contiguous():
        return False
    reach = 1
    for stride, size in sorted((stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1):
        if stride < reach:
            return True
        reach += stride * (size - 1)
    return False


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether a byte belongs to both."""
    apart = b.data_ptr() - a.data_ptr()
    if 0 in a.shape or 0 in b.shape or apart >= extent(a) or -apart >= extent(b):
        return False
    if a.is_contiguous() and b.is_contiguous():
        return True
    # A byte of both: sum i_k stride_k of a, minus as much of b, is `apart`. Equal strides of both are one term.
    terms: dict[int, tuple[int, int]] = {}
    steps = [(stride * a.itemsize, 0, size - 1) for stride, size in zip(a.stride(), a.shape, strict=True)] + [(1, 0, a.itemsize - 1)]
    steps += [(stride * b.itemsize, 1 - size, 0) for stride, size in zip(b.stride(), b.shape, strict=True)] + [(1, 1 - b.itemsize, 0)]
    for stride, least, most in steps:
        low, high = terms.get(stride, (0, 0))
        terms[stride] = low + least, high + most
    ordered = [(stride, *terms[stride]) for stride in sorted(terms, reverse=True) if stride > 0]
    return _reaches(apart, ordered, [_MOST_STEPS])


def _reaches(distance: int, terms: Sequence[_Term], left: list[int]) -> bool:
    """Whether a sum of multiples of the strides, the greatest first, is this distance; True too where no steps are `left`."""
    if not terms:
        return distance == 0
    (stride, least, most), rest = terms[0], terms[1:]
    low, high = sum(s * n for s, n, _ in rest), sum(s * n for s, _, n in rest)
    for count in range(max(least, -((high - distance) // stride)), min(most, (distance - low) // stride) + 1):
        left[0] -= 1
        if left[0] < 0 or _reaches(distance - count * stride, rest, left):
            return True
    return False


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape and dtype are the same memory, element by element."""
    return a.data_ptr() == b.data_ptr() and all(s == t or n < 2 for s, t, n in zip(a.stride(), b.stride(), a.shape, strict=True))


def _collect(value: Any, found: list[Tensor]) -> None:
    """Append the tensors with memory of their own in a value, in a tuple or in a dataclass, however deep."""
    kind = type(value)
    if kind in _OWN_MEMORY:
        found.append(value)
    elif isinstance(value, tuple):
        for part in value:
            if part is not None:
                _collect(part, found)
    elif not (value is None or kind in _PLAIN or isinstance(value, Tensor)):
        for part in getattr(value, "__dict__", {}).values():
            _collect(part, found)


def _message(op: str, name: str, other: str, in_place: tuple[str, str] | None = None) -> str:
    may = f" ({in_place[0]} may be {in_place[1]} itself)" if in_place else ""
    return f"{op}: {name} shares memory with {other}; outputs that overlap nothing else in the call are supported{may}: pass another tensor"
