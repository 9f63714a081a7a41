"""Plans within a budget, against what they have to keep."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pab_kernels.rules.budget import BudgetTooSmall, GivenUp, parsed
from pab_kernels.rules.config import MODULE_KINDS, Broadcast, CachePoint, PABConfig
from pab_kernels.rules.costs import Cost
from pab_kernels.rules.forecast import peak_bytes
from pab_kernels.rules.plan import Plan, Sublayer
from pab_kernels.rules.schedule import Schedule
from pab_kernels.rules.within_budget import within
from tests.rules.random_plans import plans

Costs = dict[str | None, dict[str, Cost]]


def costs_of(plan: Plan, sizes: dict[str, int], flops: dict[str, int]) -> Costs:
    """Slots of `sizes`, and of half of it in 8 bits."""
    own = {s.name: Cost(flops[s.name], 2 * sizes[s.name]) for s in plan.sublayers}
    eight = {name: replace(cost, slot_bytes=cost.slot_bytes // 2) for name, cost in own.items()}
    return {None: own, "int8": eight, "float8_e4m3fn": eight}


@st.composite
def costed(draw: st.DrawFn) -> tuple[Plan, Costs]:
    plan = draw(plans())
    names = [s.name for s in plan.sublayers]
    sizes, flops = ({name: draw(st.integers(1, most)) for name in names} for most in (9, 99))
    cache_dtype, cache_device = draw(st.sampled_from([None, "int8"])), draw(st.sampled_from([None, "cpu"]))
    cache_point = draw(st.sampled_from(get_args(CachePoint)))
    where = {"cache_device": cache_device, "cache_point": cache_point}
    config = replace(plan.config, cache_dtype=cache_dtype, **where)
    if draw(st.booleans()):  # all kinds are reused at the same steps
        same = draw(st.sampled_from([Broadcast(2, (0, 1)), Broadcast(3, (0, 1), reuse="linear")]))
        config = replace(config, **dict.fromkeys(MODULE_KINDS[:-1], same), rules=(), cache_point="post_gate")
    plan = replace(plan, config=config)
    return plan, costs_of(plan, sizes, flops)


def in_rows(plan: Plan) -> dict[str, str]:
    """What follows if every block follows the one before it, and so does every sublayer in a block."""
    around = {s.block for s in plan.sublayers if s.block is not None}
    chains = [[s.name for s in plan.sublayers if s.block == block] for block in sorted(around)]
    chains.append([s.name for s in plan.sublayers if s.kind == "block"])
    return {one: other for chain in chains for one, other in itertools.pairwise(chain)}


@settings(max_examples=150, deadline=None)
@given(costed(), st.integers(1, 3), st.integers(0, 5), st.floats(0.001, 1.2), st.booleans(), st.booleans())
def test_a_plan_fits_its_budget_or_the_error_has_the_smallest(
    case: tuple[Plan, Costs], contexts: int, latents: int, share: float, fixed: bool, shares: bool
) -> None:
    plan, costs = case
    follows = in_rows(plan) if shares else {}
    options = {"contexts": contexts, "latents_bytes": latents, "fixed": fixed}
    whole = peak_bytes(replace(plan, given_up=GivenUp(0, 0)), costs, **options)
    budget = max(1, int(share * whole))
    try:
        found = within(plan, costs, budget, **options, follows=follows)
    except BudgetTooSmall as error:
        assert budget < error.smallest <= whole
        found = within(plan, costs, error.smallest, **options, follows=follows)
        assert found.given_up is not None and found.given_up.peak == error.smallest
        with pytest.raises(BudgetTooSmall, match=f"{error.smallest} bytes"):
            within(plan, costs, error.smallest - 1, **options, follows=follows)
        return
    given_up = found.given_up
    assert given_up is not None and given_up.peak == peak_bytes(found, costs, **options) <= budget
    assert found == within(plan, costs, budget, **options, follows=follows)
    reused = {name for name, row in found.rows.items() if any(d.reads for d in row)}
    assert not reused & set(given_up.computed) and set(given_up.fewer_bits) <= reused
    if whole <= budget:
        assert not (given_up.computed or given_up.fewer_bits or given_up.on_host or given_up.spans)
    elif whole:
        assert reused and (given_up.computed or given_up.fewer_bits or given_up.on_host or given_up.spans)
    kinds_of = {s.name: s.kind for s in plan.sublayers}
    for span in given_up.spans:
        assert all(follows[one] == other for one, other in itertools.pairwise(span))
        assert len({(found.rows[name], found.outputs(name)) for name in span}) == 1 and reused.issuperset(span)
        assert plan.config.cache_point == "post_gate" or {kinds_of[name] for name in span} == {"block"}
    for name, row in found.rows.items():  # the rest is as it was
        inside = next(s.block for s in plan.sublayers if s.name == name) in given_up.computed
        assert row == plan.rows[name] or name in given_up.computed or inside


SUBLAYERS = tuple(
    Sublayer(f"blocks.{layer}.{kind}", kind, layer) for layer in range(3) for kind in ("spatial", "cross", "mlp")
)
EVERY_SECOND = Broadcast(2, (0, 1))
PLAN = Plan(PABConfig(EVERY_SECOND, cross=Broadcast(4, (0, 1)), mlp=EVERY_SECOND), Schedule(8), SUBLAYERS)
SIZES = {s.name: 100 for s in SUBLAYERS}
FLOPS = {s.name: {"spatial": 50, "cross": 1, "mlp": 100}[s.kind] for s in SUBLAYERS}
COSTS = costs_of(PLAN, SIZES, FLOPS)


def kinds(plan: Plan, names: tuple[str, ...]) -> list[str]:
    return sorted(next(s.kind for s in plan.sublayers if s.name == name) for name in names)


@pytest.mark.parametrize(
    ("budget", "fewer_bits", "computed"),
    [
        (1800, [], []),
        (1799, ["cross"], []),
        (1300, ["cross"] * 3 + ["spatial"] * 2, []),
        (900, ["cross"] * 3 + ["mlp"] * 3 + ["spatial"] * 3, []),
        (899, ["cross"] * 2 + ["mlp"] * 3 + ["spatial"] * 3, ["cross"]),
        (600, ["mlp"] * 3 + ["spatial"] * 3, ["cross"] * 3),
        (550, ["mlp"] * 3 + ["spatial"] * 2, ["cross"] * 3 + ["spatial"]),
        (100, ["mlp"], ["cross"] * 3 + ["mlp"] * 2 + ["spatial"] * 3),
    ],
)
def test_what_saves_least_for_its_bytes_goes_first(budget: int, fewer_bits: list[str], computed: list[str]) -> None:
    found = within(PLAN, COSTS, budget).given_up
    assert found is not None
    assert (kinds(PLAN, found.fewer_bits), kinds(PLAN, found.computed)) == (fewer_bits, computed)


def test_measured_seconds_count_in_place_of_flops() -> None:
    seconds = {"cross": 9.0, "mlp": 1.0, "spatial": 5.0}
    found = within(PLAN, COSTS, 899, seconds=seconds).given_up
    assert found is not None
    assert (kinds(PLAN, found.computed), set(kinds(PLAN, found.fewer_bits))) == (["mlp"], {"cross", "mlp", "spatial"})
    del seconds["cross"]  # which is reused
    assert within(PLAN, COSTS, 899, seconds=seconds) == within(PLAN, COSTS, 899)


def test_what_is_left_free_makes_slots_whole_again() -> None:
    plan = replace(PLAN, config=PABConfig(EVERY_SECOND, cross=Broadcast(4, (0, 1))))
    costs = costs_of(plan, SIZES | {f"blocks.{i}.cross": 1000 for i in range(3)}, FLOPS)
    found = within(plan, costs, 999).given_up  # of 6,600 and, in 8 bits, 3,300
    assert found is not None and (found.fewer_bits, found.peak) == ((), 600)
    assert kinds(plan, found.computed) == ["cross"] * 3


def test_slots_that_have_8_bits_are_computed_instead() -> None:
    plan = replace(PLAN, config=replace(PLAN.config, cache_dtype="float8_e4m3fn"))
    found = within(plan, COSTS, 899).given_up
    assert found is not None and not found.fewer_bits and kinds(plan, found.computed) == ["cross"]


def in_blocks(layers: int, size: int) -> tuple[Plan, Costs]:
    """Blocks with slots of a size, of sublayers of which the spatial ones are reused too."""
    sublayers = [replace(s, block=f"blocks.{s.layer}") for s in SUBLAYERS if s.layer < layers]
    blocks = [Sublayer(f"blocks.{i}", "block", i) for i in range(layers)]
    plan = Plan(PABConfig(spatial=EVERY_SECOND, block=Broadcast(3, (0, 1))), Schedule(8), (*sublayers, *blocks))
    return plan, costs_of(plan, SIZES | {s.name: size for s in blocks}, FLOPS | {s.name: 1 for s in blocks})


def test_with_a_block_its_sublayers_are_computed() -> None:
    found = within(*in_blocks(3, 100), 100)
    assert found.given_up is not None and found.given_up.peak == 100
    assert sum(any(d.reads for d in row) for row in found.rows.values()) == 1


def test_what_is_computed_with_its_block_has_no_slot() -> None:
    found = within(*in_blocks(2, 3000), 3150).given_up
    assert found is not None and found.computed and not set(found.fewer_bits) & set(found.computed)


def test_a_plan_that_computes_all_blocks_is_none() -> None:
    with pytest.raises(BudgetTooSmall, match="3100 bytes"):
        within(*in_blocks(1, 3000), 3099)


def test_the_smallest_budget_of_the_error_fits_where_a_computed_block_splits_a_span() -> None:
    blocks = tuple(Sublayer(f"blocks.{i}", "block", i) for i in range(4))
    plan = Plan(PABConfig(block=EVERY_SECOND), Schedule(4), blocks)
    names = [s.name for s in blocks]
    costs = costs_of(plan, dict(zip(names, (2, 2, 1, 9), strict=True)), dict(zip(names, (9, 9, 5, 2), strict=True)))
    follows = dict(zip(names, names[1:], strict=False))
    with pytest.raises(BudgetTooSmall) as raised:
        within(plan, costs, 0, follows=follows)
    found = within(plan, costs, raised.value.smallest, follows=follows).given_up
    assert found is not None and found.peak == raised.value.smallest


def test_sublayers_that_share_a_slot_are_given_up_together() -> None:
    rules = dict.fromkeys(("spatial", "cross", "mlp"), EVERY_SECOND)
    sublayers = tuple(replace(s, block=f"blocks.{s.layer}", how="fused") for s in SUBLAYERS)
    plan = Plan(PABConfig(**rules, cache_point="post_gate"), Schedule(8), sublayers)
    costs, follows = costs_of(plan, SIZES, FLOPS), in_rows(plan)
    found = within(plan, costs, 1799, follows=follows)
    shared, moved = found.given_up, found.forecast(costs[None]).moved_bytes
    assert 3 * moved == plan.forecast(costs[None]).moved_bytes  # one slot is read instead of three
    assert shared is not None and [len(span) for span in shared.spans] == [3, 3, 3]
    assert (shared.peak, shared.fewer_bits, shared.computed) == (600, (), ())
    eight = within(plan, costs, 599, follows=follows)
    assert eight.given_up is not None and eight.given_up.fewer_bits == ("blocks.0.mlp",)
    fewest = within(plan, costs, 299, follows=follows).given_up
    assert fewest is not None and fewest.computed == tuple(f"blocks.0.{kind}" for kind in rules)
    assert "9 sublayers share 3 slot(s); 1 of 3 mlp kept in int8" in str(eight)


def test_what_was_given_up_is_printed_and_a_kept_rule_is_not_a_note() -> None:
    text = str(within(PLAN, COSTS, 600))
    assert "budget 600 B, 600 B at the peak: 3 of 3 spatial, 3 of 3 mlp kept in int8; 3 of 3 cross computed" in text
    assert "budget 1.95 KiB, 1.76 KiB at the peak: nothing is given up" in str(within(PLAN, COSTS, 2000))


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (1, 1),
        (2.0, 2),
        (0.5, 0.5),
        ("50%", 0.5),
        ("12.5 %", 0.125),
        ("8GiB", 2**33),
        ("1.5 mib", 3 * 2**19),
        ("800MB", 800 * 10**6),
        ("3 b", 3),
        ("2TB", 2 * 10**12),
    ],
)
def test_a_budget_is_bytes_or_a_share(given: int | float | str, found: int | float) -> None:
    assert parsed(given) == found and type(parsed(given)) is type(found)
    config = PABConfig(spatial=2, budget=given)
    assert config.budget == found and PABConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    "given", [0, -1, 1.5, "0GiB", "100%", "8", "GiB", "8 GiBs", True, "1e3MB", float("nan"), float("inf"), 10**400]
)
def test_other_budgets_are_refused(given: object) -> None:
    with pytest.raises(ValueError, match="supported are a number of bytes"):
        PABConfig(budget=given)  # type: ignore[arg-type]
