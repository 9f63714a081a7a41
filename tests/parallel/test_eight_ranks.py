"""Models on eight ranks, which take long to start: in one file, so that they are started once."""

from __future__ import annotations

from pab_kernels.rules.traffic import OUTPUT
from tests.parallel.decoding import decoded
from tests.parallel.frames_runs import Case, check, compare, compare_in_fours
from tests.parallel.processes import run_on
from tests.parallel.token_runs import STEPS, on_eight

FEW = [Case("stdit3", "hold", 3), Case("latte", "linear", 3, (12, 12))]


def test_branches_and_frames() -> None:
    """Of which four share the frames of each branch of guidance: one has none of three frames."""
    check(run_on(8, compare, FEW, 2, 8))
    check(run_on(8, compare_in_fours, FEW[:1]))


def test_branches_and_tokens() -> None:
    for found in run_on(8, on_eight):
        assert len(found) == 3
        for difference, traffic in found.values():
            assert difference < 1e-12  # few rows for each rank: their last bits are rounded otherwise
            messages = [sent.messages for sent in traffic.sent["spatial"]]
            assert messages == [messages[0], 0] * (STEPS // 2) and messages[0] > 0
            assert {sent.messages for sent in traffic.sent[OUTPUT]} <= {1, 2}


def test_ranks_decode_in_the_order_of_the_mesh() -> None:
    assert run_on(8, decoded) == [[True] * 6] * 8
