"""Tests do not depend on how fast the machine is: none sleeps, reads a clock, or ends what is merely slow."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

TESTS = Path(__file__).parent
CLOCKS = {
    "sleep",
    "time",
    "time_ns",
    "perf_counter",
    "perf_counter_ns",
    "monotonic",
    "monotonic_ns",
    "process_time",
    "alarm",
    "setitimer",
}
MODULES = {"time", "signal", "asyncio"}


def _timings(source: str) -> Iterator[str]:
    """What in a test goes by the clock; a wait may have the limit `HANG`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module in MODULES:
            yield from (
                f"line {node.lineno}: {node.module}.{alias.name}" for alias in node.names if alias.name in CLOCKS
            )
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        if isinstance(called, ast.Attribute):
            if isinstance(called.value, ast.Name) and called.value.id in MODULES and called.attr in CLOCKS:
                yield f"line {node.lineno}: {called.value.id}.{called.attr}"
            if called.attr in ("join", "wait") and any(_is_number(argument) for argument in node.args):
                yield f"line {node.lineno}: {called.attr} with a limit"
        for keyword in node.keywords:
            if keyword.arg in ("timeout", "deadline") and _is_number(keyword.value):
                yield f"line {node.lineno}: {keyword.arg} of its own"


def _is_number(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, (int, float))


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: str(path.relative_to(TESTS)))
def test_no_test_goes_by_the_clock(path: Path) -> None:
    assert list(_timings(path.read_text())) == [], "wait for an event, with tests.hang.HANG as the limit"


def test_every_way_to_go_by_the_clock_is_seen() -> None:
    for bad in (
        "import time\ntime.sleep(1)",
        "from time import perf_counter",
        "import time\nassert time.monotonic() < 3",
        "import signal\nsignal.alarm(10)",
        "thread.join(240)",
        "event.wait(5)",
        "subprocess.run(command, timeout=60)",
        "threading.Barrier(2, timeout=60)",
        "@settings(deadline=200)\ndef test(): pass",
    ):
        assert list(_timings(bad)), bad
    for fine in (
        "thread.join(HANG)",
        "','.join(names)",
        "threading.Barrier(2, timeout=HANG)",
        "@settings(deadline=None)\ndef test(): pass",
    ):
        assert list(_timings(fine)) == [], fine


def test_nothing_ends_a_test_that_is_slow(request: pytest.FixtureRequest) -> None:
    """pytest shows where a long test is, and lets it go on.

    Hypothesis neither limits an example nor how long it looks for one.
    """
    assert not request.config.getini("faulthandler_exit_on_timeout")
    assert hypothesis.settings().deadline is None
    assert hypothesis.HealthCheck.too_slow in hypothesis.settings().suppress_health_check
