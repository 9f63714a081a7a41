"""`pab calibrate` as a user calls it: a folder, the demo model, wrong arguments, Ctrl-C."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("yaml")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from typer.testing import CliRunner

from pab_kernels import PABConfig, cli
from pab_kernels.analysis.calibration import calibrate as module
from pab_kernels.analysis.calibration.calibration import Interrupted
from pab_kernels.rules.formats import load_config
from tests.tiny_pipelines import save

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def pab(*arguments: object) -> Any:
    return CliRunner().invoke(
        cli.build_app(), list(map(str, arguments)), env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / "latte"
    save("latte", path)
    return path


def test_a_pipeline_is_calibrated_and_everything_written(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prompts = [f"--prompt=a red circle {word}" for word in ("moves", "right", "a")]
    asked = (
        "--steps",
        12,
        "--flops",
        0.7,
        "--most-generations",
        18,
        "--size",
        "4x32x32",
        "--guidance",
        2,
        "--out",
        out,
    )
    result = pab("calibrate", folder, *prompts, *asked)
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("calibrating costs at most 1") and "full generations of 12 steps" in result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("12 steps, ") and any(line.startswith("note: 3 prompt(s) for 7 clips") for line in lines)
    names = {"config.yaml", "report.json", "curve.png", "schedule.png", "worst.png"}
    assert {Path(line).name for line in lines if line.startswith(str(out))} == names
    report = json.loads((out / "report.json").read_text())
    assert load_config(out / "config.yaml") == PABConfig.from_dict(report["config"])
    assert report["verified"]["flops_share"] <= 0.7 and report["generations"] <= 18
    again = pab("calibrate", folder, *prompts, *asked, "--json")
    assert json.loads(again.stdout) == report, "from the generations that were kept"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--steps", "8"], "pab: num_steps must be a whole number of at least 12, got 8"),
        (["demo", "--floor", "30", "--speed", "2"], "pab: calibrate takes exactly one of floor, flops, seconds, speed"),
        (["demo", "--prompt", "a zebra"], "pab: "),
        (["demo", "--dtype", "int4"], "pab: --dtype is float32, bfloat16 or float16, got 'int4'"),
        (["demo", "--most-generations", "2"], "pab: calibrating for floor=35 takes at least"),
        (["missing/../folder"], "pab: --prompt is needed, at least once"),
        (["./missing", "--prompt", "a"], "pab: there is no folder ./missing"),
        (["FOLDER", "--prompt", "a", "--argument", "b=1"], "pab: LattePipeline takes no b; leave it out"),
    ],
)
def test_wrong_arguments_give_one_clear_line_and_exit_code_2(
    arguments: list[str], message: str, folder: Path, tmp_path: Path
) -> None:
    given = [str(folder) if a == "FOLDER" else a for a in arguments]
    result = pab("calibrate", *given, "--out", tmp_path / "out")
    assert result.exit_code == 2 and result.stdout == "", result.output
    assert result.stderr.splitlines()[-1].startswith(message)


def test_ctrl_c_says_where_the_finished_generations_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise Interrupted(3.5, 19.0, ())

    monkeypatch.setattr(module, "calibrate", interrupted)
    result = pab("calibrate", "demo", "--out", tmp_path)
    assert result.exit_code == 130
    assert result.stderr == (
        f"interrupted after 3.5 of 19.0 generations; they are kept in {tmp_path}: the same command goes on from there\n"
    )
