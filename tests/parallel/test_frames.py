"""Models with spatial and temporal attention on several ranks: the numbers of one, and the bytes of the formula."""

from __future__ import annotations

import pytest
import torch

from tests.parallel.frames_runs import FP8, PLANS, Case, check, compare, within_budgets
from tests.parallel.processes import run_on

STDIT3 = [Case("stdit3", plan, frames=3, given=plan == "hold") for plan in PLANS]
LATTE = [Case("latte", plan, frames=5, size=(12, 12)) for plan in PLANS if plan != "after the gate"]
EXACT = [Case(model, "int8", 5, (12, 12), options={"exact": True}) for model in ("stdit3", "latte")]


@pytest.mark.parametrize("cases", [STDIT3, [*LATTE, *EXACT]], ids=["STDiT3", "Latte and exact 8 bits"])
def test_two_ranks_give_what_one_gives(cases: list[Case]) -> None:
    check(run_on(2, compare, cases, 1, 2))


def test_inputs_may_be_sent_in_fewer_bits() -> None:
    cases = [Case("stdit3", "hold", 3, options={"input_dtype": dtype}) for dtype in (torch.int8, FP8, torch.bfloat16)]
    found = run_on(2, compare, cases, 1, 2)[0]
    for (_, difference, sent, expected), most in zip(found, (0.02, 0.05, 0.01), strict=True):
        assert 0 < difference < most
        if sent is not found[-1][2]:
            assert sent.sent == expected.sent
    whole, half = (steps["temporal"][0].bytes for steps in (found[-1][3].sent, found[-1][2].sent))
    assert half == whole * (2 + 8) / (8 + 8)  # bfloat16 there, float64 back


def test_a_budget_is_that_of_a_ranks_part_and_all_ranks_give_up_the_same() -> None:
    found = run_on(2, within_budgets)
    assert found[0] == found[1]
    for peak, budget, given_up, forced in found[0]:
        assert peak == given_up.peak <= budget == given_up.budget and not forced
        assert given_up.computed or given_up.fewer_bits
