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


class Scaling(Block):
    """Writes to an output after it has used it."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        y = self.attn(x)
        z = x + gate * y
        return z + y.mul_(3)


@torch.no_grad()
@pytest.mark.parametrize("config", [PABConfig(spatial=Broadcast(3, (0, 1))), PABConfig(block=Broadcast(3, (0, 1)))])
def test_a_compiled_block_that_writes_to_an_output_leaves_the_slot_alone(config: PABConfig) -> None:
    model = Model()
    model.block = Scaling()
    model.eval().requires_grad_(False)
    x, gate = torch.randn(8, 64), torch.randn(64)
    plain = model(x, gate)
    model.block.compile(fullgraph=True)
    pab.enable(model, config, num_steps=STEPS, kinds={"block.attn": "spatial", "block.mlp": "mlp", "block": "block"})
    assert all(torch.allclose(model(x, gate), plain, atol=1e-5) for _ in range(STEPS))
    summary = pab.summary(model)
    assert summary.forced == 0 and sum(t.reused for t in summary.contexts["#0"].values()) == 4


@torch.no_grad()
def test_the_input_of_a_compiled_block_is_not_copied() -> None:
    from torch._inductor.utils import run_and_get_code

    model = Model().eval().requires_grad_(False)
    x, gate = torch.randn(8, 64), torch.randn(64)
    model.block.compile(fullgraph=True)
    _, (plain,) = run_and_get_code(model, x, gate)
    pab.enable(model, PABConfig(block=Broadcast(3, (0, 1))), num_steps=STEPS, kinds={"block": "block"})
    _, (storing,) = run_and_get_code(model, x, gate)
    assert work(storing) == work(plain), "the loop that writes the output writes the change too"


@torch.no_grad()
def test_a_compiled_block_reads_no_slot_that_was_lent_and_written_to() -> None:
    """Lent by the block when it ran in eager mode."""
    model, kept = Model().eval().requires_grad_(False), []
    x, gate = torch.randn(8, 64), torch.randn(64)
    plain = model(x, gate)
    pab.enable(
        model,
        PABConfig(spatial=Broadcast(3, (0, 1))),
        num_steps=STEPS,
        kinds={"block.attn": "spatial", "block.mlp": "mlp"},
    )
    for step in range(STEPS):
        if step == 3:
            handle = model.block.attn.register_forward_hook(lambda module, args, out: kept.append(out))
        if step == 4:
            handle.remove()
            kept[0].zero_()
            model.block.compile(fullgraph=True)
        assert torch.allclose(model(x, gate), plain, atol=1e-5)
    assert pab.summary(model).forced == 1
