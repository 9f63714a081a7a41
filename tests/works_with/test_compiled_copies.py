"""What a compiled block stores and reads costs no copy: it stays where it was computed, and a slot is read where it
lies."""

from __future__ import annotations

import re
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++ for a CPU")

STEPS = 6


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Linear(64, 64)
        self.mlp = nn.Linear(64, 64)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        x = x + gate * self.attn(x)
        return x + gate * self.mlp(x.relu())


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor, gate: Tensor) -> Any:
        return self.block(x, gate)


def work(code: str) -> tuple[int, int, int]:
    """Buffers, loops over elements and products of matrices in what the compiler wrote of a graph."""
    body = code[code.index("def call(") : code.index("runner = ")]
    buffers, loops, products = (
        len(re.findall(p, body)) for p in (r"= empty_strided_cpu\(", r" cpp_fused\w*\(", r"extern_kernels\.")
    )
    return buffers, loops, products


@torch.no_grad()
def test_a_stored_and_a_read_output_cost_no_copy() -> None:
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    model = Model().eval().requires_grad_(False)
    x, gate = torch.randn(8, 64), torch.randn(64)
    model.block.compile(fullgraph=True)
    _, (plain,) = run_and_get_code(model, x, gate)
    pab.enable(
        model,
        PABConfig(spatial=Broadcast(3, (0, 1))),
        num_steps=STEPS,
        kinds={"block.attn": "spatial", "block.mlp": "mlp"},
    )
    _, (storing,) = run_and_get_code(model, x, gate)
    _, (reading,) = run_and_get_code(model, x, gate)
    assert work(storing) == work(plain)
    buffers, loops, products = work(plain)
    assert work(reading) == (buffers - 1, loops, products - 1), "without the attention and its buffer"
    assert pab.summary(model).contexts["#0"]["spatial"].reused == 1
    torch._dynamo.reset()
