"""Cases of `dequantize`: an int8 or fp8 slot into the activations' dtype."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pab_kernels.ops import dequantize_out, quantize
from pab_kernels.ops.dequantize import reference

from .candidates import backends, plain_torch
from .case import Case, Draw, Inputs, Outputs, doubled
from .geometries import Geometry
from .quantize import DTYPES

OP = "dequantize"


def cases(name: str, geometry: Geometry, dtype: torch.dtype) -> Iterator[Case]:
    """The cases at this geometry."""
    for title, kept in DTYPES.items():
        yield _case(name, geometry, dtype, title, kept)


def _case(name: str, geometry: Geometry, dtype: torch.dtype, title: str, kept: torch.dtype) -> Case:
    batch, tokens, channels = geometry.batch, geometry.frames * geometry.tokens, geometry.channels

    def draw(draw: Draw) -> Inputs:
        return {"q": quantize(draw(batch, tokens, channels), kept)}

    def places(inputs: Inputs) -> Outputs:
        return (torch.empty(inputs["q"].shape, dtype=dtype, device=inputs["q"].device),)

    def plain(inputs: Inputs) -> Outputs:
        return (reference.dequantize(inputs["q"], dtype),)

    def call(backend: str, inputs: Inputs, places: Outputs) -> Outputs:
        dequantize_out(inputs["q"], places[0], backend=backend)
        return places

    return Case(
        OP,
        name,
        title,
        {"batch": batch, "tokens": tokens, "channels": channels},
        dtype,
        0,
        draw,
        places,
        plain,
        exact=lambda inputs: (doubled(inputs["q"]),),
        looked_at=lambda outputs: outputs,
        candidates=(*backends(OP, call), *plain_torch(plain)),
    )
