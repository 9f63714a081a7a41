"""`pab generate` as a user calls it: table, JSON, files, wrong arguments, missing files, Ctrl-C."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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

from typer.testing import CliRunner

import pab_kernels.generate as generate_module
from pab_kernels import PABConfig, cli
from tests.tiny_pipelines import save

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def pab(*arguments: object) -> Any:
    app = cli.build_app()
    return CliRunner().invoke(
        app, ["generate", *map(str, arguments)], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "pixart"
    save("pixart", folder)
    return folder


@pytest.fixture
def asked(model: Path, tmp_path: Path) -> list[object]:
    return ["--model", model, "--prompt", "a red circle", "--steps", 3, "--device", "cpu", "--out", tmp_path / "out"]


def test_the_table_the_summary_and_the_files_are_printed(asked: list[object], tmp_path: Path) -> None:
    result = pab(
        *asked,
        "--compare",
        "--pab",
        "pab246",
        "--size",
        "256x256",
        "--seed",
        3,
        "--negative-prompt",
        "a",
        "--guidance",
        2,
        "--budget",
        "1GiB",
        "--cache-device",
        "cpu",
    )
    assert result.exit_code == 0, result.output
    assert result.stderr == "" and "budget 1.00 GiB, " in result.stdout
    lines = result.stdout.splitlines()
    assert lines[0].startswith("PixArtSigmaPipeline, float32, ") and [line.split()[:2] for line in lines[4:6]][0] == [
        "no",
        "PAB",
    ]
    assert lines[5].split()[0] == "PAB" and lines[5].split()[-1] == "pab.png" and "1.00x" in lines[4]
    assert any(line.startswith("3 steps, ") for line in lines) and any(line.startswith("context #0") for line in lines)
    written = [Path(line) for line in lines if line.startswith(str(tmp_path))]
    assert {path.name for path in written} == {"off.png", "pab.png", "side-by-side.png", "schedule.png", "results.json"}
    assert all(path.stat().st_size > 100 for path in written)
    data = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (data["seed"], data["negative_prompt"], data["guidance"], data["size"]) == (3, "a", 2.0, [256, 256])


def test_json_is_printed_alone(asked: list[object], tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(PABConfig(cross=2).to_dict()))
    result = pab(
        *asked, "--pab", config, "--dtype", "bfloat16", "--timed", "--argument", "num_images_per_prompt=2", "--json"
    )
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data == json.loads((tmp_path / "out" / "results.json").read_text()) and data["dtype"] == "bfloat16"
    assert data["runs"][0]["config"]["cross"] == PABConfig(cross=2).to_dict()["cross"] and len(data["runs"]) == 1
    assert data["runs"][0]["summary"]["contexts"]["#0"]["cross"]["seconds"] > 0
    assert data["further"] == {"num_images_per_prompt": 2} and str(tmp_path / "out" / "pab.png") in result.stderr


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--model", "missing"], "pab: there is no folder missing"),
        (["--model", "."], "pab: . is not a diffusers pipeline: it has no model_index.json"),
        (["--model", "owner/never-fetched", "--local-files-only"], "pab: owner/never-fetched could not be loaded"),
        (["--pab", "missing.yaml"], "pab: there is no file missing.yaml"),
        (["--pab", "pab999"], "pab: there is no preset 'pab999'"),
        (["--pab", "bad.json"], "pab: bad.json: "),
        (["--pab", "off", "--compare"], "pab: compare, timed, cuda_graphs, budget and cache_device need PAB"),
        (
            ["--cache-device", "disk"],
            "pab: cache_device 'disk' is not known",
        ),
        (["--budget", "much"], "pab: got budget='much'; supported are a number of bytes"),
        (["--size", "large"], "pab: --size takes frames x height x width such as 49x480x720"),
        (["--size", "8"], "pab: --size takes frames x height x width"),
        (["--size", "4x64x64"], "pab: PixArtSigmaPipeline takes no num_frames; leave it out"),
        (["--argument", "image"], "pab: --argument takes NAME=VALUE"),
        (["--argument", "image=b.png"], "pab: PixArtSigmaPipeline takes no image; leave it out"),
        (["--steps", "0"], "pab: steps must be at least 1, got 0"),
        (["--dtype", "int4"], "pab: dtype 'int4' is not supported"),
        (["--device", "abacus"], "pab: device 'abacus' cannot be used here"),
        (["--offload", "disk"], "pab: offload 'disk' is not supported; supported are none, model, sequential"),
        (["--fps", "0"], "pab: fps must be from 0.001 to 1000, got 0"),
        (["--out", "bad.json"], "pab: "),
    ],
)
def test_wrong_arguments_give_one_clear_line_and_exit_code_2(
    changed: list[str], message: str, asked: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.json").write_text("{")
    result = pab(*asked, *changed)
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith(message) and len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out" / "off.png").exists()


@pytest.mark.parametrize(
    "arguments", [[], ["--model", "demo"], ["--prompt", "a"], ["--model", "demo", "--prompt", "a", "--speed"]]
)
def test_missing_and_unknown_arguments_are_refused(arguments: list[str]) -> None:
    assert pab(*arguments).exit_code == 2


@pytest.mark.parametrize(("during", "kept"), [("no PAB", []), ("PAB", ["off.png"])])
def test_ctrl_c_keeps_the_finished_runs_and_says_so(
    during: str, kept: list[str], asked: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = generate_module.generate

    def interrupted(settings: Any, out: Any, progress: Any) -> Any:
        def stop(title: str, done: int, todo: int | None) -> None:
            progress(title, done, todo)
            if title == during:
                raise KeyboardInterrupt

        return whole(settings, out, stop)

    monkeypatch.setattr(generate_module, "generate", interrupted)
    result = pab(*asked, "--compare", "--pab", "pab246")
    assert result.exit_code == 130
    assert result.stderr.splitlines() == [
        f"interrupted: {len(kept)} of 2 runs are finished and kept in {tmp_path / 'out'}"
    ]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [*kept, "results.json"]
    assert json.loads((tmp_path / "out" / "results.json").read_text())["interrupted"] is True
    assert ("no PAB" in result.stdout) is bool(kept)


def test_the_script_runs_as_a_process_and_is_silent_but_for_its_report(asked: list[object], tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    script = [sys.executable, "-W", "ignore", "-c", "from pab_kernels.cli import main; main()", "generate"]
    done = subprocess.run(
        [*script, *map(str, asked), "--pab", "pab246", "--json"], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0 and [run["key"] for run in json.loads(done.stdout)["runs"]] == ["pab"]
    assert done.stderr.splitlines() == [
        str(tmp_path / "out" / name) for name in ("pab.png", "schedule.png", "results.json")
    ]
