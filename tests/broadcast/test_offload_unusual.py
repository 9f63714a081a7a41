"""Slots in host memory in runs that a plan does not foresee."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from pab_kernels.broadcast import offload
from pab_kernels.rules.costs import Cost
from tests.adapters.tiny_latte import noise, prompt, tiny_latte
from tests.broadcast.bus_recorder import BusRecorder
from tests.broadcast.chained import Model, X, directly
from tests.broadcast.toy import Attention

pytestmark = pytest.mark.flops

ALL = (0.0, 1.0)


def test_runs_that_reuse_after_one_that_cannot_leave_no_bytes_counted(bus: BusRecorder) -> None:
    def in_parts(model: Model, x: Tensor) -> Any:
        parts = [x[:, : lengths[0]], x]
        for block in model.blocks:
            parts = [block(part) for part in parts]
        return torch.cat(parts, 1)

    lengths = [3]
    model, twin, rules = Model(in_parts), Model(in_parts), PABConfig(spatial=Broadcast(3, ALL, reuse="linear"))
    pab.enable(model, rules, cache_device="cpu")
    pab.enable(twin, rules)
    with torch.no_grad(), pab.generation(model, num_steps=9) as request, pab.generation(twin, num_steps=9):
        for step in range(9):
            lengths[0] = 3 if step < 3 else 4  # the first run alone has outputs of two shapes at step 4
            assert torch.equal(model(X + step), twin(X + step))
            assert request.summary().cache_bytes == 0 and not (bus.pending or bus.present)
    assert pab.summary(model).forced == pab.summary(twin).forced > 0


def test_an_error_that_is_kept_holds_no_host_memory(bus: BusRecorder) -> None:
    def fails(model: Model, x: Tensor) -> Any:
        for block in model.blocks[: number[0]]:
            x = block(x)
        if number[0] < 4:
            raise RuntimeError("once")
        return x

    number, model = [4], Model(fails)
    pab.enable(model, PABConfig(spatial=Broadcast(8, ALL)), cache_device="cpu")
    with pytest.raises(RuntimeError, match="once") as caught, torch.no_grad(), pab.generation(model, num_steps=8):
        model(X)
        number[0] = 2
        model(X)
    kept = [copy for copies in bus.queued("to host") for copy in copies.copies]
    assert caught.tb and len(kept) == 4 and not any(copy() is not None for copy in kept)


def test_slots_are_made_smaller_on_devices_without_a_bus() -> None:
    model, given = tiny_latte(num_layers=4).to("meta"), noise(0).to("meta")
    text, timestep = prompt(0).to("meta"), torch.zeros(1, dtype=torch.int64, device="meta")
    pab.enable(model, PABConfig(spatial=Broadcast(8, ALL)), budget=96 * 1024)
    with torch.no_grad(), pab.generation(model, num_steps=8):
        for name in ("cond", "uncond"):  # all fits before the second one comes
            with pab.context(model, name):
                model(given, timestep=timestep, encoder_hidden_states=text)
    plan = pab.summary(model).plan
    assert plan is not None and plan.given_up is not None and plan.given_up.fewer_bits
    assert pab.summary(model).cache_bytes <= plan.given_up.budget


def test_on_a_cpu_a_budget_is_kept_without_host_memory() -> None:
    found = []
    for cache_device in (None, "cpu"):
        model = Model(directly)
        pab.enable(model, PABConfig(spatial=Broadcast(4, ALL)), budget=2 * X.nbytes, cache_device=cache_device)
        with torch.no_grad(), pab.generation(model, num_steps=4):
            outputs = [model(X + step) for step in range(4)]
        found.append((outputs, pab.summary(model).peak_cache_bytes, str(pab.summary(model).plan)))
    (wanted, peak, plan), (outputs, same_peak, same_plan) = found
    assert all(torch.equal(a, b) for a, b in zip(outputs, wanted, strict=True))
    assert same_peak == peak <= 2 * X.nbytes and same_plan == plan


def test_a_context_that_comes_while_outputs_are_on_their_way_moves_what_has_arrived(bus: BusRecorder) -> None:
    def within_itself(model: Model, x: Tensor) -> Any:
        for number, block in enumerate(model.blocks):
            x = block(x)
            if number == 1 and not inside:
                inside.append(1)
                x = x + model(x)
                inside.clear()
        return x

    inside: list[int] = []
    model, twin, rules = Model(within_itself), Model(within_itself), PABConfig(spatial=Broadcast(4, ALL))
    pab.enable(twin, rules)
    pab.enable(model, rules, cache_device="cpu", budget=6 * X.nbytes)
    with torch.no_grad(), pab.generation(model, num_steps=4), pab.generation(twin, num_steps=4):
        for step in range(4):
            with pab.context(model, "outer", step), pab.context(twin, "outer", step):
                assert torch.equal(model(X + step), twin(X + step))
    summary = pab.summary(model)
    assert len(summary.contexts) == 2 and summary.peak_host_bytes > 0 and not (bus.pending or bus.present)


def test_bytes_are_as_forecast_where_one_block_lies_between_the_sublayers_of_another(bus: BusRecorder) -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = Attention()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.attn(x)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.inner, self.attn_after = Attention(), Inner(), Attention()

        def forward(self, x: Tensor) -> Tensor:
            x = self.inner(x + self.attn(x))
            return x + self.attn_after(x)

    model = Outer().eval().requires_grad_(False)
    pab.enable(model, PABConfig(spatial=Broadcast(2, ALL)), cache_device="cpu")
    with torch.no_grad(), pab.generation(model, num_steps=4):
        for step in range(4):
            model(X.float() + step)
    summary = pab.summary(model)
    assert summary.plan is not None
    said = summary.plan.forecast({s.name: Cost(0, X.nbytes // 2) for s in summary.plan.sublayers})
    assert [s.owner for s in summary.plan.sublayers] == ["", "inner", ""]
    assert summary.peak_cache_bytes == said.peak_cache_bytes == 3 * X.nbytes // 2


def compile_attention(model: Model) -> None:
    model.blocks[1].attn.compile(backend="eager")


def compile_forward(model: Model) -> None:
    model.blocks[1].forward = torch.compile(model.blocks[1].forward, backend="eager")  # type: ignore[method-assign]


def compile_forward_of_model(model: Model) -> None:
    model.forward = torch.compile(model.forward, backend="eager")  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("compiles", "name"),
    [(compile_attention, r"blocks\.1\.attn"), (compile_forward, r"blocks\.1"), (compile_forward_of_model, "Model")],
)
def test_what_is_compiled_in_another_way_than_by_blocks_is_refused(
    bus: BusRecorder, compiles: Callable[[Model], None], name: str
) -> None:
    model = Model(directly)
    compiles(model)
    pab.enable(model, PABConfig(spatial=Broadcast(2, ALL)), num_steps=4, cache_device="cpu")
    with torch.no_grad(), pytest.raises(RuntimeError, match=f"{name} is compiled, and PAB does not know"):
        model(X)


def test_what_was_read_for_the_last_time_leaves_host_memory_in_the_middle_of_the_call(bus: BusRecorder) -> None:
    model, held = Model(directly), []
    pab.enable(model, PABConfig(spatial=Broadcast(2, ALL)), cache_device="cpu")

    def note(*_: Any) -> None:
        copies = [copy for queued in bus.queued("to host") for copy in queued.copies]
        held.append(sum(copy() is not None for copy in copies))

    for block in model.blocks:
        block.mlp.register_forward_pre_hook(note)
    with torch.no_grad(), pab.generation(model, num_steps=2):
        model(X)
        held.clear()
        model(X + 1)
    assert held == [3, 2, 1, 0]


def test_an_argument_elsewhere_does_not_keep_outputs_on_the_device(
    bus: BusRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Timed(Model):
        def forward(self, t: Tensor, x: Tensor) -> Any:  # type: ignore[override]
            return self.run(self, x)

    # The CPU is the device here, and another place is where the timestep is.
    monkeypatch.setattr(offload, "bus_of", lambda device: None if device.type == "meta" else bus)
    model, elsewhere = Timed(directly), torch.ones(1, device="meta")
    pab.enable(model, PABConfig(spatial=Broadcast(2, ALL)), cache_device="cpu", num_steps=2)
    with torch.no_grad():
        for step in range(2):
            model(elsewhere, X + step)
    assert len(bus.queued("to host")) == len(bus.queued("to device")) == 4
