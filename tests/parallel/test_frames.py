"""Models with spatial and temporal attention on several ranks: the numbers of one, and the bytes of the formula."""

from __future__ import annotations

import pytest

from tests.parallel.frames_runs import PLANS, Case, Found, compare, compare_in_fours
from tests.parallel.processes import run_on

STDIT3 = [Case("stdit3", plan, frames=3, given=plan == "hold") for plan in PLANS]
LATTE = [Case("latte", plan, frames=5, size=(12, 12)) for plan in PLANS if plan != "after the gate"]
ROUNDING = {"stdit3": 0.0, "latte": 1e-13}
"""The output of STDiT3 has float32: the last bit of a matrix product in float64, which may depend on the number of its
rows, does not show."""
FEW = [Case("stdit3", "hold", 3), Case("latte", "linear", 3, (12, 12))]
EXACT = [Case(model, "int8", 5, (12, 12), options={"exact": True}) for model in ("stdit3", "latte")]


def check(found_on_ranks: list[Found]) -> None:
    for rank, found in enumerate(found_on_ranks):
        for case, difference, sent, expected in found:
            eight = case.plan == "int8" and not case.options
            assert difference <= (0.02 if eight else ROUNDING[case.model]), (rank, case, difference)
            assert {kind: steps for kind, steps in sent.sent.items() if any(s.messages for s in steps)} == {
                kind: steps for kind, steps in expected.sent.items() if any(s.messages for s in steps)
            }, (rank, case)
            assert sent.without_pab == expected.without_pab, (rank, case)


@pytest.mark.parametrize("cases", [STDIT3, [*LATTE, *EXACT]], ids=["STDiT3", "Latte and exact 8 bits"])
def test_two_ranks_give_what_one_gives(cases: list[Case]) -> None:
    check(run_on(2, compare, cases, 1, 2))


def test_eight_ranks_give_what_one_gives() -> None:
    """Of which four share the frames of each branch of guidance: one has none of three frames."""
    check(run_on(8, compare, FEW, 2, 8))
    check(run_on(8, compare_in_fours, FEW[:1]))
