"""`python -m bench.host`: what is timed, in which order, and with which package."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from pathlib import Path

import pytest

import pab_kernels as pab
from bench import host
from bench.record import ROOT, read

VARIANTS = ["plain", "range 1", "compute and store", "reuse", "diffusers compute", "diffusers reuse"]


@pytest.fixture(autouse=True)
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of one or two blocks."""
    depths = {"num_layers": 1, "num_single_layers": 1, "depth": 1}
    for name, model in host.MODELS.items():
        config = {key: depths.get(key, value) for key, value in model.config.items()}
        monkeypatch.setitem(host.MODELS, name, dataclasses.replace(model, config=config))


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")  # diffusers' own use
@pytest.mark.parametrize("name", host.MODELS)
def test_every_variant_is_timed_once_a_round(name: str) -> None:
    ticks = itertools.count()
    seconds = host.measure(name, 2, lambda: float(next(ticks)))
    assert list(seconds) == VARIANTS[: 4 if name == "stdit3" else 6]  # STDiT3 has no cache of diffusers'
    assert all(found == [1.0, 1.0] for found in seconds.values())


def test_a_reuse_step_reuses_all_attention_and_the_step_before_stores_it() -> None:
    model, inputs = host.MODELS["latte"].make()
    made = host.variants(model, 2)
    copied = made["compute and store", "reuse"]
    for _ in range(4):
        copied(**inputs)
    (tallies,) = pab.summary(copied).contexts.values()
    assert {kind: (t.stored, t.reused) for kind, t in tallies.items() if kind != "mlp"} == dict.fromkeys(
        ("spatial", "temporal", "cross"), (2, 2)
    )
    made["range 1",](**inputs)
    (tallies,) = pab.summary(made["range 1",]).contexts.values()
    assert all(t.stored == t.reused == 0 for t in tallies.values())


def test_a_row_has_medians_and_ratios() -> None:
    ours, other = {"plain": [1.0, 3.0, 2.0], "reuse": [0.5]}, {"plain": [4.0], "reuse": [0.25]}
    plain, reuse = host.rows_of("latte", ours, other)
    assert plain["milliseconds"] == 2000 and plain["spread"] == [1000, 3000] and plain["repeats"] == 3
    assert (reuse["ratio_to_plain"], reuse["milliseconds_against"], reuse["ratio_against"]) == (0.25, 250, 2)
    assert "ratio_against" not in host.rows_of("latte", ours)[0]


def test_checkouts_take_turns_and_their_rounds_are_taken_together(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[Path] = []

    def measured(checkout: Path, names: list[str], repeats: int) -> dict[str, host.Samples]:
        turns.append(checkout)
        return {name: {"plain": [float(len(turns))]} for name in names}

    monkeypatch.setattr(host, "measured_with", measured)
    ours, others = host.alternated(Path("/other"), ["wan"], 1)
    assert turns == [ROOT, Path("/other")] * host.ROUNDS
    assert ours == {"wan": {"plain": [1.0, 3.0, 5.0]}} and others == {"wan": {"plain": [2.0, 4.0, 6.0]}}


def test_a_child_takes_the_package_of_the_other_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And `bench` of this one, which another checkout may not have."""
    (tmp_path / "pab_kernels").symlink_to(ROOT / "pab_kernels")
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "__init__.py").write_text("raise ImportError('the wrong bench')")
    program = host.CHILD.replace(
        "host.child(*sys.argv[1:])", "print(host.json.dumps({{'package': host.pab.__file__, 'seconds': {{}}}}))"
    )
    monkeypatch.setattr(host, "CHILD", program)
    assert host.measured_with(tmp_path, ["latte"], 1) == {}
    with pytest.raises(RuntimeError, match="there is no pab_kernels in"):
        host.measured_with(tmp_path / "nowhere", ["latte"], 1)


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="there is no model 'sora'; there are latte, stdit3"):
        host._names("latte,sora")
    with pytest.raises(argparse.ArgumentTypeError, match="there is no pab_kernels in .*; give the root of a checkout"):
        host._checkout("/tmp")


def test_rows_are_written_with_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "host.jsonl"
    monkeypatch.setattr(sys, "argv", ["host", "--models", "latte", "--repeats", "1", "--out", str(path)])
    host.main()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == read([path])
    assert [row["variant"] for row in rows] == VARIANTS
    assert all({"device", "versions", "commit", "command", "date"} <= row.keys() for row in rows)
    assert len(capsys.readouterr().out.splitlines()) == len(VARIANTS)
