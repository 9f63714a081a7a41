"""Cases of `dequantize`: a slot of 8 or 4 bits into the activations' dtype."""

from __future__ import annotations

from pab_kernels.ops import dequantize, quantize
from pab_kernels.ops.dequantize import reference

from .case import doubled
from .slot_case import slot_cases

cases = slot_cases(
    "dequantize",
    draw=lambda x, kept: {"q": quantize(x, kept)},
    plain=lambda inputs, dtype, _: (reference.dequantize(inputs["q"], dtype),),
    call=lambda backend, inputs, dtype, _: (dequantize(inputs["q"], dtype, backend=backend),),
    exact=lambda inputs: (doubled(inputs["q"]),),
    looked_at=lambda outputs: outputs,
)
