"""The one place that chooses which implementation serves an operation.

Backend `b` of operation `op` is the module `pab_kernels.ops.<op>.<b>`, imported when it is first used, so a kernel
language that is not installed is never asked for. It has the functions of `Backend`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

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

SELF_CHECKING = {"broadcast_residual": "cuda"}
"""By operation, the backend that checks calls itself, at less cost than Python: `attempt(call, outputs)` is given calls
that nobody has checked, and says whether it served one. It launches nothing where anything is wrong; the checks in
Python then say what."""


class Backend(NamedTuple):
    """The functions of a backend's module, one of the first two and perhaps others.

    None for one that it does not have.
    """

    compute: Any
    """`compute(call)`: the outputs, new tensors that autograd follows."""
    launch: Any
    """`launch(call, outputs)`: write the outputs; autograd does not follow."""
    refusal: Any
    """`refusal(call)`: why it cannot serve the call, in a few words, or None. Without it the backend serves
    everything."""
    attempt: Any
    """`attempt(call, outputs)`: see `SELF_CHECKING`."""


class BackendError(RuntimeError):
    """The backend that was asked for cannot serve the call; the message says why and what to do."""


def implementation(op: str, backend: str, call: Any) -> Backend:
    """The backend that serves a call.

    `auto` is the reference where autograd is to record the call and the kernel has no gradient.

    Raises:
        BackendError: see `choose`; or a gradient would be lost.
    """
    served = load(op, choose(op, backend, call))
    if served.launch is not None and torch.is_grad_enabled() and any(t.requires_grad for t in _tensors(call)):
        if backend != "auto":
            reason = "a gradient would be recorded and its kernel has none"
            raise BackendError(
                f"{op}: backend {backend!r} cannot serve this call; {reason}: call it under torch.no_grad()"
            )
        return load(op, "reference")
    return served


def choose(op: str, backend: str, call: Sequence[Any]) -> str:
    """The backend that serves `op` on this call.

    `auto` is the first of `PREFERRED` for the device that can serve, else the reference. Shapes, dtypes, strides and
    devices decide, never values, so that a call decides alike when it is traced and when it is run.

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
        known, has = f"auto, {', '.join(BACKENDS)}", ", ".join(available)
        if backend in BACKENDS:
            raise BackendError(
                f"{op}: backend {backend!r} has no kernel for it; it has {has}: pass one of these or 'auto'"
            )
        raise BackendError(f"{op}: backend {backend!r} is unknown; known are {known}: pass 'auto' or one of these")
    reason = refusal(op, backend, call)
    if reason is not None:
        raise BackendError(f"{op}: backend {backend!r} cannot serve this call; {reason}: pass backend='auto'")
    return backend


def refusal(op: str, backend: str, call: Any) -> str | None:
    """Why a backend that there is cannot serve this call; None where it can."""
    try:
        served = load(op, backend)
    except ModuleNotFoundError as error:
        return f"it needs the package {error.name}, which is not installed"
    return None if served.refusal is None else served.refusal(call)


def is_traced(op: str, backend: str, device: torch.device) -> bool:
    """Whether a call that is compiled becomes the reference's plain torch, which the compiler fuses with what is around
    it.

    It does where the reference is what serves it, whatever the call, since there is no kernel for the device. Elsewhere
    it is one opaque operation, and the backend is chosen when it runs.
    """
    return backend in ("auto", "reference") and all(
        b not in IMPLEMENTATIONS[op] for b in PREFERRED.get(device.type, ())
    )


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
def load(op: str, backend: str) -> Backend:
    """A backend, whose module is imported."""
    module = import_module(f"pab_kernels.ops.{op}.{backend}")
    return Backend(*(getattr(module, name, None) for name in Backend._fields))


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
            return (
                f"{tensor.device} has compute capability {'.'.join(map(str, capability(tensor.device)))}; 8.0 or later "
                "is needed"
            )
        return None
    if interpreted and tensor.device.type == "cpu":
        return None
    return (
        "Triton kernels run on CUDA devices, and on the CPU under TRITON_INTERPRET=1; the tensors are on "
        f"{tensor.device}"
    )


def refuse_float8(tensor: torch.Tensor, name: str) -> str | None:
    """Why Triton cannot read or write a float8 operand of this name on `tensor`'s device; None where it can."""
    if tensor.is_cuda and capability(tensor.device) < (8, 9):
        return f"{name} is torch.float8_e4m3fn; compute capability 8.9 or later is needed for it"
    return None
