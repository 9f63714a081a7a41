"""What every launch of a Triton kernel keeps to, whichever operation it is of."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from pab_kernels import ops
from tests.ops.tensors import KERNEL_DEVICE, draws

pytest.importorskip("triton")

draw = draws(torch.bfloat16, device=KERNEL_DEVICE)
X, QKV = draw(1, 3, 136), [draw(1, 3, 2, 32) for _ in range(3)]
CALLS = {
    "broadcast_residual": lambda: ops.broadcast_residual(X, [X], norm=ops.Norm(), backend="triton"),
    "project_residual": lambda: ops.project_residual(X, draw(136, 136), None, X, backend="triton"),
    "attention": lambda: ops.attention(*QKV, q_norm=ops.QKNorm(), backend="triton"),
    "short_attention": lambda: ops.short_attention(*QKV, backend="triton"),
}
KERNELS = {
    "broadcast_residual": ["broadcast_residual.triton._broadcast_residual_kernel"],
    "project_residual": ["project_residual.triton._project_residual_kernel"],
    "attention": ["attention.prepare._prepare_kernel", "attention.triton._attention_kernel"],
    "short_attention": ["short_attention.triton._short_attention_kernel"],
}


@pytest.mark.parametrize("op", CALLS)
def test_a_kernel_is_launched_on_the_device_of_its_tensors(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device, which another one may be."""
    devices: list[torch.device] = []
    launched: list[list[torch.device]] = []

    @contextlib.contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        devices.append(tensor.device)
        yield
        devices.pop()

    class Watched:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Any:
            launched.append(list(devices))
            return self.kernel[grid]

    for path in KERNELS[op]:
        module, name = path.rsplit(".", 1)
        module = importlib.import_module(f"pab_kernels.ops.{module}")
        monkeypatch.setattr(module, name, Watched(getattr(module, name)))
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    CALLS[op]()
    assert launched == [[X.device]] * len(KERNELS[op])
