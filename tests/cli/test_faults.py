"""What users and machines get wrong, in every command: one line, status 1 or 2, and what was measured is kept."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("skimage")
pytest.importorskip("imageio_ffmpeg")
pytest.importorskip("matplotlib")
pytest.importorskip("yaml")

from typer.testing import CliRunner

from pab_kernels import cli, demo
from pab_kernels.analysis import load_pipeline, study
from pab_kernels.analysis.differences.study import Analysis
from pab_kernels.analysis.quality.clips import read_clip

pytestmark = [
    pytest.mark.usefixtures("measured_once"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings(
        "ignore::pytest.PytestUnraisableExceptionWarning"
    ),  # imageio's reader leaves a pipe to the collector
]

MANY = "1" + "0" * 30
LONG = "n" * 5000


def pab(*arguments: object) -> Any:
    return CliRunner().invoke(
        cli.build_app(), list(map(str, arguments)), env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    )


def _given(folder: Path) -> None:
    """Files that are not what their names say."""
    (folder / "pipe").mkdir()
    for name in ("deep.json", "pipe/model_index.json"):
        (folder / name).write_text("[" * 10**5)
    np.save(folder / "a.npy", np.random.default_rng(0).random((2, 3, 16, 16)))
    whole = (folder / "a.npy").read_bytes()
    (folder / "cut.npy").write_bytes(whole[:-9])
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (99999999, 3, 999, 999), }".ljust(117) + b"\n"
    (folder / "lies.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    for name in ("tensor.png", "tensor.mp4", "tensor.gif", "tensor.pt", "tensor.safetensors", "tensor.json"):
        (folder / name).write_bytes(whole)
    np.save(folder / "nan.npy", np.full((2, 3, 16, 16), np.nan))
    os.mkfifo(folder / "fifo.mp4")
    os.mkfifo(folder / "fifo.json")
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "loop.mp4").symlink_to("loop.mp4")
    (folder / "folder.png").mkdir()
    (folder / "neg.json").write_text('{"_class_name": "WanTransformer3DModel", "num_attention_heads": -3}')
    (folder / "nan.json").write_text('{"_class_name": "WanTransformer3DModel", "ffn_dim": NaN}')


GENERATE = ("generate", "--model", "demo", "--prompt", "a red circle")
SCHEDULE = ("plan", "--config", "pab246", "--steps")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*SCHEDULE, MANY), f"--steps must be at most 10,000, got {MANY}"),
        (("plan", "--model", "latte", "--steps", MANY), f"--steps must be at most 10,000, got {MANY}"),
        (("plan", "--model", "latte", "--batch", MANY), f"batch must be at most 1,000,000, got {MANY}"),
        (("plan", "--model", "latte", "--text", MANY), f"text must be at most 1,000,000, got {MANY}"),
        (("plan", "--model", "latte", "--size", f"16x512x{MANY}"), f"width must be at most 1,000,000, got {MANY}"),
        (
            ("plan", "--model", "neg.json", "--size", "5x32x48", "--steps", 3),
            "neg.json: WanTransformer3DModel does not take this config",
        ),
        (
            ("plan", "--model", "nan.json", "--size", "5x32x48", "--steps", 3),
            "nan.json is not JSON: NaN is not a number of JSON",
        ),
        (("plan", "--model", "deep.json"), "deep.json is not JSON: it is nested too deep"),
        (("plan", "--model", "fifo.json"), "fifo.json is a pipe, a device or a socket, not a file"),
        (("plan", "--model", f"{LONG}/config.json"), "there is no nnn"),
        (("plan", "--model", ""), "no file can be named ''"),
        ((*SCHEDULE, 9, "--plot", f"{LONG}.png"), "File name too long"),
        ((*SCHEDULE, 9, "--plot", "folder.png"), "folder.png is a folder, not a file"),
        (("compare", "a.npy", f"{LONG}.mp4"), "there is no file or folder nnn"),
        (("compare", "fifo.mp4", "a.npy"), "fifo.mp4 is a pipe, a device or a socket, not a file"),
        (("compare", "zero.png", "a.npy"), "zero.png is a pipe, a device or a socket, not a file"),
        (
            ("compare", "loop.mp4", "a.npy"),
            "loop.mp4 cannot be read as mp4: [Errno 40] Too many levels of symbolic links",
        ),
        (("compare", "folder.png", "a.npy"), "the folder folder.png holds no images"),
        (("compare", "cut.npy", "a.npy"), "cut.npy cannot be read as npy: "),
        (("compare", "lies.npy", "a.npy"), "lies.npy "),
        (("compare", "nan.npy", "a.npy"), "nan.npy holds values that are not finite"),
        (("compare", "tensor.png", "a.npy"), "tensor.png cannot be read as png: cannot identify image file"),
        (("compare", "tensor.gif", "a.npy"), "tensor.gif cannot be read as gif: cannot identify image file"),
        (("compare", "tensor.mp4", "a.npy"), "tensor.mp4 cannot be read as mp4: "),
        (("compare", "tensor.pt", "a.npy"), "tensor.pt cannot be read as pt: "),
        (("compare", "tensor.safetensors", "a.npy"), "tensor.safetensors cannot be read as safetensors: "),
        (("compare", "tensor.json", "a.npy"), "tensor.json ends in .json; supported are folders of images"),
        (
            ("compare", "a.npy", "a.npy", "--values", "0,inf"),
            "values must be two numbers, black below white, got (0.0, inf)",
        ),
        (
            ("compare", "a.npy", "a.npy", "--values", "nan,1"),
            "values must be two numbers, black below white, got (nan, 1.0)",
        ),
        (("demo", "--steps", MANY), f"steps must be at most 10,000, got {MANY}"),
        (("demo", "--clips", MANY), f"--clips must be at most 1,000, got {MANY}"),
        (("demo", "--seed", MANY), f"seed must be a whole number that fits into 64 bits, got {MANY}"),
        (("demo", "--ranges", f"2,4,{MANY}"), f"range must be at most 2**63 - 1, got {MANY}"),
        (("demo", "--out", "a.npy/out"), "a.npy/out: Not a directory"),
        (("analyze", "--model", "demo", "--steps", MANY), f"--steps must be at most 10,000, got {MANY}"),
        (
            ("analyze", "--model", "demo", "--seed", f"-{MANY}"),
            f"seed must be a whole number that fits into 64 bits, got -{MANY}",
        ),
        (
            ("analyze", "--model", "demo", "--argument", "guidance_scale=NaN"),
            "--argument guidance_scale: NaN is not a number of JSON",
        ),
        (
            ("analyze", "--model", "demo", "--argument", "guidance_scale=1e999"),
            "--argument guidance_scale: 1e999 is not a number of JSON",
        ),
        (("analyze", "--model", "demo", "--argument", "x=" + "[" * 9999), "--argument x: it is nested too deep"),
        (("analyze", "--model", LONG), "there is no folder nnn"),
        ((*GENERATE, "--steps", MANY), f"steps must be at most 10,000, got {MANY}"),
        ((*GENERATE, "--seed", MANY), f"seed must be a whole number that fits into 64 bits, got {MANY}"),
        ((*GENERATE, "--guidance", "nan"), "guidance must be a finite number, got nan"),
        ((*GENERATE, "--fps", "nan"), "fps must be from 0.001 to 1000, got nan"),
        ((*GENERATE, "--fps", "inf"), "fps must be from 0.001 to 1000, got inf"),
        ((*GENERATE, "--fps", "1e-300"), "fps must be from 0.001 to 1000, got 1e-300"),
        ((*GENERATE, "--pab", "fifo.json"), "fifo.json is a pipe, a device or a socket, not a file"),
        ((*GENERATE, "--pab", "deep.json"), "deep.json: it is nested too deep"),
        ((*GENERATE, "--pab", LONG), "there is no preset 'nnn"),
        ((*GENERATE, "--model", "~nobody-of-this-name"), "there is no folder ~nobody-of-this-name"),
        ((*GENERATE, "--model", "pipe"), "pipe could not be loaded as a diffusers pipeline"),
        ((*GENERATE, "--device", LONG), "device 'nnn"),
    ],
    ids=lambda v: v if isinstance(v, str) else " ".join(map(str, v))[:60],
)
def test_what_was_given_is_refused_at_once(
    arguments: tuple[object, ...], message: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    _given(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    result = pab(*arguments)
    assert result.exit_code in (1, 2) and message in result.stderr and result.stderr.startswith("pab: ")
    assert result.stderr.count("\n") == 1 and len(result.stderr) < 1100 and sorted(tmp_path.rglob("*")) == before


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes the disk full after so many files."""

    def after(files: int) -> None:
        done = []

        def fsync(descriptor: int) -> None:
            done.append(descriptor)
            if len(done) > files:
                raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", fsync)

    return after


def _failed(result: Any, path: Path) -> None:
    assert result.exit_code == 1 and result.stderr == f"pab: {path}: No space left on device\n"


@pytest.mark.usefixtures("no_flops")
@pytest.mark.parametrize(
    ("files", "kept"),
    [
        (0, []),
        (1, ["results.json"]),
        (2, ["results.json"]),
        (4, ["off.mp4", "results.json"]),
        (6, ["off.mp4", "pab.mp4", "results.json"]),
        (7, ["off.mp4", "pab.mp4", "results.json"]),
        (8, ["off.mp4", "pab.mp4", "results.json", "schedule.png"]),
    ],
)
def test_generate_keeps_the_runs_and_every_file_is_whole(
    files: int, kept: list[str], full: Any, tmp_path: Path
) -> None:
    full(files)
    asked = (
        *GENERATE,
        "--size",
        "8x32x32",
        "--steps",
        2,
        "--guidance",
        3,
        "--compare",
        "--device",
        "cpu",
        "--out",
        tmp_path / "out",
    )
    result = pab(*asked)
    assert (
        result.exit_code == 1
        and result.stderr.endswith(": No space left on device\n")
        and result.stderr.count("\n") == 1
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == kept
    shown = [line.split() for line in result.stdout.splitlines()]
    assert sum(line[:2] == ["no", "PAB"] or line[:1] == ["PAB"] for line in shown) == (
        0 if files < 1 else 1 if files < 4 else 2
    )
    for name in kept:
        if name.endswith(".mp4"):
            assert read_clip(tmp_path / "out" / name).frames.shape == (8, 3, 32, 32)
    if kept:
        runs = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
        assert all(run["file"] is None or run["file"] in kept for run in runs)


@pytest.fixture(scope="module")
def sampled() -> demo.DemoResult:
    return demo.run_demo(demo.DemoSettings(demo.PROMPTS[:1], steps=2, device="cpu"))


@pytest.mark.parametrize("files", [0, 1, 3])
def test_demo_prints_what_it_cannot_write(
    files: int, full: Any, sampled: demo.DemoResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "run_demo", lambda settings, progress: sampled)
    full(files)
    result = pab("demo", "--steps", 2, "--clips", 1, "--device", "cpu", "--out", tmp_path)
    _failed(result, tmp_path / ("results.json", "clips.gif", "", "schedule-fast.png")[files])
    assert "PAB balanced" in result.stdout and "diffusers 2/4/6" in result.stdout
    assert [path.name for path in tmp_path.glob("*.json")] == ["results.json"] * bool(files)


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    pipe = load_pipeline("demo", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    clip = {"video_length": 8, "height": 32, "width": 32, "num_inference_steps": 8, "output_type": "latent"}
    return study.analyze(pipe, lambda: pipe("a red circle moves right at night", **clip))


@pytest.fixture
def analysed(analysis: Analysis, monkeypatch: pytest.MonkeyPatch) -> None:
    """`pab analyze` has measured already."""
    monkeypatch.setattr(study, "analyze", lambda *_, **__: analysis)


@pytest.mark.usefixtures("analysed")
@pytest.mark.parametrize(
    ("files", "name"), [(0, "analysis.json"), (1, "start.yaml"), (2, "curves.png"), (3, "layers.png")]
)
def test_analyze_prints_what_it_cannot_write(files: int, name: str, full: Any, tmp_path: Path) -> None:
    (tmp_path / name).write_text("of an earlier run")
    full(files)
    result = pab("analyze", "--model", "demo", "--steps", 8, "--device", "cpu", "--out", tmp_path)
    _failed(result, tmp_path / name)
    assert "LatteTransformer3DModel, 8 steps" in result.stdout and (tmp_path / name).read_text() == "of an earlier run"
    assert len(list(tmp_path.iterdir())) == files + 1


def test_compare_and_plan_print_what_they_cannot_draw(full: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.random.default_rng(0).random((2, 3, 16, 16)))
    full(0)
    compared = pab("compare", tmp_path / "a.npy", tmp_path / "a.npy", "--no-lpips", "--plot", tmp_path / "c.png")
    _failed(compared, tmp_path / "c.png")
    planned = pab("plan", "--config", "pab246", "--steps", 9, "--plot", tmp_path / "p.png")
    _failed(planned, tmp_path / "p.png")
    assert (
        "total" in compared.stdout and "9 steps" in planned.stdout and [p.name for p in tmp_path.iterdir()] == ["a.npy"]
    )


@pytest.mark.usefixtures("analysed")
def test_ctrl_c_while_analyze_writes_keeps_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    whole = Analysis.save

    def save(self: Analysis, path: str | Path) -> Path:
        os.kill(os.getpid(), signal.SIGINT)
        return whole(self, path)

    monkeypatch.setattr(Analysis, "save", save)
    result = pab("analyze", "--model", "demo", "--steps", 8, "--device", "cpu", "--out", tmp_path)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)
    assert result.exit_code == 130 and result.stderr.endswith("pab: interrupted\n") and "8 steps" in result.stdout
    assert {p.name for p in tmp_path.iterdir()} == {"analysis.json", "start.yaml", "curves.png", "layers.png"}


def test_ctrl_c_before_anything_is_measured_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise study.Interrupted(Analysis("Model", 0, None, False, ()))

    monkeypatch.setattr(study, "analyze", interrupted)
    result = pab("analyze", "--model", "demo", "--steps", 8, "--device", "cpu", "--out", tmp_path)
    assert (
        result.exit_code == 130
        and result.stderr == "pab: interrupted\n"
        and result.stdout == ""
        and not list(tmp_path.iterdir())
    )
