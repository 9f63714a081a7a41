"""Seconds by kind: what they are given to, what is counted where sublayers are fused, and that nothing waits or is read
unasked."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig, ops
from pab_kernels.broadcast import stopwatch as stopwatch_module
from pab_kernels.broadcast import stream
from pab_kernels.broadcast.stopwatch import REST, Stopwatch
from pab_kernels.nn import BroadcastModule
from tests.adapters.tiny_latte import LAYERS, inputs, tiny_latte

CPU = torch.device("cpu")
COMPUTED = PABConfig(spatial=1)


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 0.0
        self.reads = 0

    def read(self) -> float:
        self.reads += 1
        return self.now

    def slow(self, function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
        """`function`, which moves the clock."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self.now += seconds
            return function(*args, **kwargs)

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(stopwatch_module, "time", SimpleNamespace(perf_counter=made.read))
    return made


def test_time_belongs_to_the_kind_marked_last(clock: Clock) -> None:
    watch = Stopwatch()
    for kind, seconds in ((REST, 1), ("spatial", 2), ("mlp", 4), ("spatial", 8), (None, 16), (REST, 32), (None, 64)):
        watch.mark(kind, CPU)
        clock.now += seconds
    assert watch.seconds() == {REST: 33, "spatial": 10, "mlp": 4}
    assert watch.seconds() == {REST: 33, "spatial": 10, "mlp": 4} and watch.kind is None


def test_a_mark_without_a_device_and_without_one_before_it_is_none(clock: Clock) -> None:
    watch = Stopwatch()
    watch.mark(None)
    assert watch.seconds() == {} and clock.reads == 0


class Event:
    """A CUDA event as far as a stopwatch knows it."""

    made: list[Event] = []
    waited = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.moment = None
        Event.made.append(self)

    def record(self, stream: Any) -> None:
        self.moment = len(Event.made) ** 2

    def synchronize(self) -> None:
        Event.waited += 1

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.moment - self.moment)


def test_on_a_cuda_device_events_are_recorded_and_waited_for_when_they_are_read(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    watch = Stopwatch()
    for kind, device in ((REST, first), ("spatial", None), ("cross", None), (REST, second), (None, None)):
        watch.mark(kind, device)
    assert Event.waited == 0 and len(Event.made) == 5 and clock.reads == 0
    assert watch.seconds() == {
        REST: 3 + 9,
        "spatial": 5,
    }  # moments 1, 4, 9, 16, 25; cross begins and ends on different devices
    assert Event.waited == 1
    assert watch.seconds() == {REST: 12, "spatial": 5}


@pytest.fixture
def slow_operations(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Clock:
    for name in ("attention", "short_attention"):
        monkeypatch.setattr(ops, name, clock.slow(getattr(ops, name), 1.0))
    run = {
        name: clock.slow(stream.run_checked, seconds)
        for name, seconds in (("project_residual", 10.0), ("broadcast_residual", 100.0))
    }
    monkeypatch.setattr(stream, "run_checked", lambda op, call: run[op](op, call))
    return clock


def timed(model: Any, config: PABConfig, steps: int = 1, **changed: Any) -> Any:
    pab.enable(model, config, num_steps=steps, timed=True)
    with torch.no_grad():
        for _ in range(steps):
            model(**inputs() | changed)
    return pab.summary(model)


def seconds(summary: Any) -> dict[str, float]:
    return {kind: tally.seconds for kind, tally in summary.contexts["#0"].items()}


def test_a_fused_sublayer_has_its_norm_its_attention_and_its_projection(slow_operations: Clock) -> None:
    summary = timed(tiny_latte(), COMPUTED)
    # the projection waits for the sublayer after it, and is the former's all the same
    assert seconds(summary) == {
        "spatial": 111 * LAYERS,
        "temporal": 111 * LAYERS,
        "cross": 11 * LAYERS,
        "mlp": 110 * 2 * LAYERS,
    }
    assert summary.rest_seconds == 0 and slow_operations.now == sum(seconds(summary).values())


def test_what_is_reused_is_added_where_the_stream_is_read_next(slow_operations: Clock) -> None:
    reused = Broadcast(2, (0, 1))
    summary = timed(tiny_latte(), PABConfig(spatial=reused, temporal=reused), steps=2)
    # step 1: the temporal attention is pending and comes along in the MLP's norm; the spatial one is flushed for the
    # cross attention
    assert seconds(summary) == {
        "spatial": 111 * LAYERS,
        "temporal": 111 * LAYERS,
        "cross": (11 + 111) * LAYERS,
        "mlp": 2 * 110 * 2 * LAYERS,
    }


def test_a_reused_block_is_counted_as_one(slow_operations: Clock) -> None:
    summary = timed(tiny_latte(), PABConfig(block=Broadcast(2, (0, 1))), steps=2)
    assert seconds(summary)["block"] == 100 * 2 * LAYERS
    assert seconds(summary)["spatial"] == 111 * LAYERS and summary.rest_seconds == 0


def test_the_rest_of_the_model_is_not_a_sublayers(slow_operations: Clock) -> None:
    model = tiny_latte()
    model.proj_out.forward = slow_operations.slow(model.proj_out.forward, 7.0)
    model.pos_embed.forward = slow_operations.slow(model.pos_embed.forward, 5.0)
    summary = timed(model, COMPUTED)
    assert summary.rest_seconds == 12 and seconds(summary)["mlp"] == 110 * 2 * LAYERS
    assert "12.000 s outside of the sublayers" in str(summary) and str(summary).splitlines()[5].split()[:2] == [
        "context",
        "#0",
    ]
    assert str(summary).splitlines()[5].endswith("seconds") and str(summary).splitlines()[6].endswith("222.000")


class Row(nn.Module):
    """Two modules under PAB, and something between them that is not."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.first, self.second = BroadcastModule(nn.Linear(3, 3), "spatial"), BroadcastModule(nn.Linear(3, 3), "cross")
        self.between = clock.slow(torch.tanh, 5.0)
        self.first.module.forward = clock.slow(self.first.module.forward, 2.0)
        self.second.module.forward = clock.slow(self.second.module.forward, 3.0)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.second(self.between(self.first(hidden_states)))


@torch.no_grad()
def test_a_module_has_its_own_time_alone(clock: Clock) -> None:
    model = Row(clock)
    pab.enable(model, PABConfig(spatial=Broadcast(2, (0, 1)), cross=1), num_steps=2, timed=True)
    for _ in range(2):
        model(torch.ones(1, 3))
        clock.now += 1000  # between the calls of the model nobody counts
    assert seconds(pab.summary(model)) == {"spatial": 2, "cross": 6} and pab.summary(model).rest_seconds == 10


class Nested(nn.Module):
    """A block, found by the generic adapter, and attention in it."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        attention = nn.MultiheadAttention(4, 1, batch_first=True)
        attention.forward = clock.slow(lambda x: x, 2.0)
        block = nn.Module()
        block.attn1 = attention
        block.forward = clock.slow(lambda x: self.after(attention(x)), 3.0)
        self.after = clock.slow(lambda x: x, 4.0)
        self.blocks = nn.ModuleList([block])

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.blocks[0](hidden_states)


@torch.no_grad()
def test_what_a_found_block_does_around_its_attention_is_the_blocks(clock: Clock) -> None:
    model = Nested(clock)
    kinds = {"blocks.0": "block", "blocks.0.attn1": "spatial"}
    pab.enable(model, PABConfig(spatial=1, block=1), num_steps=1, timed=True, kinds=kinds)
    model(torch.ones(1, 2, 4))
    assert seconds(pab.summary(model)) == {"block": 7, "spatial": 2} and pab.summary(model).rest_seconds == 0


@torch.no_grad()
def test_a_call_that_fails_ends_its_time(clock: Clock) -> None:
    model = Row(clock)
    pab.enable(model, COMPUTED, num_steps=2, timed=True)
    model.between = mock.Mock(side_effect=RuntimeError("out of memory"))
    with pytest.raises(RuntimeError, match="out of memory"):
        model(torch.ones(1, 3))
    clock.now += 1000
    assert seconds(pab.summary(model)) == {"spatial": 2} and pab.summary(model).rest_seconds == 0


@torch.no_grad()
def test_unasked_no_clock_is_read(clock: Clock) -> None:
    model = tiny_latte()
    pab.enable(model, COMPUTED, num_steps=1)
    model(**inputs())
    summary = pab.summary(model)
    assert clock.reads == 0 and summary.rest_seconds is None and set(seconds(summary).values()) == {None}
    assert "seconds" not in str(summary) and "outside" not in str(summary)


@torch.no_grad()
def test_timing_is_asked_for_from_the_next_generation_on_and_stays_until_it_is_not(clock: Clock) -> None:
    model = Row(clock)
    for asked, expected in ((None, False), (True, True), (None, True), (False, False)):
        pab.enable(model, COMPUTED, timed=asked)
        with pab.generation(model, num_steps=1):
            model(torch.ones(1, 3))
        assert (pab.summary(model).rest_seconds is not None) is expected


def test_a_compiled_block_runs_in_one_graph_and_is_not_timed() -> None:
    torch.compiler.reset()
    model = Row(Clock())
    model.first.module, model.second.module, model.between = nn.Linear(3, 3), nn.Linear(3, 3), torch.tanh
    model.requires_grad_(False)
    pab.enable(model, COMPUTED, num_steps=1, timed=True)
    model.first.compile(fullgraph=True, backend="eager")
    model.second.compile(fullgraph=True, backend="eager")
    model(torch.ones(1, 3))
    summary = pab.summary(model)
    assert summary.contexts["#0"]["spatial"].computed == 1 and set(seconds(summary).values()) == {0.0}
