"""The table of a summary with seconds, where a kind has none: its sublayers were skipped with the model."""

from __future__ import annotations

import pytest

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from tests.adapters.tiny_latte import sample, tiny_pipe


@pytest.mark.flops
def test_a_kind_without_seconds_has_an_empty_cell() -> None:
    pipe = tiny_pipe()
    pab.enable(pipe, PABConfig(model=Broadcast(2, reuse="forecast")), timed=True)
    sample(pipe)
    kinds = pab.summary(pipe).contexts["#0"]
    assert any(tally.seconds is None for tally in kinds.values())
    lines = str(pab.summary(pipe)).splitlines()
    for kind, tally in kinds.items():
        (row,) = (line.split() for line in lines if line.startswith(f"  {kind} "))
        assert len(row) == (9 if tally.seconds is not None else 8)
