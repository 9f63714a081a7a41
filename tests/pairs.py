"""Few cases in which every two values of every two parameters meet, instead of the product of all of them."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any


def pairs(*parameters: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Cases for `pytest.mark.parametrize` with several names.

    Most faults come from one value or from two together, so a product of three or more parameters runs most of its
    cases for nothing. The cases are chosen greedily and are the same in every run: each is the one with the most pairs
    that were in none before, and of several such the one whose pairs were in the fewest.

    Args:
        parameters: the values of each parameter; two or more parameters.

    Returns:
        A case a tuple, a value of each parameter.
    """
    places = list(itertools.combinations(range(len(parameters)), 2))
    product = list(itertools.product(*(range(len(values)) for values in parameters)))
    met: Counter[tuple[int, int, int, int]] = Counter()  # how often two values of two parameters met

    def pairs_in(case: tuple[int, ...]) -> list[tuple[int, int, int, int]]:
        return [(i, j, case[i], case[j]) for i, j in places]

    missing = {pair for case in product for pair in pairs_in(case)}
    chosen = []
    while missing:
        case = max(
            product,
            key=lambda case: (len(missing.intersection(pairs_in(case))), -sum(met[pair] for pair in pairs_in(case))),
        )
        met.update(pairs_in(case))
        missing.difference_update(pairs_in(case))
        chosen.append(case)
    return [tuple(values[k] for values, k in zip(parameters, case, strict=True)) for case in sorted(chosen)]
