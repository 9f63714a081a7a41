"""Models with spatial and temporal attention on several ranks: the numbers of one, and the bytes of the formula."""

from __future__ import annotations

import pytest

from tests.parallel.frames_runs import PLANS, Case, compare
from tests.parallel.processes import run_on

STDIT3 = [Case("stdit3", plan, frames=3, given=plan == "hold") for plan in PLANS]
LATTE = [Case("latte", plan, frames=5, size=(12, 12)) for plan in PLANS if plan != "after the gate"]
ROUNDING = {"stdit3": 0.0, "latte": 1e-13}
"""The output of STDiT3 has float32: the last bit of a matrix product in float64, which may depend on the number of its
rows, does not show."""
EXACT = [Case(model, "int8", 5, (12, 12), options={"exact": True}) for model in ("stdit3", "latte")]


def check(ranks: int, cfg: int, cases: list[Case]) -> None:
    for rank, found in enumerate(run_on(ranks, compare, cases, cfg, ranks)):
        for case, difference, sent, expected in found:
            eight = case.plan == "int8" and not case.options and ranks > cfg
            assert difference <= (0.02 if eight else ROUNDING[case.model]), (rank, case, difference)
            assert {kind: steps for kind, steps in sent.sent.items() if any(s.messages for s in steps)} == {
                kind: steps for kind, steps in expected.sent.items() if any(s.messages for s in steps)
            }, (rank, case)
            assert sent.without_pab == expected.without_pab, (rank, case)


@pytest.mark.parametrize("cases", [STDIT3, [*LATTE, *EXACT]], ids=["STDiT3", "Latte and exact 8 bits"])
def test_two_ranks_give_what_one_gives(cases: list[Case]) -> None:
    check(2, 1, cases)
