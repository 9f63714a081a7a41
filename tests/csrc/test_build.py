"""CMake alone, with neither torch nor Python, and what setup.py says where something is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from pab_kernels.ops import cuda_library

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    not (ROOT / "CMakeLists.txt").exists(), reason="the sources of the kernels are not here"
)


def _run(*command: str | Path, **options) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def _need(*tools: str) -> None:
    lacking = [tool for tool in tools if shutil.which(tool) is None]
    if lacking:
        pytest.skip(f"there is no {', '.join(lacking)}")


def test_cmake_builds_and_runs_the_host_tests_alone(tmp_path):
    _need("cmake", "ctest", "c++")
    _run("cmake", "-S", ROOT, "-B", tmp_path, "-DPAB_CUDA=0", "-DPAB_WERROR=1")
    _run("cmake", "--build", tmp_path, "--parallel", "2")
    said = _run("ctest", "--test-dir", tmp_path, "--output-on-failure")
    assert "quantize_plan" in said and "100% tests passed" in said


def test_the_tests_of_the_tree_that_was_built_pass_or_are_skipped():
    """Device tests among them, which end with 77 where there is no device."""
    _need("ctest")
    tree = ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}"
    if cuda_library.build_info()["missing"] is not None or not tree.exists():
        pytest.skip("there are no compiled kernels: `make extension` compiles them")
    said = _run("ctest", "--test-dir", tree, "--output-on-failure")
    assert "100% tests passed" in said and "quantize_device" in said


SETUP = """
import sys
import setuptools
setuptools.setup = lambda **arguments: print(len(arguments["ext_modules"]), arguments["setup_requires"])
import runpy
sys.argv = ["setup.py", "bdist_wheel"]
made = runpy.run_path("setup.py")
print(made["missing"](kernels=True))
"""


def _setup(code: str = "", **variables: str) -> list[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("PAB_")} | variables
    return _run(sys.executable, "-c", f"{code}\n{SETUP}", cwd=ROOT, env=env).splitlines()


def test_without_tools_nothing_is_compiled_and_it_is_said_what_is_missing(tmp_path):
    bare = {"PATH": str(tmp_path), "CUDA_HOME": "", "CUDA_PATH": ""}
    made, reason = _setup(**bare)
    assert made == "0 []" and "no C++ compiler" in reason
    for tool in ("c++", "nvcc"):
        (tmp_path / tool).write_text("#!/bin/sh\n")
        (tmp_path / tool).chmod(0o755)
    assert "cmake was not found" in _setup(**bare)[1]
    assert _setup(**bare, PAB_BUILD_CUDA="1")[0] == "1 ['cmake>=3.24', 'ninja']"
    (tmp_path / "cmake").write_text("#!/bin/sh\n")
    (tmp_path / "cmake").chmod(0o755)
    assert _setup(**bare) == ["1 []", "None"]
    assert _setup(**bare, PAB_BUILD_CUDA="0")[0] == "0 []"
    assert "torch's headers were not found" in _setup(**bare, PAB_TORCH_INCLUDE=str(tmp_path))[1]
    header = tmp_path / "torch" / "headeronly" / "version.h"
    header.parent.mkdir(parents=True)
    header.write_text("#define TORCH_VERSION_MAJOR 2\n#define TORCH_VERSION_MINOR 9\n#define TORCH_VERSION_PATCH 1\n")
    assert (
        "torch 2.9.1's headers were found; 2.10 or later is needed"
        in _setup(**bare, PAB_TORCH_INCLUDE=str(tmp_path))[1]
    )


def test_torchs_headers_are_found_where_the_build_is_isolated_from_torch():
    """pip's isolated builds hide torch from imports; the interpreter is still that of the environment."""
    _need("c++", "nvcc", "cmake")
    hide = (
        "import importlib.util as u; find = u.find_spec; u.find_spec = lambda name, *rest: None if name == 'torch' "
        "else find(name)"
    )
    assert _setup(hide) == ["1 []", "None"]


def test_an_editable_install_compiles_nothing_by_itself(tmp_path):
    for name in ("csrc", "python", "cmake"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "pab_kernels").mkdir()
    (tmp_path / "pab_kernels" / "__init__.py").touch()
    env = {name: value for name, value in os.environ.items() if name != "PAB_BUILD_CUDA"}
    _run(
        sys.executable,
        "-c",
        "import setuptools.build_meta as b; print(b.build_editable('dist'))",
        cwd=tmp_path,
        env=env,
    )
    assert list((tmp_path / "dist").glob("*.whl")) and not list(tmp_path.rglob("cmake-*"))
    assert [path.name for path in (tmp_path / "pab_kernels").iterdir()] == ["__init__.py"]


def test_an_unknown_wish_is_refused():
    env = {**os.environ, "PAB_BUILD_CUDA": "yes"}
    done = subprocess.run([sys.executable, "setup.py", "--version"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode != 0 and "PAB_BUILD_CUDA is 'yes'; 0, 1 and auto are supported" in done.stderr
