"""One call on the meta device: what is alive in it."""

from __future__ import annotations

import torch
from torch import nn

from pab_kernels.analysis.forecasts.measure import measure
from pab_kernels.rules.plan import Sublayer


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(16, 64), nn.Linear(64, 16)
        self.register_buffer("shift", torch.zeros(1, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.narrow(self.wide(x) + self.shift.expand(3, 64))


def test_activations_are_what_is_alive_at_most_and_weights_are_not_among_them() -> None:
    with torch.device("meta"):
        model, x = Two(), torch.empty(3, 16)
    found = measure(model, {"x": x}, [Sublayer("wide", "mlp", 0)])
    assert found.activation_bytes == 4 * 3 * (16 + 64 + 64)  # the input, and what the addition reads and makes
    assert found.weight_bytes == 4 * (2 * 16 * 64 + 64 + 16 + 64)
