"""The one place that chooses which implementation serves an operation.

Backend `b` of operation `op` is the module `pab_kernels.ops.<op>.<b>`, which holds the functions `<op>` and `<op>_out`, and `refusal`,
which takes the arguments of `<op>` and says in a few words why it cannot serve them, or gives None (the reference has none: it serves
everything). It is imported when it is first used, so a kernel language that is not installed is never asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch

BACKENDS = ("reference", "triton", "cuda", "sdpa", "flash_attn")
"""Every backend that `backend=` may name, beside `auto`."""

IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    "broadcast_residual": ("reference", "triton", "cuda"),
    "project_residual": ("reference", "triton"),
    "attention": ("reference", "triton", "sdpa", "flash_attn"),
    "short_attention": ("reference", "triton", "cuda"),
    "quantize": ("reference", "cuda"),
    "dequantize": ("reference", "cuda"),
}
"""The backends that exist for each operation. Adding a kernel is adding its module and its name here."""

PREFERRED: dict[str, tuple[str, ...]] = {"cuda": ("triton",)}
"""By type of device, what `auto` tries before the reference: kernels written for it. Nothing was measured yet."""


WITHOUT_GRADIENT = ("triton", "cuda")
"""Backends whose results are not connected to their arguments. What an `_out` form writes is recorded by none."""


class BackendError(RuntimeError):
    """The backend that was asked for cannot serve the call; the message says why and what to do."""


def implementation(op: str, backend: str, arguments: tuple[Any, ...], form: str = "") -> Callable[..., Any]:
    """The function that serves `op` on these arguments; `form` is "" for the one that returns new tensors, "_out" for the one that writes.

    `auto` is the reference where autograd is to record the call and the kernel has no gradient.

    Raises:
        BackendError: see `choose`; or a gradient would be lost.
    """
    chosen = choose(op, backend, arguments)
    if chosen in WITHOUT_GRADIENT and not form and torch.is_grad_enabled() and any(t.requires_grad for t in _tensors(arguments)):
        if backend != "auto":
            reason = "a gradient would be recorded and its kernel has none"
            raise BackendError(f"{op}: backend {backend!r} cannot serve this call; {reason}: call it under torch.no_grad()")
        chosen = "reference"
    return load(op, chosen, op + form)


def choose(op: str, backend: str, arguments: tuple[Any, ...]) -> str:
    """The backend that serves `op` on these arguments, the first of them a tensor.

    `auto` is the first of `PREFERRED` for the device that can serve, else the reference. Shapes, dtypes, strides and devices decide, never
    values, so that a call decides alike when it is traced and when it is run.

    Raises:
        BackendError: `backend` is unknown, has no kernel for `op`, or cannot serve these arguments.
    """
    available = IMPLEMENTATIONS[op]
    if backend == "auto":
        preferred = PREFERRED.get(arguments[0].device.type, ())
        return next((b for b in preferred if b in available and _refusal(op, b, arguments) is None), "reference")
    if backend not in available:
        known, has = f"auto, {', '.join(BACKENDS)}", ", ".join(available)
        if backend in BACKENDS:
            raise BackendError(f"{op}: backend {backend!r} has no kernel for it; it has {has}: pass one of these or 'auto'")
        raise BackendError(f"{op}: backend {backend!r} is unknown; known are {known}: pass 'auto' or one of these")
    reason = _refusal(op, backend, arguments)
    if reason is not None:
        raise BackendError(f"{op}: backend {backend!r} cannot serve this call; {reason}: pass backend='auto'")
    return backend


def _refusal(op: str, backend: str, arguments: tuple[Any, ...]) -> str | None:
    if backend == "reference":
        return None
    try:
        refusal = load(op, backend, "refusal")
    except ModuleNotFoundError as error:
        return f"it needs the package {error.name}, which is not installed"
    return refusal(*arguments)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors among arguments, within norms, tables and cached outputs too."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif is_dataclass(value):
        yield from _tensors(tuple(vars(value).values()))


@cache
def load(op: str, backend: str, function: str) -> Callable[..., Any]:
    """A function of a backend's module."""
    return getattr(import_module(f"pab_kernels.ops.{op}.{backend}"), function)


@cache  # every launch asks
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)


def refuse_device(tensor: torch.Tensor, interpreted: bool) -> str | None:
    """Why Triton cannot run where `tensor` lies; None where it can."""
    if tensor.device.type == "cuda":
        if torch.version.hip is not None:
            return f"the kernels are for NVIDIA's GPUs; {tensor.device} is another's"
        if capability(tensor.device) < (8, 0):
            return f"{tensor.device} has compute capability {'.'.join(map(str, capability(tensor.device)))}; 8.0 or later is needed"
        return None
    if interpreted and tensor.device.type == "cpu":
        return None
    return f"Triton kernels run on CUDA devices, and on the CPU under TRITON_INTERPRET=1; the tensors are on {tensor.device}"


def refuse_float8(tensor: torch.Tensor, name: str) -> str | None:
    """Why Triton cannot read or write a float8 operand of this name on `tensor`'s device; None where it can."""
    if tensor.is_cuda and capability(tensor.device) < (8, 9):
        return f"{name} is torch.float8_e4m3fn; compute capability 8.9 or later is needed for it"
    return None
