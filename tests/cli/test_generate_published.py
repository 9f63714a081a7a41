"""`pab generate` and `pab analyze` on the published models by name, from a prompt to a video, offline."""

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

from typer.testing import CliRunner

from pab_kernels import cli
from pab_kernels.analysis.quality.clips import read_clip
from tests.models.tiny_checkpoints import FOLDERS, save

pytestmark = [
    pytest.mark.usefixtures("no_flops"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # diffusers' schedulers
]

CLEAN = {"open-sora-1.2": "clean_prompt=false"}
"""Without the packages that clean prompts."""


def pab(*arguments: object) -> Any:
    environment = {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb", "HF_HUB_OFFLINE": "1"}
    return CliRunner().invoke(cli.build_app(), [*map(str, arguments)], env=environment)


@pytest.fixture(scope="module", params=FOLDERS)
def named(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, save(request.param, tmp_path_factory.mktemp("weights"))


def test_a_prompt_becomes_a_video_with_pab_and_without(named: tuple[str, Path], tmp_path: Path) -> None:
    model, weights = named
    argument = CLEAN.get(model, "clean_caption=false")
    size = "17x32x48"
    asked = ["--model", model, "--weights", weights, "--prompt", "a red circle", "--steps", 5, "--size", size]
    options = ["--device", "cpu", "--pab", "pab246", "--compare", "--out", tmp_path, "--json", "--argument", argument]
    result = pab("generate", *asked, *options)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    plain, ours = found["runs"]
    assert found["weights"] == str(weights) and ours["quality"]["total"]["psnr"] > 0
    (counted,) = ours["summary"]["contexts"].values()
    assert sum(kind["reused"] for kind in counted.values()) > 0
    for run in (plain, ours):
        clip = read_clip(tmp_path / run["file"])
        assert run["file"].endswith(".mp4") and clip.frames.shape == (17, 3, 32, 48)


def test_what_is_missing_is_said_in_one_line(named: tuple[str, Path], tmp_path: Path) -> None:
    model, weights = named
    (tmp_path / "transformer").symlink_to(weights / FOLDERS[model])
    asked = ["--model", model, "--prompt", "a red circle", "--device", "cpu", "--local-files-only"]
    result = pab("generate", *asked, "--weights", tmp_path, "--out", tmp_path / "out")
    assert result.exit_code == 2 and len(result.stderr.strip().splitlines()) == 1
    assert f"pab: {model} lacks its vae: no folder vae in {tmp_path}; it is published as " in result.stderr
    assert not (tmp_path / "out").exists()
    result = pab("generate", "--model", "demo", "--prompt", "a red circle", "--weights", tmp_path)
    assert result.exit_code == 2 and "weights are for published models by name (open-sora-1.2, " in result.stderr


def test_analyze_measures_them(named: tuple[str, Path], tmp_path: Path) -> None:
    model, weights = named
    argument = CLEAN.get(model, "clean_caption=false")
    asked = ["--model", model, "--weights", weights, "--prompt", "a red circle", "--steps", 4, "--device", "cpu"]
    sized = [item for name in ("height=32", "width=48", "num_frames=17", argument) for item in ("--argument", name)]
    result = pab("analyze", *asked, *sized, "--no-plot", "--out", tmp_path)
    assert result.exit_code == 0, result.stderr
    found = json.loads((tmp_path / "analysis.json").read_text())
    assert found["complete"] and {"spatial", "cross"} <= {sublayer["kind"] for sublayer in found["sublayers"]}
