"""Fitted weights: which reuses they are for, and what is reported where they are for none."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pab_kernels.rules.config import Broadcast, PABConfig
from pab_kernels.rules.fitted import FittedRow, FittedWeights
from pab_kernels.rules.formats import load_config, save_config
from pab_kernels.rules.plan import Plan, Sublayer, plan
from pab_kernels.rules.schedule import Schedule
from tests.rules.random_weights import with_random_weights

SUBLAYERS = (Sublayer("a.attn", "spatial", 0), Sublayer("b.attn", "spatial", 1), Sublayer("a.ff", "mlp", 0))
RULES = PABConfig(spatial=Broadcast(2, (0.2, 0.9), reuse="linear"), mlp=Broadcast(4, (0.2, 0.9), reuse="linear"))
TIMESTEPS = tuple(1000.0 - 83 * i for i in range(12))


def fitted(timesteps: tuple[float, ...] | None = TIMESTEPS, **changes: Any) -> PABConfig:
    return replace(with_random_weights(RULES, SUBLAYERS, Schedule.of(12, timesteps)), **changes)


def of(config: PABConfig, num_steps: int = 12, timesteps: Any = TIMESTEPS, begin: int = 0) -> Plan:
    return Plan(config, Schedule.of(num_steps, timesteps, begin), SUBLAYERS)


def weights(made: Plan) -> dict[tuple[str, int], tuple[float, ...]]:
    """Of all linear reuses, as they are planned."""
    rows = {name: zip(made.steps, row, strict=True) for name, row in made.rows.items()}
    return {(n, i): made.weights(n, i, d.reads) for n, row in rows.items() for i, d in row if len(d.reads) == 2}


def test_every_sublayer_and_step_has_its_own_weight() -> None:
    made = of(fitted())
    assert made.notes == () and len(set(weights(made).values())) == len(weights(made)) > 10
    assert fitted().fitted is not None
    for row in fitted().fitted.rows:  # type: ignore[union-attr]
        for name in row.weights:
            for (i, s, p), w in row.of(name):
                assert made.weights(name, i, (s, p)) == (w,)


def test_other_sources_and_reuses_of_one_output_take_the_line() -> None:
    made, line = of(fitted()), of(RULES)
    for name, step, sources in (("a.attn", 5, (4, 3)), ("a.attn", 6, (5, 4)), ("a.ff", 5, (4, 1)), ("a.ff", 5, (4,))):
        assert made.weights(name, step, sources) == line.weights(name, step, sources)


@pytest.mark.parametrize(
    ("num_steps", "timesteps", "message"),
    [
        (
            14,
            None,
            "fitted weights are for 12 steps and this schedule has 14: reuses take the line; fit them for ",
        ),
        (
            12,
            [t - 5 * (i > 3) for i, t in enumerate(TIMESTEPS)],
            "fitted weights are for timestep 668 at step 4 and this schedule has 663: reuses take the line",
        ),
    ],
)
def test_another_schedule_takes_the_line_and_a_note_reports_it(num_steps: int, timesteps: Any, message: str) -> None:
    made = of(fitted(), num_steps, timesteps)
    assert weights(made) == weights(of(RULES, num_steps, timesteps)) and made.fitted is None
    assert len(made.notes) == 1 and made.notes[0].startswith(message)
    assert f"note: {message}" in str(made)


@pytest.mark.parametrize(
    ("own", "given"),
    [(TIMESTEPS, None), (None, TIMESTEPS), (TIMESTEPS, [t + 0.4 for t in TIMESTEPS])],
    ids=["not known", "not known when fitted", "rounded otherwise"],
)
def test_the_same_schedule_is_known_again(own: Any, given: Any) -> None:
    config = fitted(own)
    assert weights(of(config, 12, given)) == weights(of(config, 12, own)) != weights(of(RULES))


def test_changed_rules_and_runs_that_begin_later_use_the_weights_that_are_still_for_their_reuses() -> None:
    config = fitted()
    changed = of(replace(config, spatial=Broadcast(2, (0.4, 0.9), reuse="linear")))
    assert changed.notes == (
        "2 of 12 linear reuses have no fitted weights and take the line: the rules or the first step are not those of "
        "the fit",
    )
    assert changed.weights("a.attn", 9, (8, 6)) == of(config).weights("a.attn", 9, (8, 6))
    later = of(config, begin=5)
    assert len(later.notes) == 1 and "linear reuses have no fitted weights" in later.notes[0]
    holds = of(replace(config, spatial=Broadcast(2), mlp=None))
    assert holds.notes == ("the rules reuse nothing linearly on this schedule: the fitted weights have no effect",)


def test_a_plan_shows_that_weights_are_fitted() -> None:
    assert str(of(fitted())).endswith("\nfitted weights of 3 sublayer(s), steps 3 to 10")
    by_kind = plan(fitted(), num_steps=12)
    assert str(by_kind).endswith("\nfitted weights of 3 sublayer(s), steps 3 to 10") and by_kind.notes == ()
    assert "fitted" not in str(of(RULES))


@pytest.mark.parametrize("ending", ["json", "yaml"])
@pytest.mark.parametrize("timesteps", [TIMESTEPS, None], ids=["timesteps", "steps"])
def test_a_file_keeps_them(ending: str, timesteps: Any, tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    config = fitted(timesteps)
    path = save_config(config, tmp_path / f"c.{ending}")
    assert load_config(path) == config and hash(load_config(path)) == hash(config)
    if ending == "yaml":
        assert "    - [3, 2, 1]\n" in path.read_text(), "a list of numbers is one line"
    assert "fitted" not in save_config(RULES, tmp_path / f"r.{ending}").read_text()


def row(**changes: Any) -> dict[str, Any]:
    return {"reads": [[3, 2, 1]], "weights": {"a": [0.5]}} | changes


def data(**changes: Any) -> dict[str, Any]:
    return {"num_steps": 12, "rows": [row()]} | changes


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "fitted must be FittedWeights or None, got []; pab.fit makes them"),
        ({"rows": []}, "FittedWeights needs 'num_steps'"),
        (data(more=1), "FittedWeights has no field 'more'; it has num_steps, rows, timesteps"),
        (data(num_steps=0), "num_steps must be a whole number of at least 1, got 0"),
        (data(timesteps=[1.0]), "num_steps=12 does not fit 1 timesteps"),
        (data(timesteps=12 * [float("nan")]), "timesteps must be a sequence of finite numbers"),
        (data(rows=[]), "rows must be a list of FittedRow, got ()"),
        (data(rows=[{}]), "FittedRow needs 'reads', 'weights'"),
        (data(rows=[row(reads=[])]), "reads must be a list of steps (i, s, p) with i > s > p >= 0"),
        (data(rows=[row(reads=[[3, 2]])]), "those whose outputs it reads; got [[3, 2]]"),
        (data(rows=[row(reads=[[3, 1, 2]])]), "got [[3, 1, 2]]"),
        (data(rows=[row(reads=[[3, 2, True]])]), "got [[3, 2, True]]"),
        (data(rows=[row(reads=[[3.5, 2, 1]])]), "got [[3.5, 2, 1]]"),
        (data(rows=[row(reads=[[12, 2, 1]])]), "fitted weights of 12 steps are for steps below that, got 12"),
        (data(rows=[row(reads=[[3, 2, 1]] * 2)]), "reads must name each step once"),
        (data(rows=[row(weights=[0.5])]), "weights must be lists by the names of sublayers, got [0.5]"),
        (data(rows=[row(weights={"a": 0.5})]), "the weights of 'a' must be 1 numbers, one for each of reads, got 0.5"),
        (data(rows=[row(weights={"a": [0.5, 0.6]})]), "got [0.5, 0.6]"),
        (data(rows=[row(weights={"a": ["0.5"]})]), "got ['0.5']"),
        (data(rows=[row(weights={"a": [float("nan")]})]), "the weights of 'a' must be at most 1000 in size, got [nan]"),
        (data(rows=[row(weights={"a": [-1e4]})]), "the weights of 'a' must be at most 1000 in size"),
        (data(rows=[row(), row()]), "'a' has two fitted weights at step 3; leave one out"),
    ],
)
def test_what_a_file_may_not_hold_is_refused_in_one_line(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^[^\\n]*{re.escape(message)}[^\\n]*$"):
        PABConfig.from_dict({"spatial": 2, "fitted": given})


def test_outputs_after_the_gate_have_no_fitted_weights() -> None:
    with pytest.raises(ValueError, match=r"before the gate, got cache_point 'post_gate'; supported are 'pre_gate'"):
        fitted(cache_point="post_gate")


def test_the_same_sublayer_may_have_weights_of_two_models_that_run_in_turn() -> None:
    first, second = (FittedRow(((i, i - 1, i - 2),), {"a": (w,)}) for i, w in ((4, 0.25), (9, 0.75)))
    both = FittedWeights(12, (first, second))
    assert both.weight("a", 4, (3, 2)) == 0.25 and both.weight("a", 9, (8, 7)) == 0.75
    assert both.weight("a", 9, (8, 6)) is None and both.names == {"a"}
