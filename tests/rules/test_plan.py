"""The plan against a simulation written from the definition."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pab_kernels.rules.config import Broadcast, PABConfig
from pab_kernels.rules.costs import Cost
from pab_kernels.rules.plan import Action, Decision, Plan, Sublayer, plan
from pab_kernels.rules.schedule import Schedule
from tests.rules.random_plans import plans

COMPUTE, STORE, REUSE, SKIP = Action.COMPUTE, Action.STORE, Action.REUSE, Action.SKIP

_any_plan = settings(max_examples=40)


@dataclass
class _Run:
    """What a sublayer did at each step, found out by running through the steps once."""

    actions: list[str] = field(default_factory=list)
    reads: list[tuple[int, ...]] = field(default_factory=list)
    """The steps whose outputs are read, the newest first."""


def _wants_reuse(rule: Broadcast | None, schedule: Schedule, step: int, before: list[int]) -> bool:
    """Whether a rule reuses at a step, which counts after those in `before`."""
    if rule is None:
        return False
    n = schedule.num_steps
    coordinate = {"step": step, "timestep": int((schedule.timesteps or ())[step]), "fraction": step / n}[rule.unit]
    if rule.at is None:
        lo, hi = rule.window or (0, 0)
        inside = lo < coordinate < hi if rule.unit == "timestep" else lo <= coordinate < hi
        return inside and len(before) % rule.range != 0
    position = {i: i if rule.unit == "step" else int((schedule.timesteps or ())[i]) for i in (*before, step)}
    passed = [count for count, i in enumerate(position) if position[i] in rule.at]
    return bool(passed) and 0 < len(before) - passed[-1] < rule.range


def _simulate(made: Plan) -> dict[str, _Run]:
    runs = {s.name: _Run() for s in made.sublayers}
    ran: dict[str, list[int]] = {s.name: [] for s in made.sublayers}
    every: list[int] = []
    running: list[int] = []  # steps at which the model runs
    for step in range(made.schedule.begin, made.schedule.num_steps):
        skipped = False
        for s in sorted(
            made.sublayers, key=lambda s: ["model", "block"].index(s.kind) if s.kind in ("model", "block") else 2
        ):
            rule = made.config.rule(s.kind, s.layer)
            run = runs[s.name]
            before = every if s.kind == "model" else running
            if skipped or (s.block in runs and runs[s.block].actions[-1] == "reuse"):
                did, reads = "skip", []
            elif ran[s.name] and _wants_reuse(rule, made.schedule, step, before):
                outputs = 2 if rule and rule.reuse == "linear" else 1
                did, reads = "reuse", ran[s.name][: -outputs - 1 : -1]
            else:
                did, reads = "compute", []
                ran[s.name].append(step)
            run.actions.append(did)
            run.reads.append(tuple(reads))
            skipped = skipped or (s.kind == "model" and did == "reuse")
        every.append(step)
        running += [] if skipped else [step]
    return runs


@given(plans())
@_any_plan
def test_actions_and_sources_are_those_of_the_definition(made: Plan) -> None:
    for name, run in _simulate(made).items():
        row = made.rows[name]
        names = {COMPUTE: "compute", STORE: "compute", REUSE: "reuse", SKIP: "skip"}
        assert [names[d.action] for d in row] == run.actions
        assert [d.reads for d in row] == run.reads


@given(plans())
@_any_plan
def test_every_source_is_an_earlier_store_with_no_run_in_between(made: Plan) -> None:
    for name in made.rows:
        for step in made.steps:
            d = made.decision(name, step)
            if d.action is not REUSE:
                assert d.reads == ()
                continue
            assert d.reads and made.schedule.begin <= d.reads[0] < step
            for read, until in zip(d.reads, (step, *d.reads), strict=False):
                assert made.decision(name, read).action is STORE
                assert all(made.decision(name, i).action in (REUSE, SKIP) for i in range(read + 1, until))


@given(plans())
@_any_plan
def test_an_output_is_stored_iff_a_later_step_reads_it(made: Plan) -> None:
    for name, row in made.rows.items():
        readers: dict[int, list[int]] = {}
        for step in made.steps:
            d = made.decision(name, step)
            for read in d.reads:
                readers.setdefault(read, []).append(step)
        assert {step for step in made.steps if made.decision(name, step).action is STORE} == set(readers)
        assert row[0].action in (COMPUTE, STORE), "the first step has nothing to reuse"


@given(plans())
@_any_plan
def test_a_sublayer_is_skipped_exactly_under_a_reused_block_or_model(made: Plan) -> None:
    for s in made.sublayers:
        around = [name for name in (s.block, made.whole) if name in made.rows and name != s.name]
        for step in made.steps:
            reused = any(made.decision(name, step).action is REUSE for name in around if name is not None)
            assert (made.decision(s.name, step).action is SKIP) is reused


@given(plans())
@_any_plan
def test_slots_live_from_the_store_to_the_last_read(made: Plan) -> None:
    for step in made.steps:
        for name in made.rows:
            kept = {read for i in made.steps if i > step for read in made.decision(name, i).reads if read <= step}
            assert made.decision(name, step).held == len(kept) <= 2
            computed = [i for i in made.steps if i <= step and made.decision(name, i).action in (COMPUTE, STORE)]
            assert not kept or sorted(kept) == computed[-len(kept) :], "the newest ones"
    assert not any(d.held for d in made.decisions(made.schedule.num_steps - 1)), "nothing outlives the generation"


@given(plans())
@_any_plan
def test_counts_add_up_to_all_cells(made: Plan) -> None:
    runs = _simulate(made)
    for kind, c in made.counts().items():
        actions = [a for s in made.sublayers if s.kind == kind for a in runs[s.name].actions]
        assert (c.computed, c.reused, c.skipped) == tuple(actions.count(a) for a in ("compute", "reuse", "skip"))
        assert c.stored == sum(
            len({i for reads in runs[s.name].reads for i in reads}) for s in made.sublayers if s.kind == kind
        )
        steps = made.step_counts()[kind]
        assert steps.computed + steps.reused + steps.skipped == len(made.steps)
        assert steps.reused == max(runs[s.name].actions.count("reuse") for s in made.sublayers if s.kind == kind)
    assert set(made.counts()) == {s.kind for s in made.sublayers}


@given(plans())
@_any_plan
def test_patterns_are_the_distinct_columns(made: Plan) -> None:
    columns = set()
    for step in made.steps:
        if made.whole is not None and made.decision(made.whole, step).reads:
            continue  # nothing runs
        cells = [made.decision(s.name, step) for s in made.sublayers if s.name != made.whole]
        columns.add("".join("/" if len(d.reads) > 1 else d.action.value for d in cells))
    assert made.patterns == len(columns)


@given(plans(), st.integers(0, 100))
@_any_plan
def test_the_forecast_is_what_a_simulation_adds_up(made: Plan, rest: int) -> None:
    costs = {s.name: Cost(0 if s.kind == "block" else 7 * i + 1, 3**i) for i, s in enumerate(made.sublayers)}
    runs = _simulate(made)
    flops, held, held_after, held_most = [], dict.fromkeys(runs, 0), [], 0
    for column, step in enumerate(made.steps):
        ran = [name for name, run in runs.items() if run.actions[column] == "compute"]
        skipped = made.whole is not None and made.whole not in ran
        flops.append(0 if skipped else rest + sum(costs[name].flops for name in ran))
        for name, run in runs.items():
            held[name] = sum(i <= step for i in {i for reads in run.reads[column + 1 :] for i in reads})
            held_most = max(held_most, sum(costs[n].slot_bytes * count for n, count in held.items()))
        held_after.append(sum(costs[n].slot_bytes * count for n, count in held.items()))
    forecast = made.forecast(costs, rest)
    assert forecast.flops_by_step == tuple(flops)
    assert forecast.flops == sum(flops)
    assert forecast.flops_without == len(made.steps) * (rest + sum(c.flops for c in costs.values()))
    assert forecast.cache_bytes == tuple(held_after)
    assert forecast.peak_cache_bytes == held_most
    assert forecast.share == (forecast.flops / forecast.flops_without if forecast.flops_without else 1)


@given(plans())
@settings(max_examples=20)
def test_plans_made_twice_are_equal_and_can_be_copied_and_pickled(made: Plan) -> None:
    config = PABConfig.from_dict(json.loads(json.dumps(made.config.to_dict())))
    again = Plan(config, made.schedule, made.sublayers)
    for other in (again, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert other == made and other.rows == made.rows and str(other) == str(made) and other.notes == made.notes


@given(plans())
@settings(max_examples=30)
def test_the_drawing_shows_every_row_once_and_its_counts(made: Plan) -> None:
    head, *lines = str(made).split("\n")
    assert head.startswith(f"{made.schedule.num_steps} steps")
    rows = {(s.kind, made.rows[s.name]) for s in made.sublayers}
    drawn = [line for line in lines if not line.startswith("note: ")]
    assert len(drawn) == len(rows) == len(made.grouped())
    marks = {"".join(d.action.value for d in row) for _, row in rows}
    width = max(len(label) for label, _ in made.grouped())
    assert {line[width + 1 : width + 1 + len(made.steps)] for line in drawn} == marks
    assert [line[6:] for line in lines if line.startswith("note: ")] == list(made.notes)


# Single cases


def test_range_one_computes_always_and_stores_nothing() -> None:
    made = plan(
        PABConfig(spatial=1, temporal=Broadcast(1, (0, 1)), cross=Broadcast(1, unit="step", at=[2])), num_steps=9
    )
    assert {d for row in made.rows.values() for d in row} == {Decision(COMPUTE)}
    assert made.patterns == 1
    assert made.notes == ()


def test_a_store_may_come_before_the_window_opens() -> None:
    row = plan(PABConfig(cross=Broadcast(6, (7, 9), "step")), num_steps=10).rows["cross"]
    assert [d.action.value for d in row] == list("######S..#")
    assert row[7] == Decision(REUSE, (6,), held=1) and row[8] == Decision(REUSE, (6,), held=0)


def test_a_window_that_holds_the_first_step_does_not_reuse_it() -> None:
    made = plan(PABConfig(spatial=Broadcast(2, (0, 1))), num_steps=5)
    assert "".join(d.action.value for d in made.rows["spatial"]) == "S.S.#"
    alone = plan(PABConfig(spatial=Broadcast(2, (0, 1))), num_steps=1)
    assert alone.rows["spatial"] == (Decision(COMPUTE),)


def test_entered_in_the_middle_the_range_counts_from_there_and_the_window_from_the_full_schedule() -> None:
    made = Plan(PABConfig(spatial=3), Schedule(20, begin=9))
    assert list(made.steps) == list(range(9, 20))
    assert "".join(d.action.value for d in made.rows["spatial"]) == "S..S..S.###"
    assert made.decision("spatial", 10) == Decision(REUSE, (9,), held=1)
    assert str(made).startswith("20 steps, entered at 9, ")


def test_a_slot_is_kept_across_steps_at_which_the_block_around_it_is_reused() -> None:
    sublayers = (Sublayer("b.attn", "spatial", 0, block="b"), Sublayer("b", "block", 0))
    config = PABConfig(spatial=Broadcast(4, (0, 7), "step"), block=Broadcast(3, (1, 6), "step"))
    made = Plan(config, Schedule(8), sublayers)
    assert "".join(d.action.value for d in made.rows["b"]) == "S..S..##"
    assert "".join(d.action.value for d in made.rows["b.attn"]) == "S  .  .#"
    assert [made.decision("b.attn", step) for step in (3, 6)] == [
        Decision(REUSE, (0,), held=1),
        Decision(REUSE, (0,), held=0),
    ]
    assert [[d.held for d in made.decisions(step)] for step in (4, 5, 6)] == [[1, 1], [1, 0], [0, 0]]


def test_a_block_without_a_rule_is_left_out_and_its_sublayers_go_their_own_way() -> None:
    sublayers = tuple(
        Sublayer(f"b{i}{end}", kind, i, block=f"b{i}")
        for i in (0, 1)
        for end, kind in ((".attn", "spatial"), ("", "block"))
    )
    made = Plan(PABConfig(spatial=2, block=Broadcast(2, layers=[1])), Schedule(10), sublayers)
    assert set(made.rows) == {"b0.attn", "b1.attn", "b1"}
    assert any(d.action is REUSE for d in made.rows["b0.attn"])
    assert any(d.action is SKIP for d in made.rows["b1.attn"])


def test_two_sublayers_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sublayer names must differ, got \['a', 'a'\]"):
        Plan(PABConfig(), Schedule(3), (Sublayer("a", "spatial", 0), Sublayer("a", "cross", 0)))


def _table(rule: Broadcast, schedule: Schedule) -> str:
    """A line a step: mark, source, previous, outputs held afterwards."""
    made = Plan(PABConfig(cross=rule), schedule)
    lines = []
    for step in made.steps:
        d = made.decision("cross", step)
        reads = " ".join(map(str, (*d.reads, "-", "-")[:2]))
        lines.append(f"{step} {d.action.value} {reads} {d.held}")
    return "\n".join(lines)


def test_a_linear_row_keeps_the_two_outputs_that_its_reuses_read() -> None:
    rule = Broadcast(3, (4, 9), "step", "linear")
    assert _table(rule, Schedule(12)).split("\n") == [
        "0 # - - 0",
        "1 # - - 0",
        "2 S - - 1",
        "3 S - - 2",
        "4 . 3 2 2",
        "5 . 3 2 1",
        "6 S - - 2",
        "7 . 6 3 2",
        "8 . 6 3 0",
        "9 # - - 0",
        "10 # - - 0",
        "11 # - - 0",
    ]


def test_a_linear_row_without_anything_before_its_source_holds() -> None:
    assert _table(Broadcast(3, (0, 1), reuse="linear"), Schedule(5, begin=0)).split("\n") == [
        "0 S - - 1",
        "1 . 0 - 1",
        "2 . 0 - 1",
        "3 S - - 2",
        "4 . 3 0 0",
    ]
    entered = _table(Broadcast(2, (0, 1), reuse="linear"), Schedule(9, begin=5)).split("\n")
    assert entered == ["5 S - - 1", "6 . 5 - 1", "7 S - - 2", "8 . 7 5 0"]


def test_a_linear_output_is_let_go_between_two_stretches_of_reuse() -> None:
    rows = _table(Broadcast(2, unit="step", reuse="linear", at=[1, 5]), Schedule(8)).split("\n")
    assert [row.split()[1] + row.split()[-1] for row in rows] == ["S1", "S2", ".0", "#0", "S1", "S2", ".0", "#0"]


def test_a_line_reaches_over_steps_at_which_the_block_is_reused() -> None:
    sublayers = (Sublayer("b.attn", "spatial", 0, block="b"), Sublayer("b", "block", 0))
    config = PABConfig(spatial=Broadcast(4, (4, 9), "step", "linear"), block=Broadcast(3, (1, 9), "step"))
    made = Plan(config, Schedule(10), sublayers)
    assert "".join(d.action.value for d in made.rows["b.attn"]) == "S  S  .  #"
    assert made.decision("b.attn", 6) == Decision(REUSE, (3, 0), held=0)
    assert [made.decision("b.attn", step).held for step in made.steps] == [1, 1, 1, 2, 2, 2, 0, 0, 0, 0]
    assert [d.held for d in made.decisions(4)] == [2, 1]


def test_linear_of_range_one_stores_nothing() -> None:
    made = plan(PABConfig(spatial=Broadcast(1, (0, 1), reuse="linear")), num_steps=9)
    assert set(made.rows["spatial"]) == {Decision(COMPUTE)}


def test_reuses_of_one_and_of_two_outputs_are_two_patterns() -> None:
    rule = Broadcast(2, (0, 1))
    assert plan(PABConfig(spatial=rule), num_steps=6).patterns == 2
    assert plan(PABConfig(spatial=replace(rule, reuse="linear")), num_steps=6).patterns == 3


def test_a_plan_that_the_schedule_cannot_serve_is_refused_when_it_is_made() -> None:
    config = PABConfig(spatial=Broadcast(2, (100, 800), "timestep"))
    with pytest.raises(ValueError, match="pass timesteps=, or a window in fractions"):
        plan(config, num_steps=10)
    with pytest.raises(ValueError, match="a plan needs num_steps= or timesteps=; got neither"):
        plan(config)


def test_a_forecast_without_flops_has_share_one() -> None:
    assert plan(PABConfig(spatial=2), num_steps=6).forecast({"spatial": Cost(0, 8)}).share == 1


def test_the_generic_plan_has_a_sublayer_for_each_kind_and_for_each_listed_layer() -> None:
    made = plan(PABConfig(cross=6, mlp=Broadcast(3, layers=[0, 2])), num_steps=10)
    assert list(made.rows) == ["cross", "mlp.0", "mlp.2", "mlp.3"]
    assert [made.config.rule("mlp", s.layer) is None for s in made.sublayers[1:]] == [False, False, True]


def test_the_generic_plan_has_its_sublayers_inside_of_its_blocks() -> None:
    everywhere = plan(PABConfig(spatial=2, block=Broadcast(2, (0, 1))), num_steps=4)
    assert "".join(d.action.value for d in everywhere.rows["spatial"]) == "# # "
    made = plan(PABConfig(spatial=Broadcast(2, (0, 1)), block=Broadcast(2, (0, 1), layers=[1])), num_steps=4)
    assert {name: "".join(d.action.value for d in row) for name, row in made.rows.items()} == {
        "spatial.1": "# # ",
        "spatial.2": "S.S.",
        "block.1": "S.S.",
    }


# A schedule that is left before its end, as another model takes over


def test_a_plan_that_ends_early_is_the_beginning_of_the_whole_one_and_keeps_nothing_for_later() -> None:
    config = PABConfig(
        spatial=Broadcast(4, (0.2, 0.9)),
        temporal=Broadcast(3, unit="step", at=(2, 7)),
        cross=Broadcast(6, (0, 1000), "timestep"),
    )
    timesteps = tuple(float(t) for t in range(1000, 0, -100))
    whole = Plan(config, Schedule(10, timesteps))
    for end in range(1, 11):
        early = Plan(config, Schedule(10, timesteps, end=end))
        assert early.steps == range(end)
        for name, row in early.rows.items():
            assert [d.reads for d in row] == [d.reads for d in whole.rows[name][:end]]
            assert early.decision(name, end - 1).held == 0
            read = {i for d in row for i in d.reads}
            assert all(
                (d.action is Action.STORE) == (i in read) for i, d in enumerate(row) if d.action is not Action.REUSE
            )
    assert "10 steps, left at 5, " in str(Plan(config, Schedule(10, timesteps, end=5)))
    assert "left at" not in str(Plan(config, Schedule(10, timesteps, end=10)))
    assert Plan(config, Schedule(10, timesteps, begin=3, end=5)).steps == range(3, 5)


def test_host_memory_and_what_is_copied_follow_from_the_plan() -> None:
    """Two blocks of an attention each, reused at every second of four steps, in two branches."""
    sublayers = tuple(Sublayer(f"blocks.{i}.attn", "spatial", i) for i in range(2))
    config = PABConfig(Broadcast(2, (0, 1)), cache_device="cpu")
    costs = {s.name: Cost(30, 8) for s in sublayers}
    made = Plan(config, Schedule(4), sublayers)
    assert [made.on_host(s.name) for s in sublayers] == [True, True]
    found = made.forecast(costs, rest_flops=40, contexts=2)
    assert found.host_bytes == (32, 0, 32, 0) and found.peak_host_bytes == 32
    assert found.sent_bytes == (32, 0, 32, 0) and found.fetched_bytes == (0, 32, 0, 32)
    assert found.cache_bytes == (0, 0, 0, 0) and found.peak_cache_bytes == 16  # of two blocks, one call at a time
    assert found.host_bytes_by_kind == {"spatial": (32, 0, 32, 0)} and found.peak_by_kind == {"spatial": 32}
    # a step of 200 FLOPs takes 1 s at 200 a second, one of 80 takes 0.4 s, in which 32 bytes are copied
    assert found.least_step_seconds(32 / 0.4) == pytest.approx(1.0)
    on_device = Plan(PABConfig(Broadcast(2, (0, 1))), Schedule(4), sublayers).forecast(costs, 40, contexts=2)
    assert on_device.peak_host_bytes == 0 == on_device.least_step_seconds(1.0) and not on_device.host_bytes_by_kind
