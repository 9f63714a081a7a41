"""Keys and values of the text are computed once a generation and context, from the first run of a cross attention to
its last, and forecasts count them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig, ops
from pab_kernels.analysis.forecasts.measure import measure
from pab_kernels.broadcast.costs import on_meta
from pab_kernels.models.stdit3 import STDiT3
from pab_kernels.rules.costs import Forecast
from tests.adapters.tiny_stdit3 import CHANNELS, LAYERS, TEXT, conditions, given_frames, noise, text, tiny_stdit3
from tests.pairs import pairs

BLOCKS = 2 * LAYERS
STEPS = 8
KEPT = BLOCKS * 2 * TEXT * 2 * CHANNELS * 4
"""Bytes of all keys and values: two samples of five tokens, k and v, in float32."""
LATE = PABConfig(mlp=Broadcast(3, (4, 5), "step"))
"""Nothing is reused before step 4, and cross attention never."""
CROSS = PABConfig(cross=Broadcast(3, (1, 6), "step"))


def counted(model: Any) -> Counter[str]:
    ran = Counter[str]()
    for name, module in model.named_modules():
        if name.endswith("kv_linear"):
            module.register_forward_hook(lambda *_, name=name: ran.update([name]))
    return ran


def call(model: Any, step: int = 0, y: Tensor | None = None, **fixed: Any) -> Tensor:
    t = torch.full((2,), 900.0 - 10 * step)
    out: Tensor = model(noise(step), t, text() if y is None else y, **conditions() | fixed)
    return out


RULES = {"cross": CROSS, "spatial and temporal": PABConfig(spatial=2, temporal=2), "blocks": PABConfig(block=2)}


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_they_are_computed_once_and_held_until_the_last_run(rules: PABConfig) -> None:
    model = tiny_stdit3()
    ran, y, fixed = counted(model), text(), conditions()
    pab.enable(model, rules, num_steps=STEPS)
    plan = pab.summary(model).plan
    assert plan is not None
    last = max(plan.runs["spatial_blocks.0.cross_attn"])
    for step in range(STEPS):
        call(model, step, y, **fixed)
        slots = sum(t.cache_bytes for t in pab.summary(model).contexts["#0"].values())
        assert pab.summary(model).cache_bytes - slots == (KEPT if step < last else 0)
    assert set(ran.values()) == {1} and len(ran) == BLOCKS
    assert pab.summary(model).forced == 0
    pab.disable(model)
    call(model, 0, y, **fixed)
    assert set(ran.values()) == {2}


def test_blocks_in_which_nothing_is_reused_run_as_without_pab() -> None:
    model = tiny_stdit3()
    ran, y, fixed = counted(model), text(), conditions()
    pab.enable(model, PABConfig(temporal=2, cross=1), num_steps=STEPS)
    for step in range(STEPS):
        call(model, step, y, **fixed)
    assert {ran[f"spatial_blocks.{i}.cross_attn.kv_linear"] for i in range(LAYERS)} == {STEPS}
    assert {ran[f"temporal_blocks.{i}.cross_attn.kv_linear"] for i in range(LAYERS)} == {1}


def test_each_context_has_its_own() -> None:
    model, texts = tiny_stdit3(), {"cond": text(1), "uncond": text(2)}
    plain, ran, fixed = tiny_stdit3(), counted(model), conditions()
    pab.enable(model, LATE, num_steps=STEPS)
    for step in range(3):
        for name, y in texts.items():
            with pab.context(model, name):
                assert torch.equal(call(model, step, y, **fixed), call(plain, step, y, **fixed))
    assert set(ran.values()) == {2} and pab.summary(model).peak_cache_bytes == 2 * KEPT


def doubled(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return 2 * out


CHANGES: dict[str, Any] = {
    "another text": lambda model, y, fixed: (y.flip(0), fixed),
    "an equal text": lambda model, y, fixed: (y.clone(), fixed),
    "a text written to": lambda model, y, fixed: (y.mul_(-1), fixed),
    "another mask": lambda model, y, fixed: (y, fixed | {"mask": fixed["mask"].flip(1)}),
    "a mask written to": lambda model, y, fixed: (fixed["mask"].fill_(1), (y, fixed))[1],
    "no mask": lambda model, y, fixed: (y, fixed | {"mask": None}),
    "weights of keys": lambda model, y, fixed: (
        [b.cross_attn.kv_linear.weight.neg_() for b in model.spatial_blocks],
        (y, fixed),
    )[1],
    "weights of the embedding": lambda model, y, fixed: (model.y_embedder.y_proj.fc1.weight.neg_(), (y, fixed))[1],
    "a layer replaced": lambda model, y, fixed: (
        setattr(model.spatial_blocks[0].cross_attn, "kv_linear", nn.Linear(CHANNELS, 2 * CHANNELS)),
        (y, fixed),
    )[1],
    "a hook on a projection": lambda model, y, fixed: (
        model.spatial_blocks[0].cross_attn.kv_linear.register_forward_hook(doubled),
        (y, fixed),
    )[1],
    "a hook in the embedding": lambda model, y, fixed: (
        model.y_embedder.y_proj.fc1.register_forward_hook(doubled),
        (y, fixed),
    )[1],
    "a forward of a projection": lambda model, y, fixed: (
        setattr(model.spatial_blocks[0].cross_attn.kv_linear, "forward", lambda y: y.new_ones(2, TEXT, 2 * CHANNELS)),
        (y, fixed),
    )[1],
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_within_a_generation_is_computed_again(change: str) -> None:
    model, y, fixed = tiny_stdit3(), text(), conditions()
    pab.enable(model, LATE, num_steps=STEPS)
    for step in range(4):
        if step == 2:
            y, fixed = CHANGES[change](model, y, fixed)
        got = call(model, step, y, **fixed)
        with torch.enable_grad():  # the model runs plainly
            model.final_layer.linear.weight.requires_grad_()
            expected = call(model, step, y, **fixed).detach()
            model.final_layer.linear.weight.requires_grad_(False)
        assert torch.equal(got, expected), step


class Scaled(nn.Linear):
    """A linear layer with a scale that is no tensor, as that of a LoRA."""

    scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * super().forward(x)


@pytest.mark.parametrize("name", ["spatial_blocks.0.cross_attn.kv_linear", "y_embedder.y_proj.fc2"])
def test_a_scale_of_a_layer_may_change_within_a_generation(name: str) -> None:
    model, plain, y, fixed = tiny_stdit3(), tiny_stdit3(), text(), conditions()
    layers: list[Any] = [m.get_submodule(name) for m in (model, plain)]
    for layer in layers:
        layer.__class__ = Scaled
    pab.enable(model, LATE, num_steps=STEPS)
    for step in range(3):
        for layer in layers:
            layer.scale = 1.0 + step
        assert torch.equal(call(model, step, y, **fixed), call(plain, step, y, **fixed))


class Fading(STDiT3):
    """Its text depends on more than its arguments."""

    strength = 1.0

    def embed_text(self, y: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        embedded, lengths = super().embed_text(y, mask)
        self.strength *= 0.5
        return embedded * self.strength, lengths


def faded_by_a_hook(model: Any) -> None:
    ran = Counter[str]()

    def fade(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        ran.update(["y"])
        return out * 0.5 ** ran["y"]

    model.y_embedder.register_forward_hook(fade)


@pytest.mark.parametrize(
    "change", [lambda model: setattr(model, "__class__", Fading), faded_by_a_hook], ids=["a subclass", "a hook"]
)
def test_text_that_is_made_in_another_way_is_projected_always(change: Any) -> None:
    model, plain, y, fixed = tiny_stdit3(), tiny_stdit3(), text(), conditions()
    for m in (model, plain):
        change(m)
    pab.enable(model, LATE, num_steps=STEPS)
    for step in range(3):
        assert torch.equal(call(model, step, y, **fixed), call(plain, step, y, **fixed))


def test_text_whose_writes_are_not_counted_is_projected_always() -> None:
    model, plain = tiny_stdit3(), tiny_stdit3()
    ran = counted(model)
    pab.enable(model, LATE, num_steps=STEPS)
    with torch.inference_mode():
        y = text()
        for step in range(3):
            y.add_(1)
            assert torch.equal(call(model, step, y), call(plain, step, y))
    assert set(ran.values()) == {3}


def test_text_made_before_inference_mode_is_projected_once() -> None:
    model, y, fixed = tiny_stdit3(), text(), conditions()
    ran = counted(model)
    pab.enable(model, LATE, num_steps=STEPS)
    with torch.inference_mode():
        for step in range(3):
            call(model, step, y, **fixed)
    assert set(ran.values()) == {1}


# Forecasts


EVERYTHING = {
    "spatial": Broadcast(2, (0, 1)),
    "temporal": Broadcast(3, (0, 1)),
    "cross": Broadcast(4, (0, 1)),
    "mlp": Broadcast(5, (0, 1)),
    "block": Broadcast(3, (4, 8), "step", layers=(1,)),
}


def forecast(model: Any, inputs: dict[str, Any]) -> Forecast:
    plan = pab.summary(model).plan
    assert plan is not None
    on_device = {n: torch.empty_like(v, device="meta") if isinstance(v, Tensor) else v for n, v in inputs.items()}
    return plan.forecast(*measure(on_meta(model), on_device, plan.sublayers).costs(plan.config.cache_dtype))


def check_forecast(config: PABConfig, dtype: torch.dtype = torch.float32, **more: Any) -> None:
    model = tiny_stdit3(dtype)
    inputs = {"x": noise(dtype=dtype), "timestep": torch.tensor([900.0, 900.0]), "y": text(dtype=dtype)}
    inputs |= conditions(dtype=dtype) | more
    pab.enable(model, config, num_steps=STEPS)
    flops, now = 0, []
    for _ in range(STEPS):
        with ops.flop_counter() as counter:
            model(**inputs)
        flops += counter.get_total_flops()
        now.append(pab.summary(model).cache_bytes)
    summary, expected = pab.summary(model), forecast(model, inputs)
    assert flops == summary.flops == expected.flops
    assert summary.flops_without == expected.flops_without >= summary.flops and summary.forced == 0
    assert summary.peak_cache_bytes == expected.peak_cache_bytes
    assert tuple(now) == expected.cache_bytes and now[-1] == 0


@pytest.mark.flops
@pytest.mark.parametrize(
    ("rules", "cache_dtype", "cache_point", "dtype"),
    pairs(
        [{}, EVERYTHING, {"cross": 3, "model": Broadcast(2, (0.2, 0.9))}, {"block": 2}],
        [None, "int8", "float8_e4m3fn"],
        ["pre_gate", "post_gate"],
        [torch.float32, torch.bfloat16],
    ),
)
def test_flops_and_bytes_of_a_generation_are_forecast(
    rules: Any, cache_dtype: Any, cache_point: Any, dtype: torch.dtype
) -> None:
    check_forecast(PABConfig(**rules, cache_dtype=cache_dtype, cache_point=cache_point), dtype, x_mask=given_frames())


@st.composite
def configs(draw: st.DrawFn) -> PABConfig:
    rules = []
    for kind in draw(st.lists(st.sampled_from(list(EVERYTHING)), min_size=1, max_size=5)):
        lo, hi = sorted(draw(st.lists(st.integers(0, 8), min_size=2, max_size=2, unique=True)))
        layers, reuse = draw(st.sampled_from([None, (0,), (1,)])), draw(st.sampled_from(["hold", "linear"]))
        rules.append((kind, Broadcast(draw(st.integers(2, 6)), (lo, hi), "step", reuse, layers)))
    return PABConfig(rules=tuple(rules), cache_dtype=draw(st.sampled_from([None, "int8"])))


@pytest.mark.flops
@settings(max_examples=4)
@given(config=configs())
def test_the_forecast_holds_for_any_rules(config: PABConfig) -> None:
    check_forecast(config)


@pytest.mark.parametrize("cache_point", ["pre_gate", "post_gate", "unprojected"])
def test_a_generation_runs_on_the_meta_device(cache_point: Any) -> None:
    model = tiny_stdit3().to("meta")
    pab.enable(model, PABConfig(**EVERYTHING, cache_point=cache_point), num_steps=STEPS)
    y, fixed = text().to("meta"), {name: v.to("meta") for name, v in conditions().items()}
    for step in range(STEPS):
        out = model(noise(step).to("meta"), torch.empty(2, device="meta"), y, **fixed)
        assert out.is_meta and out.shape == (2, 8, 3, 5, 7)
    assert pab.summary(model).forced == 0
