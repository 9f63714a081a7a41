"""A model of four blocks, called in a row or with something between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pab_kernels.rules.plan import Sublayer


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Linear(8, 8)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        x = x + self.attn(x, x, x, need_weights=False)[0]
        return x + self.mlp(x if skip is None else x + skip)


def directly(model: Model, x: Tensor) -> Any:
    for block in model.blocks:
        x = block(x)
    return x


class Model(nn.Module):
    def __init__(self, forward: Callable[[Model, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.run = forward
        self.double().eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


SUBLAYERS = [Sublayer(f"blocks.{i}", "block", i) for i in range(4)]
X = torch.randn(1, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
