"""`python -m bench` on the CPU: rows, failures and exit status."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec

import pytest
import torch

from bench import __main__ as runner
from bench import broadcast_residual
from bench.case import Candidate, Unavailable
from bench.exact_attention import checked_queries, exact_attention
from bench.record import environment, read

FIELDS = {
    *(
        "bench",
        "geometry",
        "case",
        "shape",
        "dtype",
        "seed",
        "candidate",
        "ours",
        "status",
        "reason",
        "error",
        "allowed_error",
    ),
    *(
        "microseconds",
        "spread",
        "repeats",
        "timed_by",
        "sets",
        "rotated_bytes",
        "cache_bytes",
        "exceeds_cache",
        "clocks",
    ),
    *("bytes", "flops", "floor_microseconds", "share_of_floor", "gigabytes_per_second", "teraflops_per_second"),
    *("copy_gigabytes_per_second", "matmul_teraflops_per_second", "device", "versions", "commit", "command", "date"),
}


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Run it with these arguments: exit status and rows."""

    def run(*arguments: str):
        path = tmp_path / "rows.jsonl"
        monkeypatch.setattr(
            sys, "argv", ["bench", *arguments, "--device", "cpu", "--repeats", "2", "--json", str(path)]
        )
        monkeypatch.setattr(runner.signal, "signal", lambda *_: None)
        return runner.main(), read([path]) if path.exists() else []

    return run


def _case_with(monkeypatch, *candidates: Candidate) -> None:
    """`broadcast_residual` has one case, with these candidates."""
    made = next(broadcast_residual.cases("tiny", runner.GEOMETRIES["tiny"], torch.float32))
    monkeypatch.setattr(broadcast_residual, "cases", lambda *_: [replace(made, candidates=candidates)])


@pytest.mark.parametrize(("geometry", "dtype"), [("tiny", "float32"), ("tiny", "bfloat16"), ("odd-joint", "float32")])
def test_reference_and_eager_are_right_in_every_case(bench, geometry, dtype):
    chosen = ["--candidate", "pab reference", "--candidate", "torch eager"]
    status, rows = bench("--op", "all", "--geometry", geometry, "--dtype", dtype, *chosen)
    assert status == 0
    assert {row["bench"] for row in rows} == set(runner.OPS) - (
        {"short_attention"} if geometry == "odd-joint" else set()
    )
    for row in rows:
        assert row["status"] == "ok", row
        assert set(row) >= FIELDS and row["dtype"] == dtype and row["timed_by"] == "wall clock"
        low, high = row["spread"]
        assert 0 < low <= row["microseconds"] <= high and row["bytes"] > 0 and row["floor_microseconds"] > 0


def test_the_command_is_the_one_that_was_given(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench/__main__.py", "--case", "1 slot"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", ModuleSpec("bench.__main__", None), raising=False)
    assert environment("cpu")["command"] == "python -m bench --case '1 slot'"


def test_bytes_are_those_of_the_design(bench):
    _, rows = bench("--op", "broadcast_residual", "--geometry", "tiny", "--candidate", "pab reference")
    tokens, channels, width = 2 * 15, 64, 4
    modulation = 2 * 2 * channels * width
    by_case = {row["case"]: row["bytes"] for row in rows}
    for slots, name in enumerate(["norm", "1 slot", "2 slots", "3 slots"]):
        streams = 2 if slots == 0 else 3 + slots
        assert by_case[name] == streams * tokens * channels * width + modulation + slots * 2 * channels * width
    assert (
        by_case["1 int8 slot"] == by_case["1 slot"] - tokens * channels * 3 + tokens * 4
    )  # a scale for each group of up to 128


def test_what_is_wrong_or_fails_or_is_not_there_is_a_row_and_tells(bench, monkeypatch, capsys):
    def missing():
        raise Unavailable("not built here")

    def broken(inputs):
        raise RuntimeError("no\nluck")

    def unwritten(inputs):
        return None, torch.empty_like(inputs["x"])

    def inexact(inputs):
        x = inputs["x"]
        y = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + inputs["scale"]) + inputs["shift"]
        y[0, 0, 0] += 0.01
        return None, y

    calls = []

    def late(inputs):  # right in the check, wrong when it is timed
        calls.append(1)
        y = torch.nn.functional.layer_norm(inputs["x"], (64,), eps=1e-6) * (1 + inputs["scale"]) + inputs["shift"]
        return None, y if len(calls) == 1 else y + 1

    runs = {"broken": broken, "unwritten": unwritten, "inexact": inexact, "late": late}
    made = [Candidate(name, lambda run=run: run) for name, run in runs.items()]
    _case_with(monkeypatch, Candidate("missing", missing), *made)
    status, rows = bench("--op", "broadcast_residual", "--geometry", "tiny")
    assert status == 1
    told = {row["candidate"]: (row["status"], row["reason"]) for row in rows}
    assert told["missing"] == ("unavailable", "not built here")
    assert told["broken"] == ("failed", "RuntimeError: no luck")
    assert told["unwritten"][0] == "wrong" and "not written" in told["unwritten"][1]
    assert told["inexact"][0] == "wrong" and "largest error" in told["inexact"][1]
    assert told["late"][0] == "wrong" and told["late"][1].startswith("when it was timed: ")
    assert not any("microseconds" in row for row in rows)
    errors = capsys.readouterr().err
    assert "failed: broadcast_residual tiny norm, broken: RuntimeError: no luck" in errors


def test_what_is_only_unavailable_is_no_failure(bench, monkeypatch):
    def missing():
        raise Unavailable("not built here")

    _case_with(monkeypatch, Candidate("missing", missing))
    assert bench("--op", "broadcast_residual", "--geometry", "tiny")[0] == 0


def test_an_interrupted_run_keeps_its_rows(bench, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    made = next(broadcast_residual.cases("tiny", runner.GEOMETRIES["tiny"], torch.float32))
    eager = next(c for c in made.candidates if c.name == "torch eager")
    _case_with(monkeypatch, eager, Candidate("interrupted", interrupt))
    status, rows = bench("--op", "broadcast_residual", "--geometry", "tiny")
    assert status == 130 and [row["candidate"] for row in rows] == ["torch eager"]


def test_cases_for_which_no_time_is_left_are_rows(bench):
    status, rows = bench(
        "--op", "short_attention", "--geometry", "tiny", "--seconds", "1e-9", "--candidate", "pab reference"
    )
    assert status == 0 and {row["status"] for row in rows} == {"skipped"} and len(rows) == 3


def test_a_case_that_is_wrong_itself_fails_in_every_row(bench, monkeypatch):
    made = next(broadcast_residual.cases("tiny", runner.GEOMETRIES["tiny"], torch.float32))
    twice = replace(made, exact=lambda inputs: tuple(2 * t for t in made.exact(inputs)))
    monkeypatch.setattr(broadcast_residual, "cases", lambda *_: [twice])
    status, rows = bench("--op", "broadcast_residual", "--geometry", "tiny", "--candidate", "torch eager")
    assert status == 1 and rows[0]["status"] == "failed" and rows[0]["reason"].startswith("the case itself: ")


def test_an_unknown_name_is_refused(bench, capsys):
    with pytest.raises(SystemExit):
        bench("--op", "convolution")
    assert "'convolution' is unknown" in capsys.readouterr().err


def test_rows_are_one_json_object_a_line(bench, tmp_path):
    bench("--op", "broadcast_residual", "--geometry", "tiny", "--case", "norm", "--candidate", "torch eager")
    bench("--op", "broadcast_residual", "--geometry", "tiny", "--case", "norm", "--candidate", "torch eager")
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert (
        len(lines) == 4 and len({json.loads(line)["seed"] for line in lines}) == 2
    )  # "norm" and "no norm", other numbers each time


def test_exact_attention_is_softmax_attention_in_float64_row_by_row(monkeypatch):
    monkeypatch.setattr("bench.exact_attention.SCORES", 1)
    q, k, v = torch.randn(3, 5, 2, 8), torch.randn(3, 4, 2, 8), torch.randn(3, 4, 2, 8)
    lengths = torch.tensor([4, 1, 2])
    out = exact_attention(q, k, v, lengths)
    for row, length in enumerate(lengths.tolist()):
        scores = torch.einsum("nhd,mhd->hnm", q[row].double(), k[row, :length].double()) / 8**0.5
        expected = torch.einsum("hnm,mhd->nhd", scores.softmax(-1), v[row, :length].double())
        assert torch.allclose(out[row], expected, rtol=1e-12, atol=1e-12)


def test_queries_are_checked_from_the_first_to_the_last_within_memory():
    assert checked_queries(7, 7, 1).tolist() == list(range(7))
    some = checked_queries(67_000, 67_000, 24)
    assert some[0] == 0 and some[-1] == 66_999 and len(some) * 67_000 * 24 <= 2**27 and len(some.unique()) == len(some)
