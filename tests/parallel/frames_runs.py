"""Sampling runs of tiny STDiT3 and Latte, on one rank and on several, that tests of several processes compare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from pab_kernels.parallel.parallelize import parallel_of
from pab_kernels.rules.budget import GivenUp
from pab_kernels.rules.plan import Plan
from pab_kernels.rules.schedule import Schedule
from pab_kernels.rules.traffic import EightBits, Layout, Shapes, Traffic, returned, traffic
from tests.adapters import tiny_latte, tiny_stdit3
from tests.broadcast.bus_recorder import recorded

STEPS = 6
FP8 = torch.float8_e4m3fn
PLANS = {
    "without PAB": None,
    "hold": PABConfig(spatial=2, temporal=3, cross=4),
    "in step": PABConfig(spatial=3, temporal=3, cross=3),
    "linear": PABConfig(temporal=Broadcast(2, reuse="linear"), mlp=2),
    "int8": PABConfig(spatial=2, temporal=3, cache_dtype="int8"),
    "int4": PABConfig(spatial=2, temporal=3, cache_dtype="int4"),
    "after the gate": PABConfig(temporal=2, cache_point="post_gate"),
    "blocks": PABConfig(block=2),
    "the model": PABConfig(model=2, temporal=2),
    "in host memory": PABConfig(spatial=3, temporal=2, cross=2, cache_device="cpu"),
}


@dataclass(frozen=True)
class Case:
    """One sampling run.

    Args:
        model: "stdit3" or "latte".
        plan: a name in `PLANS`.
        frames, size, batch: of the latents.
        given: frames that STDiT3 gets given.
        layers: of the model.
        options: of `pab.parallelize`.
    """

    model: str
    plan: str
    frames: int
    size: tuple[int, int] = (5, 7)
    batch: int = 2
    given: bool = False
    layers: int = 2
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def build(self) -> nn.Module:
        """The model, in float64."""
        if self.model == "stdit3":
            return tiny_stdit3.tiny_stdit3(torch.float64, depth=self.layers)
        model: nn.Module = tiny_latte.tiny_latte(torch.float64, video_length=self.frames, num_layers=self.layers)
        return model

    def sample(self, model: nn.Module, seed: int = 0) -> Tensor:
        """The latents after `STEPS` steps."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.batch, 4, self.frames, *self.size, generator=generator, dtype=torch.float64)
        for step in range(STEPS):
            x = x - 0.1 * self.call(model, x, 900 - 100 * step)
        return x

    def call(self, model: nn.Module, x: Tensor, timestep: int) -> Tensor:
        """The model's output at a step."""
        if self.model == "stdit3":
            conditions = tiny_stdit3.conditions(batch=self.batch, dtype=torch.float64)
            mask = tiny_stdit3.given_frames(self.frames, batch=self.batch) if self.given else None
            text = tiny_stdit3.text(batch=self.batch, dtype=torch.float64)
            t = torch.full((self.batch,), float(timestep), dtype=torch.float64)
            return model(x, t, text, x_mask=mask, **conditions)[:, :4].double()
        text = torch.cat([tiny_latte.prompt(i, torch.float64) for i in range(self.batch)])
        t = torch.full((self.batch,), timestep)
        return model(x, timestep=t, encoder_hidden_states=text, return_dict=False)[0][:, :4]

    @property
    def tokens(self) -> int:
        """S: tokens of a frame."""
        patch = 2 if self.model == "stdit3" else 4
        return -(-self.size[0] // patch) * -(-self.size[1] // patch)

    def expected(self, sublayers: Any, config: PABConfig | None, cfg: int, ranks: int) -> Traffic:
        """What the formula says that a rank sends."""
        kept = None if config is None or self.options.get("exact") else config.cache_dtype
        given = self.options.get("input_dtype")
        input_dtype = cast(EightBits, str(given).removeprefix("torch.")) if given in (torch.int8, FP8) else None
        layout = Layout.of(ranks, cfg, input_dtype, returned(kept))
        itemsize = 4 if self.model == "stdit3" else 8  # its output has float32
        shapes = Shapes(self.batch, self.frames, self.tokens, 64, 8, 8 * self.size[0] * self.size[1] * itemsize)
        if self.model == "latte":
            shapes = replace(shapes, least=2, joined=True)
        made = Plan(config or PABConfig(), Schedule(STEPS), tuple(sublayers))
        return traffic(layout, "frames", shapes, made)


ROUNDING = {"stdit3": 0.0, "latte": 1e-13}
"""The output of STDiT3 has float32: the last bit of a matrix product in float64, which may depend on the number of its
rows, does not show."""
Found = list[tuple[Case, float, Traffic, Traffic]]


def compare(rank: int, cases: list[Case], cfg: int, ranks: int, mesh: Any = None) -> Found:
    """For each case the largest difference between one rank and several, what was sent, and what the formula says."""
    found = []
    for case in cases:
        model, config = case.build(), PLANS[case.plan]
        with recorded() as bus:  # between the CPU as a device and as a host
            alone = _run(model, config, lambda m=model, c=case: c.sample(m))
            pab.parallelize(model, mesh, **case.options | ({} if mesh else {"cfg": cfg}))
            together = _run(model, config, lambda m=model, c=case: c.sample(m))
        assert bool(bus.log) == (config is not None and config.cache_device is not None) and not bus.pending
        parallel = parallel_of(model)
        assert parallel is not None
        sent, expected = parallel.traffic(), case.expected(pab.sublayers(model), config, cfg, ranks)
        assert sent is not None
        found.append((case, float((alone - together).abs().max()), sent, expected))
        pab.unparallelize(model)
        pab.disable(model)
        assert not [name for module in model.modules() for name in vars(module) if "pab" in name]
    return found


def compare_in_fours(rank: int, cases: list[Case]) -> Found:
    """`compare` on each half of eight ranks, by a mesh that belongs to the caller."""
    mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("copies", "cfg", "sequence"))
    return compare(rank, cases, 2, 4, mesh["cfg", "sequence"])


def within_budgets(rank: int) -> list[tuple[int, int, GivenUp, int]]:
    """The most bytes held, the budget, what was given up for it and forced runs; the last budget is a share."""
    found = []
    for case, budget in ((Case("stdit3", "hold", 5), 40_000), (Case("latte", "hold", 5, (12, 12)), 30_000)):
        model = pab.parallelize(case.build())
        pab.enable(model, PLANS["hold"], num_steps=STEPS, budget=budget)
        found.append(_within_budget(case, model, budget))
        with mock.patch("pab_kernels.broadcast.budgeting.free_bytes", return_value=(2 + rank) * budget):
            pab.enable(model, num_steps=STEPS, budget=0.5)
            found.append(_within_budget(case, model, budget))
        pab.unparallelize(model)
    return found


def _within_budget(case: Case, model: nn.Module, budget: int) -> tuple[int, int, GivenUp, int]:
    case.sample(model)
    summary = pab.summary(model)
    assert summary.plan is not None and summary.plan.given_up is not None
    return summary.peak_cache_bytes, budget, summary.plan.given_up, summary.forced


def check(found_on_ranks: list[Found]) -> None:
    """Assert that all ranks have what one has, and sent what the formula says."""
    for rank, found in enumerate(found_on_ranks):
        for case, difference, sent, expected in found:
            eight = case.plan == "int8" and not case.options
            assert difference <= (0.02 if eight else ROUNDING[case.model]), (rank, case, difference)
            assert {kind: steps for kind, steps in sent.sent.items() if any(s.messages for s in steps)} == {
                kind: steps for kind, steps in expected.sent.items() if any(s.messages for s in steps)
            }, (rank, case)
            assert sent.without_pab == expected.without_pab, (rank, case)


def _run(model: nn.Module, config: PABConfig | None, run: Callable[[], Tensor]) -> Tensor:
    if config is not None:
        pab.enable(model, config, num_steps=STEPS)
    return run()
