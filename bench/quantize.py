"""Cases of `quantize`: a sublayer's output into a slot of 8 or 4 bits."""

from __future__ import annotations

from pab_kernels.ops import quantize
from pab_kernels.ops.quantize import reference
from pab_kernels.ops.quantized import FORMATS

from .case import floats
from .slot_case import slot_cases

cases = slot_cases(
    "quantize",
    draw=lambda x, _: {"x": x},
    plain=lambda inputs, _, kept: (reference.quantize(inputs["x"], kept, FORMATS[kept].group),),
    call=lambda backend, inputs, _, kept: (quantize(inputs["x"], kept, backend=backend),),
    exact=lambda inputs: (inputs["x"].double(),),
    looked_at=lambda outputs: (floats(outputs[0]),),
)
