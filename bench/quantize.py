"""Cases of `quantize`: a sublayer's output into an int8 or fp8 slot."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pab_kernels.ops import empty_quantized, quantize_out
from pab_kernels.ops.quantize import GROUP, reference

from .candidates import backends, plain_torch
from .case import Case, Draw, Inputs, Outputs, floats
from .geometries import Geometry

OP = "quantize"
DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def cases(name: str, geometry: Geometry, dtype: torch.dtype) -> Iterator[Case]:
    """The cases at this geometry."""
    for title, kept in DTYPES.items():
        yield _case(name, geometry, dtype, title, kept)


def _case(name: str, geometry: Geometry, dtype: torch.dtype, title: str, kept: torch.dtype) -> Case:
    batch, tokens, channels = geometry.batch, geometry.frames * geometry.tokens, geometry.channels

    def draw(draw: Draw) -> Inputs:
        return {"x": draw(batch, tokens, channels)}

    def places(inputs: Inputs) -> Outputs:
        return (empty_quantized(inputs["x"].shape, kept, device=inputs["x"].device),)

    def plain(inputs: Inputs) -> Outputs:
        return (reference.quantize(inputs["x"], kept, GROUP),)

    def call(backend: str, inputs: Inputs, places: Outputs) -> Outputs:
        quantize_out(inputs["x"], places[0], backend=backend)
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
        exact=lambda inputs: (inputs["x"].double(),),
        looked_at=lambda outputs: (floats(outputs[0]),),
        candidates=(*backends(OP, call), *plain_torch(plain)),
    )
