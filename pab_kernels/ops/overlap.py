"""Outputs lie in memory that nothing else in the call shares: checked from addresses, sizes and strides, without
reading a value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_OWN_MEMORY = (Tensor, torch.nn.Parameter)
"""Of these classes an address means something: fake tensors and wrappers have none of their own, meta tensors the
address 0."""

_PLAIN = frozenset((type(None), str, float, int, bool, torch.dtype))
"""Classes of what holds no tensor."""

_MOST_STEPS = 10_000
"""Where two tensors are interleaved so that it takes more to find out, they are taken to overlap."""

_Term = tuple[int, int, int]  # a stride in bytes, and the least and the greatest multiple of it


def check_apart(op: str, names: Sequence[str], outputs: Sequence[Any], call: Any) -> None:
    """No output shares memory with another output or with what is read; but an output `x_out` may be x itself.

    Args:
        op: the operation.
        names, outputs: tensors, `Quantized`, or None for one that is not given.
        call: the named tuple of what is read: tensors, and whatever holds tensors.

    Raises:
        ValueError: one does, or was made in inference mode and is to be written outside of it.
    """
    written: list[tuple[str, Tensor, int, int]] = []
    least = most = 0  # where all that is written lies
    places: list[tuple[str, Tensor]] = []
    for name, out in zip(names, outputs, strict=True):
        if type(out) in _OWN_MEMORY:
            places.append((name, out))
        elif type(out) not in _PLAIN:
            for part in () if isinstance(out, Tensor) else ("data", "scale"):
                _collect(f"{name}.{part}", getattr(out, part), places)
    for name, t in places:
        if t.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(
                f"{op}: {name} was made in inference mode; outside of it other tensors are supported: clone it, or "
                "write within that mode"
            )
        if first := t.data_ptr():
            last = first + (t.nbytes if t.is_contiguous() else extent(t))
            for other, u, begin, end in written:
                if first < end and begin < last and overlap(t, u):
                    raise ValueError(_message(op, name, other))
            written.append((name, t, first, last))
            least, most = (first, last) if most == 0 else (min(least, first), max(most, last))
    if not written:
        return
    reads: list[tuple[str, Tensor]] = []
    for argument, value in zip(call._fields, call, strict=True):
        if type(value) in _OWN_MEMORY:
            reads.append((argument, value))
        elif type(value) not in _PLAIN:
            _collect(argument, value, reads)
    for argument, read in reads:
        begin = read.data_ptr()
        end = begin + (read.nbytes if read.is_contiguous() else extent(read))
        if begin < most and least < end:
            for name, t, first, last in written:
                if (
                    begin < last
                    and first < end
                    and overlap(t, read)
                    and ((name, argument) != ("x_out", "x") or not _same(t, read))
                ):
                    may = " (x_out may be x itself)" if names[0] == "x_out" else ""
                    raise ValueError(_message(op, name, "slots or gates" if argument == "cached" else argument, may))


def extent(t: Tensor) -> int:
    """Bytes from the first element to the end of the last one."""
    if t.is_contiguous():
        return t.nbytes
    return t.itemsize * (1 + sum([(size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)]))


def overlaps_itself(t: Tensor) -> bool:
    """Whether two elements may share memory: each stride, from the least on, is to reach beyond all that the smaller
    ones span."""
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
    steps = [(stride * a.itemsize, 0, size - 1) for stride, size in zip(a.stride(), a.shape, strict=True)] + [
        (1, 0, a.itemsize - 1)
    ]
    steps += [(stride * b.itemsize, 1 - size, 0) for stride, size in zip(b.stride(), b.shape, strict=True)] + [
        (1, 1 - b.itemsize, 0)
    ]
    for stride, least, most in steps:
        low, high = terms.get(stride, (0, 0))
        terms[stride] = low + least, high + most
    ordered = [(stride, *terms[stride]) for stride in sorted(terms, reverse=True) if stride > 0]
    return _reaches(apart, ordered, [_MOST_STEPS])


def _reaches(distance: int, terms: Sequence[_Term], left: list[int]) -> bool:
    """Whether a sum of multiples of the strides, the greatest first, is this distance.

    True too where no steps are `left`.
    """
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
    return a.data_ptr() == b.data_ptr() and all(
        s == t or n < 2 for s, t, n in zip(a.stride(), b.stride(), a.shape, strict=True)
    )


def _collect(name: str, value: Any, found: list[tuple[str, Tensor]]) -> None:
    """Append the tensors with memory of their own in a value, in a tuple or in a dataclass, however deep, each with the
    value's name."""
    if type(value) in _OWN_MEMORY:
        found.append((name, value))
    elif not isinstance(value, Tensor):
        for part in value if isinstance(value, tuple) else vars(value).values():
            if type(part) not in _PLAIN:
                _collect(name, part, found)


def _message(op: str, name: str, other: str, may: str = "") -> str:
    return (
        f"{op}: {name} shares memory with {other}; outputs that overlap nothing else in the call are supported{may}: "
        "pass another tensor"
    )
