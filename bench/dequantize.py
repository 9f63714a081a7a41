"""Cases of `dequantize`: an int8 or fp8 slot into the activations' dtype."""

from __future__ import annotations

import torch

from pab_kernels.ops import dequantize_out, quantize
from pab_kernels.ops.dequantize import reference

from .case import Inputs, Outputs, doubled
from .slot_case import slot_cases


def _call(backend: str, inputs: Inputs, places: Outputs) -> Outputs:
    dequantize_out(inputs["q"], places[0], backend=backend)
    return places


cases = slot_cases(
    "dequantize",
    draw=lambda x, kept: {"q": quantize(x, kept)},
    places=lambda inputs, dtype, _: (torch.empty(inputs["q"].shape, dtype=dtype, device=inputs["q"].device),),
    plain=lambda inputs, dtype, _: (reference.dequantize(inputs["q"], dtype),),
    call=_call,
    exact=lambda inputs: (doubled(inputs["q"]),),
    looked_at=lambda outputs: outputs,
)
