"""docs/your_own_dit.md: its code runs, and its model does under PAB what an independent record and replay does."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from tests.oracle import Rule
from tests.record_and_replay import RecordAndReplay

PAGE = Path(__file__).parents[1] / "docs" / "your_own_dit.md"
MODEL, SAMPLING, CONVERSION = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
STEPS = 12
KINDS = ("spatial", "temporal", "cross", "mlp")
TEXTS = {
    "cond": (torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([5])),
    "uncond": (torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(1)), torch.tensor([2])),
}
"""Text and its length, by context."""


def page(*blocks: str) -> dict[str, Any]:
    """What the code of the page defines."""
    names: dict[str, Any] = {"__name__": "your_own_dit"}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    return names


def build() -> Any:
    torch.manual_seed(1)
    return page(MODEL)["VideoDiT"]().eval().requires_grad_(False)


def latents(step: int) -> Tensor:
    return torch.randn(1, 4, 5, 6, 8, generator=torch.Generator().manual_seed(50 + step))


def call(model: Any, step: int, name: str) -> Tensor:
    return model(latents(step), torch.tensor([1000.0 * (1 - step / STEPS)]), *TEXTS[name])


RULES = [
    {"spatial": Rule(2), "temporal": Rule(3), "cross": Rule(4), "mlp": Rule(2, (0.3, 0.8))},
    {"spatial": Rule(3, (0, 1)), "cross": Rule(5, (2, 11), "step", layers=(1,))},
    {"temporal": Rule(12, (0, 1)), "mlp": Rule(4, (0, 1), layers=(0,))},
]


def config(rules: dict[str, Rule]) -> PABConfig:
    return PABConfig(**{kind: Broadcast(r.range, r.window, r.unit, layers=r.layers) for kind, r in rules.items()})  # type: ignore[arg-type]


def test_the_model_has_less_than_80_lines() -> None:
    assert len(MODEL.splitlines()) < 80


def test_the_page_runs() -> None:
    names = page(MODEL, SAMPLING, CONVERSION)
    assert names["broadcast"].shape == names["noise"].shape and names["broadcast"].isfinite().all()
    x, text = torch.randn(2, 9, 64), torch.randn(2, 5, 64)
    torch.testing.assert_close(names["new"](x, text), names["old"](x, text), rtol=1e-5, atol=1e-5)
    assert list(names["new"].state_dict()) == list(names["old"].state_dict())
    assert [(s.name, s.kind) for s in pab.sublayers(names["new"])] == [("attn", "spatial"), ("cross", "cross")]


@pytest.mark.parametrize("rules", RULES)
def test_it_does_what_the_oracle_does_in_both_contexts(rules: dict[str, Rule]) -> None:
    model, twin = build(), build()
    assert [s.name for s in pab.sublayers(model) if s.kind != "block"] == [
        f"blocks.{layer}.{kind}" for layer in range(len(model.blocks)) for kind in KINDS
    ]
    replay = RecordAndReplay(twin, pab.sublayers(model), rules, lambda: range(STEPS))
    pab.enable(model, config(rules), num_steps=STEPS)
    differs = False
    for step in range(STEPS):
        for name in TEXTS:
            with pab.context(model, name):
                got = call(model, step, name)
            replay.at(step, name)
            with replay.running():
                assert torch.equal(got, call(twin, step, name)), (step, name)
            differs |= not torch.equal(got, call(build(), step, name))
    assert differs
    summary = pab.summary(model)
    assert set(summary.contexts) == set(TEXTS)
    for kind in rules:
        for name, tallies in summary.contexts.items():
            assert tallies[kind].computed == replay.counts[name, kind, "computed"], (kind, name)
    assert summary.forced == 0 and summary.cache_bytes == 0


def test_range_1_and_disable_are_bit_identical() -> None:
    model = build()
    plain = [call(model, step, name) for step in range(STEPS) for name in TEXTS]

    def outputs(named: bool) -> list[Tensor]:
        got = []
        for step in range(STEPS):
            for name in TEXTS:
                with pab.context(model, name) if named else contextlib.nullcontext():
                    got.append(call(model, step, name))
        return got

    def same(named: bool) -> bool:
        return all(torch.equal(a, b) for a, b in zip(outputs(named), plain, strict=True))

    names = list(model.state_dict())
    pab.enable(model, PABConfig(spatial=1, temporal=1, cross=1, mlp=1), num_steps=STEPS)
    assert same(named=True)
    assert list(model.state_dict()) == names and not any("module" in name for name in names)
    pab.enable(model, config(RULES[0]), num_steps=STEPS)
    assert not same(named=True)
    pab.disable(model)
    assert same(named=False)
    assert not any(vars(m).get("_member") for m in model.modules())


def test_keys_and_values_are_computed_once_for_each_context() -> None:
    model = build()
    projected = []
    for block in model.blocks:
        block.cross.module.kv.register_forward_hook(lambda module, args, out: projected.append(args[0]))
    pab.enable(model, PABConfig(cross=1), num_steps=STEPS)
    for step in range(STEPS):
        for name in TEXTS:
            with pab.context(model, name):
                call(model, step, name)
    assert len(projected) == len(model.blocks) * len(TEXTS)
