"""Checks that the operations share.

Each error is one line: what was given, what is supported, what to do. No check reads device data.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

LARGEST = sys.float_info.max

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def not_a(op: str, name: str, value: Any, wanted: str, advice: str) -> TypeError:
    """The error for a value of the wrong type."""
    return TypeError(f"{op}: {name} is a {type(value).__name__}; {wanted} is supported: {advice}")


def none_of(op: str, name: str, value: Any, choices: Sequence[Any]) -> str:
    """The message for a value that is none of the choices."""
    return f"{op}: {name} is {value!r}; {', '.join(map(repr, choices))} are supported: pass one of these"


def check_tensor(op: str, name: str, t: Any) -> None:
    if not isinstance(t, Tensor):
        raise not_a(op, name, t, "a torch.Tensor", "pass a tensor")


def check_last_stride(op: str, name: str, t: Tensor) -> None:
    if t.stride(-1) != 1 and t.shape[-1] != 1:
        raise ValueError(
            f"{op}: {name} has stride {t.stride(-1)} in its last dimension; stride 1 is supported: call .contiguous()"
        )


def check_float(op: str, name: str, t: Any) -> None:
    """A float tensor of at least one dimension."""
    check_tensor(op, name, t)
    if t.dtype not in FLOATS:
        supported = "float16, bfloat16, float32 and float64 are supported"
        raise TypeError(f"{op}: {name} has dtype {t.dtype}; {supported}: convert it")
    if t.ndim == 0:
        raise ValueError(f"{op}: {name} has no dimensions; [..., channels] is supported: reshape it")


def check_activation(op: str, name: str, t: Any) -> None:
    """A float tensor of at least one dimension, the last contiguous."""
    if isinstance(t, Tensor) and t.dtype in FLOATS and t.ndim > 0 and t.is_contiguous():
        return  # the usual case
    check_float(op, name, t)
    check_last_stride(op, name, t)


def check_kind(op: str, name: str, t: Any, dtype: torch.dtype, device: torch.device) -> None:
    """A tensor of this dtype on this device."""
    check_tensor(op, name, t)
    if t.dtype != dtype:
        raise TypeError(f"{op}: {name} has dtype {t.dtype}; {dtype} is supported here: convert it")
    if t.device != device:
        raise ValueError(f"{op}: {name} is on {t.device}; the operation runs on {device}: move it there")


def check_shape(op: str, name: str, t: Any, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    """A tensor of exactly this shape, dtype and device, of any strides."""
    check_kind(op, name, t, dtype, device)
    if t.shape != tuple(shape):
        raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}; {tuple(shape)} is supported here: reshape it")


def check_operand(op: str, name: str, t: Any, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    """A tensor of exactly this shape, dtype and device, last dimension contiguous."""
    if isinstance(t, Tensor) and t.is_contiguous() and t.dtype == dtype and t.shape == shape and t.device == device:
        return  # the usual case, at a third of the cost of finding out what is wrong
    check_shape(op, name, t, shape, dtype, device)
    check_last_stride(op, name, t)


def check_number(op: str, name: str, value: Any, least: float = -LARGEST) -> None:
    """A finite number from `least` on."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise not_a(op, name, value, "a number", "pass a float")
    if not least <= value <= LARGEST:
        given = "too large for a float" if isinstance(value, int) and abs(value) > LARGEST else value
        from_least = "" if least < 0 else f" from {least:g} on"
        raise ValueError(f"{op}: {name} is {given}; a finite number{from_least} is supported: pass one")


def _fits(shape: Sequence[int], full: Sequence[int]) -> bool:
    """Whether `shape` broadcasts to `full` and has all of its channels."""
    ndim = len(shape)
    if ndim != len(full):
        full = full[-ndim:] if 0 < ndim < len(full) else ()
    for n, m in zip(shape, full, strict=False):  # a loop: a generator costs three times as much
        if n not in (1, m):
            return False
    return bool(full) and shape[-1] == full[-1]


def broadcasts(t: Tensor, x: Tensor) -> bool:
    """Whether an operation on x takes `t` as a gate, shift or scale: see `check_broadcasts`."""
    return (
        t.dtype == x.dtype
        and t.device == x.device
        and _fits(t.shape, x.shape)
        and (t.is_contiguous() or t.stride(-1) == 1)
    )


def check_broadcasts(op: str, name: str, t: Any, x: Tensor) -> None:
    """A tensor of x's dtype and device that broadcasts to x and has all of x's channels, last dimension contiguous."""
    if isinstance(t, Tensor) and broadcasts(t, x):
        return
    check_kind(op, name, t, x.dtype, x.device)
    if not _fits(t.shape, full := x.shape):
        raise ValueError(
            f"{op}: {name} has shape {tuple(t.shape)}; a shape that broadcasts to {tuple(full)} and has its {full[-1]} "
            "channels is supported: unsqueeze the missing dimensions"
        )
    check_last_stride(op, name, t)
