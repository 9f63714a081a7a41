"""What the tests of the broadcast share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from pab_kernels.broadcast import stream as stream_module
from tests.broadcast.bus_recorder import BusRecorder, recorded


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the fused operations that the stream calls."""
    calls: Counter[str] = Counter()
    original = stream_module.run_checked

    def run(op: str, call: Any) -> Any:
        calls[op] += 1
        return original(op, call)

    monkeypatch.setattr(stream_module, "run_checked", run)
    return calls


@pytest.fixture(params=["early", "late"])
def bus(request: pytest.FixtureRequest) -> Iterator[BusRecorder]:
    """A stand-in for the bus of a device, whose copies read early or late."""
    with recorded(request.param == "early") as bus:
        yield bus


@pytest.fixture(autouse=True)
def _no_flops(no_flops: None) -> None:
    """Few of these tests look at FLOPs."""
