"""The steps of a schedule that lie in a window are those at which a rule may reuse."""

from __future__ import annotations

from typing import Any

import pytest

from pab_kernels.rules.config import Broadcast
from pab_kernels.rules.schedule import Schedule

TIMESTEPS = (999.0, 930.5, 798.9, 676.2, 500.0, 333.3, 100.0, 98.7, 0.0)


@pytest.mark.parametrize(
    ("rule", "within"),
    [
        (Broadcast(9, (0.2, 0.8)), [2, 3, 4, 5, 6, 7]),
        (Broadcast(9, (0.0, 1.0)), list(range(9))),
        (Broadcast(9, (2, 5), "step"), [2, 3, 4]),
        (Broadcast(9, (100, 800), "timestep"), [3, 4, 5]),
        (Broadcast(9, (100, 800), "timestep", exact=True), [2, 3, 4, 5]),
        (Broadcast(9, (-1, 99), "timestep"), [7, 8]),
    ],
    ids=str,
)
@pytest.mark.parametrize("begin", [0, 2])
def test_the_steps_within_are_those_at_which_a_rule_reuses(rule: Any, within: list[int], begin: int) -> None:
    schedule = Schedule.of(timesteps=TIMESTEPS, begin=begin)
    found = rule.inside(schedule)
    assert list(found) == [i for i in within if i >= begin]
    assert rule.reused(schedule) == {i for i in found if i > begin}


def test_a_window_in_timesteps_needs_them() -> None:
    with pytest.raises(ValueError, match=r"the window \(100, 800\) counts in timesteps, but only num_steps=4 is known"):
        Broadcast(2, (100, 800), "timestep").inside(Schedule.of(num_steps=4))
