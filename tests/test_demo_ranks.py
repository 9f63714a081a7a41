"""The demo on several ranks: equal clips, the bytes that PAB leaves out, and what it refuses."""

from __future__ import annotations

import json
from functools import partial
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

from torch.multiprocessing.spawn import start_processes
from typer.testing import CliRunner

from pab_kernels import cli
from tests.parallel.processes import forking


def pab(*arguments: object) -> Any:
    environment = {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    return CliRunner().invoke(cli.build_app(), ["demo", *map(str, arguments)], env=environment)


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks are forked, as their imports take longer than their runs; docs/commands.md starts some as users do."""
    start_method = forking().get_start_method()
    monkeypatch.setattr("pab_kernels.demo_ranks.spawn", partial(start_processes, start_method=start_method))


@pytest.mark.usefixtures("forked")
def test_two_ranks_have_the_clip_of_one_process_and_pab_sends_less(tmp_path: Path) -> None:
    done = pab("--ranks", 2, "--steps", 12, "--out", tmp_path)
    assert done.exit_code == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert any(line[:2] == ["no", "PAB"] and line[-1] == "same" for line in lines)
    assert done.stdout.endswith(f"{tmp_path / 'results.json'}\n")
    found = json.loads((tmp_path / "results.json").read_text())
    full, fast, paper = found["runs"]
    assert [run["key"] for run in found["runs"]] == ["full", "fast", "pab246"]
    assert all(run["difference"] == 0 for run in found["runs"])
    assert full["bytes_share"] == 1 and max(fast["bytes_share"], paper["bytes_share"]) < 1
    for run in (full, paper):
        traffic = run["traffic"]
        assert traffic["bytes_without"] == full["traffic"]["bytes"] and len(traffic["bytes_by_step"]) == 12
    assert min(paper["traffic"]["messages_by_step"]) == 1, (
        "a step that reuses temporal attention sends the output alone"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", 0], "pab: ranks must be from 2 to 4, as each has at least 2 of the 8 frames of a clip; got 0"),
        (["--ranks", 5], "pab: ranks must be from 2 to 4"),
        (["--ranks", 2, "--device", "meta"], "pab: ranks of the demo run on the CPU, got device 'meta'; leave it out"),
    ],
)
def test_what_several_ranks_cannot_do_is_refused(arguments: list[object], message: str, tmp_path: Path) -> None:
    done = pab(*arguments, "--out", tmp_path / "out")
    assert done.exit_code == 2 and done.stdout == "" and not (tmp_path / "out").exists()
    assert done.stderr.startswith(message) and len(done.stderr.strip().splitlines()) == 1


def test_windows_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pab_kernels.demo_ranks.sys.platform", "win32")
    done = pab("--ranks", 2, "--out", tmp_path)
    assert done.exit_code == 2 and done.stderr.startswith("pab: several ranks need torch.distributed with gloo")
