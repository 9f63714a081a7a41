"""`pab analyze` as a user calls it: a folder, the demo model, wrong arguments, Ctrl-C."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("yaml")

import diffusers
from typer.testing import CliRunner

from pab_kernels import PABConfig, cli
from pab_kernels.rules.formats import load_config
from tests.analysis.tiny_dit import tiny_dit

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

FILES = {"analysis.json", "start.yaml", "curves.png", "layers.png"}


def pab(*arguments: object) -> Any:
    return CliRunner().invoke(
        cli.build_app(), list(map(str, arguments)), env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dit")
    tiny_dit().save_pretrained(path)
    return path


def test_a_folder_is_analysed_and_everything_written(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    result = pab("analyze", "--model", folder, "--steps", 10, "--argument", "class_labels=[1]", "--out", out)
    assert result.exit_code == 0, result.output
    assert "DiTTransformer2DModel, 10 steps" in result.stdout and "spatial" in result.stdout and "mlp" in result.stdout
    assert "written in" in result.stderr and {p.name for p in out.iterdir()} == FILES
    data = json.loads((out / "analysis.json").read_text())
    assert (
        data["complete"]
        and data["num_steps"] == 10
        and {s["kind"] for s in data["sublayers"]} == {"spatial", "mlp", "block"}
    )
    assert load_config(out / "start.yaml") == PABConfig.from_dict(data["start"]["config"])


def test_json_is_printed_and_plots_are_left_out(folder: Path, tmp_path: Path) -> None:
    result = pab(
        "analyze",
        "--model",
        folder,
        "--steps",
        4,
        "--json",
        "--no-plot",
        "--argument",
        "class_labels=[1]",
        "--out",
        tmp_path,
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == json.loads((tmp_path / "analysis.json").read_text())
    assert not list(tmp_path.glob("*.png"))


def test_the_demo_model_has_a_prompt_of_its_own(tmp_path: Path) -> None:
    result = pab("analyze", "--model", "demo", "--steps", 3, "--no-plot", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "LatteTransformer3DModel, 3 steps" in result.stdout and "temporal" in result.stdout


def test_an_interrupted_run_keeps_what_was_measured_and_says_so(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, steps = diffusers.DDIMScheduler.step, []

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        steps.append(None)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(diffusers.DDIMScheduler, "step", step)
    result = pab("analyze", "--model", folder, "--steps", 8, "--argument", "class_labels=[1]", "--out", tmp_path)
    assert result.exit_code == 130
    assert "interrupted: the steps measured until then are in" in result.stderr and result.stderr.endswith(
        "pab: interrupted\n"
    )
    assert "interrupted" in result.stdout
    data = json.loads((tmp_path / "analysis.json").read_text())
    assert not data["complete"] and data["start"] is None
    assert [v is not None for v in data["curves"]["spatial"]["mse"]] == [False, True, True, *[False] * 5]
    assert {p.name for p in tmp_path.iterdir()} == FILES - {"start.yaml"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "nothing"), "there is no folder nothing"),
        (
            ("--model", "FOLDER"),
            "DiTPipeline needs class_labels; give it (--prompt TEXT or --argument NAME=VALUE)",
        ),
        (("--model", "FOLDER", "--prompt", "x"), "DiTPipeline takes no prompt; leave it out. It takes class_labels"),
        (
            ("--model", "FOLDER", "--argument", "class_labels"),
            "--argument takes NAME=VALUE such as height=256, got 'class_labels'",
        ),
        (("--model", "demo", "--steps", "2"), "--steps must be at least 3"),
        (("--model", "demo", "--dtype", "int8"), "--dtype is float32, bfloat16 or float16, got 'int8'"),
        (("--model", "demo", "--device", "toaster"), "device 'toaster' cannot be used here: "),
        (("--model", "FOLDER", "--device", "cpu:3:4"), "device 'cpu:3:4' cannot be used here: "),
        (("--model", "demo", "--prompt", "a castle"), "does not know the word 'castle'"),
        (("--model", "demo", "--out", "FILE"), "File exists"),
    ],
)
def test_wrong_arguments_get_one_line(arguments: tuple[str, ...], message: str, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    given = [{"FOLDER": str(folder), "FILE": str(file)}.get(a, a) for a in arguments]
    result = pab("analyze", *given, *([] if "--out" in given else ["--out", tmp_path / "out"]))
    assert result.exit_code == 2
    assert message in result.stderr and result.stderr.startswith("pab: ") and result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_model_is_required() -> None:
    result = pab("analyze")
    assert result.exit_code == 2 and "--model" in result.stderr
