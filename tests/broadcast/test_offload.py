"""Slots in host memory: what is copied when, what the device holds, and what comes out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils import _pytree as pytree

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from pab_kernels.analysis.forecasts.measure import measure
from pab_kernels.broadcast.bus import CudaBus, bus_of
from pab_kernels.rules.costs import Forecast
from tests.adapters import tiny_stdit3
from tests.adapters.tiny_latte import noise, prompt, tiny_latte
from tests.adapters.tiny_pipes import named
from tests.broadcast.bus_recorder import BusRecorder
from tests.broadcast.chained import Model, X, directly
from tests.broadcast.toy import CONFIG, Pipe, toy
from tests.works_with.group_offloading import grouped, offloading

pytestmark = [
    pytest.mark.flops,
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),  # diffusers' own use
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),  # diffusers' schedulers hand tensors to numpy
]

STEPS = 8
ALL = (0.0, 1.0)
RULES = {
    "hold": PABConfig(spatial=Broadcast(2, ALL), temporal=Broadcast(3, ALL), cross=Broadcast(4, ALL)),
    "linear": PABConfig(spatial=Broadcast(3, ALL, reuse="linear"), mlp=Broadcast(2, ALL)),
    "blocks": PABConfig(block=Broadcast(3, ALL), spatial=Broadcast(2, ALL)),
    "8 bits": PABConfig(spatial=Broadcast(3, ALL), cross=Broadcast(2, ALL), cache_dtype="int8"),
    "4 bits": PABConfig(spatial=Broadcast(3, ALL), cross=Broadcast(2, ALL), cache_dtype="int4"),
    "unprojected": PABConfig(spatial=Broadcast(3, ALL), cross=Broadcast(2, ALL), cache_point="unprojected"),
}


def on_latte(model: Any, step: int, i: int) -> Tensor:
    out: Tensor = model(noise(step), timestep=torch.tensor([step]), encoder_hidden_states=prompt(i)).sample
    return out


def on_stdit3(model: Any, step: int, i: int) -> Tensor:
    x = torch.full((1, 4, 3, 6, 6), 0.1 * step + i)
    out: Tensor = model(x, torch.full((1,), 900.0 - step), tiny_stdit3.text(batch=1), **tiny_stdit3.conditions(batch=1))
    return out


def run(model: Any, call: Callable[[Any, int, int], Tensor], contexts: int = 2) -> list[Tensor]:
    """The outputs of a sampling run on a bare model."""
    outputs = []
    with torch.no_grad(), pab.generation(model, num_steps=STEPS):
        for step in range(STEPS):
            for i in range(contexts):
                with pab.context(model, f"branch {i}", step):
                    outputs.append(call(model, step, i))
    return outputs


def forecast(model: Any, inputs: dict[str, Any]) -> Forecast:
    """Of the latest run, from shapes alone."""
    plan = pab.summary(model).plan
    assert plan is not None
    pab.disable(model)
    measured = measure(model.to("meta"), {k: pytree.tree_map(on_meta, v) for k, v in inputs.items()}, plan.sublayers)
    return plan.forecast(*measured.costs(plan.config.cache_dtype), contexts=2)


def on_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


LATTE = {"hidden_states": noise(0), "timestep": torch.tensor([0]), "encoder_hidden_states": prompt(0)}
STDIT3 = {"x": torch.zeros(1, 4, 3, 6, 6), "timestep": torch.ones(1), "y": tiny_stdit3.text(batch=1)}
STDIT3 |= tiny_stdit3.conditions(batch=1)


@pytest.mark.parametrize(
    ("build", "call", "inputs", "rules"),
    [(tiny_latte, on_latte, LATTE, rules) for rules in ("hold", "linear", "8 bits", "4 bits")]
    + [
        (tiny_stdit3.tiny_stdit3, on_stdit3, STDIT3, rules)
        for rules in ("hold", "linear", "blocks", "8 bits", "unprojected")
    ],
)
def test_results_are_those_of_slots_on_the_device_and_bytes_are_as_forecast(
    bus: BusRecorder, build: Any, call: Any, inputs: Any, rules: str
) -> None:
    model, twin = build(), build()
    pab.enable(twin, RULES[rules])
    pab.enable(model, RULES[rules], cache_device="cpu")
    wanted = run(twin, call)
    for _ in range(2):
        bus.log.clear()
        assert all(torch.equal(a, b) for a, b in zip(run(model, call), wanted, strict=True))
        assert not (bus.pending or bus.present)
    there, here = pab.summary(model), pab.summary(twin)
    assert not (there.host_bytes or there.cache_bytes or there.forced)
    assert there.flops == here.flops > 0 and there.peak_host_bytes > 0
    said, fetched, sent = forecast(model, inputs), bus.queued("to device"), bus.queued("to host")
    assert (there.peak_host_bytes, there.peak_cache_bytes) == (said.peak_host_bytes, said.peak_cache_bytes)
    assert sum(said.fetched_bytes) == sum(copies.nbytes for copies in fetched) > 0
    assert sum(said.sent_bytes) == sum(copies.nbytes for copies in sent) > 0
    assert 0 < bus.most_present <= said.peak_cache_bytes
    assert there.host_bytes_by_kind == said.host_bytes_by_kind
    kinds = {kind: held for kind, held in here.cache_bytes_by_kind.items() if any(held)}
    assert kinds.keys() >= there.host_bytes_by_kind.keys()
    for kind, held in there.host_bytes_by_kind.items():
        on_device = there.cache_bytes_by_kind[kind]
        assert [a + b for a, b in zip(held, on_device, strict=True)] == list(kinds[kind])
        peaks = [tallies[kind] for tallies in there.contexts.values()]
        assert sum(t.peak_host_bytes for t in peaks) >= max(held) and not any(t.host_bytes for t in peaks)
    assert "on the host now" in str(there) and "on the host now" not in str(here)


@pytest.mark.parametrize("name", ["WanPipeline", "CogVideoXPipeline", "FluxPipeline"])
@pytest.mark.parametrize("rules", [RULES["hold"], PABConfig(block=Broadcast(2, ALL, reuse="linear"))])
def test_pipelines(bus: BusRecorder, name: str, rules: PABConfig) -> None:
    tiny = named(name)
    pipe = tiny.build()
    wanted = tiny.sample(pab.enable(pipe, rules), STEPS)
    pab.enable(pipe, cache_device="cpu")
    assert torch.equal(tiny.sample(pipe, STEPS), wanted)
    summary = pab.summary(pipe)
    assert summary.peak_host_bytes > 0 and not (summary.forced or summary.host_bytes or bus.pending or bus.present)
    assert "in host memory 0.0 MiB now" in str(summary) and summary.to_dict()["peak_host_bytes"] > 0
    pab.enable(pipe)  # it stays
    tiny.sample(pipe, STEPS)
    assert pab.summary(pipe).peak_host_bytes == summary.peak_host_bytes
    pab.enable(pipe, rules)
    tiny.sample(pipe, STEPS)
    assert pab.summary(pipe).peak_host_bytes == 0


def test_the_next_block_is_fetched_while_one_runs_and_what_is_sent_is_not_waited_for(bus: BusRecorder) -> None:
    model = Model(directly)  # of four blocks with an attention each
    pab.enable(model, PABConfig(spatial=Broadcast(2, ALL)), cache_device="cpu")
    ran: list[tuple[str, ...]] = []

    def note(block: Any, args: Any) -> None:
        ran.append(tuple(c.way + (" waited for" if c.waited else "") for c in dict.fromkeys(bus.log)))

    for block in model.blocks:
        block.mlp.register_forward_pre_hook(note)
    with torch.no_grad(), pab.generation(model, num_steps=2):
        for step in range(2):
            bus.log.clear()
            model(X + step)
    one, arrived = "to device", "to device waited for"
    out, left = "to host", "to host waited for"
    assert ran[:4] == [(out,), (out, out), (left, out, out), (left, left, out, out)]
    assert ran[4:] == [
        (arrived, one),
        (arrived, arrived, one),
        (arrived, arrived, arrived, one),
        (arrived, arrived, arrived, arrived),
    ]
    assert bus.most_present == 2 * X.nbytes


def test_outputs_that_are_read_in_another_order_are_fetched_when_they_are_needed(bus: BusRecorder) -> None:
    def forward(model: Model, x: Tensor) -> Tensor:
        for block in model.blocks if forwards[0] else reversed(model.blocks):
            x = block(x)
        return x

    forwards = [True]
    model, twin = Model(forward), Model(forward)
    rules = PABConfig(spatial=Broadcast(2, ALL))
    pab.enable(model, rules, cache_device="cpu")
    pab.enable(twin, rules)
    with torch.no_grad(), pab.generation(model, num_steps=4), pab.generation(twin, num_steps=4):
        for step in range(4):
            forwards[0] = step % 2 == 0
            assert torch.equal(model(X + step), twin(X + step))
    assert not bus.pending and not bus.present and pab.summary(model).peak_cache_bytes == 2 * X.nbytes


def test_a_sublayer_that_runs_several_times_in_a_call(bus: BusRecorder) -> None:
    def twice(model: Model, x: Tensor) -> Tensor:
        for block in model.blocks:
            x = torch.cat([block(part) for part in x.chunk(2, 1)], 1)
        return x

    model, twin = Model(twice), Model(twice)
    rules = PABConfig(spatial=Broadcast(3, ALL, reuse="linear"), mlp=Broadcast(2, ALL))
    pab.enable(model, rules, cache_device="cpu")
    pab.enable(twin, rules)
    x = torch.cat([X, X + 1], 1)
    with torch.no_grad(), pab.generation(model, num_steps=8), pab.generation(twin, num_steps=8):
        assert all(torch.equal(model(x + step), twin(x + step)) for step in range(8))
    fetched = {copies.nbytes for copies in bus.queued("to device")}
    assert not bus.pending and not bus.present and len(fetched) == 1 and not pab.summary(model).forced


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("at", range(1, 16, 2))
def test_a_call_that_fails_leaves_nothing_on_its_way_and_nothing_in_host_memory(
    bus: BusRecorder, error: type[BaseException], at: int
) -> None:
    model, calls = Model(directly), []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == at:
            raise error

    model.blocks[1].mlp.register_forward_pre_hook(fail)
    pab.enable(model, PABConfig(spatial=Broadcast(3, ALL, reuse="linear"), mlp=Broadcast(2, ALL)), cache_device="cpu")
    with torch.no_grad(), pytest.raises(error), pab.generation(model, num_steps=16):
        for step in range(16):
            model(X + step)
    kept = [copy for copies in bus.queued("to host") for copy in copies.copies]
    assert kept and not bus.pending and not bus.present and not any(copy() is not None for copy in kept)
    summary = pab.summary(model)
    assert not summary.host_bytes and not summary.cache_bytes


@pytest.mark.parametrize("end", [pab.release, pab.disable])
def test_what_ends_a_run_releases_host_memory(bus: BusRecorder, end: Callable[[Any], None]) -> None:
    model = Model(directly)
    pab.enable(model, PABConfig(spatial=Broadcast(8, ALL)), num_steps=8, cache_device="cpu")
    with torch.no_grad():
        model(X)
    kept = [copy for copies in bus.queued("to host") for copy in copies.copies]
    assert len(kept) == 4 and all(copy() is not None for copy in kept)
    assert pab.summary(model).host_bytes == 4 * X.nbytes
    end(model)
    assert not any(copy() is not None for copy in kept)


def test_requests_in_turn(bus: BusRecorder) -> None:
    model, alone = toy(), Pipe(toy())
    pipes = [pab.enable(Pipe(model), CONFIG, cache_device="cpu") for _ in range(2)]
    pab.enable(alone, CONFIG)
    wanted = [list(alone.steps(6, seed)) for seed in range(2)]
    found = zip(*[pipe.steps(6, seed) for seed, pipe in enumerate(pipes)], strict=True)
    for (a, b), x, y in zip(found, *wanted, strict=True):
        assert torch.equal(a, x) and torch.equal(b, y)
    assert not bus.pending and not bus.present


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_with_group_offloading_of_weights(bus: BusRecorder, kind: str) -> None:
    model, twin = tiny_latte(), tiny_latte()
    pab.enable(twin, RULES["hold"])
    wanted = run(twin, on_latte)
    with offloading() as onloaded:
        grouped(model, kind, prefetch=True)
        pab.enable(model, RULES["hold"], cache_device="cpu")
        assert all(torch.equal(a, b) for a, b in zip(run(model, on_latte), wanted, strict=True))
        assert onloaded and bus.queued("to device") and not (bus.pending or bus.present)


# With a budget


@pytest.mark.parametrize("share", [1.0, 0.7, 0.4, 0.25])
def test_with_a_budget_as_few_slots_as_needed_are_in_host_memory(bus: BusRecorder, share: float) -> None:
    model, twin = tiny_latte(num_layers=4), tiny_latte(num_layers=4)
    pab.enable(twin, RULES["hold"])
    wanted, whole = run(twin, on_latte), pab.summary(twin).peak_cache_bytes
    pab.enable(model, RULES["hold"], cache_device="cpu", budget=int(share * whole))
    for again in range(2):  # the second knows how many contexts there are
        found, summary = run(model, on_latte), pab.summary(model)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)) and not summary.forced
        assert summary.plan is not None and summary.plan.given_up is not None
        given_up = summary.plan.given_up
        assert not (given_up.computed or given_up.fewer_bits) and bool(given_up.on_host) == (share < 1)
        assert summary.peak_cache_bytes <= given_up.budget
        assert summary.peak_cache_bytes == given_up.peak or not again
        assert summary.peak_host_bytes < whole or share < 0.3
        assert not (bus.pending or bus.present)
    assert ("in host memory" in str(summary.plan)) == (share < 1)


def test_with_a_smaller_budget_slots_have_8_bits_too(bus: BusRecorder) -> None:
    model = tiny_latte(num_layers=4)
    pab.enable(model, RULES["hold"], cache_device="cpu", budget=40_000)
    for _ in range(2):
        run(model, on_latte)
    plan = pab.summary(model).plan
    assert plan is not None and plan.given_up is not None and plan.given_up.fewer_bits
    assert pab.summary(model).peak_cache_bytes == plan.given_up.peak <= 40_000


def test_slots_held_when_a_context_comes_are_moved(bus: BusRecorder) -> None:
    model, twin = tiny_latte(num_layers=4), tiny_latte(num_layers=4)
    rules = PABConfig(spatial=Broadcast(STEPS, ALL))  # stored at step 0, before the second context is known
    pab.enable(twin, rules)
    wanted, whole = run(twin, on_latte), pab.summary(twin).peak_cache_bytes
    pab.enable(model, rules, cache_device="cpu", budget=whole * 3 // 4)
    found, summary = run(model, on_latte), pab.summary(model)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)) and not summary.forced
    assert summary.peak_cache_bytes <= whole * 3 // 4 and summary.peak_host_bytes > 0
    assert not (bus.pending or bus.present)


def test_a_summary_draws_what_was_held_where(bus: BusRecorder, tmp_path: Path) -> None:
    model = tiny_latte()
    with pytest.raises(ValueError, match="call the model first"):
        pab.summary(pab.enable(model, RULES["hold"], cache_device="cpu")).plot()
    run(model, on_latte)
    pab.summary(model).plot(str(tmp_path / "run.svg"))
    assert "spatial in host memory" in (tmp_path / "run.svg").read_text()


# Where it does nothing, and where it is refused


def test_on_a_cpu_outputs_are_in_host_memory_already() -> None:
    assert bus_of(torch.device("cpu")) is None
    model, twin = tiny_latte(), tiny_latte()
    pab.enable(twin, RULES["hold"])
    pab.enable(model, RULES["hold"], cache_device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(run(model, on_latte), run(twin, on_latte), strict=True))
    assert pab.summary(model).peak_cache_bytes == pab.summary(twin).peak_cache_bytes
    assert pab.summary(model).peak_host_bytes == 0


def test_devices_without_pinned_memory_are_refused() -> None:
    with pytest.raises(ValueError, match="cache_device='cpu' for a model on meta"):
        bus_of(torch.device("meta"))


def test_with_cuda_graphs_it_is_refused() -> None:
    model = tiny_latte()
    with pytest.raises(ValueError, match="cuda_graphs=True and cache_device='cpu'"):
        pab.enable(model, RULES["hold"], cache_device="cpu", cuda_graphs=True)
    pab.enable(model, RULES["hold"], cuda_graphs=True)
    with pytest.raises(ValueError, match="only one of them"):
        pab.enable(model, cache_device="cpu")
    with pytest.raises(ValueError, match="cache_device"):
        pab.enable(model, RULES["hold"], cache_device="disk")  # type: ignore[arg-type]


# Compiled


@pytest.fixture
def _forgotten_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_forgotten_graphs")
def test_compiled_blocks_read_what_has_arrived_in_as_many_graphs(bus: BusRecorder) -> None:
    rules = PABConfig(spatial=Broadcast(3, ALL, reuse="linear"))
    graphs, found, peaks = [], [], []
    for cache_device in (None, "cpu"):
        torch._dynamo.reset()
        model, counter = Model(directly), CompileCounter()
        for block in model.blocks:
            block.compile(backend=counter, fullgraph=True)
        pab.enable(model, rules, cache_device=cache_device)
        pab.enable(model)  # a second time
        held = []  # the first examples of what enters a graph stay
        for _ in range(3):
            with torch.no_grad(), pab.generation(model, num_steps=8):
                found.append([model(X + step) for step in range(8)])
            held.append(bus.present)
        graphs.append(counter.frame_count)
        summary = pab.summary(model)
        peaks.append((summary.peak_host_bytes, summary.peak_cache_bytes))
        assert not (summary.forced or summary.host_bytes or summary.cache_bytes or bus.pending)
        assert held[0] == held[1] == held[2] <= 3 * X.nbytes
        pab.disable(model)
        assert not any("stand_in" in repr(vars(block)["_compiled_call_impl"]) for block in model.blocks)
    assert graphs[0] == graphs[1]
    assert all(torch.equal(a, b) for outputs in found for a, b in zip(outputs, found[0], strict=True))
    (nothing, whole), (host, device) = peaks
    assert nothing == 0 and host == whole and 0 < device < whole


@pytest.mark.usefixtures("_forgotten_graphs")
def test_a_model_compiled_as_a_whole_and_blocks_compiled_later_are_refused(bus: BusRecorder) -> None:
    rules = PABConfig(spatial=Broadcast(2, ALL))
    model = Model(directly)
    compiled = torch.compile(model, backend="eager")
    pab.enable(compiled, rules, cache_device="cpu", num_steps=4)
    with torch.no_grad(), pytest.raises(RuntimeError, match="Model is compiled as a whole"):
        compiled(X)
    model = Model(directly)
    pab.enable(model, rules, cache_device="cpu", num_steps=4)
    model.blocks[1].compile(backend="eager")
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"blocks\.1 is compiled"):
        model(X)


# The bus of a CUDA device, on streams that only note what they are told


class NotedStream:
    """Notes what is queued on it and what it waits for."""

    def __init__(self, log: list[tuple[str, ...]], name: str) -> None:
        self.log, self.name = log, name

    def wait_stream(self, other: NotedStream) -> None:
        self.log.append((self.name, "waits for", other.name))

    def wait_event(self, event: str) -> None:
        self.log.append((self.name, "waits for", event))

    def record_event(self) -> str:
        self.log.append((self.name, "is noted"))
        return f"the end of {self.name}"


def test_copies_begin_after_earlier_work_and_end_before_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[tuple[str, ...]] = []
    names = iter(["down", "up"])
    current, inside = NotedStream(log, "current"), []
    empty_like, copy = torch.empty_like, Tensor.copy_

    @contextlib.contextmanager
    def stream(other: NotedStream) -> Iterator[None]:
        inside.append(other.name)
        yield
        inside.pop()

    def noted_copy(to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        log.append((inside[-1], "copies", str(non_blocking)))
        return copy(to, source)

    def allocated(t: Tensor, device: Any, pin_memory: bool) -> Tensor:
        log.append((inside[-1] if inside else "current", "allocates", str(pin_memory)))
        return empty_like(t)

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: NotedStream(log, next(names)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch, "empty_like", allocated)
    monkeypatch.setattr(Tensor, "copy_", noted_copy)
    moves, x = CudaBus(torch.device("cuda")), X.clone()
    for way, name, pinned in ((moves.to_host, "down", "True"), (moves.to_device, "up", "False")):
        log.clear()
        (made,), done = way([x])
        moves.wait(done)
        assert torch.equal(made, x) and made is not x
        assert log == [
            ("current", "allocates", pinned),
            (name, "waits for", "current"),
            (name, "copies", "True"),
            (name, "is noted"),
            ("current", "waits for", f"the end of {name}"),
        ]
