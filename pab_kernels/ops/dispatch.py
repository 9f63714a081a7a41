"""Checks the call of an operation and runs it: on a backend or, under `torch.compile`, as part of the graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .backend import implementation, is_traced
from .quantized import data_and_scale

Outputs = tuple[Any, ...]
"""What an operation returns: for each output a tensor, a `Quantized`, or None where the call has none."""


class Call(Protocol):
    """A call of an operation: a named tuple of all that it reads. It runs on the device of the first entry."""

    def __getitem__(self, index: Any, /) -> Any: ...

    def check(self, op: str) -> None:
        """Raise a TypeError or ValueError if the call is not supported."""

    def flatten(self) -> tuple[Any, ...]:
        """The arguments of the operation as registered with torch, without the backend."""

    @classmethod
    def unflatten(cls, *flat: Any) -> Call:
        """The inverse of `flatten`."""

    def empty(self) -> Outputs:
        """Uninitialised outputs."""

    def pack(self, tensors: Sequence[Tensor]) -> Outputs:
        """The outputs with these tensors, which lack those that are None."""


REFERENCES: dict[str, Callable[[Any], Outputs]] = {}
"""By operation, the function of a call to its outputs in plain torch; `register` adds to it."""


def run(op: str, call: Call, backend: str) -> Outputs:
    """The outputs of a call, checked first, as new tensors.

    Raises:
        TypeError, ValueError: the call is not supported.
        BackendError: the backend cannot serve it.
    """
    call.check(op)
    return run_checked(op, call, backend)


def run_checked(op: str, call: Call, backend: str = "auto") -> Outputs:
    """`run` for a call that is valid by construction."""
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
    """The tensors of the outputs that are not None."""
    return [t for out in outputs for t in data_and_scale(out) if t is not None]
