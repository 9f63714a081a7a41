"""`nn.TransformerEncoderLayer`, which torch runs as one operation where nobody is in the way: its attention is then not
called."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig

STEPS = 4
HALF = Broadcast(2, (0, 1))
OF_BLOCKS = {"layers.*.self_attn": None}


class Encoder(nn.Module):
    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, batch_first=batch_first) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def inputs(step: int) -> Tensor:
    return torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(step))


@pytest.fixture
def slowly() -> Iterator[None]:
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


def test_its_attention_is_refused_and_nothing_is_left_behind() -> None:
    model = Encoder().eval()
    assert {s.kind for s in pab.sublayers(model)} == {"spatial", "block"}
    with pytest.raises(
        ValueError, match=r"layers.0.self_attn .*set_fastpath_enabled\(False\).*kinds={'layers.\*.self_attn': None}"
    ):
        pab.enable(model, PABConfig(spatial=HALF), num_steps=STEPS)
    assert all("forward" not in vars(m) for m in model.modules()) and "_pab_broadcaster" not in vars(model)


def test_as_a_block_it_is_reused() -> None:
    model = Encoder().eval()
    plain = [model(inputs(step)) for step in range(STEPS)]
    pab.enable(model, PABConfig(block=Broadcast(1)), num_steps=STEPS, kinds=OF_BLOCKS)
    assert all(torch.equal(model(inputs(step)), plain[step]) for step in range(STEPS))
    pab.enable(model, PABConfig(block=HALF))
    changes: list[Tensor] = []
    with pab.generation(model, num_steps=STEPS):
        for step in range(STEPS):
            if step % 2 == 0:
                x, changes = inputs(step), []
                for layer in model.layers:
                    out = type(layer).forward(layer, x)
                    changes.append(out - x)
                    x = out
            else:
                x = inputs(step) + changes[0] + changes[1]
            torch.testing.assert_close(model(inputs(step)), x)
    assert pab.summary(model).contexts["#0"]["block"].reused == 2 * STEPS // 2


@pytest.mark.parametrize("batch_first", [True, False])
def test_its_attention_is_reused_where_torch_calls_it(batch_first: bool, request: pytest.FixtureRequest) -> None:
    if batch_first:
        request.getfixturevalue("slowly")
    model = Encoder(batch_first).eval()
    plain = [model(inputs(step)) for step in range(STEPS)]
    pab.enable(model, PABConfig(spatial=Broadcast(1)), num_steps=STEPS)
    assert all(torch.equal(model(inputs(step)), plain[step]) for step in range(STEPS))
    pab.enable(model, PABConfig(spatial=HALF))
    with pab.generation(model, num_steps=STEPS):
        for step in range(STEPS):
            assert torch.equal(model(inputs(step)), plain[step]) == (step % 2 == 0)
    assert pab.summary(model).contexts["#0"]["spatial"].reused == 2 * STEPS // 2
    pab.disable(model)
    assert torch.equal(model(inputs(0)), plain[0])
