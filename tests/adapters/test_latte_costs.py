"""What Latte costs under PAB is known before it runs: FLOPs, cache bytes, and no wait for the device."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from hypothesis import given, settings
from torch.utils._python_dispatch import TorchDispatchMode

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig, ops
from pab_kernels.analysis.forecasts.measure import measure
from pab_kernels.broadcast.costs import on_meta
from pab_kernels.rules.costs import Forecast
from tests.adapters.tiny_latte import (
    FRAMES,
    LAYERS,
    SIZE,
    TEXT,
    TEXT_CHANNELS,
    noise,
    prompt,
    sample,
    tiny_latte,
    tiny_pipe,
)
from tests.pairs import pairs

# diffusers' schedulers hand tensors to numpy in a way that numpy deprecates
pytestmark = [pytest.mark.flops, pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")]

STEPS = 10
WIDE = (0.0, 1.0)
EVERYTHING = {
    "spatial": Broadcast(2, WIDE),
    "temporal": Broadcast(3, WIDE),
    "cross": Broadcast(4, WIDE),
    "mlp": Broadcast(5, WIDE),
    "block": Broadcast(3, (5, 10), "step", layers=(1,)),
}
LINEAR = {kind: dataclasses.replace(rule, reuse="linear") for kind, rule in EVERYTHING.items()}
BOTH = pytest.mark.parametrize("rules", [EVERYTHING, LINEAR], ids=["hold", "linear"])


def forecast(model: Any, *, batch: int = 1, size: int = SIZE, text: int = TEXT) -> Forecast:
    plan = pab.summary(model).plan
    assert plan is not None
    inputs = {
        "hidden_states": torch.empty(batch, 4, FRAMES, size, size, dtype=model.dtype, device="meta"),
        "timestep": torch.empty(batch, device="meta"),
        "encoder_hidden_states": torch.empty(batch, text, TEXT_CHANNELS, dtype=model.dtype, device="meta"),
    }
    return plan.forecast(*measure(on_meta(model), inputs, plan.sublayers).costs(plan.config.cache_dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config", [PABConfig(), PABConfig(spatial=2, temporal=3, cross=4), PABConfig(**EVERYTHING), PABConfig(**LINEAR)]
)
def test_flops_of_a_pipeline_run_are_forecast_and_counted(config: PABConfig, dtype: torch.dtype) -> None:
    pipe = tiny_pipe(model=tiny_latte(dtype))
    with ops.flop_counter() as plain:
        sample(pipe, STEPS)
    pab.enable(pipe, config)
    with ops.flop_counter() as counter:
        sample(pipe, STEPS)
    summary, expected = pab.summary(pipe), forecast(pipe.transformer, batch=2)  # guidance is batched
    assert counter.get_total_flops() == summary.flops == expected.flops
    assert plain.get_total_flops() == summary.flops_without == expected.flops_without
    assert sum(expected.flops_by_step) == expected.flops
    assert summary.share == expected.share and (summary.share < 1) == (config != PABConfig())


@pytest.mark.parametrize("config", [PABConfig(), PABConfig(**EVERYTHING), PABConfig(**LINEAR)])
def test_flops_of_separate_contexts_are_those_of_one_times_their_number(config: PABConfig) -> None:
    model = tiny_latte()
    pab.enable(model, config, num_steps=STEPS)
    size, text = 24, 7
    with ops.flop_counter() as counter:
        for _ in range(STEPS):
            for name in ("cond", "uncond"):
                with pab.context(model, name):
                    inputs = noise(height=size, width=size)
                    model(inputs, timestep=torch.tensor([500]), encoder_hidden_states=prompt(text=text))
    summary, expected = pab.summary(model), forecast(model, size=size, text=text)
    assert counter.get_total_flops() == summary.flops == 2 * expected.flops
    assert summary.flops_without == 2 * expected.flops_without
    assert summary.peak_cache_bytes == 2 * expected.peak_cache_bytes


def test_an_mlp_in_chunks_costs_what_all_chunks_do() -> None:
    model = tiny_latte()
    for block in (*model.transformer_blocks, *model.temporal_transformer_blocks):
        block.set_chunk_feed_forward(2, 1)
    pab.enable(model, PABConfig(mlp=2), num_steps=STEPS)
    with ops.flop_counter() as counter:
        for _ in range(STEPS):
            model(noise(), timestep=torch.tensor([500]), encoder_hidden_states=prompt())
    summary, expected = pab.summary(model), forecast(model)
    assert counter.get_total_flops() == summary.flops == expected.flops < summary.flops_without
    assert summary.peak_cache_bytes == expected.peak_cache_bytes > 0


@pytest.mark.parametrize(
    ("rules", "cache_dtype", "cache_point", "dtype"),
    pairs(
        [EVERYTHING, LINEAR],
        [None, "int8", "float8_e4m3fn", "int4"],
        ["pre_gate", "post_gate"],
        [torch.float32, torch.bfloat16],
    ),
)
def test_peak_cache_bytes_are_forecast(rules: Any, cache_dtype: Any, cache_point: Any, dtype: torch.dtype) -> None:
    pipe = tiny_pipe(model=tiny_latte(dtype))
    pab.enable(pipe, PABConfig(**rules, cache_dtype=cache_dtype, cache_point=cache_point))
    now: list[int] = []

    def after_step(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        now.append(pab.summary(pipe).cache_bytes)
        return tensors

    sample(pipe, STEPS, callback_on_step_end=after_step)
    summary, expected = pab.summary(pipe), forecast(pipe.transformer, batch=2)
    assert summary.peak_cache_bytes == expected.peak_cache_bytes > 0
    assert tuple(now) == expected.cache_bytes
    assert summary.cache_bytes == 0 and summary.forced == 0


@st.composite
def configs(draw: st.DrawFn) -> PABConfig:
    rules = []
    for kind in draw(
        st.lists(st.sampled_from(["spatial", "temporal", "cross", "mlp", "block"]), min_size=1, max_size=6)
    ):
        lo, hi = sorted(draw(st.lists(st.integers(0, 8), min_size=2, max_size=2, unique=True)))
        layers = draw(st.sampled_from([None, (0,), (1,)]))
        reuse = draw(st.sampled_from(["hold", "linear"]))
        rules.append((kind, Broadcast(draw(st.integers(2, 6)), (lo, hi), "step", reuse, layers)))
    return PABConfig(rules=tuple(rules), cache_dtype=draw(st.sampled_from([None, "int8", "int4"])))


@settings(max_examples=15)
@given(config=configs())
def test_the_forecast_holds_for_any_rules(config: PABConfig) -> None:
    model = tiny_latte()
    pab.enable(model, config, num_steps=8)
    for _ in range(8):
        model(noise(height=8, width=8), timestep=torch.tensor([500]), encoder_hidden_states=prompt())
    summary, expected = pab.summary(model), forecast(model, size=8)
    assert summary.peak_cache_bytes == expected.peak_cache_bytes
    assert summary.flops == expected.flops and summary.flops_without == expected.flops_without
    assert summary.cache_bytes == expected.cache_bytes[-1] == 0


@pytest.mark.parametrize(
    ("rules", "cache_dtype", "cache_point"),
    pairs([EVERYTHING, LINEAR], [None, "int8", "float8_e4m3fn", "int4"], ["pre_gate", "post_gate"]),
)
def test_a_generation_runs_on_the_meta_device(rules: Any, cache_dtype: Any, cache_point: Any) -> None:
    model = tiny_latte().to("meta")
    config = PABConfig(**rules, cache_dtype=cache_dtype, cache_point=cache_point)
    pab.enable(model, config, timesteps=list(range(900, -1, -100)))
    x, t = noise(batch=2).to("meta"), torch.empty(2, device="meta")
    text = prompt().expand(2, -1, -1).to("meta")
    for _ in range(STEPS):
        out = model(x, timestep=t, encoder_hidden_states=text).sample
        assert out.is_meta and out.shape == (2, 8, FRAMES, SIZE, SIZE)
    summary = pab.summary(model)
    assert summary.forced == 0
    counts = summary.plan.counts() if summary.plan else {}
    for kind in EVERYTHING:
        assert summary.contexts["#0"][kind].reused == counts[kind].reused > 0
    assert counts["spatial"].computed + counts["spatial"].reused + counts["spatial"].skipped == STEPS * LAYERS


class ReadsOfValues(TorchDispatchMode):
    """Counts the operations that bring a value of a tensor to the host."""

    READS = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "_unique2", "masked_select", "allclose")

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.READS:
            self.reads[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("cache_dtype", [None, "int8"])
@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
@BOTH
def test_values_are_read_in_the_first_call_only(rules: Any, scheduler: Any, cache_dtype: Any) -> None:
    pipe = tiny_pipe(scheduler())
    pab.enable(pipe, PABConfig(**rules, cache_dtype=cache_dtype))
    mode = ReadsOfValues()
    reads: list[int] = []

    def enter(*_: Any) -> None:
        mode.__enter__()

    def leave(*_: Any) -> None:
        reads.append(mode.reads.total())
        mode.__exit__(None, None, None)

    handles = [pipe.transformer.register_forward_pre_hook(enter), pipe.transformer.register_forward_hook(leave)]
    for _ in range(2):
        reads.clear()
        mode.reads.clear()
        sample(pipe, STEPS)
        assert len(reads) == STEPS
        assert reads[0] <= 1
        assert reads == reads[:1] * STEPS
    for handle in handles:
        handle.remove()
    with mode:
        assert torch.ones(1).item() == 1
    assert mode.reads.total() > reads[-1]  # it does see them
