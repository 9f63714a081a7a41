"""A parallel model in its life: repeated and interrupted runs, other sizes, and ranks that fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parallel import lives
from tests.parallel.processes import run_on


def test_every_run_gives_what_one_rank_gives() -> None:
    for found in run_on(2, lives.runs):
        assert len(found) == 7
        assert {name: value for name, value in found.items() if value} == {}


@pytest.mark.parametrize("cfg", [1, 2])
def test_a_pipeline_enabled_before_or_after(cfg: int) -> None:
    for difference, sent, computes in run_on(2, lives.pipeline, cfg):
        assert difference < 1e-12
        assert {True, False} == set(computes)
        found = [step.messages for step in sent.sent.get("temporal", ())]
        assert found == ([4 * runs for runs in computes] if cfg == 1 else [])
        assert sent.by_kind["output"].messages == 10
        assert (sent.share < 1) is (cfg == 1)


def test_branches_in_separate_calls_are_refused() -> None:
    with pytest.raises(AssertionError, match="got a batch of 1 with cfg=2") as error:
        run_on(2, lives.branches_apart)
    assert str(error.value).count("ValueError: got a batch of 1") == 2


def test_an_output_that_one_rank_lost_is_an_error_on_all() -> None:
    with pytest.raises(AssertionError) as error:
        run_on(2, lives.loses_an_output)
    assert str(error.value).count("RanksDiffer: ranks would not run the same") == 2
    assert "without the outputs of temporal_blocks.0.attn" in str(error.value)


def test_a_rank_that_fails_is_an_error_on_all() -> None:
    with pytest.raises(AssertionError) as error:
        run_on(2, lives.fails)
    assert "ArithmeticError: rank 1 is broken" in str(error.value)
    assert "rank 0: Traceback" in str(error.value)


def test_a_rank_that_stays_away_is_an_error_on_the_others(tmp_path: Path) -> None:
    with pytest.raises(AssertionError) as error:
        run_on(2, lives.stays_away, str(tmp_path / "store"))
    assert "rank 0: Traceback" in str(error.value)
    assert "another rank did not come to call 2" in str(error.value)


def test_hooks_see_tensors_with_eight_bit_slots_too() -> None:
    assert run_on(2, lives.hooked) == [0, 0]
