"""The one place that chooses which implementation serves an operation.

Backend `b` of operation `op` is the module `pab_kernels.ops.<op>.<b>`, which holds the functions `<op>` and `<op>_out`. It is imported
when it is first used, so a kernel language that is not installed is never asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

BACKENDS = ("reference", "triton", "cuda", "sdpa", "flash_attn")
"""Every backend that `backend=` may name, beside `auto`."""

IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    "broadcast_residual": ("reference",),
    "project_residual": ("reference",),
    "attention": ("reference",),
    "short_attention": ("reference",),
}
"""The backends that exist for each operation. Adding a kernel is adding its module and its name here."""


class BackendError(RuntimeError):
    """The backend that was asked for cannot serve the call; the message says why and what to do."""


def choose(op: str, backend: str) -> str:
    """The backend that serves `op`; `auto` is the reference.

    Raises:
        BackendError: `backend` is unknown or has no kernel for `op`.
    """
    available = IMPLEMENTATIONS[op]
    if backend == "auto":
        return "reference"
    if backend in available:
        return backend
    if backend in BACKENDS:
        raise BackendError(f"{op}: backend {backend!r} has no kernel for it; it has {', '.join(available)}: pass one of these or 'auto'")
    raise BackendError(f"{op}: backend {backend!r} is unknown; known are auto, {', '.join(BACKENDS)}: pass 'auto' or one of these")


@cache
def load(op: str, backend: str, form: str = "") -> Callable[..., Any]:
    """The function of a chosen backend; `form` is "" for the one that returns new tensors, "_out" for the one that writes."""
    return getattr(import_module(f"pab_kernels.ops.{op}.{backend}"), op + form)
