"""`broadcast_residual`: add cached outputs to the residual stream, norm and modulate it, in one pass over memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backend import implementation, load
from ..cached_outputs import (
    CACHED_SCHEMA,
    CachedOutput,
    Line,
    check_cached_outputs,
    flatten_cached_outputs,
    unflatten_cached_outputs,
)
from ..checks import check_activation, check_broadcasts, check_output
from ..norm import NORM_SCHEMA, Norm, check_norm, check_norm_type, flatten_norm, unflatten_norm
from ..overlap import check_apart
from ..quantize import Quantized
from ..registration import register

OP = "broadcast_residual"
MAX_SLOTS = 3

_READ = ("x", "slots or gates", "norm", "shift", "scale")


def broadcast_residual(
    x: Tensor,
    slots: Sequence[Tensor | Quantized | Line] = (),
    *,
    gates: Sequence[Tensor | None] | None = None,
    weights: None = None,
    norm: Norm | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Add up to three cached outputs to the residual stream, then norm and modulate it.

        1. for each slot: c = slot, dequantised, or the value on a `Line`; c = gate * c; x = c + x
        2. y = norm(x); y = y * (1 + scale); y = y + shift

    Every assignment rounds to x's dtype; a norm is float32 inside. An absent gate, scale or shift is skipped, not multiplied.
    Memory: (6 + 2n) bytes a channel for n bf16 slots, (6 + n) for 8-bit ones, 4 for none; a line reads two. In eager the reference is
    plain torch and so differentiable; compiled, it is for inference.

    Args:
        x: `[..., C]`, float, last dimension contiguous.
        slots: up to three, each x's shape and dtype, a `Quantized` in groups of 128, or a `Line` through two such.
        gates: one entry per slot: None or x's dtype, broadcasting to x with all C channels (per batch row, frame or token).
        weights: refused. Two weighted slots would be rounded one after the other, and the first may overflow; a `Line` rounds once.
        norm: None for no y.
        shift, scale: as a gate.
        backend: "auto", or one that must serve.

    Returns:
        x (new and contiguous; without slots x itself, which is never written) and y (contiguous), None without a norm.

    Raises:
        TypeError, ValueError: an argument is not of this kind.
        BackendError: `backend` cannot serve.
    """
    if weights is not None:
        raise ValueError(f"{OP}: weights is given; kept outputs are weighted as a line: slots=[Line(newest, before, weight)]")
    if _may_be_attempted(backend):
        made = load(OP, backend, "attempt_new")(x, slots, gates, norm, shift, scale)
        if made is not None:
            return made
    cached = _check(x, slots, gates, norm, shift, scale)
    if torch.compiler.is_compiling():
        outputs = torch.ops.pab_kernels.broadcast_residual(*_flatten(x, cached, norm, shift, scale), backend)
        return outputs[0] if cached else x, None if norm is None else outputs[-1]
    arguments = (x, cached, norm, shift, scale)
    return implementation(OP, backend, arguments)(*arguments)


def broadcast_residual_out(
    x: Tensor,
    slots: Sequence[Tensor | Quantized | Line] = (),
    *,
    x_out: Tensor | None = None,
    y_out: Tensor | None = None,
    gates: Sequence[Tensor | None] | None = None,
    norm: Norm | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """`broadcast_residual` into tensors of x's shape and dtype: x_out with slots, y_out with a norm, else None.

    x_out may be x itself; apart from that, outputs may not overlap themselves, each other or what is read. Not recorded by autograd.
    """
    if _may_be_attempted(backend) and load(OP, backend, "attempt")(x, slots, gates, norm, shift, scale, x_out, y_out):
        return
    cached = _check(x, slots, gates, norm, shift, scale)
    for name, out, computed in (("x_out", x_out, cached), ("y_out", y_out, norm)):
        source = "slots" if name == "x_out" else "norm"
        if out is None and computed:
            raise ValueError(f"{OP}: {name} is None and {source} is given; its result needs a place: pass {name}")
        if out is not None and not computed:
            raise ValueError(f"{OP}: {name} is given without {source}; nothing would be written there: pass None")
        if out is not None:
            check_output(OP, name, out, x.shape, x.dtype, x.device)
    if torch.compiler.is_compiling():
        torch.ops.pab_kernels.broadcast_residual_out(*_flatten(x, cached, norm, shift, scale), backend, x_out, y_out)
    else:
        _write((x, cached, norm, shift, scale), backend, x_out, y_out)


def _may_be_attempted(backend: str) -> bool:
    """Whether the backend may be handed arguments that are not checked: it checks them itself, at less cost."""
    return backend == "cuda" and not torch.compiler.is_compiling() and not torch.is_grad_enabled()


def _check(x: Any, slots: Any, gates: Any, norm: Any, shift: Any, scale: Any) -> tuple[CachedOutput, ...]:
    check_activation(OP, "x", x)
    cached = check_cached_outputs(OP, x, slots, gates, MAX_SLOTS)
    if norm is not None:
        check_norm_type(OP, "norm", norm, Norm)
        check_norm(OP, "norm", norm, x.shape[-1:], x.dtype, x.device)
    elif not cached:
        raise ValueError(f"{OP}: neither slots nor norm is given; up to {MAX_SLOTS} slots, a norm, or both are supported: pass one")
    for name, t in (("shift", shift), ("scale", scale)):
        if t is not None and norm is None:
            raise ValueError(f"{OP}: {name} is given without norm; it modulates the normed x: pass a norm")
        if t is not None:
            check_broadcasts(OP, name, t, x)
    return cached


def _flatten(x: Tensor, cached: Sequence[CachedOutput], norm: Norm | None, shift: Tensor | None, scale: Tensor | None) -> tuple[Any, ...]:
    return (x, *flatten_cached_outputs(cached), *flatten_norm(norm), shift, scale)


def _unflatten(x: Tensor, *flat: Any) -> tuple[Any, ...]:
    return (x, unflatten_cached_outputs(*flat[:4]), unflatten_norm(*flat[4:8]), *flat[8:])


def _functional(*args: Any) -> list[Tensor]:
    *flat, backend = args
    x = flat[0]
    arguments = _unflatten(*flat)
    outputs = implementation(OP, backend, arguments)(*arguments)
    return [t for t in outputs if t is not None and t is not x]


def _out(*args: Any) -> None:
    *flat, backend, x_out, y_out = args
    _write(_unflatten(*flat), backend, x_out, y_out)


def _write(arguments: tuple[Any, ...], backend: str, x_out: Tensor | None, y_out: Tensor | None) -> None:
    check_apart(OP, (("x_out", x_out), ("y_out", y_out)), zip(_READ, arguments, strict=True), ("x_out", "x"))
    implementation(OP, backend, arguments, "_out")(*arguments, x_out, y_out)


def _fake(x: Tensor, slots: list[Tensor], slot_scales: Any, gates: Any, weights: Any, norm: str | None, *_: Any) -> list[Tensor]:
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(bool(slots) + (norm is not None))]


def _flops(*args: Any, **kwargs: Any) -> int:
    return 0


register(
    OP,
    f"Tensor x, {CACHED_SCHEMA}, {NORM_SCHEMA.format('norm')}, Tensor? shift, Tensor? scale",
    ("Tensor(a!)? x_out", "Tensor(b!)? y_out"),
    _functional,
    _out,
    _fake,
    _flops,
)
