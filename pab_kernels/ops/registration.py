"""Registers operations with torch: `pab_kernels::<op>`, for compilers, meta tensors and FLOP counters.

One Python implementation serves every device: it asks `backend.py` for the kernel. The registered operations are for
inference: `backward` through one raises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .dispatch import REFERENCES, Call, Outputs, serve, tensors_of


def register(
    op: str,
    call: type[Call],
    arguments: str,
    reference: Callable[[Any], Outputs],
    flops: Callable[..., int] = lambda *args, **kwargs: 0,
) -> None:
    """Define an operation, with its implementation, fake and FLOP formula.

    Args:
        op: name.
        call: class of its calls.
        arguments: schema of what `call.flatten` gives.
        reference: the outputs of a call, in plain torch.
        flops: takes the shapes of the arguments.
    """
    REFERENCES[op] = reference

    def new(*args: Any) -> list[Tensor]:
        return tensors_of(serve(op, call.unflatten(*args[:-1]), args[-1]))

    def fake(*args: Any) -> list[Tensor]:
        return tensors_of(call.unflatten(*args[:-1]).empty())

    def refuse(ctx: Any, *gradients: Any) -> None:
        raise RuntimeError(f"pab_kernels::{op} has no gradient; it is for inference: call it under torch.no_grad()")

    schema = f"({arguments}, str backend) -> Tensor[]"
    operation = torch.library.custom_op(f"pab_kernels::{op}", new, mutates_args=(), schema=schema)
    operation.register_fake(fake)
    operation.register_autograd(refuse)
    register_flop_formula(getattr(torch.ops.pab_kernels, op))(flops)
