"""Reuses beside those that the package has: how many outputs they read, and by which weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from pab_kernels.broadcast.slots import Extrapolation, Key, Slot
from pab_kernels.broadcast.stream import ResidualStream
from pab_kernels.rules.reuse import REUSES
from tests.broadcast.parabola import Parabola


class Attention(nn.Module):
    """Gives the square of the timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return torch.zeros_like(x) + timestep**2


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> Any:
        return self.attn(x, timestep)


@pytest.fixture
def parabola(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(REUSES, "parabola", Parabola())
    yield


@pytest.mark.usefixtures("parabola")
@pytest.mark.parametrize("cache_dtype", [None, "int8"])
def test_a_reuse_of_three_outputs_needs_no_more_than_its_class(cache_dtype: Any) -> None:
    """Squares of uneven timesteps lie on a parabola: from the third computed step on, what is not computed is right all
    the same."""
    timesteps = [900.0, 850.0, 700.0, 640.0, 500.0, 330.0, 310.0, 120.0, 70.0, 20.0]
    model = Model()
    config = PABConfig(spatial=Broadcast(3, (3, 9), "step", "parabola"), cache_dtype=cache_dtype)
    pab.enable(model, config, timesteps=timesteps, kinds={"attn": "spatial"})
    assert PABConfig.from_dict(config.to_dict()) == config
    x = torch.zeros(1, 2, 8)
    with torch.no_grad():
        got = [float(model(x, torch.tensor(t)).mean()) for t in timesteps]
    assert model.attn.calls == 6
    exact = [t**2 for t in timesteps]
    assert got == pytest.approx(exact, rel=1e-4 if cache_dtype is None else 0.2, abs=60 if cache_dtype is None else 2e4)
    held = [pab.sublayers(model)[0].name]
    plan = pab.broadcast.broadcaster.broadcaster_of(model).latest.plan  # type: ignore[attr-defined]
    assert [plan.decision(held[0], i).reads for i in (4, 5, 7)] == [(3, 2, 1), (3, 2, 1), (6, 3, 2)]
    assert max(plan.decision(held[0], i).held for i in plan.steps) == 3
    assert plan.patterns == 3, "computed; computed and stored; reused"


def test_a_stream_adds_what_three_outputs_stand_for() -> None:
    key = Key((2, 8), torch.float32, torch.device("cpu"))
    slots = tuple(Slot(torch.randn(2, 8), key, source, 64, torch.float32) for source in (5, 3, 1))
    weights = (torch.tensor(0.75), torch.tensor(-0.25))
    x, gate = torch.randn(2, 8), torch.randn(8)
    model = Model()
    pab.enable(model, PABConfig(spatial=2), num_steps=4, kinds={"attn": "spatial"})
    call = pab.broadcast.broadcaster.broadcaster_of(model).latest.open()  # type: ignore[attr-defined]
    with torch.no_grad():
        stream = ResidualStream(x, call)
        stream.reuse(Extrapolation(slots, weights), gate)
        got = stream.read().double()
    c, c_1, c_2 = (slot.value.double() for slot in slots)
    exact = x.double() + gate.double() * (c + 0.75 * (c - c_1) - 0.25 * (c - c_2))
    assert (got - exact).abs().max() < 1e-6 * exact.abs().max()
