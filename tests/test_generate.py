"""Generating from checkpoints on disk: what is run, written and compared, and what stays after an interruption or an
error."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("skimage")
pytest.importorskip("imageio_ffmpeg")
pytest.importorskip("matplotlib")

from pab_kernels import PABConfig
from pab_kernels.analysis.pipeline_call import Wish
from pab_kernels.analysis.quality.clips import read_clip
from pab_kernels.generate import NotWritten, Result, Settings, generate
from pab_kernels.models.demo import pipeline as demo_pipeline
from pab_kernels.rules.formats import save_config
from tests.tiny_pipelines import PIPELINES, save

# diffusers' schedulers hand tensors to numpy in a way that numpy deprecates; imageio's reader leaves a pipe to the
# collector
pytestmark = [
    pytest.mark.usefixtures("measured_once"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in PIPELINES:
        save(name, folder / name)
    return folder


def asked(name: str, steps: int = 4, **options: Any) -> Wish:
    return Wish("a red circle", steps=steps, size=tuple(map(int, PIPELINES[name][1].split("x"))), **options)


@pytest.fixture(scope="module", params=PIPELINES)
def compared(
    request: pytest.FixtureRequest, checkpoints: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Result]:
    name, out = request.param, tmp_path_factory.mktemp("out") / "new"
    settings = Settings(str(checkpoints / name), asked(name), pab="pab246", compare=True, device="cpu", timed=True)
    return name, out, generate(settings, out)


def test_any_pipeline_is_run_without_pab_and_with_it(compared: tuple[str, Path, Result]) -> None:
    name, _, result = compared
    off, on = result.runs
    assert (off.key, off.config, off.summary, off.quality) == ("off", None, None, None) and not result.interrupted
    assert on.config == PABConfig.preset("pab246") and on.summary is not None and on.summary.forced == 0
    assert len(on.summary.contexts) == (2 if name == "wan" else 1)
    for kinds in on.summary.contexts.values():
        assert {"spatial", "mlp"} <= set(kinds) and kinds["spatial"].reused > 0 and kinds["mlp"].reused == 0
        assert all(tally.seconds is not None and tally.seconds > 0 for tally in kinds.values())
    assert on.quality is not None and 15 < on.quality.total.psnr < math.inf  # close, and not the same
    assert on.sampled.seconds > 0 and on.sampled.speedup(off.sampled) == off.sampled.seconds / on.sampled.seconds


def test_videos_images_and_figures_are_written(compared: tuple[str, Path, Result]) -> None:
    name, out, result = compared
    suffix = ".png" if name == "pixart" else ".mp4"
    assert {path.name for path in result.files} == {
        "off" + suffix,
        "pab" + suffix,
        "side-by-side" + suffix,
        "schedule.png",
        "results.json",
    }
    assert {path.name for path in out.iterdir()} == {path.name for path in result.files}
    for run in result.runs:
        clip = read_clip(run.file).frames
        frames = run.sampled.output
        assert clip.shape == tuple(frames.shape)
        difference = (torch.from_numpy(clip.astype("float32")) / 255 - frames).abs().mean()
        assert difference < (2 / 255 if suffix == ".png" else 0.25)  # H.264 halves the colours' resolution
    data = json.loads((out / "results.json").read_text(), parse_constant=pytest.fail)
    assert data == json.loads(json.dumps(result.to_dict()))
    assert (
        data["pipeline"] == PIPELINES[name][0]().__class__.__name__
        and data["prompt"] == "a red circle"
        and data["dtype"] == "float32"
    )
    assert data["interrupted"] is False and [run["file"] for run in data["runs"]] == ["off" + suffix, "pab" + suffix]
    off, on = data["runs"]
    assert off["speedup"] == 1 and on["quality"]["total"]["psnr"] > 15 and on["summary"]["contexts"]
    assert off["peak_memory_bytes"] is None or off["peak_memory_bytes"] > 2**20


def test_ranges_of_one_from_a_file_change_nothing(checkpoints: Path, tmp_path: Path) -> None:
    config = save_config(PABConfig(spatial=1, temporal=1, cross=1), tmp_path / "plain.yaml")
    seen: list[tuple[str, int, int | None]] = []
    settings = Settings(str(checkpoints / "latte"), asked("latte", 3), pab=str(config), compare=True, device="cpu")
    result = generate(settings, tmp_path, lambda *step: seen.append(step))
    assert torch.equal(result.runs[0].sampled.output, result.runs[1].sampled.output)
    assert result.runs[1].quality is not None and result.runs[1].quality.total.psnr == math.inf
    assert seen == [(title, done, 3) for title in ("warming up", "no PAB", "PAB") for done in (1, 2, 3)]
    assert json.loads((tmp_path / "results.json").read_text())["runs"][1]["quality"]["equal"] is True


def test_pab_auto_skips_the_model_and_off_is_the_pipeline_alone(checkpoints: Path, tmp_path: Path) -> None:
    auto = generate(Settings(str(checkpoints / "latte"), asked("latte", 2), device="cpu"), tmp_path / "auto")
    assert [run.key for run in auto.runs] == ["pab"] and auto.runs[0].config == PABConfig.preset("balanced")
    assert {path.name for path in auto.files} == {"pab.mp4", "schedule.png", "results.json"} and auto.runs[
        0
    ].quality is None
    assert json.loads((tmp_path / "auto" / "results.json").read_text())["runs"][0]["speedup"] is None
    off = generate(Settings(str(checkpoints / "latte"), asked("latte", 2), pab="off", device="cpu"), tmp_path / "off")
    assert [run.key for run in off.runs] == ["off"] and {path.name for path in off.files} == {"off.mp4", "results.json"}


def test_the_demo_model_in_a_folder_draws_what_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demo = demo_pipeline.load(device="cpu")
    demo.pipe.save_pretrained(tmp_path / "demo")
    prompt = "a red circle moves right at night"
    wish = Wish(prompt, steps=3, guidance=3.0, size=(8, 32, 32), seed=5)
    monkeypatch.delitem(
        sys.modules, "pab_kernels.models.demo.components"
    )  # as in a process that has not used the demo model
    result = generate(Settings(str(tmp_path / "demo"), wish, pab="off", device="cpu"), tmp_path)
    assert torch.equal(result.runs[0].sampled.output, demo.generate([prompt], [5], 3, 3.0)[0])


@pytest.mark.parametrize(("during", "finished"), [("warming up", []), ("no PAB", []), ("PAB", ["off"])])
def test_an_interruption_keeps_the_finished_runs(
    during: str, finished: list[str], checkpoints: Path, tmp_path: Path
) -> None:
    def interrupt(title: str, done: int, todo: int | None) -> None:
        if title == during and done == 2:
            raise KeyboardInterrupt

    settings = Settings(str(checkpoints / "pixart"), asked("pixart", 2), pab="pab246", compare=True, device="cpu")
    result = generate(settings, tmp_path, interrupt)
    assert result.interrupted and [run.key for run in result.runs] == finished and result.planned == 2
    data = json.loads((tmp_path / "results.json").read_text())
    assert data["interrupted"] is True and [run["key"] for run in data["runs"]] == finished
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", *(f"{key}.png" for key in finished)}


def test_an_interruption_on_a_full_disk_keeps_the_runs_in_memory(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def interrupt(title: str, done: int, todo: int | None) -> None:
        if title == "PAB":
            monkeypatch.setattr(os, "fsync", full)
            raise KeyboardInterrupt

    settings = Settings(str(checkpoints / "pixart"), asked("pixart", 2), pab="pab246", compare=True, device="cpu")
    with pytest.raises(NotWritten) as info:
        generate(settings, tmp_path, interrupt)
    assert info.value.errno == errno.ENOSPC and info.value.filename == str(tmp_path / "results.json")
    assert info.value.result.interrupted and [path.name for path in info.value.result.files] == ["off.png"]
    assert [run["file"] for run in json.loads((tmp_path / "results.json").read_text())["runs"]] == ["off.png"]


def test_an_error_in_a_later_run_keeps_the_first_and_says_so(checkpoints: Path, tmp_path: Path) -> None:
    def fail(title: str, done: int, todo: int | None) -> None:
        if title == "PAB":
            raise RuntimeError("out of memory\nand more of it")

    settings = Settings(str(checkpoints / "pixart"), asked("pixart", 2), pab="pab246", compare=True, device="cpu")
    with pytest.raises(ValueError) as info:
        generate(settings, tmp_path, fail)
    assert str(info.value) == f"PixArtSigmaPipeline failed: out of memory; kept in {tmp_path}: off.png"
    assert [run["key"] for run in json.loads((tmp_path / "results.json").read_text())["runs"]] == ["off"]


@pytest.mark.parametrize(
    ("name", "options", "wish", "message"),
    [
        ("pixart", {}, {"size": (4, 16, 16)}, "PixArtSigmaPipeline takes no num_frames; leave it out"),
        ("latte", {"pab": "open-sora-1.2"}, {}, None),
        ("wan", {"pab": "latte"}, {}, "cache_point 'post_gate' does not suit WanTransformer3DModel"),
        ("wan", {}, {"size": (5, 17, 16)}, "WanPipeline failed: `height` and `width` have to be divisible by 16"),
    ],
)
def test_what_does_not_suit_the_model_is_refused(
    name: str, options: dict[str, Any], wish: dict[str, Any], message: str | None, checkpoints: Path, tmp_path: Path
) -> None:
    settings = Settings(
        str(checkpoints / name),
        Wish("a red circle", steps=2, **{"size": asked(name).size, **wish}),
        device="cpu",
        **options,
    )
    out = tmp_path / "out"
    if message is None:
        assert generate(settings, out).runs
        return
    with pytest.raises(ValueError, match=message):
        generate(settings, out)
    ran = "failed" in message  # all else is refused before anything is run
    assert out.exists() is ran and (not ran or json.loads((out / "results.json").read_text())["runs"] == [])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Settings("demo", Wish("a"), pab="off", compare=True),
            "compare, timed, cuda_graphs, budget and cache_device need PAB; choose auto, a preset or a file",
        ),
        (
            lambda: Settings("demo", Wish("a"), pab="off", timed=True),
            "compare, timed, cuda_graphs, budget and cache_device need PAB",
        ),
        (
            lambda: Settings("demo", Wish("a"), pab="off", cuda_graphs=True),
            "cuda_graphs, budget and cache_device need PAB",
        ),
        (lambda: Settings("demo", Wish("a"), timed=True, cuda_graphs=True), "leave out timed or cuda_graphs"),
        (
            lambda: generate(Settings("demo", Wish("a"), device="cpu", cuda_graphs=True), "."),
            "CUDA graphs need a CUDA device, .* on cpu; leave",
        ),
        (lambda: Settings("demo", Wish("a"), pab="pab24"), "there is no preset 'pab24'; did you mean 'pab246'"),
        (
            lambda: Settings("demo", Wish("a"), dtype="int4"),
            "dtype 'int4' is not supported; supported are bfloat16, float16, float32",
        ),
        (lambda: Settings("demo", Wish("a"), fps=0), "fps must be from 0.001 to 1000, got 0"),
        (lambda: Wish("a", steps=0), "steps must be at least 1, got 0"),
        (
            lambda: Wish("a", size=(1, 2, 3, 4)),
            "frames x height x width or height x width, each at least 1; got 1x2x3x4",
        ),
        (lambda: Wish("a", size=(0, 8)), "each at least 1; got 0x8"),
        (lambda: generate(Settings("demo", Wish("a"), device="abacus"), "."), "device 'abacus' cannot be used here"),
        (
            lambda: generate(Settings("demo", Wish("a"), device="cpu", offload="all"), "."),
            "offload 'all' is not supported",
        ),
        (
            lambda: generate(Settings("demo", Wish("a"), device="cpu", offload="model"), "."),
            "needs a CUDA device, and the device is cpu; leave it out",
        ),
    ],
)
def test_bad_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
