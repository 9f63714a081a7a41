"""One call on the meta device: what is alive in it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pab_kernels import Broadcast, PABConfig
from pab_kernels.adapters import adapter_for
from pab_kernels.analysis.forecasts.measure import measure
from pab_kernels.nn import PABAttention
from pab_kernels.rules.plan import Plan, Sublayer
from pab_kernels.rules.schedule import Schedule


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


class TwoAttentions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(PABAttention(64, 2, "spatial", layer=i) for i in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.mark.parametrize(("cache_dtype", "kept"), [(None, 5 * 64 * 2), ("int8", 5 * (64 + 4))])
def test_a_reuse_of_an_nn_module_reads_what_is_kept_and_writes_its_output(cache_dtype: str | None, kept: int) -> None:
    with torch.device("meta"):
        model, x = TwoAttentions().half(), torch.empty(1, 5, 64, dtype=torch.half)
    sublayers = tuple(adapter_for(model).sublayers)
    plan = Plan(PABConfig(spatial=Broadcast(2, (0, 1))), Schedule(4), sublayers)
    found = plan.forecast(*measure(model, {"x": x}, sublayers).costs(cache_dtype), 1, 0)
    assert found.moved_bytes == 2 * 2 * (kept + 5 * 64 * 2), "in two steps and two layers"
    assert found.peak_cache_bytes == 2 * kept
