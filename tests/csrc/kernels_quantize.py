"""What the kernels of quantize and dequantize must be."""

from __future__ import annotations

from tests.csrc.compilation import Promise

NARROW = ("LDG.E.U8", "LDG.E.U16", "LDG.E.64", "STG.E.U8", "STG.E.U16", "STG.E.128")

KERNELS = {
    "quantize_kernel<*, *, true>": Promise(has=("LDG.E.128", "STG.E.64"), has_not=NARROW, loads_first=True),
    "quantize_kernel<*, *, false>": Promise(loads_first=True),
    "dequantize_kernel<*, *, true>": Promise(
        has=("LDG.E.64", "STG.E.128"), has_not=("LDG.E.U", "STG.E.U"), loads_first=True
    ),
    "dequantize_kernel<*, *, false>": Promise(loads_first=True),
}
