"""The doctor never fails, says why what does not work does not, and needs nothing but Python."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pab_kernels import doctor as doctor_module
from pab_kernels.doctor import NO_KERNEL, doctor
from pab_kernels.ops import backend, cuda_library
from tests.ops.tensors import parts

ROOT = Path(__file__).parents[1]


def _run(*arguments: str, code: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """`python -m pab_kernels.doctor` in a process of its own, after `code`."""
    run = "runpy.run_module('pab_kernels.doctor', run_name='__main__')"
    script = f"import runpy, sys\n{code}\nsys.argv = ['doctor', *{list(arguments)!r}]\n{run}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)


def test_the_report_has_versions_devices_backends_extension_and_cache() -> None:
    report = doctor()
    assert report.packages["torch"] == metadata.version("torch") and report.torch.startswith(torch.__version__)
    assert report.devices[0].startswith("cpu: ") and len(report.devices) >= 1 + torch.cuda.device_count()
    assert report.operations.keys() == backend.IMPLEMENTATIONS.keys()
    for op, served in report.operations.items():
        assert served["auto"] in backend.IMPLEMENTATIONS[op] and served["reference"] is None
        assert set(served) == {"auto", *backend.BACKENDS}
        assert all(
            (served[name] == NO_KERNEL) == (name not in backend.IMPLEMENTATIONS[op]) for name in backend.BACKENDS
        )
        assert not any("cannot be loaded" in (served[name] or "") for name in backend.BACKENDS)
    assert json.loads(json.dumps(report.to_dict()))["operations"] == report.operations


def test_the_text_fits_a_screen_and_names_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    text = str(doctor())
    headings = (
        "python",
        "torch",
        "packages",
        "missing",
        "devices",
        "extension",
        "triton cache",
        "environment",
        "operation",
    )
    for heading in (*headings, *backend.IMPLEMENTATIONS, *backend.BACKENDS, "TRITON_INTERPRET=1"):
        assert any(line.startswith(heading) or f" {heading}" in line for line in text.splitlines()), heading
    assert len(text.splitlines()) <= 40


def test_the_calls_that_backends_are_asked_about_are_calls_that_they_take() -> None:
    calls = doctor_module._sample_calls("cpu", torch.float32)
    assert calls.keys() == backend.IMPLEMENTATIONS.keys()
    for op, call in calls.items():
        call.check(op)
        outputs = backend.implementation(op, "reference", call).compute(call)
        assert all(t.float().isfinite().all() for t in parts(outputs))


def _with_triton(monkeypatch: pytest.MonkeyPatch, refusal: Any) -> Any:
    """The report where every operation has a Triton kernel whose module behaves like `refusal`."""

    def load(op: str, name: str) -> Any:
        if name == "triton" and isinstance(refusal, Exception):
            raise refusal
        return SimpleNamespace(refusal=refusal if name == "triton" else lambda call: None)

    monkeypatch.setattr(backend, "IMPLEMENTATIONS", dict.fromkeys(backend.IMPLEMENTATIONS, ("reference", "triton")))
    monkeypatch.setattr(backend, "load", load)
    return doctor()


@pytest.mark.parametrize(
    ("refusal", "reason"),
    [
        (
            lambda call: backend.refuse_device(torch.empty(1, device="cpu"), False),
            "Triton kernels run on CUDA devices, and on the CPU",
        ),
        (ModuleNotFoundError("no", name="triton"), "it needs the package triton, which is not installed"),
        (RuntimeError("0 active\ndrivers"), "it cannot be loaded: 0 active drivers"),
    ],
)
def test_a_backend_that_cannot_serve_says_why(refusal: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    report = _with_triton(monkeypatch, refusal)
    assert all(served["triton"].startswith(reason) for served in report.operations.values())
    text = str(report)
    assert text.count("no [1]") == len(report.operations) and f"[1] {reason}" in text and text.count(reason) == 1


def test_a_backend_that_serves_is_a_yes(monkeypatch: pytest.MonkeyPatch) -> None:
    report = _with_triton(monkeypatch, lambda *_: None)
    assert all(served["triton"] is None for served in report.operations.values())
    assert str(report).count("  yes  ") >= len(report.operations)


def test_the_cache_of_compiled_kernels_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "kernel.cubin").write_bytes(bytes(2**20))
    (tmp_path / "kernel.json").write_bytes(bytes(2**19))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    cache = doctor().cache
    assert (cache.path, cache.files, cache.bytes, cache.problem) == (str(tmp_path), 2, 2**20 + 2**19, None)
    assert f"{tmp_path}: 2 files, 1.5 MiB" in str(doctor())


def test_the_cache_lies_where_triton_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("TRITON_HOME", str(tmp_path))
    cache = doctor().cache
    assert cache.path == str(tmp_path / ".triton" / "cache") and cache.problem == "there is none yet"
    knobs = pytest.importorskip("triton.knobs", exc_type=ImportError)
    assert cache.path == knobs.cache.dir


def test_compiled_kernels_are_described_or_it_is_said_why_there_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = {
        "missing": None,
        "archs": ["80", "90a"],
        "nvcc": "13.0.88",
        "torch_target": "2.10",
        "torch_headers": "2.13.0",
        "commit": "c0ffee",
    }
    (tmp_path / "_host.so").touch()
    monkeypatch.setattr(cuda_library, "PACKAGE", tmp_path)
    monkeypatch.setattr(cuda_library, "build_info", lambda: info)
    monkeypatch.setattr(cuda_library, "load", lambda: None)
    kernels, planners = doctor().extension
    assert (
        all(word in kernels for word in ("loaded", "80, 90a", "13.0.88", "2.10", "2.13.0", "c0ffee"))
        and "_host.so" in planners
    )
    (tmp_path / "_host.so").unlink()
    monkeypatch.setattr(cuda_library, "load", lambda: "nvcc was not found")
    assert doctor().extension == ("none: nvcc was not found",) and "extension     none: nvcc was not found" in str(
        doctor()
    )


@pytest.mark.parametrize("name", ["_version", "_torch_build", "_devices", "_operations", "_extension", "_triton_cache"])
def test_whatever_breaks_is_a_problem_and_not_an_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise OSError("out\nof order")

    monkeypatch.setattr(doctor_module, name, broken)
    report = doctor()
    assert report.problems and all(problem.endswith(": out of order") for problem in report.problems)
    assert f"problem: {report.problems[0]}" in str(report)
    json.dumps(report.to_dict())


def test_warnings_are_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    monkeypatch.setattr(doctor_module, "_devices", lambda: warnings.warn("the driver is too old", stacklevel=1) or ())
    assert doctor().problems == ("devices: the driver is too old",)


# As a user runs it

_ALONE = """
absent = "typer rich diffusers transformers skimage matplotlib imageio PIL safetensors yaml triton"
for name in absent.split():
    sys.modules[name] = None
"""


def test_it_runs_with_torch_alone() -> None:
    done = _run(code=_ALONE)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("python") and "broadcast_residual" in done.stdout


def test_it_runs_without_torch() -> None:
    done = _run("--json", code=_ALONE + "sys.modules['torch'] = None")
    data = json.loads(done.stdout)
    assert done.returncode == 0 and done.stderr == ""
    assert (
        data["torch"] == "cannot be imported"
        and data["operations"] == {}
        and any("torch" in p for p in data["problems"])
    )


def test_its_output_is_plain_text_whatever_the_terminal(tmp_path: Path) -> None:
    (tmp_path / "Zwischenspeicher-für-Kerne").mkdir()
    done = _run(TRITON_CACHE_DIR=str(tmp_path / "Zwischenspeicher-für-Kerne"), PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and done.stdout.isascii() and "\x1b" not in done.stdout


def test_an_unknown_option_is_refused() -> None:
    done = _run("--speed")
    assert done.returncode == 2 and "unrecognized arguments: --speed" in done.stderr


def test_help_says_what_it_does() -> None:
    done = _run("--help")
    assert done.returncode == 0 and "--json" in done.stdout and "Show what is installed" in done.stdout
