"""`pab generate --parallel` on two ranks: the clip of one process, reported and written by the first rank alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("skimage")
pytest.importorskip("imageio_ffmpeg")
pytest.importorskip("matplotlib")

import torch
from typer.testing import CliRunner

from pab_kernels import cli
from pab_kernels.analysis.pipeline_call import Wish
from pab_kernels.generate import Settings, generate
from tests.models.tiny_checkpoints import save
from tests.parallel.processes import run_on
from tests.tiny_pipelines import save as save_pipeline

ASKED = ("--prompt", "a red circle", "--steps", "6", "--device", "cpu", "--pab", "pab246")


def pab(*arguments: object) -> Any:
    environment = {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    return CliRunner().invoke(cli.build_app(), ["generate", *map(str, arguments)], env=environment)


def on_rank(rank: int, model: str, weights: str, folder: str) -> dict[str, Any]:
    wish = Wish("a red circle", steps=6, size=(17, 32, 48), further={"clean_prompt": False})
    found = {}
    for parallel in ("none", "1x2", "2x1"):
        settings = Settings(model, wish, "pab246", device="cpu", weights=weights, parallel=parallel)
        result = generate(settings, f"{folder}/{parallel}-{rank}")
        clips = [run.sampled.output for run in result.runs]
        sent = [run.summary and run.summary.traffic for run in result.runs]
        found[parallel] = {"clips": clips, "ranks": result.ranks, "sent": sent, "files": result.files}
    size = ("--size", "17x32x48", "--argument", "clean_prompt=false", "--weights", weights)
    named = ("--model", model, *size, *ASKED, "--out", f"{folder}/cli-{rank}")
    for name, options in (("table", ("--parallel", "auto", "--compare")), ("wrong", ("--parallel", "1x3"))):
        done = pab(*named, *options)
        found[name] = done.exit_code, done.stdout, done.stderr
    done = pab(
        "--model", f"{folder}/wan", *ASKED, "--size", "5x16x16", "--parallel", "2x1", "--out", f"{folder}/wan-out"
    )
    found["not batched"] = done.exit_code, done.stdout, done.stderr
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    save_pipeline("wan", folder / "wan")
    weights = save("open-sora-1.2", folder / "weights")
    return run_on(2, on_rank, "open-sora-1.2", str(weights), str(folder))


def test_the_first_rank_has_the_clip_of_one_process(ranks: list[dict[str, Any]]) -> None:
    first, second = ranks
    (expected,) = first["none"]["clips"]
    for parallel, shape in (("1x2", (1, 2)), ("2x1", (2, 1))):
        (clip,), (sent,) = first[parallel]["clips"], first[parallel]["sent"]
        torch.testing.assert_close(clip, expected, rtol=1e-4, atol=1e-4)
        assert first[parallel]["ranks"] == second[parallel]["ranks"] == shape and sent.total.bytes > 0
        assert second[parallel]["clips"] == []


def test_the_first_rank_alone_writes_and_reports(ranks: list[dict[str, Any]], folder: Path) -> None:
    for parallel in ("1x2", "2x1"):
        assert [path.name for path in ranks[0][parallel]["files"]] == ["pab.mp4", "schedule.png", "results.json"]
        assert ranks[1][parallel]["files"] == () and not (folder / f"{parallel}-1").exists()
    code, stdout, _ = ranks[0]["table"]
    assert code == 0 and stdout.startswith("OpenSoraPipeline, float32, ") and "2 ranks (2x1)" in stdout
    data = json.loads((folder / "cli-0" / "results.json").read_text())
    assert data["ranks"] == {"cfg": 2, "sequence": 1} and [run["key"] for run in data["runs"]] == ["off", "pab"]
    assert ranks[1]["table"] == (0, "", "") and not (folder / "cli-1").exists()


def test_ranks_that_do_not_fit_are_refused_on_all(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        code, stdout, stderr = found["wrong"]
        assert (code, stdout) == (2, "") and "got cfg=1 and sequence=3, 3 ranks, but 2 are running" in stderr
        code, stdout, stderr = found["not batched"]
        assert (code, stdout) == (2, "") and "use pab.parallelize(..., cfg=1)" in stderr


def test_without_torchrun_one_line_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    done = pab("--model", "demo", "--prompt", "a red circle", "--parallel", "auto", "--out", tmp_path / "out")
    assert done.exit_code == 2 and done.stdout == "" and not (tmp_path / "out").exists()
    assert done.stderr.startswith(
        "pab: parallel=auto needs processes that torchrun starts: torchrun --nproc-per-node 8 "
    )
