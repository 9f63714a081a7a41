"""Slots in host memory of a GPU; see test_offload.py for what can be shown without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from pab_kernels.broadcast.bus import CudaBus
from tests.adapters.tiny_latte import noise, prompt, tiny_latte

if not torch.cuda.is_available():
    pytest.skip("there is no CUDA device", allow_module_level=True)

STEPS = 8
ALL = (0.0, 1.0)
HOLD = PABConfig(spatial=Broadcast(2, ALL), temporal=Broadcast(3, ALL), cross=Broadcast(4, ALL))
LINEAR = PABConfig(spatial=Broadcast(3, ALL, reuse="linear"), mlp=Broadcast(2, ALL), cache_dtype="int8")
CYCLES = 3_000_000
"""Of a GPU's clock, that a copy is late: much longer than a block runs."""


def given() -> list[dict[str, Tensor]]:
    """The arguments of each call, on the device."""
    return [
        {
            "hidden_states": noise(step).cuda().bfloat16(),
            "timestep": torch.tensor([step]).cuda(),
            "encoder_hidden_states": prompt(i).cuda().bfloat16(),
        }
        for step in range(STEPS)
        for i in range(2)
    ]


def run(model: Any, arguments: list[dict[str, Tensor]]) -> list[Tensor]:
    outputs = []
    with torch.no_grad(), pab.generation(model, num_steps=STEPS):
        for call, inputs in enumerate(arguments):
            with pab.context(model, f"branch {call % 2}", call // 2):
                outputs.append(model(**inputs).sample)
    return outputs


@pytest.mark.parametrize("late", [None, "_up", "_down"])
@pytest.mark.parametrize("config", [HOLD, LINEAR])
def test_results_are_those_of_slots_on_the_device_however_late_copies_are(
    config: PABConfig, late: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = CudaBus._copy

    def delayed(bus: CudaBus, stream: torch.cuda.Stream, *tensors: Any) -> torch.cuda.Event:
        if late and stream is getattr(bus, late):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(CYCLES)
        return copy(bus, stream, *tensors)

    monkeypatch.setattr(CudaBus, "_copy", delayed)
    model, twin = (tiny_latte(torch.bfloat16, num_layers=4).cuda() for _ in range(2))
    pab.enable(twin, config)
    pab.enable(model, config, cache_device="cpu")
    arguments = given()
    wanted = run(twin, arguments)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(run(model, arguments), wanted, strict=True))
    there, here = pab.summary(model), pab.summary(twin)
    assert there.peak_host_bytes == here.peak_cache_bytes > there.peak_cache_bytes > 0 and not there.forced


def test_the_host_waits_for_nothing_and_memory_stays_as_it_was() -> None:
    model = tiny_latte(torch.bfloat16, num_layers=4).cuda()
    pab.enable(model, HOLD, cache_device="cpu")
    arguments = given()
    run(model, arguments)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(model, arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


def test_a_call_that_fails_leaves_the_device_usable() -> None:
    model, arguments = tiny_latte(torch.bfloat16, num_layers=4).cuda(), given()
    pab.enable(model, HOLD)
    wanted = run(model, arguments)
    pab.enable(model, cache_device="cpu")

    def fail(*_: Any) -> None:
        raise RuntimeError("once")

    handle = model.transformer_blocks[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="once"):
        run(model, arguments)
    handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(run(model, arguments), wanted, strict=True))
