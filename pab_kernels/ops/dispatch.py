"""Runs the call of an operation: checked first, then by a backend or, where a graph is compiled, as part of that
graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .backend import SELF_CHECKING, implementation, is_traced, load
from .overlap import check_apart
from .quantized import Quantized, data_and_scale

Outputs = tuple[Any, ...]
"""What an operation returns or writes: for each output a tensor, a `Quantized`, or None where the call has none."""


class Call(Protocol):
    """A call of an operation: a named tuple of all that it reads. The device of the first entry is where it runs."""

    @property
    def _fields(self) -> tuple[str, ...]: ...

    def __getitem__(self, index: Any, /) -> Any: ...

    def check(self, op: str) -> None:
        """Raise a TypeError or ValueError that says what is not supported."""

    def check_outputs(self, op: str, outputs: Outputs) -> None:
        """The same of outputs that are to be written."""

    def flatten(self) -> tuple[Any, ...]:
        """The arguments of the operation that is registered with torch, but for the backend and the outputs."""

    @classmethod
    def unflatten(cls, *flat: Any) -> Call:
        """The call that `flatten` made these of."""

    def empty(self) -> Outputs:
        """Uninitialised outputs."""

    def pack(self, tensors: Sequence[Tensor | None]) -> Outputs:
        """The outputs whose tensors these are: those that there are, or all that the schema of `<op>_out` has."""


class Operation(NamedTuple):
    """What `register` keeps of an operation: its reference, and the names of its outputs."""

    reference: Callable[[Any], Outputs]
    outputs: tuple[str, ...]


OPERATIONS: dict[str, Operation] = {}


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
        return OPERATIONS[op].reference(call)
    return call.pack(getattr(torch.ops.pab_kernels, op)(*call.flatten(), backend))


def write(op: str, call: Call, backend: str, outputs: Outputs) -> None:
    """Write the outputs of a call into these; both are checked. Not recorded by autograd.

    Raises:
        TypeError, ValueError, BackendError: as `run`; or an output does not fit, or shares memory.
    """
    attempt = None if backend == "auto" else _attempt_of(op, backend)
    if attempt is not None and not _have_a_past(outputs) and attempt(call, outputs):
        return
    call.check(op)
    call.check_outputs(op, outputs)
    if torch.compiler.is_compiling():
        flat: list[Tensor | None] = []
        for name, out in zip(OPERATIONS[op].outputs, outputs, strict=True):
            flat += data_and_scale(out) if name == "stored_out" or isinstance(out, Quantized) else (out,)
        getattr(torch.ops.pab_kernels, f"{op}_out")(*call.flatten(), backend, *flat)
    else:
        serve_into(op, call, backend, outputs)


def serve(op: str, call: Call, backend: str) -> Outputs:
    """The outputs of a checked call, from the backend that serves it."""
    served = implementation(op, backend, call)
    if served.launch is None:
        return served.compute(call)
    outputs = call.empty()
    served.launch(call, outputs)
    return outputs


def serve_into(op: str, call: Call, backend: str, outputs: Outputs) -> None:
    """`serve` into outputs, which are checked here for what a compiler cannot know: their addresses."""
    check_apart(op, OPERATIONS[op].outputs, outputs, call)
    served = implementation(op, backend, call, writes=True)
    if served.launch is not None:
        served.launch(call, outputs)
        return
    recorded = torch.is_grad_enabled()
    if recorded:  # `torch.no_grad()` at a fraction of its cost
        torch.set_grad_enabled(False)
    try:
        for read, written in zip(served.compute(call), outputs, strict=True):
            if isinstance(written, Quantized):
                written.data.copy_(read.data)
                written.scale.copy_(read.scale)
            elif written is not None:
                written.copy_(read)
    finally:
        if recorded:
            torch.set_grad_enabled(True)


def tensors_of(outputs: Outputs) -> list[Tensor]:
    """The tensors of the outputs that there are."""
    return [t for out in outputs for t in data_and_scale(out) if t is not None]


def _attempt_of(op: str, backend: str) -> Callable[[Call, Outputs], bool] | None:
    """What may be handed a call that nobody has checked, if the backend has it."""
    if SELF_CHECKING.get(op) != backend or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    return load(op, backend).attempt


def _have_a_past(outputs: Outputs) -> bool:
    """Whether autograd or inference mode knows of an output, of which a kernel knows nothing."""
    return any(isinstance(out, Tensor) and (out.requires_grad or out.is_inference()) for out in outputs)
