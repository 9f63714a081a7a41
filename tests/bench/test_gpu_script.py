"""`bench/gpu.sh` and what it runs, without a GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import sanitize
from bench.__main__ import OPS, cases
from bench.geometries import GEOMETRIES
from bench.record import read
from pab_kernels.ops.short_attention.cuda import HEAD_DIMS

SCRIPT = Path(sanitize.__file__).with_name("gpu.sh")

STUB = """#!/bin/sh
case "$*" in
  *get_device_name*) echo "NVIDIA Test GPU" ;;
  *xdist*|*diffusers*) exit 1 ;;
  *"--op attention"*) echo "this one breaks"; exit 3 ;;
  *bench.parts*) cat > "$3" ;;
  *) echo "ran: $*" ;;
esac
"""

TIMEOUT = """#!/bin/sh
# In place of coreutils' timeout: a part of this name takes too long, on any machine.
echo "limit: $2"
case "$*" in *"--op project_residual"*) exit 124 ;; esac
shift 2
exec "$@"
"""

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")


def _run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments], env={**os.environ, **variables}, capture_output=True, text=True
    )


def test_it_parses_and_can_be_executed():
    assert subprocess.run(["bash", "-n", str(SCRIPT)]).returncode == 0
    assert os.access(SCRIPT, os.X_OK)


def test_parts_are_listed_and_groups_expanded():
    parts = _run("--list").stdout.split()
    tests = {"tests_ops", "tests_kernels", "tests_csrc", "tests_graphs", "ctest", "fuzz"}
    assert set(parts) >= {
        "build",
        *tests,
        "memcheck",
        "racecheck",
        "initcheck",
        "synccheck",
        "determinism",
        "denoiser",
        "end_to_end",
        "ranks",
        *OPS,
    }
    assert len(set(parts)) == len(parts)
    assert _run("--list", "bench", "memcheck").stdout.split() == [*OPS, "memcheck"]
    assert "bench/gpu.sh --list" in _run("--help").stdout


def test_an_unknown_part_is_refused():
    done = _run("tests", "everything")
    assert done.returncode == 2 and "part 'everything' is unknown" in done.stderr


@pytest.fixture
def stub(tmp_path):
    path = tmp_path / "python"
    path.write_text(STUB)
    path.chmod(0o755)
    return {"PYTHON": str(path), "OUT": str(tmp_path / "out"), "PATH": f"{tmp_path}:{os.environ['PATH']}"}


def test_a_part_that_fails_does_not_stop_the_others_and_is_told(stub, tmp_path):
    done = _run("tests_ops", "attention", "short_attention", "denoiser", **stub)
    assert done.returncode == 1
    ended = {line.split()[0]: line for line in done.stdout.splitlines() if line}
    assert "passed" in ended["tests_ops"] and "passed" in ended["short_attention"]
    assert "failed (3)" in ended["attention"] and "this one breaks" in ended["attention"]
    assert "missing" in ended["denoiser"]
    assert (tmp_path / "out" / "gpu.log").read_text().count("== ") == 4
    kept = (tmp_path / "out" / "gpu-nvidia-test-gpu.jsonl").read_text().splitlines()
    assert [line.split("\t")[0] for line in kept] == ["tests_ops", "attention", "short_attention", "denoiser"]


def test_a_part_that_takes_too_long_is_ended(stub, tmp_path):
    (tmp_path / "timeout").write_text(TIMEOUT)
    (tmp_path / "timeout").chmod(0o755)
    done = _run("project_residual", "tests_kernels", **stub, LIMIT="4321")
    assert done.returncode == 1 and "time's up" in done.stdout and done.stdout.count("passed") == 1
    assert (tmp_path / "out" / "gpu.log").read_text().count("limit: 4321") == 2


def test_parts_for_which_no_time_is_left_are_skipped(stub):
    done = _run("tests", **stub, TOTAL="5")
    assert done.returncode == 1 and done.stdout.count("skipped") == 6 and "passed" not in done.stdout


def test_without_compute_sanitizer_the_part_says_so_and_the_rest_goes_on(stub):
    if shutil.which("compute-sanitizer") or list(Path("/usr/local").glob("cuda*/bin/compute-sanitizer")):
        pytest.skip("compute-sanitizer is here")
    done = _run("memcheck", "short_attention", **stub)
    assert done.returncode == 0 and "compute-sanitizer is neither on PATH" in done.stdout


def test_without_a_gpu_it_says_so(stub):
    path = Path(stub["PYTHON"])
    path.write_text("#!/bin/sh\n")
    done = _run("bench", **stub)
    assert done.returncode == 1 and "no CUDA device" in done.stderr


@pytest.fixture
def sanitized(monkeypatch, tmp_path):
    def run(*arguments: str):
        path = tmp_path / "rows.jsonl"
        monkeypatch.setattr(sys, "argv", ["sanitize", *arguments, "--device", "cpu", "--json", str(path)])
        return sanitize.main(), read([path])

    return run


def test_every_operation_with_every_option_gives_the_same_bits_again(sanitized):
    status, rows = sanitized("--geometry", "tiny,odd-joint", "--backend", "reference", "--dtype", "bfloat16,float32")
    assert status == 0 and {row["op"] for row in rows} == set(OPS)
    assert {row["status"] for row in rows} == {"ok"}


def test_every_kind_of_kernel_of_short_attention_is_under_the_sanitizer():
    """One warp with 16 or 32 rows, and four with 64, which share memory."""
    served = [GEOMETRIES[name] for name in sanitize.SMALL if GEOMETRIES[name].head_dim in HEAD_DIMS]
    rows = {16 if g.frames <= 16 else 32 if g.frames <= 32 else 64 for g in served if g.factorised}
    assert rows == {16, 32, 64}


def test_a_backend_that_serves_nothing_has_not_passed(sanitized, capsys):
    status, rows = sanitized("--geometry", "tiny", "--op", "attention", "--backend", "flash_attn")
    assert status == 1 and {row["status"] for row in rows} == {"unavailable"}
    assert "served no case of attention" in capsys.readouterr().err


def test_cuda_kernels_that_were_not_compiled_are_left_out(sanitized, capsys, monkeypatch):
    monkeypatch.setattr(
        sanitize.cuda_library, "load", lambda: "this installation has no CUDA kernels: nvcc was not found"
    )
    given = ("--geometry", "tiny", "--op", "broadcast_residual")
    status, rows = sanitized(*given, "--backend", "reference,cuda")
    assert status == 0 and {row["backend"] for row in rows} == {"reference"}
    assert "backend 'cuda' is left out: this installation has no CUDA kernels" in capsys.readouterr().err
    assert sanitized(*given, "--backend", "cuda")[0] == 1, "nothing was run"
    monkeypatch.setattr(sanitize.cuda_library, "load", lambda: None)
    status, _ = sanitized(*given, "--backend", "cuda")
    assert status == 1 and "backend 'cuda' served no case of broadcast_residual" in capsys.readouterr().err


def test_other_bits_are_found():
    case = next(cases(["broadcast_residual"], ["tiny"], torch.float32))
    calls = []

    def unsteady(self):
        def run(inputs):
            calls.append(1)
            return None, torch.full_like(inputs["x"], 1 + 1e-7 * (len(calls) == 3))

        return run

    (candidate,) = (c for c in case.candidates if c.name == "pab reference")
    object.__setattr__(candidate, "make", lambda: unsteady(None))
    found = sanitize.repeated(case, "reference", 5, torch.device("cpu"), 0, True)
    assert found == {"status": "failed", "reason": "run 2 gave other bits than run 0"}
