"""Latte's blocks on the Triton kernels: compiled on a GPU, else in Triton's interpreter."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from pab_kernels.ops import backend
from tests.adapters.tiny_latte import inputs, noise, tiny_latte
from tests.ops.tensors import KERNEL_DEVICE

pytest.importorskip("triton")

STEPS = 5
WINDOW = (0.2, 1.0)


def outputs(config: PABConfig, dtype: torch.dtype) -> list[Tensor]:
    model = tiny_latte(dtype, num_layers=1).to(KERNEL_DEVICE)
    pab.enable(model, config, num_steps=STEPS)
    found = []
    with torch.no_grad():
        for step in range(STEPS):
            given: dict[str, Any] = {
                "hidden_states": noise(step).to(dtype),
                **{k: v for k, v in inputs().items() if k != "hidden_states"},
            }
            given["encoder_hidden_states"] = given["encoder_hidden_states"].to(dtype)
            found.append(model(**{name: t.to(KERNEL_DEVICE) for name, t in given.items()}).sample.float())
    return found


@pytest.mark.parametrize(
    ("reuse", "cache_dtype"), [("hold", None), ("linear", "int8")]
)  # tests/ops has every kernel with both
def test_it_agrees_with_the_reference(reuse: Any, cache_dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = [Broadcast(reach, WINDOW, reuse=reuse) for reach in (2, 3, 3, 2)]
    config = PABConfig(spatial=rules[0], temporal=rules[1], cross=rules[2], mlp=rules[3], cache_dtype=cache_dtype)
    monkeypatch.setattr(backend, "PREFERRED", {})
    expected, plain = outputs(config, torch.float32), outputs(config, torch.bfloat16)

    served: Counter[str] = Counter()
    choose = backend.choose

    def counted(op: str, asked: str, call: Any) -> str:
        chosen = choose(op, asked, call)
        served[f"{op} {chosen}"] += 1
        return chosen

    monkeypatch.setattr(backend, "PREFERRED", {KERNEL_DEVICE: ("triton",)})
    monkeypatch.setattr(backend, "choose", counted)
    found = outputs(config, torch.bfloat16)
    kernels = {op for op, has in backend.IMPLEMENTATIONS.items() if "triton" in has}
    assert {name.split()[0] for name in served if name.endswith(" triton")} == kernels
    assert all(name.endswith(" triton") or name.split()[0] not in kernels for name in served), served
    for a, b, exact in zip(found, plain, expected, strict=True):
        assert (a - exact).norm() <= 2 * (b - exact).norm() + 1e-3 * exact.norm()
