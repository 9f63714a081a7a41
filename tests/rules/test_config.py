"""Rules: what is reused by definition, bad values, and the way to JSON and back."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import pickle
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pab_kernels.rules.config import MODULE_KINDS, Broadcast, PABConfig
from pab_kernels.rules.schedule import Schedule

# Any rule and config. Fractions have two digits, as people write them.

_RANGES = st.integers(1, 9)
_REUSES = st.sampled_from(["hold", "linear"])
_LAYERS = st.none() | st.lists(st.integers(0, 40), min_size=1, max_size=5)
_HUNDREDTHS = st.integers(0, 100).map(lambda v: v / 100)
_TWO_NUMBERS = {
    "fraction": st.lists(_HUNDREDTHS, min_size=2, max_size=2, unique=True).map(sorted),
    "step": st.lists(st.integers(0, 60), min_size=2, max_size=2, unique=True).map(sorted),
    "timestep": st.lists(st.integers(0, 999) | st.floats(0, 999), min_size=2, max_size=2, unique=True).map(sorted),
}


@st.composite
def broadcasts(draw: st.DrawFn) -> Broadcast:
    unit = draw(st.sampled_from(sorted(_TWO_NUMBERS)))
    if unit != "fraction" and draw(st.booleans()):
        points = draw(st.lists(st.integers(0, 999), min_size=1, max_size=5))
        exact = unit == "timestep" and draw(st.booleans())
        return Broadcast(draw(_RANGES), unit=unit, reuse=draw(_REUSES), layers=draw(_LAYERS), at=points, exact=exact)
    window = draw(_TWO_NUMBERS[unit])
    window = None if unit == "fraction" and draw(st.booleans()) else window
    return Broadcast(draw(_RANGES), window, unit, draw(_REUSES), draw(_LAYERS))


def whole(rule: Broadcast) -> Broadcast:
    """A rule for the whole model."""
    return dataclasses.replace(rule, layers=None, reuse="forecast")


_CONFIGS = st.builds(
    PABConfig,
    **{kind: st.none() | _RANGES | broadcasts() for kind in MODULE_KINDS},
    model=st.none() | _RANGES | broadcasts().map(whole),
    rules=st.lists(
        st.tuples(st.sampled_from(MODULE_KINDS), broadcasts()) | st.tuples(st.just("model"), broadcasts().map(whole)),
        max_size=3,
    ),
    cache_dtype=st.sampled_from([None, "float8_e4m3fn", "int8", "int4"]),
    cache_point=st.sampled_from(["pre_gate", "post_gate", "unprojected"]),
)


@given(_CONFIGS)
@settings(max_examples=60)
def test_a_config_survives_json(config: PABConfig) -> None:
    back = PABConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert back == config
    assert hash(back) == hash(config)


@given(broadcasts())
@settings(max_examples=60)
def test_a_rule_survives_json(rule: Broadcast) -> None:
    assert Broadcast.from_dict(json.loads(json.dumps(rule.to_dict()))) == rule


def test_a_dict_may_have_ranges_for_rules_and_leave_out_the_rest() -> None:
    assert PABConfig.from_dict({"spatial": 2, "cache_dtype": "int8"}) == PABConfig(spatial=2, cache_dtype="int8")
    assert PABConfig.from_dict({}) == PABConfig()


# The definition, written a second time


def _as_videosys(t: float) -> int:
    """A timestep as VideoSys compares it: fractional ones are those of a bfloat16 model, whole ones stay whole."""
    return int(t) if t == int(t) else int(torch.tensor(t, dtype=torch.float32).bfloat16())


@given(st.data(), st.integers(1, 40), _RANGES)
@settings(max_examples=100)
def test_a_step_is_reused_iff_off_the_beat_and_in_the_window(data: st.DataObject, num_steps: int, reach: int) -> None:
    begin = data.draw(st.integers(0, num_steps - 1))
    unit = data.draw(st.sampled_from(sorted(_TWO_NUMBERS)))
    lo, hi = data.draw(_TWO_NUMBERS[unit])
    timesteps = sorted(data.draw(st.lists(st.floats(0, 1000), min_size=num_steps, max_size=num_steps)), reverse=True)
    expected = set()
    for i in range(begin, num_steps):
        inside = {
            "fraction": lambda i=i: Fraction(str(lo)) <= Fraction(i, num_steps) < Fraction(str(hi)),
            "step": lambda i=i: i in range(lo, hi),
            "timestep": lambda i=i: lo < _as_videosys(timesteps[i]) < hi,
        }[unit]()
        if inside and divmod(i - begin, reach)[1] != 0:
            expected.add(i)
    schedule = Schedule(num_steps, tuple(timesteps) if unit == "timestep" else None, begin)
    assert Broadcast(reach, (lo, hi), unit).reused(schedule) == expected


def test_fractions_are_of_the_full_schedule_and_the_beat_is_of_the_first_call() -> None:
    # 20 steps entered at 9: the default window is still steps 3 to 16, and step 9 is the first beat.
    assert Broadcast(3).reused(Schedule(20, begin=9)) == {10, 11, 13, 14, 16}
    assert Broadcast(3).reused(Schedule(20)) == {4, 5, 7, 8, 10, 11, 13, 14, 16}


def test_step_windows_end_before_hi_and_timestep_windows_leave_out_both_ends() -> None:
    assert Broadcast(9, (2, 5), "step").reused(Schedule(8)) == {2, 3, 4}
    schedule = Schedule.of(timesteps=[900, 801, 800, 799, 101, 100, 99])
    assert Broadcast(9, (100, 800), "timestep").reused(schedule) == {3, 4}


# Timesteps are compared as VideoSys compares them


@given(st.floats(0, 1000) | st.integers(0, 4000).map(lambda v: v / 4) | st.floats(0, 1e38))
@example(930.0)
@example(674.8582)
@example(738.0)  # no bfloat16
@example(2.0**-140)
@example(1e300)
@settings(max_examples=300)
def test_a_fractional_timestep_is_rounded_as_a_bfloat16_tensor_is(t: float) -> None:
    assert Broadcast(2, (0, 1000), "timestep").number(t) == _as_videosys(t)
    assert Broadcast(2, (0, 1000), "timestep", exact=True).number(t) == int(t)


def test_windows_and_points_are_compared_with_the_rounded_timestep() -> None:
    schedule = Schedule.of(
        timesteps=[1000, 929.5, 927.9, 674.86, 451.2, 450.4, 100]
    )  # 1000, 928, 928, 676, 452, 450, 100
    assert Broadcast(9, (451, 929), "timestep").reused(schedule) == {1, 2, 3, 4}
    assert Broadcast(9, (451, 929), "timestep", exact=True).reused(schedule) == {2, 3}
    assert Broadcast(2, unit="timestep", at=[676]).points(schedule) == (3,)
    assert Broadcast(2, unit="timestep", at=[676], exact=True).points(schedule) == ()
    assert Broadcast(2, unit="timestep", at=[674], exact=True).points(schedule) == (3,)


def test_whole_timesteps_are_never_rounded() -> None:
    """738 is a point of Open-Sora-Plan's table and no bfloat16; 721 would become Latte's point 720."""
    assert Broadcast(2, unit="timestep", at=[738]).points(Schedule.of(timesteps=[744, 738, 732])) == (1,)
    assert Broadcast(2, unit="timestep", at=[720]).points(Schedule.of(timesteps=[741, 721, 701])) == ()


def test_the_default_window_is_the_middle_seventy_percent_whatever_the_rounding() -> None:
    for num_steps in (20, 40, 60, 100, 1000):
        assert Broadcast(10**6).reused(Schedule(num_steps)) == set(range(num_steps * 15 // 100, num_steps * 85 // 100))


# Explicit steps


@given(st.integers(1, 30), _RANGES, st.sets(st.integers(0, 35), min_size=1), st.data())
@settings(max_examples=100)
def test_each_explicit_point_is_computed_and_the_steps_after_it_are_reused(
    n: int, reach: int, points: set[int], data: st.DataObject
) -> None:
    begin = data.draw(st.integers(0, n - 1))
    expected, since = set(), None
    for i in range(begin, n):
        if i in points:
            since = i
        elif since is not None and i - since < reach:
            expected.add(i)
    assert Broadcast(reach, unit="step", at=points).reused(Schedule(n, begin=begin)) == expected
    timesteps = [1000.5 - i for i in range(n)]
    by_timestep = Broadcast(reach, unit="timestep", at=[1000 - p for p in points], exact=True)
    assert by_timestep.reused(Schedule.of(timesteps=timesteps, begin=begin)) == expected


@given(st.lists(st.booleans(), min_size=1, max_size=30))
def test_a_mask_of_ones_and_zeros_is_explicit_steps(mask: list[bool]) -> None:
    mask[0] = True  # there is nothing to reuse yet
    ones = [i for i, computed in enumerate(mask) if computed]
    reused = Broadcast(len(mask), unit="step", at=ones).reused(Schedule(len(mask)))
    assert [i not in reused for i in range(len(mask))] == mask


def test_a_timestep_that_a_second_order_scheduler_repeats_is_a_point_each_time() -> None:
    schedule = Schedule.of(timesteps=[900, 700, 700, 500, 500, 300])
    rule = Broadcast(3, unit="timestep", at=[700])
    assert rule.points(schedule) == (1, 2)
    assert rule.reused(schedule) == {3, 4}


# Which rule applies


def test_later_rules_win_over_earlier_ones_and_over_the_fields() -> None:
    first, second, third = Broadcast(3), Broadcast(4, layers=[1, 2]), Broadcast(1, layers=[2])
    config = PABConfig(
        spatial=2, cross=first, rules=(("spatial", second), ("spatial", third), ("cross", Broadcast(8, layers=[7])))
    )
    assert [config.rule("spatial", layer) for layer in range(4)] == [Broadcast(2), second, third, Broadcast(2)]
    assert config.rule("cross", 0) is first
    assert config.rule("mlp", 0) is None


def test_a_rule_restricted_to_layers_leaves_the_others_alone() -> None:
    config = PABConfig(mlp=Broadcast(3, layers=(4, 0, 4)))
    assert config.mlp == Broadcast(3, layers=(0, 4))
    assert [config.rule("mlp", layer) is not None for layer in range(6)] == [True, False, False, False, True, False]


def test_rules_and_windows_are_kept_as_tuples_whatever_they_came_in() -> None:
    rule = Broadcast(2, [0.1, 0.5], layers=range(3))
    assert rule == Broadcast(2, (0.1, 0.5), layers=(v for v in (2, 1, 0)))
    assert Broadcast(2, iter([0.1, 0.5])).window == (0.1, 0.5)
    assert PABConfig(rules=[["mlp", rule]]) == PABConfig(rules=(("mlp", rule),))
    assert hash(PABConfig(rules=[["mlp", rule]]))


# Bad input: what came, what is supported, what to do, in one line

_STEP = {"unit": "step"}
BAD_RULES: list[tuple[dict[str, Any], str]] = [
    ({"range": 0}, "range must be a whole number of at least 1, got 0; 1 computes at every step"),
    ({"range": -2}, "at least 1, got -2"),
    ({"range": 2.0}, "whole number of at least 1, got 2.0"),
    ({"range": "2"}, "got '2'"),
    ({"range": True}, "got True"),
    ({"range": None}, "got None"),
    ({"unit": "steps"}, "unit 'steps' is not known; supported are 'fraction', 'step', 'timestep'"),
    ({"unit": ["step"]}, r"unit \['step'\] is not known"),
    ({"reuse": "cubic"}, "reuse 'cubic' is not known; supported are 'hold', 'linear'"),
    ({"reuse": ["linear"]}, r"reuse \['linear'\] is not known"),
    ({"window": (0.5, 0.5)}, r"lo < hi, got \(0.5, 0.5\)"),
    ({"window": (0.8, 0.2)}, r"lo < hi, got \(0.8, 0.2\)"),
    ({"window": (0.1, float("nan"))}, "lo < hi, got"),
    ({"window": (0.1, "0.9")}, "two numbers with lo < hi"),
    ({"window": (False, True)}, "two numbers with lo < hi"),
    ({"window": (0.1, 0.5, 0.9)}, r"a pair \(lo, hi\), got"),
    ({"window": 0.5}, r"a pair \(lo, hi\), got 0.5"),
    ({"window": "ab"}, r"a pair \(lo, hi\), got 'ab'"),
    ({"window": (-0.1, 0.5)}, "unit 'fraction' supports 0 <= lo < hi <= 1"),
    ({"window": (100, 800)}, r"\(100, 800\) is out of bounds; .* for steps or timesteps pass that unit"),
    ({"window": (-1, 5), **_STEP}, "unit 'step' supports 0 <= lo < hi"),
    ({"unit": "step"}, r"unit 'step' needs a window \(lo, hi\) in steps"),
    ({"unit": "timestep"}, "unit 'timestep' needs a window"),
    ({"layers": ()}, r"layers must be a non-empty list of whole numbers from 0, got \(\); leave it out for all layers"),
    ({"layers": 3}, "layers must be a non-empty list of whole numbers from 0, got 3"),
    ({"layers": "01"}, "got '01'"),
    ({"layers": (0, -1)}, r"got \(0, -1\)"),
    ({"layers": (0, 1.0)}, r"got \(0, 1.0\)"),
    ({"layers": (0, "a")}, r"got \(0, 'a'\)"),
    ({"layers": [[0]]}, r"got \[\[0\]\]"),
    ({"at": (), **_STEP}, r"at must be a non-empty list of whole numbers from 0, got \(\); leave it out for a window"),
    ({"at": (1.5,), **_STEP}, r"at must be .* got \(1.5,\)"),
    ({"num_steps": 9}, "goes with explicit steps `at` and unit='step', got 9 with at=None and unit 'fraction'"),
    ({"num_steps": 9, "at": [1], "unit": "timestep"}, "goes with explicit steps `at` and unit='step', got 9 with at="),
    ({"num_steps": "9", "at": [1], "unit": "step"}, "num_steps is a whole number .* got '9'"),
    ({"num_steps": 9, "at": [1, 9], "unit": "step"}, "at names step 9, and num_steps=9 are counted from 0"),
    ({"exact": True}, "only unit='timestep' rounds; got True with unit 'fraction'"),
    ({"exact": 1, "unit": "timestep", "window": (0, 9)}, "exact is True or False, .* got 1 with unit 'timestep'"),
    ({"at": (1,)}, "explicit steps `at` need unit='step' or unit='timestep', got 'fraction'"),
    (
        {"at": (1,), "window": (0, 9), **_STEP},
        r"take no window, got at=\(1,\) with window \(0, 9\); leave one of the two out",
    ),
]


@pytest.mark.parametrize(("values", "message"), BAD_RULES, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_a_bad_rule_is_refused_in_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Broadcast(**{"range": 2, **values})
    assert "\n" not in str(error.value)


_RULE = Broadcast(2)
BAD_CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"spatial": 0}, "range must be a whole number of at least 1, got 0"),
    ({"cross": 2.0}, "cross must be a Broadcast, a range or None, got 2.0"),
    ({"mlp": True}, "mlp must be a Broadcast, a range or None, got True"),
    ({"block": {"range": 2}}, "block must be a Broadcast, a range or None, got {"),
    (
        {"cache_dtype": "bfloat16"},
        "cache_dtype 'bfloat16' is not known; supported are None, 'float8_e4m3fn', 'int8', 'int4'",
    ),
    (
        {"cache_point": "gated"},
        "cache_point 'gated' is not known; supported are 'pre_gate', 'post_gate', 'unprojected'",
    ),
    ({"cache_point": None}, "cache_point None is not known"),
    ({"rules": None}, r"rules must be a list of \(kind, Broadcast\) pairs, got None"),
    ({"rules": 5}, "pairs, got 5"),
    ({"rules": ("spatial", _RULE)}, "pairs, got 'spatial'"),
    ({"rules": (("spatial", 2),)}, r"rules must be \(kind, Broadcast\) pairs, got \('spatial', 2\)"),
    ({"rules": (("spatial",),)}, "pairs, got"),
    ({"rules": (_RULE,)}, "pairs, got Broadcast"),
    (
        {"rules": (("self", _RULE),)},
        "kind 'self' is not known; supported are 'spatial', 'temporal', 'cross', 'mlp', 'block'",
    ),
    ({"rules": ((None, _RULE),)}, "kind None is not known"),
]


@pytest.mark.parametrize(("values", "message"), BAD_CONFIGS, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_a_bad_config_is_refused_in_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        PABConfig(**values)
    assert "\n" not in str(error.value)


BAD_DICTS: list[tuple[Any, str]] = [
    ({"spatail": 2}, "PABConfig has no field 'spatail'; it has spatial, temporal, cross"),
    ({"spatial": {"range": 2, "windows": [0, 1]}}, "Broadcast has no field 'windows'; it has range, window, unit"),
    ({"spatial": {"window": [0, 1]}}, "range must be a whole number of at least 1, got None"),
    ({"model": {"range": 2, "layers": [0]}}, r"the model is one whole, got layers \(0,\); leave layers out"),
    (
        {"spatial": {"range": 2, "reuse": "forecast"}},
        "spatial takes reuse='hold' or 'linear', got 'forecast', which is",
    ),
    ({"spatial": [2]}, r"spatial must be a Broadcast, a range or None, got \[2\]"),
    ({"rules": None}, "rules must be a list of .* got None"),
    ({"rules": [["mlp"]]}, r"pairs, got \['mlp'\]"),
    ({"rules": [["mlp", 2]]}, r"pairs, got \['mlp', 2\]"),
    ({"rules": [["mlp", {"range": 2, "x": 1}]]}, "Broadcast has no field 'x'"),
    ({1: 2}, "PABConfig has no field 1"),
    ([2], r"PABConfig is read from a dict, got \[2\]"),
]


@pytest.mark.parametrize(("data", "message"), BAD_DICTS, ids=lambda v: str(v) if not isinstance(v, str) else "")
def test_a_bad_dict_is_refused_in_one_line(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        PABConfig.from_dict(data)
    assert "\n" not in str(error.value)


ENDLESS: list[tuple[Callable[[], Any], str]] = [
    (
        lambda: Broadcast(2, layers=range(10**9)),
        "layers lists at most 4,096 numbers, got range(0, 1000000000); leave it out for all",
    ),
    (lambda: Broadcast(2, layers=itertools.count()), "layers lists at most 4,096 numbers, got count("),
    (
        lambda: Broadcast(2, unit="step", at=itertools.repeat(0)),
        "at lists at most 10,000 numbers, got repeat(0); leave it out for a",
    ),
    (lambda: Broadcast(2, unit="step", at=range(10_001)), "at lists at most 10,000 numbers, got range(0, 10001)"),
    (
        lambda: Broadcast(2, unit="timestep", at=[10**30]),
        "at must be at most 2**63 - 1, got 1000000000000000000000000000000",
    ),
    (lambda: Broadcast(2, layers=[3, 2**63]), "layers must be at most 2**63 - 1, got (3, 9223372036854775808)"),
    (lambda: Broadcast(10**6000), "range must be at most 2**63 - 1, got a number of very many digits"),
    (lambda: Broadcast(-(10**6000)), "range must be a whole number of at least 1, got a number of very many digits"),
    (lambda: Broadcast(2, itertools.count()), "window must be a pair (lo, hi), got count("),
    (lambda: Broadcast(2, (0, math.inf), "step"), "a window's ends must be at most 2**63 - 1, got (0, inf)"),
    (lambda: Broadcast(2, (-math.inf, 5), "timestep"), "a window's ends must be at most 2**63 - 1, got (-inf, 5)"),
    (lambda: Broadcast(2, (0, math.nan), "step"), "window must be two numbers with lo < hi, got (0, nan)"),
    (lambda: PABConfig(spatial=[[7] * 10**6] * 10**6), "spatial must be a Broadcast, a range or None, got [[7, 7, 7"),
    (lambda: Schedule.of(10**30), "num_steps must be at most 10,000, got 1000000000000000000000000000000"),
    (lambda: Schedule.of(10**6000), "num_steps must be at most 10,000, got a number of very many digits"),
    (lambda: Schedule.of(timesteps=itertools.count()), "the number of timesteps must be at most 10,000, got 10001"),
    (lambda: Schedule.of(timesteps=[10**400]), "timesteps must be a sequence of finite numbers, got [1000000"),
]


@pytest.mark.parametrize(("make", "message"), ENDLESS, ids=[message for _, message in ENDLESS])
def test_what_has_no_end_is_refused_at_once_in_one_short_line(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}[^\n]*$") as error:
        make()
    assert len(str(error.value)) < 400


def test_layers_may_be_given_by_anything_that_lists_them() -> None:
    rule = Broadcast(2, layers=(1, 3, 5))
    assert Broadcast(2, layers=range(1, 6, 2)) == Broadcast(2, layers=(i for i in (5, 3, 1, 3))) == rule
    assert pickle.loads(pickle.dumps(rule)) == rule and [i for i in range(7) if rule.applies_to(i)] == [1, 3, 5]


def test_the_longest_lists_and_schedules_are_served() -> None:
    rule = Broadcast(2, unit="timestep", at=range(10_000), layers=range(4096))
    assert len(rule.points(Schedule.of(timesteps=range(9_999, -1, -1)))) == 10_000 and rule.applies_to(4095)
    assert len(Broadcast(3, (0, 1)).reused(Schedule.of(10_000))) == 6_666


def test_an_unknown_kind_has_no_rule() -> None:
    with pytest.raises(ValueError, match="kind 'self' is not known"):
        PABConfig().rule("self", 0)


def test_rules_cannot_be_changed_in_place() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Broadcast(2).range = 3  # type: ignore[misc]


# The schedule

BAD_SCHEDULES: list[tuple[dict[str, Any], str]] = [
    ({}, "a plan needs num_steps= or timesteps=; got neither"),
    ({"num_steps": 0}, "num_steps must be a whole number of at least 1, got 0"),
    ({"num_steps": -1}, "at least 1, got -1"),
    ({"num_steps": 3.0}, "got 3.0"),
    ({"num_steps": True}, "got True"),
    ({"num_steps": 3, "timesteps": [3, 2]}, "num_steps=3 does not fit 2 timesteps; pass one of the two"),
    ({"timesteps": []}, r"timesteps must be a sequence of finite numbers, got \[\]"),
    ({"timesteps": [[1.0], [2.0]]}, "sequence of finite numbers, got"),
    ({"timesteps": 7}, "sequence of finite numbers, got 7"),
    ({"timesteps": "ab"}, "sequence of finite numbers, got 'ab'"),
    ({"timesteps": [5, float("nan")]}, "sequence of finite numbers, got"),
    ({"timesteps": [float("inf"), 5]}, "sequence of finite numbers, got"),
    ({"num_steps": 4, "begin": 4}, r"begin must be a whole number in 0\.\.3, got 4"),
    ({"num_steps": 4, "begin": -1}, "got -1"),
    ({"num_steps": 4, "begin": 1.0}, "got 1.0"),
    ({"num_steps": 4, "end": 0}, r"end must be a whole number in 1\.\.4, got 0"),
    ({"num_steps": 4, "end": 5}, "got 5"),
    ({"num_steps": 4, "end": 2.0}, "got 2.0"),
    ({"num_steps": 4, "end": True}, "got True"),
    ({"num_steps": 4, "end": 2, "begin": 2}, r"begin must be a whole number in 0\.\.1, got 2"),
]


@pytest.mark.parametrize(("values", "message"), BAD_SCHEDULES, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_a_bad_schedule_is_refused_in_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Schedule.of(**values)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("rule", [Broadcast(2, (100, 800), "timestep"), Broadcast(2, unit="timestep", at=[500])])
def test_a_rule_in_timesteps_says_that_it_needs_them(rule: Broadcast) -> None:
    named = r"\(100, 800\)" if rule.window else re.escape("at=(500,)")
    with pytest.raises(
        ValueError, match=f"{named}.* only num_steps=10 is known; pass timesteps=, or a window in fractions"
    ):
        rule.reused(Schedule(10))


def test_a_window_in_timesteps_may_begin_below_0_to_take_timestep_0_in() -> None:
    schedule = Schedule(4, (900.0, 600.0, 300.0, 0.0))
    assert Broadcast(4, (-1, 1000), "timestep").reused(schedule) == {1, 2, 3}
    assert Broadcast(4, (0, 1000), "timestep").reused(schedule) == {1, 2}


def test_timesteps_may_be_anything_in_a_row() -> None:
    import numpy as np
    import torch

    expected = Schedule(3, (30.0, 20.0, 10.0))
    for row in (
        [30, 20, 10],
        range(30, 0, -10),
        np.array([30, 20, 10]),
        torch.tensor([30, 20, 10]),
        list(torch.tensor([30.0, 20, 10])),
    ):
        assert Schedule.of(timesteps=row) == expected
        assert Schedule.of(3, row) == expected
