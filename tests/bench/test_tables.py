"""Tables and plots from rows."""

from __future__ import annotations

import pytest

from bench.table import best, listing, show, tables


def _row(candidate: str, microseconds: float | None = None, **more) -> dict:
    row = {
        "bench": "attention",
        "geometry": "latte",
        "case": "spatial",
        "dtype": "bfloat16",
        "device": "a GPU",
        "candidate": candidate,
    }
    row |= {
        "ours": candidate.startswith("pab"),
        "status": "ok",
        "reason": None,
        "flops": 10**9,
        "floor_microseconds": 50.0,
    }
    row |= {"copy_gigabytes_per_second": 4300.0, "matmul_teraflops_per_second": 780.0, "exceeds_cache": True}
    if microseconds is not None:
        row |= {"microseconds": microseconds, "spread": [microseconds * 0.99, microseconds * 1.02]}
        row |= {"share_of_floor": 50 / microseconds, "gigabytes_per_second": 1.0, "teraflops_per_second": 1.0}
    return row | more


ROWS = [
    _row("pab triton", 120.0),
    _row("pab reference", 400.0),
    _row("torch eager", 300.0),
    _row("SDPA flash", 110.0),
    _row("SDPA cuDNN", 100.0),
    _row("flash-attn 2", status="unavailable", reason="flash_attn is not installed"),
    _row("FlexAttention", status="wrong", reason="output 0: relative error 1, allowed 0"),
]


def test_a_case_that_is_lost_stays_and_says_by_how_much():
    (table,) = tables(ROWS)
    assert table.title == "attention, a GPU, bfloat16"
    assert table.header[3:] == [
        "ours, us",
        "torch eager, us",
        "SDPA, us",
        "flash-attn, us",
        "FlexAttention, us",
        "ours, of the floor",
        "best other / ours",
    ]
    cells = [
        "latte",
        "spatial",
        "50",
        "120 (triton)",
        "300",
        "**100 (cuDNN)**",
        "-",
        "wrong: FlexAttention",
        "42 %",
        "0.83x",
    ]
    assert table.lines == [cells]
    assert any(note.startswith("flash-attn 2, unavailable (everywhere): flash_attn is not") for note in table.notes)
    assert "| latte | spatial | 50 | 120 (triton) |" in table.markdown()


def test_the_last_measurement_of_a_candidate_counts():
    (table,) = tables([*ROWS, _row("pab triton", 80.0)])
    assert table.lines[0][3] == "**80 (triton)**" and table.lines[0][-1] == "1.25x"


def test_devices_and_dtypes_have_tables_of_their_own_and_other_benches_none():
    rows = [
        *ROWS,
        _row("pab triton", 1.0, device="another"),
        _row("pab triton", 1.0, dtype="float16"),
        {"bench": "denoiser"},
    ]
    assert [table.title for table in tables(rows)] == [
        "attention, a GPU, bfloat16",
        "attention, another, bfloat16",
        "attention, a GPU, float16",
    ]


def test_rows_without_a_time_are_no_winners_and_are_listed():
    assert best(ROWS, ours=True)["candidate"] == "pab triton" and best(ROWS[5:], ours=False) is None
    header, lines = listing(ROWS)
    assert [line[3] for line in lines] == [row["candidate"] for row in ROWS] and lines[5][4] == "unavailable"
    assert all(len(line) == len(header) for line in lines)


def test_what_is_shown_has_every_row_and_the_ceilings(capsys):
    show(ROWS)
    text = capsys.readouterr().out
    assert all(row["candidate"] in text for row in ROWS) and "4300 GB/s" in text


def test_a_plot_has_the_timed_candidates(tmp_path):
    pytest.importorskip("matplotlib")
    from bench.plot import plot

    (path,) = plot([*ROWS, {"bench": "denoiser"}], tmp_path)
    text = path.read_text()
    assert path.name == "bench-attention-a-gpu-bfloat16.svg" and "pab triton" in text and "FlexAttention" not in text
