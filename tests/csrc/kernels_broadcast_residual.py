"""What the kernels of broadcast_residual must be: of a type, vectors a thread, slots held, aligned or not."""

from __future__ import annotations

from tests.csrc.compilation import Promise

KERNELS = {
    "broadcast_residual_kernel<*, *, *, true>": Promise(
        has=("LDG.E.128", "LDG.E.64", "STG.E.128"),
        has_not=("LDG.E.U8", "LDG.E.U16", "STG.E.U8", "STG.E.U16", "STG.E.64"),
        loads_first=True,
        waits=True,
    ),
    "broadcast_residual_kernel<*, *, *, false>": Promise(loads_first=True, waits=True),
}
