"""Configs from diffusers and from VideoSys, and masks of steps."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pab_kernels.rules.config import KINDS, MODULE_KINDS, Broadcast, PABConfig
from pab_kernels.rules.formats import (
    from_diffusers,
    from_steps_masks,
    from_videosys,
    to_steps_masks,
)
from pab_kernels.rules.plan import Action, Plan, Sublayer, plan
from pab_kernels.rules.presets import presets
from pab_kernels.rules.schedule import Schedule

_RANGES = st.integers(1, 9)


def _refused(error: type[Exception], message: str) -> Any:
    return pytest.raises(error, match=f"^[^\\n]*{re.escape(message)}[^\\n]*$")


# diffusers

_SUBLAYERS = [
    Sublayer(f"{stack}.{i}.attn{n}", kind, i)
    for i in range(3)
    for stack, n, kind in (
        ("transformer_blocks", 1, "spatial"),
        ("transformer_blocks", 2, "cross"),
        ("temporal_transformer_blocks", 1, "temporal"),
    )
]


def _diffusers(**fields: Any) -> Any:
    return pytest.importorskip("diffusers").PyramidAttentionBroadcastConfig(**fields)


def _diffusers_reused(timesteps: list[int], reach: int, window: tuple[int, int]) -> list[bool]:
    """diffusers' hook, written a second time."""
    return [i % reach != 0 and window[0] < t < window[1] for i, t in enumerate(timesteps)]


@given(
    timesteps=st.lists(st.integers(0, 999), min_size=1, max_size=30, unique=True).map(
        lambda v: sorted(v, reverse=True)
    ),
    reaches=st.tuples(_RANGES, _RANGES, _RANGES),
    window=st.tuples(st.integers(0, 400), st.integers(401, 1000)),
)
@settings(max_examples=60)
def test_diffusers_ranges_and_windows_reuse_the_same_steps(
    timesteps: list[int], reaches: tuple[int, ...], window: tuple[int, int]
) -> None:
    kinds = ("spatial", "temporal", "cross")
    ranges = {f"{kind}_attention_block_skip_range": reach for kind, reach in zip(kinds, reaches, strict=True)}
    windows = {f"{kind}_attention_timestep_skip_range": window for kind in kinds}
    made = plan(from_diffusers(_diffusers(**ranges, **windows)), timesteps=timesteps)
    for kind, reach in zip(kinds, reaches, strict=True):
        assert [d.action is Action.REUSE for d in made.rows[kind]] == _diffusers_reused(timesteps, reach, window)


def test_diffusers_defaults_are_kept() -> None:
    assert from_diffusers(_diffusers(cross_attention_block_skip_range=3)) == PABConfig(
        cross=Broadcast(3, (100, 800), "timestep", exact=True)
    )
    taken = Broadcast(2, (100, 800), "timestep", exact=True)  # diffusers warns and takes 2
    assert from_diffusers(_diffusers()) == PABConfig(spatial=taken)


def test_diffusers_identifiers_restrict_the_layers() -> None:
    config = _diffusers(
        spatial_attention_block_skip_range=2,
        spatial_attention_block_identifiers=(r"^transformer_blocks\.[12]\.",),
        temporal_attention_block_skip_range=4,
        cross_attention_block_skip_range=6,
        cross_attention_block_identifiers=("no_such_block",),
    )
    assert from_diffusers(config, _SUBLAYERS) == PABConfig(
        spatial=Broadcast(2, (100, 800), "timestep", layers=(1, 2), exact=True),
        temporal=Broadcast(4, (100, 800), "timestep", exact=True),
    )
    with _refused(
        ValueError, "spatial_attention_block_identifiers ('^transformer_blocks\\\\.[12]\\\\.',) name modules of a model"
    ):
        from_diffusers(config)


def test_identifiers_that_tear_a_layer_are_refused() -> None:
    config = _diffusers(
        spatial_attention_block_skip_range=2, spatial_attention_block_identifiers=("^transformer_blocks",)
    )
    with _refused(ValueError, "name some and not all spatial sublayers of layer 1; a rule applies to whole layers"):
        from_diffusers(config, [*_SUBLAYERS, Sublayer("single_transformer_blocks.1.attn", "spatial", 1)])


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"spatial_attention_block_skip_range": 0}, ValueError, "range must be a whole number of at least 1, got 0"),
        (
            {"spatial_attention_timestep_skip_range": (100,)},
            ValueError,
            "spatial_attention_timestep_skip_range must be two timesteps",
        ),
    ],
)
def test_bad_values_of_diffusers_are_refused(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with _refused(error, message):
        from_diffusers(_diffusers(**fields))


def test_another_config_is_not_taken_for_diffusers() -> None:
    with _refused(TypeError, "takes diffusers' PyramidAttentionBroadcastConfig, got PABConfig"):
        from_diffusers(PABConfig())


# VideoSys


def _videosys(lo: int, hi: int, ranges: dict[str, int], points: tuple[int, ...], blocks: int) -> dict[str, Any]:
    """VideoSys's arguments as its pipelines spell them."""
    table = {t: {"block": list(range(blocks)), "skip_count": 2} for t in points}
    arguments: dict[str, Any] = {
        "mlp_broadcast": True,
        "mlp_spatial_broadcast_config": table,
        "mlp_temporal_broadcast_config": dict(table),
    }
    for kind, reach in ranges.items():
        arguments |= {f"{kind}_broadcast": True, f"{kind}_threshold": [lo, hi], f"{kind}_range": reach}
    return arguments


PUBLISHED = {
    "open-sora-1.2": _videosys(450, 930, {"spatial": 2, "temporal": 4, "cross": 6}, (676, 788, 864), 5),
    "latte": _videosys(100, 800, {"spatial": 2, "temporal": 3, "cross": 6}, (720, 640, 560, 480, 400), 5),
}
SCHEDULES = {
    "open-sora-1.2": [1000 * 4.887 * t / (1 + 3.887 * t) for t in (1 - i / 30 for i in range(30))],
    "latte": list(range(980, -1, -20)),
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_the_keywords_of_videosys_give_the_presets(name: str) -> None:
    config = from_videosys(**PUBLISHED[name], cache_point="post_gate")
    assert config == presets()[name]
    made, published = (plan(c, timesteps=SCHEDULES[name]) for c in (config, presets()[name]))
    assert made.rows == published.rows and made.notes == published.notes == ()
    assert made.step_counts()["mlp"].reused == 2 * len(PUBLISHED[name]["mlp_spatial_broadcast_config"])


def _videosys_mlp_reused(timesteps: list[int], table: dict[int, dict[str, Any]], block: int) -> list[bool]:
    """VideoSys's rule for the MLP of a block, written a second time: reused within skip_count steps after a listed
    timestep."""
    reused = []
    for i, t in enumerate(timesteps):
        earlier = [
            key for key in table if key in timesteps and 0 < i - timesteps.index(key) <= table[key]["skip_count"]
        ]
        listed = t in table and block in table[t]["block"]
        reused.append(not listed and any(block in table[key]["block"] for key in earlier))
    return reused


@given(data=st.data(), timesteps=st.lists(st.integers(1, 999), min_size=4, max_size=25, unique=True))
@settings(max_examples=80)
def test_videosys_tables_reuse_the_same_steps(data: st.DataObject, timesteps: list[int]) -> None:
    timesteps = sorted(timesteps, reverse=True)
    skip = data.draw(st.integers(0, 4))
    entries = st.fixed_dictionaries(
        {"block": st.lists(st.integers(0, 3), max_size=4, unique=True), "skip_count": st.just(skip)}
    )
    table = data.draw(st.dictionaries(st.sampled_from(timesteps) | st.integers(1, 999), entries, max_size=4))
    config = from_videosys(mlp_broadcast=True, mlp_spatial_broadcast_config=table)
    made = Plan(config, Schedule.of(timesteps=timesteps), tuple(Sublayer(f"mlp{i}", "mlp", i) for i in range(4)))
    for block in range(4):
        assert [d.action is Action.REUSE for d in made.rows[f"mlp{block}"]] == _videosys_mlp_reused(
            timesteps, table, block
        )


def test_what_is_off_is_left_out() -> None:
    assert from_videosys() == PABConfig()
    assert (
        from_videosys(spatial_broadcast=False, spatial_range=2, spatial_threshold=[1, 2], mlp_broadcast=False)
        == PABConfig()
    )
    off = PUBLISHED["latte"] | {"mlp_broadcast": False, "cross_broadcast": False}
    assert from_videosys(**off) == PABConfig(
        spatial=Broadcast(2, (100, 800), "timestep"), temporal=Broadcast(3, (100, 800), "timestep")
    )


def test_timesteps_of_a_table_may_be_the_strings_of_json() -> None:
    arguments = json.loads(json.dumps(PUBLISHED["latte"]))
    assert from_videosys(**arguments, cache_point="post_gate") == presets()["latte"]


def test_blocks_with_other_points_have_rules_of_their_own() -> None:
    table = {
        720: {"block": [0, 1], "skip_count": 2},
        640: {"block": [0], "skip_count": 2},
        560: {"block": [2], "skip_count": 1},
    }
    config = from_videosys(mlp_broadcast=True, mlp_spatial_broadcast_config=table)
    expected = [((0,), (640, 720), 3), ((1,), (720,), 3), ((2,), (560,), 2)]
    assert [(kind, rule.layers, rule.at, rule.range) for kind, rule in config.rules] == [("mlp", *e) for e in expected]


_ENTRY = {"block": [0], "skip_count": 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"spatial_gap": 2},
            "VideoSys has no argument 'spatial_gap'; supported are spatial_broadcast, spatial_threshold, spatial_range",
        ),
        ({"spatial_broadcast": True, "spatial_range": 2}, "spatial_broadcast is on and spatial_threshold is missing"),
        (
            {"cross_broadcast": True, "cross_range": 2, "cross_threshold": 5},
            "cross_threshold must be two timesteps (lo, hi), got 5",
        ),
        ({"mlp_broadcast": True}, "mlp_broadcast is on and no table is given"),
        (
            {"mlp_broadcast": True, "mlp_spatial_broadcast_config": [720]},
            "mlp_spatial_broadcast_config must be {timestep:",
        ),
        ({"mlp_broadcast": True, "mlp_spatial_broadcast_config": {"x": _ENTRY}}, "got the entry 'x'"),
        (
            {"mlp_broadcast": True, "mlp_spatial_broadcast_config": {7: {"block": [0]}}},
            "got the entry 7: {'block': [0]}",
        ),
        (
            {"mlp_broadcast": True, "mlp_spatial_broadcast_config": {7: {"block": [-1], "skip_count": 1}}},
            "whole numbers from 0",
        ),
        (
            {"mlp_broadcast": True, "mlp_spatial_broadcast_config": {7: _ENTRY}, "mlp_temporal_broadcast_config": {}},
            "mlp_spatial_broadcast_config and mlp_temporal_broadcast_config differ",
        ),
        (
            {"mlp_broadcast": True, "mlp_spatial_broadcast_config": {7: _ENTRY, 9: {"block": [0], "skip_count": 1}}},
            "has skip counts 1, 2 for block 0; one for all its timesteps is supported",
        ),
    ],
)
def test_arguments_that_rules_cannot_say_are_refused(arguments: dict[str, Any], message: str) -> None:
    with _refused(ValueError, message):
        from_videosys(**arguments)


# Masks of steps


@st.composite
def _masks(draw: st.DrawFn) -> dict[str, tuple[int, ...]]:
    length = draw(st.integers(1, 40))
    kinds = draw(
        st.lists(st.sampled_from([kind for kind in MODULE_KINDS if kind != "block"]), unique=True, min_size=1)
        | st.sampled_from([["block"], ["model"]])
    )
    rest = st.lists(st.integers(0, 1), min_size=length - 1, max_size=length - 1)
    return {kind: (1, *draw(rest)) for kind in sorted(kinds, key=KINDS.index)}


@given(_masks())
@settings(max_examples=100)
def test_masks_survive_the_config(masks: dict[str, tuple[int, ...]]) -> None:
    length = len(next(iter(masks.values())))
    made = plan(from_steps_masks(**masks), num_steps=length)
    assert to_steps_masks(made) == masks
    assert made.notes == ()


@given(
    st.builds(PABConfig, **{kind: st.none() | _RANGES for kind in KINDS}),
    st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1))),
)
@settings(max_examples=100)
def test_a_plan_survives_its_masks(config: PABConfig, steps: tuple[int, int]) -> None:
    made = Plan(config, Schedule(steps[0], begin=steps[1]))
    masks = to_steps_masks(made)
    assert all(len(mask) == steps[0] for mask in masks.values())
    again = Plan(from_steps_masks(**masks), made.schedule)
    assert {name: row for name, row in again.rows.items() if name in made.rows} == made.rows


def test_a_mask_is_a_string_or_any_row() -> None:
    expected = from_steps_masks(block=[1, 1, 0, 0, 1, 0])
    assert expected == PABConfig(block=Broadcast(3, unit="step", at=(0, 1, 4)))
    assert (
        from_steps_masks(block="110010") == from_steps_masks(block=(True, True, False, False, True, False)) == expected
    )


def test_a_step_inside_a_reused_block_is_not_computed() -> None:
    masks = to_steps_masks(plan(from_steps_masks(block="1010", spatial="1111"), num_steps=4))
    assert masks == {"spatial": (1, 0, 1, 0), "block": (1, 0, 1, 0)}


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"head": "10"}, "a mask is for a kind, got 'head'; kinds are spatial, temporal, cross, mlp, block"),
        ({"block": "010"}, "must be a row of 1 (compute) and 0 (reuse) that begins with 1, got '010'"),
        ({"block": ""}, "begins with 1, got ''"),
        ({"block": itertools.repeat(1)}, "the steps of the mask of block must be at most 10,000, got 10001"),
        ({"block": [1, 2]}, "got [1, 2]"),
        ({"block": 5}, "got 5"),
        ({"spatial": "10", "cross": "100"}, "masks of one schedule must have one length, got spatial 2, cross 3"),
    ],
)
def test_bad_masks_are_refused(masks: dict[str, Any], message: str) -> None:
    with _refused(ValueError, message):
        from_steps_masks(**masks)


def test_layers_that_differ_have_no_mask() -> None:
    config = PABConfig(spatial=2, rules=(("spatial", Broadcast(3, layers=(1,))),))
    with _refused(ValueError, "a mask is for all layers of a kind, got spatial 1, spatial 2"):
        to_steps_masks(plan(config, num_steps=20))
