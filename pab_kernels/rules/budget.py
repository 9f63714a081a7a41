"""Budgets of bytes for kept outputs, and what a plan gives up for one."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..messages import shown

if TYPE_CHECKING:
    from .plan import Plan

UNITS = {"b": 1} | {f"{p}{u}": n**e for e, p in enumerate("kmgt", 1) for u, n in (("b", 1000), ("ib", 1024))}
FEWER_BITS = "int8"
"""The dtype of slots that a budget makes smaller."""


def parsed(budget: Any) -> int | float:
    """A budget as a number of bytes, or, below 1, as a share of the free memory.

    Args:
        budget: such a number, "8GiB", "800 MB" or "50%".

    Raises:
        ValueError: it is none of these.

    >>> parsed("8GiB") == 8 * 2**30, parsed("50%")
    (True, 0.5)
    """
    found: int | float | None = None
    if isinstance(budget, str):
        number = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+|%)\s*", budget.lower())
        if number and number[2] == "%":
            found = float(number[1]) / 100
        elif number and number[2] in UNITS:
            found = int(float(number[1]) * UNITS[number[2]])
    elif isinstance(budget, float):
        found = int(budget) if budget >= 1 and budget.is_integer() else budget
    elif isinstance(budget, int) and not isinstance(budget, bool):
        found = budget
    if found is None or not 0 < found < 2**63 or (isinstance(found, float) and found >= 1):
        raise ValueError(
            f"got budget={shown(budget)}; supported are a number of bytes, '8GiB', '800MB', and a share of the free "
            "memory, 0.5 or '50%'"
        )
    return found


def in_units(count: int) -> str:
    """A number of bytes as text."""
    for unit in ("GiB", "MiB", "KiB"):
        size = UNITS[unit.lower()]
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


@dataclass(frozen=True)
class GivenUp:
    """What a plan gives up for a budget.

    Args:
        budget: bytes.
        peak: the most bytes held at once.
        computed: names of sublayers that are computed at every step instead of reused.
        fewer_bits: names of sublayers whose slots are in `FEWER_BITS`.
        spans: names of blocks in a row, or of sublayers in a row in a block, that share one slot: the last one's, with
            what all of them add to the stream.
        on_host: names of sublayers whose slots are in host memory.
    """

    budget: int
    peak: int
    computed: tuple[str, ...] = ()
    fewer_bits: tuple[str, ...] = ()
    spans: tuple[tuple[str, ...], ...] = ()
    on_host: tuple[str, ...] = ()


class BudgetTooSmall(ValueError):
    """No plan that reuses an output fits a budget.

    Args:
        budget: in bytes.
        smallest: the smallest budget that one fits, in bytes.
        contexts: calls of the model in a step, as far as they are known.
    """

    def __init__(self, budget: int, smallest: int, contexts: int) -> None:
        self.smallest = smallest
        super().__init__(
            f"got a budget of {in_units(budget)} for kept outputs; the smallest that a plan of this model fits is "
            f"{in_units(smallest)} ({smallest} bytes, {contexts} call(s) in a step), and pab.disable runs the model "
            "without any"
        )


def in_words(plan: Plan) -> str:
    """What a plan gives up for its budget, in a line."""
    given_up = plan.given_up
    assert given_up is not None
    found, blocks = [], {s.name for s in plan.sublayers if s.kind == "block"}
    for what, of_blocks in (("blocks", True), ("sublayers", False)):
        spans = [span for span in given_up.spans if (span[-1] in blocks) == of_blocks]
        if spans:
            found.append(f"{sum(map(len, spans))} {what} share {len(spans)} slot(s)")
    for names, what in (
        (given_up.on_host, "in host memory"),
        (given_up.fewer_bits, f"kept in {FEWER_BITS}"),
        (given_up.computed, "computed at every step"),
    ):
        several = Counter(s.kind for s in plan.sublayers if s.name in names)
        total = Counter(s.kind for s in plan.sublayers)
        if several:
            found.append(", ".join(f"{n} of {total[kind]} {kind}" for kind, n in several.items()) + f" {what}")
    return (
        f"budget {in_units(given_up.budget)}, {in_units(given_up.peak)} at the peak: "
        f"{'; '.join(found) or 'nothing is given up'}"
    )
