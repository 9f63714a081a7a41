"""Runs the call of an operation: checked first, then by a backend or, where a graph is compiled, as part of that
graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .backend import SELF_CHECKING, implementation, is_traced, load
from .quantized import data_and_scale

Outputs = tuple[Any, ...]
"""What an operation returns: for each output a tensor, a `Quantized`, or None where the call has none."""


class Call(Protocol):
    """A call of an operation: a named tuple of all that it reads. The device of the first entry is where it runs."""

    @property
    def _fields(self) -> tuple[str, ...]: ...

    def __getitem__(self, index: Any, /) -> Any: ...

    def check(self, op: str) -> None:
        """Raise a TypeError or ValueError that says what is not supported."""

    def flatten(self) -> tuple[Any, ...]:
        """The arguments of the operation that is registered with torch, but for the backend."""

    @classmethod
    def unflatten(cls, *flat: Any) -> Call:
        """The call that `flatten` made these of."""

    def empty(self) -> Outputs:
        """Uninitialised outputs."""

    def pack(self, tensors: Sequence[Tensor]) -> Outputs:
        """The outputs whose tensors these are, without those that are None."""


REFERENCES: dict[str, Callable[[Any], Outputs]] = {}
"""By operation, its outputs in plain torch; `register` adds to it."""


def run(op: str, call: Call, backend: str) -> Outputs:
    """The outputs of a call, as new tensors; it is checked.

    Raises:
        TypeError, ValueError: the call is not supported.
        BackendError: the backend cannot serve it.
    """
    attempt = None if backend == "auto" else _attempt_of(op, backend)
    if attempt is not None and isinstance(call[0], Tensor):
        outputs = call.empty()
        if attempt(call, outputs):
            return outputs
    call.check(op)
    return run_checked(op, call, backend)


def run_checked(op: str, call: Call, backend: str = "auto") -> Outputs:
    """`run` for a call that is right by construction."""
    if not torch.compiler.is_compiling():
        return serve(op, call, backend)
    if is_traced(op, backend, call[0].device):
        return REFERENCES[op](call)
    return call.pack(getattr(torch.ops.pab_kernels, op)(*call.flatten(), backend))


def serve(op: str, call: Call, backend: str) -> Outputs:
    """The outputs of a checked call, from the backend that serves it."""
    served = implementation(op, backend, call)
    if served.launch is None:
        return served.compute(call)
    outputs = call.empty()
    served.launch(call, outputs)
    return outputs


def tensors_of(outputs: Outputs) -> list[Tensor]:
    """The tensors of the outputs that there are."""
    return [t for out in outputs for t in data_and_scale(out) if t is not None]


def _attempt_of(op: str, backend: str) -> Callable[[Call, Outputs], bool] | None:
    """What may be handed a call that nobody has checked, if the backend has it."""
    if SELF_CHECKING.get(op) != backend or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    return load(op, backend).attempt
