"""What every launch of a Triton kernel keeps to, whichever operation it is of."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pab_kernels import ops
from pab_kernels.ops.attention import Attention
from pab_kernels.ops.broadcast_residual import BroadcastResidual
from pab_kernels.ops.project_residual import ProjectResidual
from tests.ops.tensors import KERNEL_DEVICE, draws, launch

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


def zeros(size: int) -> Tensor:
    if KERNEL_DEVICE == "cuda":
        return torch.zeros(size, dtype=torch.bfloat16, device="cuda")
    # Zeros that numpy takes from the system are not there until they are written.
    return torch.from_numpy(np.zeros(size, dtype=np.int16)).view(torch.bfloat16)


def far(t: Tensor, dim: int = 0) -> Tensor:
    """A copy whose elements along `dim` are 2 ** 31 + 8 elements apart, in memory of which nothing else is touched."""
    apart, inner = 2**31 + 8, t.movedim(dim, 0).contiguous()
    return (
        zeros((len(inner) - 1) * apart + inner[0].numel())
        .as_strided(inner.shape, (apart, *inner.stride()[1:]))
        .copy_(inner)
        .movedim(0, dim)
    )


@pytest.mark.parametrize("dim", [0, 1])
def test_broadcast_residual_reaches_beyond_32_bits(dim: int) -> None:
    x, slot, gate = (draw(2, 2, 136) for _ in range(3))
    expected = ops.broadcast_residual(x, [slot], gates=[gate], norm=ops.Norm(), shift=gate, backend="triton")
    x_out, y_out, gate = (far(t, dim) for t in (x, x, gate))
    call = BroadcastResidual(far(x, dim), ((far(slot, dim), gate),), ops.Norm(), gate)
    launch("broadcast_residual", "triton", call, x_out, y_out)
    assert torch.equal(x_out, expected[0]) and torch.equal(y_out, expected[1])


@pytest.mark.parametrize("dim", [0, 1])
def test_project_residual_reaches_beyond_32_bits(dim: int) -> None:
    a, weight, x = draw(2, 2, 40), draw(2, 40), draw(2, 2, 2)
    expected = ops.project_residual(a, weight, None, x, store="pre_gate", slots=[x], backend="triton")
    x_out, stored, slot = (far(x, dim) for _ in range(3))
    call = ProjectResidual(far(a, dim), far(weight), None, far(x, dim), store="pre_gate", cached=((slot, None),))
    launch("project_residual", "triton", call, x_out, stored)
    assert torch.equal(x_out, expected[0]) and torch.equal(stored, expected[1])


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("normed", [False, True])
def test_attention_reaches_beyond_32_bits(normed: bool, dim: int) -> None:
    """Batch rows, tokens and heads."""
    q, k, v = (draw(2, 2, 2, 32) for _ in range(3))
    norm = ops.QKNorm() if normed else None
    expected, _ = ops.attention(q, k, v, q_norm=norm, k_norm=norm, backend="triton")
    out = far(torch.zeros_like(q), dim)
    call = Attention(far(q, dim), far(k, dim), far(v, dim), q_norm=norm, k_norm=norm)
    launch("attention", "triton", call, out, None)
    assert torch.equal(out, expected)


def test_attention_steps_over_keys_beyond_32_bits() -> None:
    q, (k, v) = draw(1, 1, 1, 32), (draw(1, 130, 1, 32) for _ in range(2))
    apart = 2**25  # 64 of them are 2 ** 31
    k_far, v_far = (zeros(129 * apart + 32).as_strided(t.shape, (0, apart, 32, 1)).copy_(t) for t in (k, v))
    assert torch.equal(ops.attention(q, k_far, v_far, backend="triton")[0], ops.attention(q, k, v, backend="triton")[0])
