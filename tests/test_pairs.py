"""The cases that stand for a product."""

from __future__ import annotations

import itertools

import pytest

from tests.pairs import pairs


@pytest.mark.parametrize(
    ("parameters", "most"),
    [
        ((["a", "b"], [0, 1]), 4),
        ((["a", "b"], [0, 1], [None, True]), 4),
        ((["a", "b", "c"], [0, 1, 2], [None, True, False, 3]), 14),
        (([1], [2], [3]), 1),
        (([1, 1.5], [2, 3], [4, 5], [6, 7], [8, 9, 10]), 9),
    ],
)
def test_every_two_values_meet(parameters: tuple[list[object], ...], most: int) -> None:
    cases = pairs(*parameters)
    for i, j in itertools.combinations(range(len(parameters)), 2):
        assert {(case[i], case[j]) for case in cases} == set(itertools.product(parameters[i], parameters[j]))
    assert len(cases) == len(set(cases)) <= most
    assert cases == pairs(*parameters)
