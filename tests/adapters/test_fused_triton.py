"""Blocks on the residual stream on the Triton kernels: compiled on a GPU, else in Triton's interpreter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from pab_kernels.ops import backend
from tests.adapters import tiny_stdit3
from tests.adapters.tiny_latte import inputs, noise, tiny_latte
from tests.ops.tensors import KERNEL_DEVICE

pytest.importorskip("triton")

STEPS = 5
WINDOW = (0.2, 1.0)


def latte(step: int) -> dict[str, Any]:
    return inputs() | {"hidden_states": noise(step)}


def stdit3(step: int) -> dict[str, Any]:
    """One sample has a given frame, and the texts are of unequal length."""
    frames = torch.tensor([[0, 1], [1, 1]]) != 0
    x = tiny_stdit3.noise(step, frames=2, size=(3, 4))
    given = {"x": x, "timestep": torch.full((2,), 900.0 - step), "y": tiny_stdit3.text(), "x_mask": frames}
    return given | tiny_stdit3.conditions()


MODELS: dict[str, tuple[Callable[..., Any], Callable[[int], dict[str, Any]]]] = {
    "Latte": (lambda dtype: tiny_latte(dtype, num_layers=1), latte),
    "STDiT3": (lambda dtype: tiny_stdit3.tiny_stdit3(dtype, depth=1), stdit3),
}
"""The model in a dtype, and the inputs of a step."""


def outputs(name: str, config: PABConfig, dtype: torch.dtype) -> list[Tensor]:
    build, given = MODELS[name]
    model = build(dtype).to(KERNEL_DEVICE)
    pab.enable(model, config, num_steps=STEPS)
    found = []
    with torch.no_grad():
        for step in range(STEPS):
            tensors = {
                key: t.to(KERNEL_DEVICE, dtype if t.is_floating_point() and key != "timestep" else t.dtype)
                for key, t in given(step).items()
            }
            out = model(**tensors)
            found.append((out if isinstance(out, Tensor) else out.sample).float())
    return found


@pytest.mark.parametrize(
    ("name", "reuse", "cache_dtype", "cache_point"),
    [
        ("Latte", "hold", None, "pre_gate"),
        ("Latte", "linear", "int8", "pre_gate"),
        ("STDiT3", "hold", None, "post_gate"),
        ("STDiT3", "linear", "int4", "pre_gate"),
    ],
)  # tests/ops has every kernel with all of these
def test_it_agrees_with_the_reference(
    name: str, reuse: Any, cache_dtype: Any, cache_point: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = [Broadcast(reach, WINDOW, reuse=reuse) for reach in (2, 3, 3, 2)]
    config = PABConfig(*rules, cache_dtype=cache_dtype, cache_point=cache_point)
    monkeypatch.setattr(backend, "PREFERRED", {})
    expected, plain = outputs(name, config, torch.float32), outputs(name, config, torch.bfloat16)

    served: Counter[str] = Counter()
    choose = backend.choose

    def counted(op: str, asked: str, call: Any) -> str:
        chosen = choose(op, asked, call)
        served[f"{op} {chosen}"] += 1
        return chosen

    monkeypatch.setattr(backend, "PREFERRED", {KERNEL_DEVICE: ("triton",)})
    monkeypatch.setattr(backend, "choose", counted)
    found = outputs(name, config, torch.bfloat16)
    kernels = {op for op, has in backend.IMPLEMENTATIONS.items() if "triton" in has}
    assert {each.split()[0] for each in served if each.endswith(" triton")} == kernels
    assert all(each.endswith(" triton") or each.split()[0] not in kernels for each in served), served
    for a, b, exact in zip(found, plain, expected, strict=True):
        assert (a - exact).norm() <= 2 * (b - exact).norm() + 1e-3 * exact.norm()
