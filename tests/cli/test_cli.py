from __future__ import annotations

import io
import json
import sys

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("diffusers")
pytest.importorskip("skimage")
pytest.importorskip("imageio")
pytest.importorskip("imageio_ffmpeg")
pytest.importorskip("PIL")
pytest.importorskip("matplotlib")

from typer.testing import CliRunner

from pab_kernels import cli, demo
from pab_kernels.models.demo.pipeline import SCHEDULERS
from pab_kernels.models.demo.shapes import VOCABULARY

# diffusers' schedulers hand tensors to numpy in a way that numpy 2.4 says is deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.usefixtures("measured_once"),
]


def pab(*arguments: str):
    return CliRunner().invoke(cli.build_app(), list(arguments), env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


def test_help_names_every_option_scheduler_and_word():
    result = pab("demo", "--help")
    assert result.exit_code == 0
    options = ("--prompt", "--clips", "--seed", "--steps", "--ranges", "--scheduler", "--device", "--out", "--json")
    words = [word for words in VOCABULARY.values() for word in words]
    for wanted in (*options, *SCHEDULERS, *words):
        assert wanted in result.output


def test_without_arguments_it_shows_the_commands():
    assert "demo" in pab().output and "--version" in pab("--help").output


def test_version(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: f"1.2.3 of {name}")
    result = pab("--version")
    assert result.exit_code == 0 and result.output == "pab-kernels 1.2.3 of pab-kernels\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--scheduler", "magic"],
            "the demo model has no scheduler 'magic'; it has ddim, dpm++, pndm, heun, euler, unipc",
        ),
        (
            ["--ranges", "2,x,6"],
            "--ranges takes spatial,temporal,cross[,mlp] as whole numbers such as 2,4,6, got '2,x,6'",
        ),
        (["--ranges", "2,4"], "ranges must be three or four whole numbers"),
        (["--ranges", "0,4,6"], "got 0,4,6"),
        (["--prompt", "a red banana"], "the demo model does not know the word 'banana'; it knows colour: red"),
        (["--prompt", "a red red circle"], "the prompt names two words for colour"),
        (["--steps", "0"], "steps must be at least 2, got 0"),
        (["--clips", "0"], "--clips must be at least 1, got 0"),
        (["--device", "abacus"], "device 'abacus' cannot be used here"),
    ],
)
def test_wrong_arguments_give_one_clear_line_and_exit_code_2(arguments: list[str], message: str, tmp_path):
    result = pab("demo", "--out", str(tmp_path / "out"), *arguments)
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith("pab: ") and message in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_unknown_option_is_refused():
    assert pab("demo", "--speed", "9").exit_code == 2


def test_an_out_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    result = pab("demo", "--out", str(tmp_path / "file"))
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and "file" in result.stderr


@pytest.mark.parametrize("package", ["diffusers", "matplotlib", "imageio_ffmpeg", "rich"])
def test_a_missing_package_gives_one_line_that_says_what_to_install(package: str, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    result = pab("demo")
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert (
        f"pab demo needs the package {package}" in result.stderr and "pip install 'pab-kernels[demo]'" in result.stderr
    )


def test_without_typer_the_script_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1 and "needs the package typer" in capsys.readouterr().err


def test_a_tiny_run_writes_every_file_and_prints_the_table(tmp_path):
    result = pab("demo", "--steps", "12", "--clips", "1", "--device", "cpu", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {
        "clips.gif",
        "clips.mp4",
        "schedule-balanced.png",
        "schedule-fast.png",
        "schedule-pab246.png",
        "results.json",
    }
    for name in files:
        assert str(tmp_path / name) in result.stdout
    for wanted in (
        "no PAB",
        "PAB balanced",
        "PAB fast",
        "PAB 2/4/6",
        "diffusers 2/4/6",
        "8+4",
        "speed-up",
        "PSNR, dB",
        "MiB kept",
        "1.00x",
    ):
        assert wanted in result.stdout


def test_json_prints_the_results_alone(monkeypatch, tmp_path):
    every = demo.variants
    monkeypatch.setattr(demo, "variants", lambda settings: every(settings)[:2])
    result = pab(
        "demo",
        "--steps",
        "2",
        "--prompt",
        "a blue bar",
        "--device",
        "cpu",
        "--json",
        "--seed",
        "3",
        "--out",
        str(tmp_path),
    )
    data = json.loads(result.stdout)
    assert data == json.loads((tmp_path / "results.json").read_text())
    assert data["prompts"] == ["a blue bar"] and data["seeds"] == [3]
    assert str(tmp_path / "clips.gif") in result.stderr


def test_prompts_are_taken_in_turn_for_more_clips(monkeypatch, tmp_path):
    seen = []

    def stop(settings: demo.DemoSettings, progress: object) -> None:
        seen.append(settings)
        raise ValueError("enough")

    monkeypatch.setattr(demo, "run_demo", stop)
    pab("demo", "--prompt", "a red circle", "--prompt", "a blue bar", "--clips", "3", "--out", str(tmp_path))
    assert seen[0].prompts == ("a red circle", "a blue bar", "a red circle")
    pab("demo", "--clips", "2", "--out", str(tmp_path))
    assert seen[1].prompts == demo.PROMPTS[:2]


@pytest.mark.parametrize("finished", [0, 1])
def test_ctrl_c_reports_what_is_finished(finished: int, monkeypatch, tmp_path):
    whole = demo.run_demo

    def interrupted(settings: demo.DemoSettings, progress: object) -> demo.DemoResult:
        def stop(title: str, done: int, todo: int) -> None:
            if done > 2 * finished:
                raise KeyboardInterrupt

        return whole(settings, stop)

    monkeypatch.setattr(demo, "run_demo", interrupted)
    result = pab("demo", "--steps", "2", "--clips", "1", "--device", "cpu", "--out", str(tmp_path))
    assert result.exit_code == 130 and "interrupted" in result.stderr
    assert ("no PAB" in result.stdout) is bool(finished) and (tmp_path / "results.json").exists() is bool(finished)


@pytest.mark.parametrize(("width", "first"), [(132, "run"), (80, "run"), (80, "spatial")])
def test_the_table_fits_its_terminal(width: int, first: str):
    import torch
    from rich.console import Console

    from pab_kernels.analysis.quality.comparison import Closeness, Comparison
    from pab_kernels.analysis.sampling import Peak, Sampled
    from pab_kernels.cli.demo import results_table
    from pab_kernels.rules.plan import Counts

    counts = dict.fromkeys(demo.COUNTED_KINDS, Counts(computed=33, reused=17))
    closeness = [Closeness(psnr, ssim, None, None, None) for psnr, ssim in ((31.2, 0.951), (33.1, 0.972))]
    quality = tuple(Comparison("A", "B", 8, 8, total, ()) for total in closeness)
    sampled = Sampled(torch.zeros(2, 8, 3, 8, 8), 10.0, Peak(), None)
    runs = [
        demo.DemoRun(v, 29, 50, sampled, 100, counts, 2**20, 2, quality if v.key != "full" else ())
        for v in demo.variants(demo.DemoSettings())
    ]
    console = Console(width=width, record=True, file=io.StringIO(), color_system=None)
    console.print(results_table(demo.DemoResult(demo.DemoSettings(), tuple(runs), False, {}, "a device"), width))
    text = console.export_text()
    assert "…" not in text and max(map(len, text.splitlines())) <= width
    assert text.count("33+17") == len(runs) * len(demo.COUNTED_KINDS) and text.count("32.1±1.3") == len(runs) - 1
    assert any(line.split()[:1] == [first] for line in text.splitlines())
