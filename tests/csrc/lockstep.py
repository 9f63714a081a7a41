"""Compiles a CUDA source against the lockstep machine in csrc/tests/lockstep: unmodified kernels that run on the CPU, checked."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
_HOMES = [Path(home) for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
_CUDA = next((home / "include" for home in _HOMES if (home / "include" / "cuda_fp8.h").exists()), None)
_CHECKED = ("-g1", "-fsanitize=thread,alignment,bounds", "-fno-sanitize-recover=all", "--param", "tsan-instrument-func-entry-exit=0")


def compiled(kernels: str, out: Path, host: Sequence[str] = (), *, shared: bool = True, optimised: bool = True) -> Path:
    """A library (or, not shared, a program) of `kernels`, a file of csrc/ under the machine, and of files of plain C++.

    Not optimised it compiles in half the time and runs in twice.
    """
    if _CUDA is None or shutil.which("g++") is None:
        pytest.skip("CUDA's headers or g++ are not here")
    common = ["g++", "-std=c++17", "-O1" if optimised else "-O0", "-fPIC", f"-I{_CUDA}", f"-I{CSRC}"]
    common += ["-fno-gnu-unique"]  # each library has a machine of its own, where a process loads several
    machine = ["-D__launch_bounds__(...)=", "-include", str(CSRC / "tests/lockstep/lockstep.h"), "-x", "c++"]
    made, objects = out / Path(kernels).stem, [str(out / f"{Path(name).stem}.o") for name in (kernels, *host)]
    _run([*common, *_CHECKED, *machine, "-c", str(CSRC / kernels), "-o", objects[0]])
    for name, made_of in zip(host, objects[1:], strict=True):
        _run([*common, "-c", str(CSRC / name), "-o", made_of])
    _run(["g++", *(["-shared"] if shared else []), *objects, "-o", str(made)])  # no -fsanitize: the machine is the sanitizers' runtime
    return made


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
