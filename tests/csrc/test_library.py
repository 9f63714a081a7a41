"""The compiled library loads under any torch, and says what it cannot do."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib import import_module

import pytest
import torch

from pab_kernels import ops
from pab_kernels.ops import cuda_library
from pab_kernels.ops.backend import IMPLEMENTATIONS
from tests.ops.tensors import assert_refuses

NEEDED = (
    "libtorch.so",
    "libstdc++.so",
    "libm.so",
    "libgcc_s.so",
    "libc.so",
    "libdl.so",
    "librt.so",
    "libpthread.so",
    "ld-linux",
)

X = torch.zeros(2, 128)


@pytest.fixture
def built():
    missing = cuda_library.build_info()["missing"]
    if missing is not None:
        pytest.skip(f"there is no compiled library: {missing}")


@pytest.fixture
def fresh():
    """What was found out is forgotten, before and after."""
    caches = (cuda_library.build_info, cuda_library.load, cuda_library._refuse_device)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def test_it_loads_and_loading_it_again_changes_nothing(built):
    assert cuda_library.load() is None
    torch.ops.load_library(cuda_library.LIBRARY)
    for op in (op for op, has in IMPLEMENTATIONS.items() if "cuda" in has):
        import_module(f"pab_kernels.ops.{op}.cuda")
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"pab_kernels_cuda::{op}", "CUDA")


def test_it_loads_before_the_schemas_are_defined_and_after(built):
    """C++ registers implementations only; which side comes first is not to matter."""
    define = "import pab_kernels.ops.quantize.cuda"
    load = f"torch.ops.load_library({str(cuda_library.LIBRARY)!r})"
    there = "torch._C._dispatch_has_kernel_for_dispatch_key('pab_kernels_cuda::quantize', 'CUDA')"
    code = f"""
import os, torch
child = os.fork()  # importing torch a second time takes seconds
if child:
    {define}
    {load}
    assert os.waitpid(child, 0)[1] == 0, "the other order"
else:
    {load}
    {define}
assert {there}
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore:This process:DeprecationWarning", "-c", code],
        cwd=cuda_library.PACKAGE.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_it_needs_neither_cuda_nor_more_of_torch_than_every_torch_has(built):
    if shutil.which("readelf") is None:
        pytest.skip("there is no readelf")
    said = subprocess.run(["readelf", "-dW", cuda_library.LIBRARY], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", said)
    assert "libtorch.so" in needed and [name for name in needed if not name.startswith(NEEDED)] == []
    assert "RPATH" not in said and "RUNPATH" not in said


def test_tensors_on_the_cpu_are_refused_in_a_sentence(built):
    message = "backend 'cuda' cannot serve this call; CUDA kernels run on CUDA devices; the tensors are on cpu"
    assert_refuses(ops.BackendError, message, ops.quantize, X, torch.int8, backend="cuda")
    assert_refuses(
        ops.BackendError, message, ops.dequantize, ops.quantize(X, torch.int8), torch.float32, backend="cuda"
    )


def test_an_installation_without_kernels_says_what_the_build_lacked(fresh, monkeypatch, tmp_path):
    info = tmp_path / "_build_info.json"
    monkeypatch.setattr(cuda_library, "BUILD_INFO", info)
    message = (
        "this installation has no CUDA kernels: nothing was compiled in this source tree; `make extension` compiles "
        "them"
    )
    assert_refuses(ops.BackendError, message, ops.quantize, X, torch.int8, backend="cuda")
    cuda_library.build_info.cache_clear(), cuda_library.load.cache_clear()
    info.write_text(json.dumps({"missing": "nvcc was not found"}))
    assert_refuses(ops.BackendError, "no CUDA kernels: nvcc was not found", ops.quantize, X, torch.int8, backend="cuda")
    assert ops.quantize(X, torch.int8).data.sum() == 0, "auto does without"


def test_a_library_that_cannot_be_loaded_says_so(fresh, monkeypatch, tmp_path):
    (tmp_path / "_build_info.json").write_text(json.dumps({"missing": None, "archs": ["80"]}))
    monkeypatch.setattr(cuda_library, "BUILD_INFO", tmp_path / "_build_info.json")
    monkeypatch.setattr(cuda_library, "LIBRARY", tmp_path / "lost.so")
    assert_refuses(ops.BackendError, "the CUDA kernels cannot be loaded: ", ops.quantize, X, torch.int8, backend="cuda")


@pytest.mark.parametrize(
    ("arch", "capability", "expected"),
    [
        ("80", (8, 0), True),
        ("80", (8, 9), True),
        ("80", (9, 0), False),
        ("86", (8, 0), False),
        ("90a", (9, 0), True),
        ("100a", (10, 0), True),
        ("100a", (10, 3), False),
        ("100f", (10, 3), True),
        ("120", (12, 1), True),
        ("120", (10, 0), False),
    ],
)
def test_code_runs_on_the_devices_that_it_was_compiled_for(arch, capability, expected):
    assert cuda_library.runs(arch, capability) is expected


def test_a_device_that_nothing_was_compiled_for_is_refused(fresh, monkeypatch):
    monkeypatch.setattr(cuda_library, "build_info", lambda: {"missing": None, "archs": ["80", "90a"]})
    monkeypatch.setattr(cuda_library, "load", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(9, 0), (12, 0)][index])
    assert cuda_library._refuse_device(0) is None
    assert cuda_library._refuse_device(1) == "cuda:1 has compute capability 12.0; the kernels were compiled for 80, 90a"
