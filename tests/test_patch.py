"""`enable_cache(PyramidAttentionBroadcastConfig(...))` under `patch_diffusers`: what diffusers' own tests assert, and
that it is right."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.hooks.pyramid_attention_broadcast import PyramidAttentionBroadcastHook
from diffusers.models.cache_utils import CacheMixin

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from pab_kernels.broadcast.broadcaster import broadcaster_of
from pab_kernels.rules.formats import from_diffusers
from tests.adapters.tiny_models import Tiny
from tests.adapters.tiny_pipes import named, transformer
from tests.oracle import Rule
from tests.patched import CACHING, METHODS, config, out
from tests.record_and_replay import replay_of_pipeline, replaying

pytestmark = [
    pytest.mark.usefixtures("no_flops", "patched"),
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),  # diffusers' own use
    pytest.mark.filterwarnings("ignore:(?s)In CPU autocast:UserWarning"),  # Mochi asks for float32 in autocast
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),  # diffusers' schedulers hand tensors to numpy
]

STEPS = 6


class OnPurpose(Exception):
    pass


def hooks(model: Any) -> list[Any]:
    registries = [m._diffusers_hook for m in model.modules() if hasattr(m, "_diffusers_hook")]
    return [hook for r in registries if (hook := r.get_hook("pyramid_attention_broadcast")) is not None]


# Models, as diffusers tests them


@pytest.mark.parametrize("tiny", CACHING, ids=lambda t: t.name)
def test_a_model_is_switched_on_and_off(tiny: Tiny) -> None:
    model = tiny.build()
    plain = {seed: out(model, tiny(seed)) for seed in range(2)}
    before = {name: set(vars(m)) for name, m in model.named_modules()}
    assert not model.is_cache_enabled
    model.enable_cache(config())
    assert model.is_cache_enabled
    with pytest.raises(ValueError, match="Caching has already been enabled"):
        model.enable_cache(config())
    spatial = [s for s in pab.sublayers(model) if s.kind == "spatial"]
    found = hooks(model)
    assert len(found) == len(spatial) > 0
    assert all(
        isinstance(h, PyramidAttentionBroadcastHook) and (h.state.iteration, h.state.cache) == (0, None) for h in found
    )
    assert torch.equal(out(model, tiny(0)), plain[0])
    assert all(h.state.iteration == 1 and len(h.state.cache) == 1 for h in found)
    again = out(model, tiny(1))
    assert again.isfinite().all() and not torch.allclose(again, plain[1], atol=1e-5)
    model._reset_stateful_cache()
    assert all((h.state.iteration, h.state.cache) == (0, None) for h in found)
    assert torch.equal(out(model, tiny(1)), plain[1])
    model.disable_cache()
    assert not model.is_cache_enabled and not hooks(model)
    assert torch.equal(out(model, tiny(1)), plain[1])
    left = {name: set(vars(m)) - before[name] for name, m in model.named_modules()}
    assert {name: attributes for name, attributes in left.items() if attributes} in (
        {},
        {"": {"_diffusers_hook"}},
    )  # by its reset


def test_contexts_have_outputs_of_their_own() -> None:
    tiny = CACHING[0]
    model = tiny.build()
    plain = {seed: out(model, tiny(seed)) for seed in range(3)}
    model.enable_cache(config())
    for name, seed in (("one", 0), ("two", 1)):
        with model.cache_context(name):
            assert torch.equal(out(model, tiny(seed)), plain[seed])
    with model.cache_context("one"):
        one = out(model, tiny(2))
    with model.cache_context("two"):
        two = out(model, tiny(2))
    assert len({tuple(v.flatten().tolist()) for v in (one, two, plain[2])}) == 3


def test_a_reset_begins_anew_and_leaves_no_registry_behind() -> None:
    tiny = CACHING[0]
    model = tiny.build()
    plain = {seed: out(model, tiny(seed)) for seed in range(2)}
    model.enable_cache(config())
    for _ in range(2):
        for computed in (True, False, True):
            with model.cache_context("one"):
                assert torch.equal(out(model, tiny(int(not computed))), plain[int(not computed)]) is computed
        assert {h.state.iteration for h in hooks(model)} == {3}
        model._reset_stateful_cache()
    model.disable_cache()
    assert model._diffusers_hook._get_child_registries() == []


# Pipelines

LATTE = {
    **{f"{kind}_attention_block_skip_range": reach for kind, reach in (("spatial", 2), ("temporal", 3), ("cross", 4))},
    **{f"{kind}_attention_timestep_skip_range": (100, 900) for kind in ("spatial", "temporal", "cross")},
    "cross_attention_block_identifiers": ("transformer_blocks",),
}
"""Its block identifiers find cross attention in the blocks."""


@pytest.mark.parametrize(
    ("name", "rules", "number"),
    [
        ("CogVideoXPipeline", {}, 2),
        ("FluxPipeline", {}, 3),
        ("HunyuanVideoPipeline", {"spatial_attention_block_identifiers": ["transformer_blocks"]}, 3),
        ("WanPipeline", {"cross_attention_block_skip_range": 3, "cross_attention_block_identifiers": ["blocks"]}, 4),
        ("LattePipeline", LATTE, 6),
    ],
)
def test_a_pipeline_runs_as_with_enable_and_shows_its_state(name: str, rules: dict[str, Any], number: int) -> None:
    tiny = named(name)
    pipe, other = tiny.build(), tiny.build()
    plain = tiny.sample(pipe, STEPS)
    pab_config = config(lambda: pipe.current_timestep, **rules)
    pab.enable(other, from_diffusers(pab_config, pab.sublayers(other)))
    expected = tiny.sample(other, STEPS)
    model = pipe.transformer
    model.enable_cache(pab_config)
    found = hooks(model)
    assert len(found) == number
    shown: list[Any] = []

    def look(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        shown.append((i, {h.state.iteration for h in found}, {h.state.cache is not None for h in found}))
        return {}

    for _ in range(2):
        assert all((h.state.iteration, h.state.cache) == (0, None) for h in found)
        assert torch.equal(tiny.sample(pipe, STEPS, callback_on_step_end=look), expected)
        assert shown == [(i, {i + 1}, {True}) for i in range(STEPS)]
        shown.clear()
    assert not torch.equal(expected, plain)
    assert (
        pab.summary(pipe).contexts == pab.summary(other).contexts and pab.summary(pipe).plan == pab.summary(other).plan
    )
    model.disable_cache()
    assert torch.equal(tiny.sample(pipe, STEPS), plain)
    assert "step" not in vars(pipe.scheduler)


def test_two_branches_are_right_where_diffusers_mixes_them() -> None:
    tiny = named("WanPipeline")
    pipe, twin = tiny.build(), tiny.build()
    pipe.transformer.enable_cache(
        config(lambda: pipe.current_timestep, spatial_attention_timestep_skip_range=(-1, 1001))
    )
    rules = {"spatial": Rule(2, (0, 1))}
    with replaying(twin, replay_of_pipeline(twin, pab.sublayers(twin), rules)):
        expected = tiny.sample(twin, STEPS)
    assert torch.equal(tiny.sample(pipe, STEPS), expected)

    def fail(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if i == 2:
            raise OnPurpose
        return {}

    with pytest.raises(OnPurpose):
        tiny.sample(pipe, STEPS, callback_on_step_end=fail)
    assert torch.equal(tiny.sample(pipe, STEPS), expected)
    pab.unpatch_diffusers()
    pipe.transformer.enable_cache(
        config(lambda: pipe.current_timestep, spatial_attention_timestep_skip_range=(-1, 1001))
    )
    assert not torch.equal(tiny.sample(pipe, STEPS), expected), "diffusers counts both branches' calls as one sequence"


def test_either_of_two_transformers_can_be_served_alone() -> None:
    tiny = named("WanPipeline")
    second = transformer("WanTransformer3DModel")
    pipe = replace(tiny, parts=lambda: tiny.parts() | {"transformer_2": second, "boundary_ratio": 0.8}).build()
    plain = tiny.sample(pipe, STEPS)
    pipe.transformer_2.enable_cache(config(lambda: pipe.current_timestep))
    assert not torch.equal(tiny.sample(pipe, STEPS), plain)
    assert broadcaster_of(pipe.transformer) is None
    plan = pab.summary(pipe).plan
    assert plan is not None and plan.steps.start > 0 and plan.steps.stop == STEPS
    pab.unpatch_diffusers()
    assert torch.equal(tiny.sample(pipe, STEPS), plain)


def test_a_reset_between_the_timesteps_and_the_first_step_ends_nothing() -> None:
    """As NucleusMoE's pipeline has it."""
    pipe = named("WanPipeline").build()
    model, tiny = pipe.transformer, next(t for t in CACHING if t.name == "WanTransformer3DModel")
    model.enable_cache(config(lambda: pipe.current_timestep))
    pipe.scheduler.set_timesteps(4)
    model._reset_stateful_cache()
    with model.cache_context("cond"):
        out(model, tiny(0))
    assert {h.state.iteration for h in hooks(model)} == {1} and pab.summary(pipe).plan is not None


class App:
    """Code that keeps its pipeline in an attribute."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    def timestep(self) -> Any:
        return self.pipe.current_timestep


def of_partial(pipe: Any) -> Any:
    return functools.partial(getattr, pipe, "current_timestep")


@pytest.mark.parametrize(
    "callback",
    [
        lambda pipe: lambda: pipe.current_timestep,
        lambda pipe: lambda p=pipe: p.current_timestep,
        lambda pipe: App(pipe).timestep,
        lambda pipe: functools.partial(App.timestep, App(pipe)),
        of_partial,
    ],
    ids=["closure", "default", "method", "partial of a method", "partial"],
)
def test_the_pipeline_is_found_in_the_callback_and_its_scheduler_makes_the_plan(callback: Any) -> None:
    tiny = named("FluxPipeline")
    pipe = tiny.build()
    pipe.transformer.enable_cache(config(callback(pipe)))
    tiny.sample(pipe, STEPS)
    plan = pab.summary(pipe).plan
    assert plan is not None and plan.steps == range(STEPS)


# What is left to diffusers, and taking it back


def test_other_caches_go_to_diffusers() -> None:
    tiny = next(t for t in CACHING if t.name == "FluxTransformer2DModel")
    model = tiny.build()
    plain = out(model, tiny(0))
    model.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    assert model.is_cache_enabled and broadcaster_of(model) is None
    with model.cache_context("one"):
        assert torch.equal(out(model, tiny(0)), plain)
        assert not torch.equal(out(model, tiny(1)), plain)
    model.disable_cache()
    assert not model.is_cache_enabled and torch.equal(out(model, tiny(0)), plain)
    with pytest.raises(ValueError, match="is not supported"):
        model.enable_cache(object())
    model.disable_cache()  # nothing to disable: diffusers says so


def test_unpatch_takes_everything_back_and_patching_twice_is_patching_once() -> None:
    tiny = CACHING[0]
    model, own = tiny.build(), tiny.build()
    pab.patch_diffusers()
    model.enable_cache(config())
    pab.enable(own, PABConfig(spatial=2), num_steps=2)
    pab.unpatch_diffusers()
    assert {name: vars(CacheMixin)[name] for name in METHODS} == METHODS
    assert not model.is_cache_enabled and broadcaster_of(model) is None and not hooks(model)
    assert broadcaster_of(own) is not None, "pab.enable did that"
    pab.unpatch_diffusers()
    model.enable_cache(config())
    assert (
        all(type(h.state).__module__.startswith("diffusers.") for h in hooks(model)) and broadcaster_of(model) is None
    )
    pab.patch_diffusers()
    assert model.is_cache_enabled
    model.disable_cache()  # diffusers' own, from before
    assert not hooks(model) and not model.is_cache_enabled


def test_a_method_that_was_wrapped_since_passes_through_after_unpatch() -> None:
    patched = vars(CacheMixin)["enable_cache"]
    CacheMixin.enable_cache = wrapper = lambda model, given: patched(model, given)
    model = CACHING[0].build()
    model.enable_cache(config())
    assert broadcaster_of(model) is not None
    pab.unpatch_diffusers()
    assert vars(CacheMixin)["enable_cache"] is wrapper
    model.enable_cache(config())
    assert broadcaster_of(model) is None and len(hooks(model)) > 0
    CacheMixin.enable_cache = METHODS["enable_cache"]


def test_a_config_that_cannot_be_served_leaves_the_model_plain() -> None:
    model = next(t for t in CACHING if t.name == "FluxTransformer2DModel").build()
    with pytest.raises(ValueError, match="current_timestep_callback is missing; pass current_timestep_callback=lambda"):
        model.enable_cache(PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2))
    with pytest.raises(ValueError, match="name some and not all spatial sublayers of layer 0"):
        model.enable_cache(config(spatial_attention_block_identifiers=["^transformer_blocks"]))
    assert not model.is_cache_enabled and broadcaster_of(model) is None and not hooks(model)
    pab.enable(model, PABConfig(spatial=2), num_steps=2)
    with pytest.raises(
        ValueError, match="PAB is enabled on this FluxTransformer2DModel by pab.enable; pab.disable it first"
    ):
        model.enable_cache(config())
    assert not model.is_cache_enabled


def test_what_enable_cache_switched_on_takes_no_other_rules_and_no_graphs() -> None:
    model = CACHING[0].build()
    model.enable_cache(config())
    message = "by enable_cache, which sets its rules and excludes CUDA graphs, budgets and host memory; call disable"
    rules = {"config": PABConfig(spatial=2)}
    for options in (rules, {"cuda_graphs": True}, {"budget": "1GiB"}, {"cache_device": "cpu"}):
        with pytest.raises(ValueError, match=message):
            pab.enable(model, **options)
    pab.enable(model, timed=True)
    model.disable_cache()
    pab.enable(model, PABConfig(spatial=2), cuda_graphs=True)
    pab.disable(model)


def test_rules_for_nothing_that_the_model_has_are_switched_off_too() -> None:
    model = transformer("WanTransformer3DModel")
    model.enable_cache(
        PyramidAttentionBroadcastConfig(temporal_attention_block_skip_range=2, current_timestep_callback=lambda: 500)
    )
    assert model.is_cache_enabled and not hooks(model)
    model.disable_cache()
    assert not model.is_cache_enabled


@pytest.mark.parametrize("first", ["disable_cache", "enable_cache"])
def test_a_copy_of_a_served_model_is_plain_and_can_be_served_itself(first: str) -> None:
    tiny = CACHING[0]
    model = tiny.build()
    plain = [out(model, tiny(seed)) for seed in range(2)]
    model.enable_cache(config())
    out(model, tiny(0))
    copied = copy.deepcopy(model)
    assert all(torch.equal(out(copied, tiny(seed)), plain[seed]) for seed in range(2))
    if first == "disable_cache":
        copied.disable_cache()
        assert not copied.is_cache_enabled and not hooks(copied)
    copied.enable_cache(config())
    assert (
        copied.is_cache_enabled
        and all(h.state.iteration == 0 for h in hooks(copied))
        and len(hooks(copied)) == len(hooks(model)) > 0
    )
    assert model.is_cache_enabled and all(h.state.iteration == 1 for h in hooks(model))
    out(copied, tiny(0))
    assert not torch.allclose(out(copied, tiny(1)), plain[1], atol=1e-5)


def test_a_compiled_model_is_served_where_its_pipeline_is_found() -> None:
    tiny = named("WanPipeline")
    pipe = tiny.build()
    model = pipe.transformer
    model.blocks = model.blocks[:1]

    def rules() -> PyramidAttentionBroadcastConfig:
        return config(lambda: pipe.current_timestep, spatial_attention_timestep_skip_range=(-1, 1001))

    model.enable_cache(rules())
    expected = tiny.sample(pipe, 3)
    model.disable_cache()
    before = set(vars(pipe))
    pipe.transformer = compiled = torch.compile(model, backend="eager")
    forward = vars(compiled)["forward"]
    compiled.enable_cache(rules())
    assert torch.equal(tiny.sample(pipe, 3), expected) and pab.summary(pipe).contexts["cond"]["spatial"].reused > 0
    compiled.disable_cache()
    assert vars(compiled)["forward"] is forward and set(vars(pipe)) == before


def test_all_ranges_left_out_is_a_spatial_range_of_two() -> None:
    model = transformer("WanTransformer3DModel")
    model.enable_cache(PyramidAttentionBroadcastConfig(current_timestep_callback=lambda: 500))
    kept = broadcaster_of(model)
    assert kept is not None and kept.config == PABConfig(spatial=Broadcast(2, (100, 800), "timestep", exact=True))
    pab.disable(model)
    assert model.is_cache_enabled, "nobody has told diffusers"
    model.disable_cache()
    assert not model.is_cache_enabled and not hooks(model)
