"""A case of an operation on quantised slots of a model's activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .candidates import backends, plain_torch
from .case import Case, Draw, Inputs, Outputs
from .geometries import Geometry

Cases = Callable[[str, Geometry, torch.dtype], Iterator[Case]]
DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "int4": torch.int4}


def slot_cases(
    op: str,
    *,
    draw: Callable[[Tensor, torch.dtype], Inputs],
    plain: Callable[[Inputs, torch.dtype, torch.dtype], Outputs],
    call: Callable[[str, Inputs, torch.dtype, torch.dtype], Outputs],
    exact: Callable[[Inputs], tuple[Tensor, ...]],
    looked_at: Callable[[Outputs], tuple[Tensor, ...]],
) -> Cases:
    """What makes the cases of `op`, one for each dtype of slots.

    Args:
        op: its name.
        draw: the inputs, of activations `[batch, tokens, channels]` and the dtype of the slot.
        plain: as in `Case`, with the activations' dtype and the slot's.
        call: the same with a backend, by its name, which comes first.
        exact, looked_at: as in `Case`.
    """

    def cases(name: str, geometry: Geometry, dtype: torch.dtype) -> Iterator[Case]:
        """The cases at this geometry."""
        batch, tokens, channels = geometry.batch, geometry.frames * geometry.tokens, geometry.channels

        def made(title: str, kept: torch.dtype) -> Case:
            def drawn(generator: Draw) -> Inputs:
                return draw(generator(batch, tokens, channels), kept)

            def user(inputs: Inputs) -> Outputs:
                return plain(inputs, dtype, kept)

            def served(backend: str, inputs: Inputs) -> Outputs:
                return call(backend, inputs, dtype, kept)

            shape = {"batch": batch, "tokens": tokens, "channels": channels}
            candidates = (*backends(op, served), *plain_torch(user))
            return Case(op, name, title, shape, dtype, 0, drawn, user, exact, looked_at, candidates)

        yield from (made(title, kept) for title, kept in DTYPES.items())

    return cases
