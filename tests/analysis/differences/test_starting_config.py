"""From curves to a window and ranges."""

from __future__ import annotations

import pytest

from pab_kernels.analysis.differences.starting_config import starting_config


def u(low: float, first: int = 3, last: int = 17, high: float = 9.0, steps: int = 20) -> list[float | None]:
    return [None, *(low if first <= i < last else high * low for i in range(1, steps))]


def test_the_window_is_the_calm_middle_of_all_kinds() -> None:
    relative = {"spatial": u(0.1, 4, 18), "cross": u(0.3, 2, 15)}
    start = starting_config(relative, relative, 20)
    assert start is not None and start.window == (4, 15)
    assert {rule.window for _, rule in start.config.broadcasts()} == {(0.2, 0.75)}


def test_one_loud_step_parts_the_window_and_the_longer_run_wins() -> None:
    curve = u(0.1)
    curve[7] = 0.21
    start = starting_config({"spatial": curve}, {"spatial": curve}, 20)
    assert start is not None and start.window == (8, 17)
    curve[7] = 0.19  # less than twice the median
    start = starting_config({"spatial": curve}, {"spatial": curve}, 20)
    assert start is not None and start.window == (3, 17)


@pytest.mark.parametrize(
    ("mse", "ranges", "follows"),
    [
        ({"spatial": 16.0, "temporal": 4.0, "cross": 1.0}, (2, 3, 5), True),  # drifts of 4, 2 and 1
        ({"spatial": 1.0, "temporal": 1.0, "cross": 1.0}, (2, 2, 2), True),
        ({"spatial": 1.0, "temporal": 0.3, "cross": 1e-9}, (2, 2, 6), True),
        ({"spatial": 1.0, "temporal": 1.0, "cross": 0.0}, (2, 2, 6), True),
        ({"spatial": 1.0, "temporal": 16.0, "cross": 4.0}, (2, 2, 3), False),  # spatial is cut to temporal
        ({"spatial": 1.0, "temporal": 1.0, "cross": 4.0}, (2, 2, 2), False),
    ],
)
def test_ranges_let_all_kinds_drift_alike_in_the_published_order(
    mse: dict[str, float], ranges: tuple[int, ...], follows: bool
) -> None:
    start = starting_config(
        {kind: u(0.1) for kind in mse}, {kind: u(value, high=100.0) for kind, value in mse.items()}, 20
    )
    assert start is not None
    assert tuple(rule.range for _, rule in start.config.broadcasts()) == ranges
    assert start.follows_order is follows
    assert start.drift["spatial"] == pytest.approx(mse["spatial"] ** 0.5)


def test_other_kinds_get_no_rule() -> None:
    start = starting_config({"spatial": u(0.1), "mlp": u(5.0, 9, 10)}, {"spatial": u(1.0), "mlp": u(1.0)}, 20)
    assert (
        start is not None and [kind for kind, _ in start.config.broadcasts()] == ["spatial"] and start.window == (3, 17)
    )


def test_without_attention_or_a_middle_there_is_none() -> None:
    nothing: list[float | None] = [None] * 20
    assert starting_config({"mlp": u(1.0)}, {"mlp": u(1.0)}, 20) is None
    assert starting_config({"spatial": nothing}, {"spatial": nothing}, 20) is None
