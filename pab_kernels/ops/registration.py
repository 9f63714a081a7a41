"""Registers an operation with torch: `pab_kernels::<op>` returns new tensors, `pab_kernels::<op>_out` writes to what it
is given.

The Python kernel is the implementation for every device and asks `backend.py` which one runs. Both operations are for
inference: `backward` through the first raises, the second is not recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .dispatch import OPERATIONS, Call, Operation, Outputs, serve, serve_into, tensors_of


def register(
    op: str,
    call: type[Call],
    arguments: str,
    outputs: Mapping[str, str],
    reference: Callable[[Any], Outputs],
    flops: Callable[..., int] = lambda *args, **kwargs: 0,
) -> None:
    """Define both operations, with their implementations, fakes and FLOP formula.

    Args:
        op: name.
        call: class of its calls.
        arguments: schema of what is read, as `call.flatten` gives it.
        outputs: name of each output, and its schema where it is written: of one tensor or, where it may be quantised,
            of two.
        reference: the outputs of a call, in plain torch.
        flops: takes the shapes of the arguments.
    """
    OPERATIONS[op] = Operation(reference, tuple(outputs))
    signature, written = f"{arguments}, str backend", ", ".join(outputs.values())
    names = [output.split()[-1] for output in written.split(", ")]

    def new(*args: Any) -> list[Tensor]:
        return tensors_of(serve(op, call.unflatten(*args[:-1]), args[-1]))

    def fake(*args: Any) -> list[Tensor]:
        return tensors_of(call.unflatten(*args[:-1]).empty())

    def refuse(ctx: Any, *gradients: Any) -> None:
        raise RuntimeError(f"pab_kernels::{op} has no gradient; it is for inference: call it under torch.no_grad()")

    def out(*args: Any) -> None:
        *flat, backend = args[: -len(names)]
        made = call.unflatten(*flat)
        serve_into(op, made, backend, made.pack(args[-len(names) :]))

    functional = torch.library.custom_op(
        f"pab_kernels::{op}", new, mutates_args=(), schema=f"({signature}) -> Tensor[]"
    )
    functional.register_fake(fake)
    functional.register_autograd(refuse)
    writing = torch.library.custom_op(
        f"pab_kernels::{op}_out", out, mutates_args=names, schema=f"({signature}, {written}) -> ()"
    )
    writing.register_fake(lambda *args: None)
    register_flop_formula([getattr(torch.ops.pab_kernels, op), getattr(torch.ops.pab_kernels, f"{op}_out")])(flops)
