"""Cases of `quantize`: a sublayer's output into an int8 or fp8 slot."""

from __future__ import annotations

from pab_kernels.ops import empty_quantized, quantize_out
from pab_kernels.ops.quantize import reference
from pab_kernels.ops.quantized import GROUP

from .case import Inputs, Outputs, floats
from .slot_case import slot_cases


def _call(backend: str, inputs: Inputs, places: Outputs) -> Outputs:
    quantize_out(inputs["x"], places[0], backend=backend)
    return places


cases = slot_cases(
    "quantize",
    draw=lambda x, _: {"x": x},
    places=lambda inputs, _, kept: (empty_quantized(inputs["x"].shape, kept, device=inputs["x"].device),),
    plain=lambda inputs, _, kept: (reference.quantize(inputs["x"], kept, GROUP),),
    call=_call,
    exact=lambda inputs: (inputs["x"].double(),),
    looked_at=lambda outputs: (floats(outputs[0]),),
)
