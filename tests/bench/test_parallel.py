"""The latency of several GPUs on paper: the published figures, and sums that can be done by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import parallel
from bench.parallel import Links, Parts, latency, published_parts
from bench.record import ROOT, read
from pab_kernels import PABConfig
from pab_kernels.rules.traffic import Layout

BANDWIDTHS = (200e9, 300e9, 450e9)
"""Bytes a second: 450 GB is what NVLink has in each direction on an H100."""


def checked(links: Links, reading: str) -> dict[int, float]:
    """How far the model is off, by GPUs."""
    return {row["gpus"]: row["miss"] for row in parallel.check(links) if row["reading"] == reading}


@pytest.mark.parametrize("bandwidth", BANDWIDTHS)
def test_the_published_latencies_of_pab_follow_from_the_ablations(bandwidth: float) -> None:
    misses = checked(Links(bandwidth), "PAB has a cost of its own")
    assert set(misses) == {1, 8} and all(abs(miss) < 0.03 for miss in misses.values()), misses


def test_the_other_readings_of_the_published_figures_miss_by_more() -> None:
    shrinking = checked(Links(), "savings shrink in proportion")
    assert shrinking[1] > 0.03 and shrinking[8] < -0.03, "too slow on one GPU and too fast on eight"
    assert checked(Links(), "eight GPUs are an eighth of one")[8] > 0.1


@pytest.mark.parametrize(("gpus", "published"), parallel.FULL_8S.items())
def test_without_pab_it_is_the_published_latency(gpus: int, published: float) -> None:
    found = latency(published_parts(Links()), PABConfig(), Layout(1, gpus), Links())
    assert found.seconds - found.fixed == pytest.approx(published)


def test_savings_are_those_of_the_ablations_by_hand() -> None:
    """26.54 s, 19.87 s with PAB; 9, 13 and 14 of 30 steps are reused, and of the MLPs five of 28 layers at six."""
    step = {kind: 4 * seconds for kind, seconds in {"spatial": 1.87 / 9, "temporal": 4.08 / 13}.items()}
    step |= {"cross": 4 * 1.11 / 14, "mlp": 4 * 0.40 / (6 * 5 / 28)}
    parts = published_parts(Links())
    assert {kind: parts.steps[1][kind] for kind in step} == pytest.approx(step)
    assert parts.fixed == pytest.approx(1.87 + 4.08 + 1.11 + 0.40 - (26.54 - 19.87))
    saved = 8 * step["spatial"] + 12 * step["temporal"] + 13 * step["cross"] + 2 * 5 / 28 * step["mlp"]
    one = latency(parts, parallel.PUBLISHED, Layout(), Links())
    assert one.seconds == pytest.approx(97.51 - saved + parts.fixed)
    assert one.sent == one.waits == 0


def test_a_step_is_what_is_computed_and_sent_or_what_the_host_needs() -> None:
    links = Links(bandwidth=1e9, call=0.0)
    shapes = parallel.shapes_of(parallel.EIGHT_SECONDS)
    assert (shapes.frames, shapes.tokens) == (60, 1590)
    parts = Parts({1.0: {"temporal": 10.0, "rest": 2.0}})
    full = latency(parts, PABConfig(), Layout(2, 2), links)
    assert full.computing == pytest.approx(30 * 12 / 4)
    there = 30 * 795 * 1152 * 2  # half of the frames and places, of one branch, to the other rank
    output = 30 * 8 * 60 * 106 * 4 + 60 * 8 * 60 * 106 * 4  # to the other half, then to the other branch
    assert full.sent == pytest.approx(30 * (28 * 2 * there + output) / 1e9)
    pab = latency(parts, parallel.PUBLISHED, Layout(2, 2), links)
    assert pab.computing == pytest.approx((18 * 10 + 30 * 2) / 4)
    slow_host = Parts({1.0: {"rest": 1.0}}, host=(3.0, 3.0))
    assert latency(slow_host, PABConfig(), Layout(), links).seconds == pytest.approx(30 * 3)
    assert latency(slow_host, PABConfig(), Layout(), links).waits == pytest.approx(30 * 2)


def test_ranks_of_other_nodes_are_reached_by_the_network_while_nvlink_works() -> None:
    links = Links(bandwidth=7.0, network=2.0, call=0.5, node=8)
    assert links.seconds(700, 2, group=8) == pytest.approx(100 + 1)
    assert links.seconds(1500, 0, group=16) == pytest.approx(max(700 / 7, 800 / 2))
    assert links.seconds(0, 0, group=1) == 0


def test_what_is_measured_with_fewer_rows_is_used_there_and_below() -> None:
    parts = Parts({1.0: {"rest": 8.0}, 0.125: {"rest": 2.0}})
    assert parts.at(0.5) == {"rest": 4.0} and parts.at(0.125) == {"rest": 2.0} and parts.at(0.0625) == {"rest": 1.0}


def test_more_gpus_are_faster_and_the_aim_is_named() -> None:
    rows = list(parallel.scaling(Links()))
    for name in {row["row"] for row in rows}:
        seconds = [row["seconds"] for row in rows if row["row"] == name]
        assert len(seconds) == 7 and seconds == sorted(seconds, reverse=True)
    needs = {row["layout"]: row for row in parallel.needs(Links())}
    for row in needs.values():
        assert row["allowed"] == pytest.approx(97.51 / 26, abs=1e-4)
        host_free = Parts({1.0: {"rest": 97.51 / 30 / row["one_gpu"]}})
        layout = parallel.LAYOUTS[row["layout"]]
        found = latency(host_free, parallel.PUBLISHED, layout, Links())
        assert 97.51 / found.seconds == pytest.approx(26, rel=1e-3)


def test_measured_parts_are_a_row_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = [{"rows": 1, "spatial": 0.5, "rest": 0.5}, {"rows": 0.125, "spatial": 0.1, "rest": 0.1}]
    (tmp_path / "parts.json").write_text(json.dumps({"steps": steps, "source": "a GPU", "fixed": 0.25}))
    parallel.main(["--parts", str(tmp_path / "parts.json"), "--out", str(tmp_path / "rows.jsonl")])
    rows = read([tmp_path / "rows.jsonl"])
    measured = {row["gpus"]: row for row in rows if row.get("row") == "measured: a GPU"}
    assert measured[1]["computing"] == pytest.approx(22 * 0.5 + 30 * 0.5) and measured[1]["fixed"] == 0.25
    assert measured[8]["computing"] == pytest.approx(22 * 0.1 + 30 * 0.1)
    assert "26x on eight GPUs needs" in capsys.readouterr().out
    assert {row["part"] for row in rows} == {"check", "needs", "ladder", "scaling"}


@pytest.mark.parametrize("data", [{}, {"steps": [{"rows": 0.5, "rest": 1}]}, {"steps": [{"rows": 1, "all": 1}]}])
def test_a_file_without_the_parts_is_refused(data: Any, tmp_path: Path) -> None:
    (tmp_path / "parts.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="`steps` needs an object with rows 1, and seconds of spatial, temporal"):
        Parts.read(tmp_path / "parts.json")


def test_the_ladder_is_the_one_of_the_whole_runs() -> None:
    pytest.importorskip("diffusers")
    from bench.end_to_end import LADDER

    assert {ratio for _, ratio in parallel.LADDER} <= {ratio for _, ratio, _ in LADDER}


def test_the_kept_rows_are_those_of_this_model() -> None:
    kept = read([ROOT / "bench/results/parallel-model.jsonl"])
    made = [*parallel.check(Links()), *parallel.needs(Links()), *parallel.ladder(Links()), *parallel.scaling(Links())]
    assert [{name: row[name] for name in new} for row, new in zip(kept, made, strict=True)] == made


def test_a_plot_is_saved(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    parallel.draw(list(parallel.scaling(Links())), tmp_path / "speed.png")
    assert (tmp_path / "speed.png").stat().st_size > 1000
