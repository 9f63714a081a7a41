"""Registers an operation with torch: `pab_kernels::<op>` returns new tensors, `pab_kernels::<op>_out` writes to what it is given.

The Python kernel is the implementation for every device and asks `backend.py` which one runs. Both operations are for inference:
`backward` through the first raises, the second is not recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula


def register(
    op: str,
    arguments: str,
    outputs: Sequence[str],
    functional: Callable[..., Any],
    out: Callable[..., None],
    fake: Callable[..., Any],
    flops: Callable[..., int],
) -> None:
    """Define both operations, with their implementations, fakes and FLOP formula.

    Args:
        op: name; arguments: schema of what is read, shared by both; outputs: schema of each tensor that `<op>_out` writes.
        functional, fake: take the arguments and `backend`, return a list of tensors.
        out: takes the arguments, `backend` and the outputs.
        flops: takes the shapes of the arguments.
    """
    signature = f"{arguments}, str backend"
    names = [output.split()[-1] for output in outputs]
    new = torch.library.custom_op(f"pab_kernels::{op}", functional, mutates_args=(), schema=f"({signature}) -> Tensor[]")
    new.register_fake(fake)

    def refuse(ctx: Any, *gradients: Any) -> None:
        raise RuntimeError(f"pab_kernels::{op} has no gradient; it is for inference: call it under torch.no_grad()")

    new.register_autograd(refuse)
    writing = torch.library.custom_op(
        f"pab_kernels::{op}_out", out, mutates_args=names, schema=f"({signature}, {', '.join(outputs)}) -> ()"
    )
    writing.register_fake(lambda *args: None)
    register_flop_formula([getattr(torch.ops.pab_kernels, op), getattr(torch.ops.pab_kernels, f"{op}_out")])(flops)


def not_recorded(function: Callable[..., None]) -> Callable[..., None]:
    """A function that autograd does not record: `torch.no_grad()` at a tenth of its cost where gradients are off already."""

    @wraps(function)
    def out(*args: Any) -> None:
        if not torch.is_grad_enabled():
            return function(*args)
        torch.set_grad_enabled(False)
        try:
            function(*args)
        finally:
            torch.set_grad_enabled(True)

    return out
