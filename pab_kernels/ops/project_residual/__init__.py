"""`project_residual`: an output projection that adds itself to the residual stream and stores itself, in the GEMM's epilogue."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor

from ..backend import implementation
from ..cached_outputs import (
    CACHED_SCHEMA,
    CachedOutput,
    Line,
    check_cached_outputs,
    flatten_cached_outputs,
    unflatten_cached_outputs,
)
from ..checks import check_activation, check_broadcasts, check_operand, check_output
from ..flops import linear_flops
from ..overlap import check_apart
from ..quantize import GROUP, Quantized, empty_quantized
from ..registration import register
from ..stored import STORED_OUTPUTS, check_store_dtype, check_stored_out, flatten_stored, named_stored, unflatten_stored

OP = "project_residual"
MAX_SLOTS = 2

_READ = ("a", "weight", "bias", "x", "gate", "store", "store_dtype", "slots or gates")


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
        4. stored = p ("pre_gate") or g ("post_gate"), quantised if store_dtype has 8 bits

    Every assignment rounds to x's dtype; the product accumulates as `F.linear` does. What is stored is quantised from the rounded
    p or g, what is added is not quantised. In eager the reference is plain torch and so differentiable; compiled, it is for inference.

    Args:
        a: `[..., K]` in x's dtype, last dimension contiguous, leading dimensions as x.
        weight: `[C, K]` in x's dtype; bias: `[C]` or None.
        x: `[..., C]`, float, last dimension contiguous; never written.
        gate: None or x's dtype, broadcasting to x with all C channels.
        store: which to store, or None.
        store_dtype: x's dtype (also None), torch.int8 or torch.float8_e4m3fn.
        slots, gates: as in `broadcast_residual`, up to two.
        backend: "auto", or one that must serve.

    Returns:
        x (new, contiguous) and what is stored: `[..., C]`, contiguous, memory of its own; a `Quantized` in groups of 128; or None.

    Raises:
        TypeError, ValueError: an argument is not of this kind.
        BackendError: `backend` cannot serve.
    """
    cached = _check(a, weight, bias, x, gate, store, slots, gates)
    check_store_dtype(OP, store_dtype, x.dtype)
    if store is None and store_dtype is not None:
        raise ValueError(f"{OP}: store_dtype is {store_dtype} and store is None; a dtype is supported with a store: pass store='pre_gate'")
    dtype = store_dtype or x.dtype
    if torch.compiler.is_compiling():
        outputs = torch.ops.pab_kernels.project_residual(a, weight, bias, x, gate, store, dtype, *flatten_cached_outputs(cached), backend)
        data, scale = (*outputs[1:], None, None)[:2]
        return outputs[0], unflatten_stored(data, scale, GROUP)
    arguments = (a, weight, bias, x, gate, store, dtype, cached)
    return implementation(OP, backend, arguments)(*arguments)


def project_residual_out(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    *,
    x_out: Tensor,
    stored_out: Tensor | Quantized | None = None,
    gate: Tensor | None = None,
    store: Literal["pre_gate", "post_gate"] | None = None,
    slots: Sequence[Tensor | Quantized | Line] = (),
    gates: Sequence[Tensor | None] | None = None,
    backend: str = "auto",
) -> None:
    """`project_residual` into x_out, of x's shape and dtype, and with `store` into stored_out, whose dtype is the store's.

    x_out may be x itself; apart from that, outputs may not overlap themselves, each other or what is read. Not recorded by autograd.
    """
    cached = _check(a, weight, bias, x, gate, store, slots, gates)
    check_output(OP, "x_out", x_out, x.shape, x.dtype, x.device)
    if (store is None) != (stored_out is None):
        came = "None" if stored_out is None else "given"
        raise ValueError(f"{OP}: store is {store!r} and stored_out is {came}; both or neither are supported: match them")
    dtype = x.dtype if store is None else check_stored_out(OP, stored_out, x.shape, GROUP, x)
    if torch.compiler.is_compiling():
        torch.ops.pab_kernels.project_residual_out(
            a, weight, bias, x, gate, store, dtype, *flatten_cached_outputs(cached), backend, x_out, *flatten_stored(stored_out)
        )
    else:
        _write((a, weight, bias, x, gate, store, dtype, cached), backend, x_out, stored_out)


def _check(a: Any, weight: Any, bias: Any, x: Any, gate: Any, store: Any, slots: Any, gates: Any) -> tuple[CachedOutput, ...]:
    check_activation(OP, "x", x)
    check_activation(OP, "a", a)
    check_operand(OP, "a", a, (*x.shape[:-1], a.shape[-1]), x.dtype, x.device)
    check_operand(OP, "weight", weight, (x.shape[-1], a.shape[-1]), x.dtype, x.device)
    if bias is not None:
        check_operand(OP, "bias", bias, x.shape[-1:], x.dtype, x.device)
    if gate is not None:
        check_broadcasts(OP, "gate", gate, x)
    if store not in (None, "pre_gate", "post_gate"):
        raise ValueError(f"{OP}: store is {store!r}; None, 'pre_gate' and 'post_gate' are supported: pass one of these")
    return check_cached_outputs(OP, x, slots, gates, MAX_SLOTS)


def _functional(*args: Any) -> list[Tensor]:
    *flat, backend = args
    arguments = (*flat[:7], unflatten_cached_outputs(*flat[7:]))
    x, stored = implementation(OP, backend, arguments)(*arguments)
    return [t for t in (x, *flatten_stored(stored)) if t is not None]


def _out(*args: Any) -> None:
    *flat, backend, x_out, stored_out, stored_scale_out = args
    arguments = (*flat[:7], unflatten_cached_outputs(*flat[7:]))
    _write(arguments, backend, x_out, unflatten_stored(stored_out, stored_scale_out, GROUP))


def _write(arguments: tuple[Any, ...], backend: str, x_out: Tensor, stored_out: Tensor | Quantized | None) -> None:
    check_apart(OP, (("x_out", x_out), *named_stored(stored_out)), zip(_READ, arguments, strict=True), ("x_out", "x"))
    implementation(OP, backend, arguments, "_out")(*arguments, x_out, stored_out)


def _fake(
    a: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor, gate: Tensor | None, store: str | None, store_dtype: torch.dtype, *_: Any
) -> list[Tensor]:
    x_new = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if store is None:
        return [x_new]
    if store_dtype == x.dtype:
        return [x_new, torch.empty_like(x_new)]
    stored = empty_quantized(x.shape, store_dtype, GROUP, x.device)
    return [x_new, stored.data, stored.scale]


def _flops(a: Sequence[int], weight: Sequence[int], *args: Any, **kwargs: Any) -> int:
    c_out, c_in = weight
    return linear_flops(prod(a[:-1]), c_in, c_out)


register(
    OP,
    f"Tensor a, Tensor weight, Tensor? bias, Tensor x, Tensor? gate, str? store, ScalarType store_dtype, {CACHED_SCHEMA}",
    ("Tensor(a!) x_out", *STORED_OUTPUTS),
    _functional,
    _out,
    _fake,
    _flops,
)
