"""`python -m bench.end_to_end`: the original writing, the published PAB, and the counts of a run."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

import pab_kernels as pab
from bench import end_to_end
from bench.counts import counted, launches_and_waits
from bench.end_to_end import Inputs, Setup, denoise, measure, prepared, table
from bench.record import read
from bench.stdit3_original import OriginalSTDiT3
from pab_kernels.ops.flops import attention_flops, linear_flops
from tests.adapters.tiny_stdit3 import HEADS, conditions, noise, text, tiny_stdit3

STEPS, DEPTH, WIDTH, TEXT = 30, 1, 64, 6
TINY = Setup(
    {"hidden_size": WIDTH, "num_heads": 2, "depth": DEPTH, "caption_channels": 8, "model_max_length": TEXT},
    (17, 32, 40),
)
"""5 latent frames of 4 x 5, padded to 2 x 3 patches."""
TOKENS = 2 * 5 * 6
OUTPUTS = 2 * DEPTH * TOKENS * WIDTH * 4
"""Bytes of an output of every block."""
CPU = torch.device("cpu")


def rows(*names: str, steps: int = STEPS) -> list[dict[str, Any]]:
    ticks = itertools.count()
    (found,) = measure(TINY, ["original", *names], steps, 1, CPU, torch.float32, lambda: float(next(ticks)))
    return found


@pytest.mark.parametrize(("frames", "size"), [(3, (5, 7)), (1, (4, 4)), (7, (2, 3))], ids=str)
def test_the_original_and_ours_agree_in_float64(frames: int, size: tuple[int, int]) -> None:
    """One frame and more frames than places, and texts of unequal and of equal lengths, on both kinds of attention."""
    ours = tiny_stdit3(torch.float64)
    original, given = OriginalSTDiT3(ours.state_dict(), HEADS), conditions(dtype=torch.float64)
    x, y = noise(frames=frames, size=size, dtype=torch.float64), text(dtype=torch.float64)
    timestep = torch.tensor([900.3, 12.7], dtype=torch.float64)
    for mask in (given["mask"], given["mask"][:1]):
        told = given | {"mask": mask}
        torch.testing.assert_close(
            original(x, timestep, y, x_mask=None, **told), ours(x, timestep, y, **told), atol=1e-6, rtol=1e-6
        )


def test_the_published_pab_is_the_preset_of_ours() -> None:
    given = Inputs.drawn(TINY, STEPS, CPU, torch.float64)
    original, published, ours = (
        denoise(prepared(name, given.weights, TINY, STEPS), given)
        for name in ("original", "original, published PAB", "ours, open-sora-1.2")
    )
    torch.testing.assert_close(published, ours, atol=1e-6, rtol=1e-6)
    assert (published - original).abs().max() > 1e-3, "PAB changes the latents"


def test_a_second_generation_of_the_published_pab_repeats_the_first() -> None:
    given = Inputs.drawn(TINY, STEPS, CPU, torch.float64)
    pipe = prepared("original, published PAB", given.weights, TINY, STEPS)
    assert torch.equal(denoise(pipe, given), denoise(pipe, given))


def _flops_of_original() -> int:
    """Of one step, but for those of the MLPs of timestep, fps and text."""
    c, real = WIDTH, TEXT * 2 // 3
    embedders = linear_flops(TOKENS, 16, c) + linear_flops(TOKENS, c, 32) + linear_flops(2, c, 6 * c)
    embedders += 3 * (linear_flops(1, 256, c) + linear_flops(1, c, c))  # two timesteps and one fps
    embedders += linear_flops(2 * TEXT, 8, c) + linear_flops(2 * TEXT, c, c)
    block = sum(linear_flops(TOKENS, *shape) for shape in ((c, 3 * c), (c, c), (c, c), (c, c), (c, 4 * c), (4 * c, c)))
    block += linear_flops(2 * real, c, 2 * c) + attention_flops(2, 2, 30, real, c // 2)
    return embedders + 2 * block + attention_flops(10, 2, 6, 6, c // 2) + attention_flops(12, 2, 5, 5, c // 2)


def test_counts_of_the_original_are_what_the_shapes_give() -> None:
    original, published = rows("original, published PAB")
    assert original["flops"] == STEPS * _flops_of_original()
    assert original["waits"] == STEPS * 4 and published["waits"] == STEPS * (4 + 2 * DEPTH * 3)
    assert published["cache_bytes"] == 3 * OUTPUTS, "attention, cross attention and an MLP of each block"
    assert original["cache_bytes"] == 0 and original["psnr"] is None and 20 < published["psnr"] < 100
    _reduced(published, original)
    assert rows("original, published PAB") == [original, published], "the same again"
    assert original["ratio"] == published["ratio"] == 1, "the clock counted its calls"


@pytest.mark.parametrize(("config", "steps", "slots"), [("open-sora-1.2", STEPS, 3), ("block 2", 12, 1)])
def test_counts_of_ours_are_what_the_shapes_give(config: str, steps: int, slots: int) -> None:
    _, plain, under_pab = rows("ours", f"ours, {config}", steps=steps)
    assert plain["waits"] == 0 and under_pab["waits"] == 3, "the schedule, once a generation"
    text_of_all = 2 * DEPTH * 2 * TEXT * 2 * WIDTH * 4
    assert plain["cache_bytes"] == 0 and under_pab["cache_bytes"] == slots * OUTPUTS + text_of_all
    assert plain["psnr"] > 100
    _reduced(under_pab, plain)


def _reduced(less: dict[str, Any], full: dict[str, Any]) -> None:
    for count in ("flops", "launches", "bytes_moved"):
        assert 0 < less[count] < full[count]
    assert less["peak_bytes"] > full["peak_bytes"] > 0


@pytest.mark.flops
def test_flops_of_ours_are_those_of_the_summary() -> None:
    given = Inputs.drawn(TINY, STEPS, CPU, torch.float32)
    pipe = prepared("ours, fast", given.weights, TINY, STEPS)
    _, row = counted(lambda: denoise(pipe, given), True, given.weights)
    assert row["flops"] == pab.summary(pipe).flops


def test_operations_bytes_and_reads_are_counted() -> None:
    x = torch.randn(3, 4)

    def run() -> Tensor:
        y = x.t().reshape(-1).view(2, 6) + 1  # a copy and an addition
        y.mul_(2)
        return y * float(y.sum())

    _, row = counted(run, True, {"x": x})
    assert row["launches"] == 5 and row["waits"] == 1 and row["flops"] == 0
    assert row["bytes_moved"] == 4 * (24 + 24 + 12 + 13 + 24)
    assert counted(run, False, {"x": x})[1] == dict.fromkeys(row), "nothing of compiled code"


def test_calls_of_cuda_are_launches_or_waits() -> None:
    calls = {"cudaLaunchKernel": 5, "cudaLaunchKernelExC": 2, "cuLaunchKernel": 3, "cudaGraphLaunch": 1}
    calls |= {"cudaStreamSynchronize": 4, "cudaDeviceSynchronize": 1, "cudaMemcpyAsync": 7, "void kernel<float>": 9}
    assert launches_and_waits(calls) == {"launches": 11, "waits": 4}


def test_the_ladder_says_what_was_measured() -> None:
    original = rows()[0] | {"ratio": 1.0, "seconds": 2.5}
    lines = list(table([original, original | {"row": "ours, open-sora-1.2", "ratio": 2.02, "waits": None}]))
    assert "2.500" in lines[1] and len(lines) == 4 + len(end_to_end.LADDER) and "17x32x40" in lines[3]
    rungs = {line[:58].strip(): line[58:] for line in lines[4:]}
    assert rungs["published schedule on fused operations"] == "2.02x measured, 2.17x modelled"
    assert rungs["every third block"] == "2.99x modelled" and len(rungs) == len(end_to_end.LADDER)
    assert {name for *_, name in end_to_end.LADDER if name is not None} <= end_to_end.VARIANTS.keys()


def test_the_command_writes_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    monkeypatch.setattr(end_to_end, "SMALL", TINY)
    given = ["--device", "cpu", "--steps", "12", "--repeats", "2", "--rows", "ours, pab246", "--out", str(path)]
    monkeypatch.setattr(sys, "argv", ["end_to_end", *given])
    end_to_end.main()
    original, ours = read([path])
    assert (original["row"], ours["row"]) == ("original", "ours, pab246") and ours["size"] == "17x32x40"
    assert original["ratio"] == 1 and ours["repeats"] == 2 and {"device", "commit", "command"} <= ours.keys()
    assert "the ladder" in capsys.readouterr().out.lower()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--rows", "ours; theirs"], "'theirs' does not run here"),
        (["--rows", "ours, CUDA graphs"], "does not run here"),
        (["--size", "480p"], "got '480p'; small, or frames x height x width"),
        (["--size", "4x480x854"], "got '4x480x854'"),
        (["--repeats", "0"], "must be at least 1"),
    ],
    ids=str,
)
def test_what_cannot_run_is_refused(
    given: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["end_to_end", "--device", "cpu", *given])
    with pytest.raises(SystemExit):
        end_to_end.main()
    assert said in capsys.readouterr().err


def test_help_names_the_rows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["end_to_end", "--help"])
    with pytest.raises(SystemExit):
        end_to_end.main()
    shown = " ".join(capsys.readouterr().out.split())
    assert all(name in shown for name in end_to_end.VARIANTS) and "51x480x854" in shown
