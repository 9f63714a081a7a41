"""Compiles the CUDA kernels with CMake where that is possible.

Docs/building.md says what is needed, and what happens where it is not.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
WANTED = os.environ.get("PAB_BUILD_CUDA", "auto")
ARCHS = os.environ.get("PAB_CUDA_ARCHS", "80;90a;100a").replace(",", ";").replace(" ", ";")
TORCH_TARGET = "2.10"


def compiler() -> str | None:
    """The C++ compiler."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)


def nvcc() -> str | None:
    """nvcc: of CUDACXX, CUDA_HOME, the PATH, or where the toolkit installs itself."""
    homes = [home for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")) if home]
    places = (os.environ.get("CUDACXX"), *(f"{home}/bin/nvcc" for home in homes), "nvcc", "/usr/local/cuda/bin/nvcc")
    return next((found for place in places if place and (found := shutil.which(place))), None)


def torch_include() -> Path | None:
    """torch's headers: of PAB_TORCH_INCLUDE, the torch that can be imported, or, where the build is isolated from it,
    the torch of the environment whose interpreter runs the build. torch itself is never imported."""
    spec = find_spec("torch")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or () if spec else ())]
    folders += [Path(sysconfig.get_path(kind)) / "torch" for kind in ("platlib", "purelib")]
    named = os.environ.get("PAB_TORCH_INCLUDE")
    places = [Path(named)] if named else [folder / "include" for folder in folders]
    return next((place for place in places if torch_version(place)), None)


def torch_version(include: Path) -> str | None:
    """Version of the torch that these headers are of."""
    header = include / "torch" / "headeronly" / "version.h"
    found = header.exists() and re.findall(r"#define TORCH_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)", header.read_text())
    return ".".join(found) if found else None


def missing(*, kernels: bool) -> str | None:
    """What a build lacks, or None."""
    if not sys.platform.startswith("linux"):
        return f"they are compiled on Linux, and this is {sys.platform}"
    if compiler() is None:
        return "there was no C++ compiler: CXX, c++, g++ and clang++ were not found"
    if kernels and nvcc() is None:
        return "nvcc was found neither on PATH nor in CUDA_HOME"
    if shutil.which("cmake") is None:
        return "cmake was not found"
    include = torch_include()
    if include is None:
        return (
            "torch's headers were not found: build with --no-build-isolation beside torch, or name them in "
            "PAB_TORCH_INCLUDE"
        )
    version = torch_version(include) or ""
    if tuple(map(int, version.split(".")[:2])) < tuple(map(int, TORCH_TARGET.split("."))):
        return f"torch {version}'s headers were found; {TORCH_TARGET} or later is needed"
    return None


def commit() -> str | None:
    """The commit of this tree, with a mark where it was changed."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return None
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=ROOT, capture_output=True, text=True
    )
    return done.stdout.strip() or None


def write_info(folder: Path, reason: str | None) -> None:
    """What the package says of its build: see `pab_kernels.ops.cuda_library.build_info`."""
    info: dict[str, object] = {"missing": reason, "commit": commit()}
    if reason is None:
        said = subprocess.run([str(nvcc()), "--version"], capture_output=True, text=True).stdout
        release = re.search(r"V(\d+\.\d+\.\d+)", said)
        info |= {"archs": ARCHS.split(";"), "nvcc": release[1] if release else "unknown", "torch_target": TORCH_TARGET}
        info["torch_headers"] = torch_version(torch_include() or Path())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "_build_info.json").write_text(json.dumps(info, indent=1) + "\n")


class BuildExtension(build_ext):
    """The kernels and the planners, both or, in place, the planners alone where there is no nvcc."""

    def run(self) -> None:
        if self.editable_mode and WANTED == "auto":
            return  # an editable install takes seconds; `make extension` compiles
        lacking = missing(kernels=True)
        if lacking is not None and WANTED == "1":
            raise SystemExit(f"PAB_BUILD_CUDA=1: {lacking}")
        here = self.inplace or self.editable_mode
        folder = ROOT / "pab_kernels" if here else Path(self.build_lib) / "pab_kernels"
        if missing(kernels=False) is None:
            self.make(folder, kernels=lacking is None)
        write_info(folder, lacking)

    def make(self, folder: Path, kernels: bool) -> None:
        """Configure, build, and copy the libraries to `folder`."""
        tree = ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}"
        python = f"{sysconfig.get_path('include')};{torch_include()}"  # torch brings pybind11 along
        options = {
            "PAB_CUDA": int(kernels),
            "PAB_CUDA_ARCHS": ARCHS,
            "PAB_TORCH_INCLUDE": torch_include(),
            "PAB_PYTHON_INCLUDE": python,
            "PAB_HOST_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
            "PAB_WERROR": os.environ.get("PAB_WERROR", "0"),
            "CMAKE_CXX_COMPILER": compiler(),
        }
        if kernels:
            options["CMAKE_CUDA_COMPILER"] = nvcc()
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        for command in (
            [
                "cmake",
                "-S",
                str(ROOT),
                "-B",
                str(tree),
                *generator,
                *(f"-D{name}={value}" for name, value in options.items()),
            ],
            ["cmake", "--build", str(tree), "--parallel", jobs],
            ["cmake", "--install", str(tree), "--prefix", str(folder), "--component", "python", "--strip"],
        ):
            subprocess.run(command, check=True)

    def get_outputs(self) -> list[str]:
        if self.inplace or self.editable_mode:
            return []
        folder = Path(self.build_lib) / "pab_kernels"
        return [str(path) for pattern in ("*.so", "_build_info.json") for path in folder.glob(pattern)]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class BuildPython(build_py):
    """The package; where nothing is compiled it holds the reason."""

    def run(self) -> None:
        super().run()
        if not self.distribution.ext_modules and not self.editable_mode:
            write_info(
                Path(self.build_lib) / "pab_kernels",
                "PAB_BUILD_CUDA=0 was set" if WANTED == "0" else missing(kernels=True),
            )


in_place = "build_ext" in sys.argv
compiled = WANTED == "1" or in_place or (WANTED == "auto" and missing(kernels=True) is None)
if WANTED not in ("0", "1", "auto"):
    raise SystemExit(f"PAB_BUILD_CUDA is {WANTED!r}; 0, 1 and auto are supported: set one of these")

setup(
    ext_modules=[Extension("pab_kernels._host", sources=[])] if compiled and WANTED != "0" else [],
    cmdclass={"build_ext": BuildExtension, "build_py": BuildPython},
    setup_requires=["cmake>=3.24", "ninja"] if compiled and shutil.which("cmake") is None else [],
)
