"""`pab compare` as a user calls it, with wrong arguments, missing files and Ctrl-C.

And what all commands have in common.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("skimage")
pytest.importorskip("matplotlib")

from typer.testing import CliRunner

from pab_kernels import cli
from pab_kernels.analysis.quality import comparison

COMMANDS = ("demo", "generate", "plan", "analyze", "compare", "doctor")


def pab(*arguments: object) -> Any:
    return CliRunner().invoke(
        cli.build_app(), list(map(str, arguments)), env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    )


@pytest.fixture
def clips(tmp_path: Path) -> tuple[Path, Path]:
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        np.save(tmp_path / f"{name}.npy", rng.random((3, 3, 16, 16)))
    return tmp_path / "a.npy", tmp_path / "b.npy"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_that_says_what_it_does(command: str) -> None:
    result = pab(command, "--help")
    assert result.exit_code == 0 and f" {command} [OPTIONS]" in result.output
    assert "--json" in result.output and "Show this message" in result.output
    assert command in pab("--help").output


def test_the_table_is_printed(clips: tuple[Path, Path]) -> None:
    result = pab("compare", *clips, "--no-lpips")
    assert result.exit_code == 0 and result.stderr == ""
    lines = result.stdout.splitlines()
    assert lines[:3] == [f"A  {clips[0]}", f"B  {clips[1]}", "3 frame(s) of 16 x 16"]
    assert [line.split()[0] for line in lines[4:]] == ["frame", "0", "1", "2", "total"]


def test_json_is_printed_alone(clips: tuple[Path, Path]) -> None:
    result = pab("compare", *clips, "--json", "--no-lpips")
    data = json.loads(result.stdout)
    assert data == comparison.compare(*clips, lpips=False).to_dict() and data["a"] == str(clips[0])


def test_without_a_package_for_lpips_a_line_says_so(clips: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("lpips", "torchmetrics"):
        monkeypatch.setitem(sys.modules, package, None)
    assert (
        pab("compare", *clips)
        .stdout.splitlines()[-1]
        .startswith("note: LPIPS was not measured: neither the package lpips")
    )
    refused = pab("compare", *clips, "--lpips")
    assert (
        refused.exit_code == 1
        and refused.stderr.startswith("pab: LPIPS cannot be measured: neither")
        and refused.stdout == ""
    )


def test_the_picture_is_drawn(clips: tuple[Path, Path], tmp_path: Path) -> None:
    assert pab("compare", *clips, "--plot", tmp_path / "curve.png").exit_code == 0
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.npy", "missing.mp4"], "pab: there is no file or folder missing.mp4"),
        (["a.npy", "."], "pab: the folder . holds no images; supported are .png"),
        (["a.npy", "notes.txt"], "pab: notes.txt ends in .txt; supported are folders of images and .mp4"),
        (
            ["a.npy", "a.npy", "--values", "0"],
            "pab: --values takes two numbers, black and white, such as 0,1 or -1,1, got '0'",
        ),
        (["a.npy", "a.npy", "--values", "1,0"], "pab: values must be two numbers, black below white, got (1.0, 0.0)"),
        (["a.npy", "a.npy", "--plot", "curve.doc"], "pab: curve.doc cannot be drawn; supported endings are"),
        (["a.npy", "a.npy", "--plot", "none/curve.png"], "pab: there is no folder none for curve.png; make it first"),
        (["a.npy", "long.npy"], "pab: a.npy has 3 frame(s) and long.npy has 4; the numbers must agree"),
        (["a.npy", "large.npy"], "pab: a.npy has frames of 16 x 16 and large.npy of 16 x 20"),
    ],
)
def test_wrong_arguments_give_one_clear_line_and_exit_code_2(
    arguments: list[str], message: str, clips: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(clips[0].parent)
    Path("notes.txt").write_text("")
    np.save("long.npy", np.zeros((4, 3, 16, 16)))
    np.save("large.npy", np.zeros((3, 3, 16, 20)))
    result = pab("compare", *arguments)
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith(message) and len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("arguments", [[], ["a.npy"], ["a.npy", "b.npy", "c.npy"], ["a.npy", "b.npy", "--speed"]])
def test_missing_and_unknown_arguments_are_refused(arguments: list[str]) -> None:
    assert pab("compare", *arguments).exit_code == 2


def test_ctrl_c_is_one_line(clips: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = comparison.compare

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        def stop(done: int, todo: int) -> None:
            raise KeyboardInterrupt

        return whole(*args, **kwargs | {"progress": stop})

    monkeypatch.setattr(comparison, "compare", interrupted)
    result = pab("compare", *clips, "--no-lpips")
    assert (
        result.exit_code == 130 and result.stdout == "" and result.stderr.strip().splitlines() == ["pab: interrupted"]
    )


def test_ctrl_c_while_the_picture_is_drawn_keeps_the_table(
    clips: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison.Comparison, "plot", interrupted)
    result = pab("compare", *clips, "--no-lpips", "--plot", clips[0].with_name("curve.png"))
    assert result.exit_code == 130 and result.stdout.splitlines()[-1].startswith("total")
    assert result.stderr.strip().splitlines()[-1] == "pab: interrupted"


@pytest.mark.parametrize("package", ["rich", "skimage"])
def test_a_missing_package_gives_one_line(
    package: str, clips: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    app = cli.build_app()
    monkeypatch.setitem(sys.modules, package, None)
    result = CliRunner().invoke(app, ["compare", *map(str, clips)])
    assert result.exit_code == 1 and result.stderr.startswith(
        f"pab: pab compare needs the package {package}, which is not installed"
    )


def test_the_script_runs_as_a_process(clips: tuple[Path, Path]) -> None:
    """And ends with the command's status; one that succeeds is run by test_generate.py."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    script = [sys.executable, "-c", "from pab_kernels.cli import main; main()", "compare"]
    missing = subprocess.run([*script, clips[0], "missing.npy"], env=env, capture_output=True, text=True)
    assert missing.returncode == 2 and missing.stderr.strip() == "pab: there is no file or folder missing.npy"


def test_pab_doctor_prints_the_doctor_s_report() -> None:
    text, data = pab("doctor"), pab("doctor", "--json")
    assert text.exit_code == data.exit_code == 0
    assert text.stdout.startswith("python") and json.loads(data.stdout)["operations"]["attention"]["reference"] is None
    assert pab("doctor", "--speed").exit_code == 2
