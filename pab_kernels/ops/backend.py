"""Chooses the implementation that serves a call; nothing else does.

Backend `b` of operation `op` is the module `pab_kernels.ops.<op>.<b>` with the functions of `Backend`. It is imported
at its first use, so a kernel language need not be installed until then.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch

BACKENDS = ("reference", "triton", "cuda", "sdpa", "flash_attn")
"""The backends that `backend=` may name besides `auto`."""

IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    "broadcast_residual": ("reference", "triton", "cuda"),
    "project_residual": ("reference", "triton"),
    "attention": ("reference", "triton", "sdpa", "flash_attn"),
    "short_attention": ("reference", "triton", "cuda"),
    "quantize": ("reference", "cuda"),
    "dequantize": ("reference", "cuda"),
}
"""The backends of each operation. A new kernel is a module and its name here."""

PREFERRED: dict[str, tuple[str, ...]] = {"cuda": ("triton",)}
"""By device type, the backends that `auto` tries before the reference. Nothing has been measured yet."""


class Backend(NamedTuple):
    """The functions of a backend's module, None for those that it lacks; it has one of the first two."""

    compute: Any
    """`compute(call)`: the outputs, new tensors, recorded by autograd."""
    launch: Any
    """`launch(call, outputs)`: write the outputs, not recorded by autograd."""
    refusal: Any
    """`refusal(call)`: why the backend cannot serve the call, or None. Without it, it serves every call."""


class BackendError(RuntimeError):
    """The requested backend cannot serve the call; the message says why and what to do."""


def implementation(op: str, backend: str, call: Any) -> Backend:
    """The backend that serves a call.

    Where autograd would record the call and the chosen kernel has no gradient, `auto` is the reference.

    Raises:
        BackendError: as `choose`, or a gradient would be lost.
    """
    served = load(op, choose(op, backend, call))
    if served.launch is not None and torch.is_grad_enabled() and any(t.requires_grad for t in _tensors(call)):
        if backend != "auto":
            raise _cannot_serve(op, backend, "a gradient would be recorded", "call it under torch.no_grad()")
        return load(op, "reference")
    return served


def choose(op: str, backend: str, call: Sequence[Any]) -> str:
    """The backend that serves `op` on this call.

    `auto` is the first of `PREFERRED` for the device that can serve, else the reference. The choice depends on shapes,
    dtypes, strides and devices, never on values: it is the same when a call is traced and when it runs.

    Raises:
        BackendError: `backend` is unknown, has no kernel for `op`, or cannot serve this call.
    """
    available = IMPLEMENTATIONS[op]
    if backend == "auto":
        for preferred in PREFERRED.get(call[0].device.type, ()):
            if preferred in available and refusal(op, preferred, call) is None:
                return preferred
        return "reference"
    if backend not in available:
        given = "has no kernel for it" if backend in BACKENDS else "is unknown"
        supported = ", ".join(("auto", *available))
        raise BackendError(f"{op}: backend {backend!r} {given}; {supported} are supported: pass one of these")
    reason = refusal(op, backend, call)
    if reason is not None:
        raise _cannot_serve(op, backend, reason, "pass backend='auto'")
    return backend


def _cannot_serve(op: str, backend: str, reason: str, advice: str) -> BackendError:
    return BackendError(f"{op}: backend {backend!r} cannot serve this call; {reason}: {advice}")


def refusal(op: str, backend: str, call: Any) -> str | None:
    """Why an available backend cannot serve this call; None where it can."""
    try:
        served = load(op, backend)
    except ModuleNotFoundError as error:
        return f"it needs the package {error.name}, which is not installed"
    return None if served.refusal is None else served.refusal(call)


def is_traced(op: str, backend: str, device: torch.device) -> bool:
    """Whether a compiled call becomes the reference's plain torch, which the compiler fuses with the code around it.

    It does where the device has no kernel, so that the reference serves every call. Elsewhere a call is one opaque
    operation, whose backend is chosen when it runs.
    """
    return backend in ("auto", "reference") and all(
        b not in IMPLEMENTATIONS[op] for b in PREFERRED.get(device.type, ())
    )


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors among arguments, including those of norms, tables and cached outputs."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif is_dataclass(value):
        yield from _tensors(tuple(vars(value).values()))


@cache
def load(op: str, backend: str) -> Backend:
    """A backend; imports its module."""
    module = import_module(f"pab_kernels.ops.{op}.{backend}")
    return Backend(*(getattr(module, name, None) for name in Backend._fields))


@cache  # for every launch
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)


def refuse_device(tensor: torch.Tensor, interpreted: bool) -> str | None:
    """Why Triton cannot run where `tensor` lies; None where it can."""
    if tensor.device.type == "cuda":
        if torch.version.hip is not None:
            return f"the kernels are for NVIDIA's GPUs; {tensor.device} is another's"
        major, minor = capability(tensor.device)
        return None if major >= 8 else f"{tensor.device} has compute capability {major}.{minor}; 8.0 or later is needed"
    if interpreted and tensor.device.type == "cpu":
        return None
    supported = "Triton kernels run on CUDA devices, and on the CPU under TRITON_INTERPRET=1"
    return f"{supported}; the tensors are on {tensor.device}"


def refuse_stream(x: torch.Tensor, most_tokens: int, most_channels: int = sys.maxsize) -> str | None:
    """Why a kernel cannot serve a residual stream of this dtype and size; None where it can."""
    channels = x.shape[-1]
    if x.dtype == torch.float64:
        return "x is torch.float64; float16, bfloat16 and float32 are supported"
    if channels > most_channels:
        return f"x has {channels} channels; up to {most_channels} are supported"
    if x.numel() > most_tokens * channels:
        return f"x has {x.numel() // channels} tokens; up to {most_tokens} are supported"
    return None


def refuse_float8(tensor: torch.Tensor, name: str, dtype: torch.dtype | None = torch.float8_e4m3fn) -> str | None:
    """Why Triton cannot access an operand of this name and dtype on `tensor`'s device; None where it can."""
    if dtype == torch.float8_e4m3fn and tensor.is_cuda and capability(tensor.device) < (8, 9):
        return f"{name} is torch.float8_e4m3fn; it needs compute capability 8.9 or later"
    return None
