"""`python -m bench.budgets`: its rows, and the table of the page that shows them."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("diffusers")

from bench import budgets
from bench.record import ROOT, read

RESULTS, PAGE = ROOT / "bench" / "results" / "budgets.jsonl", ROOT / "docs" / "memory.md"


def test_the_page_has_the_table_of_the_file_and_every_row_fits(capsys: pytest.CaptureFixture[str]) -> None:
    found = read([RESULTS])
    budgets.report(found)
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) > 20 and not set(table) - set(PAGE.read_text().splitlines())
    for row in found:
        if row["gigabytes"] is not None and row["share"] is not None:
            used = row["weight_bytes"] + row["activation_bytes"] + row["peak_cache_bytes"] + budgets.RESERVED
            assert used <= row["gigabytes"] * 10**9


def test_rows_of_a_model_on_small_devices() -> None:
    whole, nothing, some, moved, all_of_it = list(budgets.rows("latte", (16, 256, 256), (3, 5, 24)))
    assert nothing["share"] is None and not all_of_it["fewer_bits"] and not all_of_it["computed"]
    assert whole["peak_cache_bytes"] == all_of_it["peak_cache_bytes"] > some["peak_cache_bytes"]
    given: dict[str, Any] = some["fewer_bits"] | some["computed"]
    assert given and whole["share"] <= some["share"] <= 1
    assert moved["cache_device"] == "cpu" and moved["share"] == whole["share"] and not moved["computed"]
    assert moved["peak_host_bytes"] > 0 < moved["least_step_seconds"]
