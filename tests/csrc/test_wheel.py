"""The wheel with the CUDA kernels: it holds them, is tagged for what it is, and works where it is installed.

The wheel without them is looked into by tests/test_package.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

from pab_kernels.ops import cuda_library

ROOT = Path(__file__).parents[2]

SMOKE = """
import json, sys
import torch
import pab_kernels
from pab_kernels import _host
from pab_kernels.doctor import doctor
from pab_kernels.ops import BackendError, cuda_library, quantize
x = torch.randn(3, 200)
assert torch.equal(quantize(x, torch.int8).scale[:, 0], x[:, :128].abs().amax(-1) / 127)
try:
    quantize(x, torch.int8, backend="cuda")
except BackendError as error:
    said = str(error)
plan = _host.plan_quantize(0, 0, 3, 256, 128, 256, 256, _host.DType.float32, _host.DType.int8)
seen = {"file": pab_kernels.__file__, "load": cuda_library.load(), "said": said, "grid": plan.grid}
print(json.dumps(seen | {"extension": doctor().extension}))
"""


def _run(*command: str | Path, **options) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from this tree; what `make extension` compiled is not compiled again."""
    missing = cuda_library.build_info()["missing"]
    if missing is not None:
        pytest.skip(f"there are no compiled kernels: {missing}")
    if not (ROOT / "CMakeLists.txt").exists():
        pytest.skip("the sources of the kernels are not here")
    work = tmp_path_factory.mktemp("wheel")
    env = {**os.environ, "PAB_BUILD_CUDA": "1", "PAB_CUDA_ARCHS": ";".join(cuda_library.build_info()["archs"])}
    command = ("setup.py", "-q", "egg_info", "--egg-base", work, "build", "--build-base", work / "build", "bdist_wheel")
    _run(sys.executable, "-W", "ignore", *command, "--bdist-dir", work / "bdist", "--dist-dir", work, cwd=ROOT, env=env)
    (path,) = work.glob("*.whl")
    return path


def test_it_holds_the_kernels_and_says_what_they_are(wheel):
    with zipfile.ZipFile(wheel) as files:
        names = set(files.namelist())
        info = json.loads(files.read("pab_kernels/_build_info.json"))
        (tags,) = (files.read(name).decode() for name in names if name.endswith(".dist-info/WHEEL"))
    assert {"pab_kernels/pab_kernels_cuda.so", f"pab_kernels/_host{sysconfig.get_config_var('EXT_SUFFIX')}"} <= names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"pab_kernels"}, (
        "no tests, no sources of kernels"
    )
    interpreter = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert f"Tag: {interpreter}-{interpreter}-linux_" in tags and "Root-Is-Purelib: false" in tags
    assert info["missing"] is None and info["archs"] == cuda_library.build_info()["archs"]
    assert (
        info["torch_target"] == "2.10" and info["nvcc"].count(".") == 2 and info.keys() >= {"commit", "torch_headers"}
    )


def test_it_works_where_it_is_installed(wheel, tmp_path):
    """In a fresh environment that sees the torch of this one."""
    hidden = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # where the sources may be

    def run(*command: str | Path) -> str:
        return _run(*command, cwd=tmp_path, env=hidden)

    run(sys.executable, "-m", "venv", "--without-pip", "venv")
    python = tmp_path / "venv" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('platlib'))").strip())
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-deps",
        "--no-index",
        "--disable-pip-version-check",
        wheel,
    )
    (site / "torch.pth").write_text(str(Path(torch.__file__).parents[1]))
    seen = json.loads(run(python, "-W", "error", "-c", SMOKE).splitlines()[-1])
    assert Path(seen["file"]).is_relative_to(site)
    assert seen["load"] is None and seen["extension"][0].startswith("pab_kernels_cuda.so: loaded; ")
    assert "CUDA kernels run on CUDA devices; the tensors are on cpu" in seen["said"] and seen["grid"] == [1, 1, 1]
