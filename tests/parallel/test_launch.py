"""How the processes that torchrun starts share a pipeline: what is chosen, what is refused, and two programs whole."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("imageio_ffmpeg")
pytest.importorskip("skimage")
pytest.importorskip("matplotlib")

import diffusers
import torch
import torch.distributed as dist

from pab_kernels.models.open_sora_plan.pipelines import OpenSoraPlan11Pipeline, OpenSoraPlan12Pipeline
from pab_kernels.parallel.launch import ONE_BATCH, in_one_batch, is_first, joined, shape_of, ways_for
from tests.models.tiny_open_sora import tiny_pipe
from tests.parallel.processes import run_on
from tests.tiny_pipelines import cogvideox, latte, pixart, wan

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "two_ranks.py"


@pytest.mark.parametrize(("text", "shape"), [("none", None), ("auto", None), ("1x8", (1, 8)), ("2x4", (2, 4))])
def test_a_way_to_share_is_read(text: str, shape: tuple[int, int] | None) -> None:
    assert shape_of(text) == shape


@pytest.mark.parametrize("text", ["", "8", "3x2", "2x0", "x", "2x4x1", "Auto"])
def test_no_other_way_is(text: str) -> None:
    with pytest.raises(ValueError, match="parallel must be auto, none, or branches of guidance x parts of the"):
        shape_of(text)


def test_guidance_is_shared_first_and_heads_divide() -> None:
    assert ways_for(4, latte(), {}) == [(2, 2), (1, 4)]
    assert ways_for(3, latte(), {}) == [(1, 3)]
    assert ways_for(4, cogvideox(), {}) == [(2, 2)] and ways_for(6, cogvideox(), {}) == []  # it has two heads
    assert ways_for(1, wan(), {}) == [(1, 1)] and ways_for(2, wan(), {}) == [(1, 2)]


def test_both_branches_are_in_one_batch_only_with_guidance() -> None:
    for pipe, batched in ((tiny_pipe(), True), (pixart(), True), (wan(), False)):
        assert in_one_batch(pipe, {}) == in_one_batch(pipe, {"guidance_scale": 3.0}) == batched
        assert not in_one_batch(pipe, {"guidance_scale": 1.0})
    assert not in_one_batch(tiny_pipe(), {"cfg": "apart"})
    for kind in (OpenSoraPlan11Pipeline, OpenSoraPlan12Pipeline):
        assert ONE_BATCH & {base.__name__ for base in kind.__mro__}


def test_pipelines_of_diffusers_are_told_apart_as_their_code_does() -> None:
    for name in sorted(ONE_BATCH - {"OpenSoraPipeline"}):
        assert "torch.cat([latents] * 2)" in inspect.getsource(getattr(diffusers, name)), name


def joins(parallel: str, device: str | None) -> str | None:
    with joined(parallel, device) as found:
        return found


def test_one_process_keeps_its_device_and_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    assert joins("none", "cuda:1") == "cuda:1" and is_first("none") and not is_first("auto")


def test_what_torchrun_did_not_start_is_told_how_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(
        ValueError, match="parallel=2x4 needs processes that torchrun starts: torchrun --nproc-per-node"
    ):
        joins("2x4", "cpu")


def test_processes_of_torchrun_that_would_all_do_the_same_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="torchrun started 2 processes, which would all do the same"):
        joins("none", None)


@pytest.mark.parametrize(
    ("device", "gpus", "message"),
    [
        ("cuda:1", 8, "got device 'cuda:1'; ranks run on cpu, or on cuda, each on the GPU of its LOCAL_RANK"),
        (
            "cuda",
            2,
            "local rank 2 has no GPU: this machine has 2; start one process for each .torchrun --nproc-per-node",
        ),
    ],
)
def test_a_rank_without_a_gpu_is_refused(device: str, gpus: int, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "2", "LOCAL_RANK": "2", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(device_count=lambda: gpus))
    with pytest.raises(ValueError, match=message):
        joins("auto", device)


def test_torchrun_starts_pab_and_the_first_rank_alone_reports_and_writes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    asked = ["--model", "demo", "--prompt", "a red circle moves right", "--size", "8x32x32", "--steps", 2]
    options = ["--pab", "off", "--device", "cpu", "--parallel", "auto", "--out", "out", "--json"]
    command += ["-m", "pab_kernels", "generate", *map(str, asked), *options]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ranks"] == {"cfg": 2, "sequence": 1} and found["parallel"] == "auto"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["off.mp4", "results.json"]


def example(rank: int, port: int, folder: str) -> str:
    """What the example prints on a rank, which finds the others as torchrun's processes do."""
    dist.destroy_process_group()
    set_by_torchrun = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost"}
    set_by_torchrun |= {"MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    printed, before = io.StringIO(), Path.cwd()
    with (
        mock.patch.dict(os.environ, {name: str(value) for name, value in set_by_torchrun.items()}),
        mock.patch.object(sys, "argv", [str(EXAMPLE), "2"]),
        contextlib.redirect_stdout(printed),
    ):
        os.chdir(folder)
        runpy.run_path(str(EXAMPLE), run_name="__main__")
        os.chdir(before)
    return printed.getvalue()


def test_the_example_for_a_users_own_script_runs(tmp_path: Path) -> None:
    if not EXAMPLE.is_file():
        pytest.skip("the examples are not here")
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    first, second = run_on(2, example, store.port, str(tmp_path))
    assert first.count("sent by this rank: ") == 1 and first.endswith("two_ranks.gif\n") and second == ""
    assert (tmp_path / "two_ranks.gif").stat().st_size > 100
