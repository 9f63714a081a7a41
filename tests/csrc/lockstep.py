"""Compiles a CUDA source against the lockstep machine in csrc/tests/lockstep: unmodified kernels that run on the CPU,
checked."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
_HOMES = [Path(home) for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
_CUDA = next((home / "include" for home in _HOMES if (home / "include" / "cuda_fp8.h").exists()), None)
_KEPT = Path(sys.prefix) / "lockstep-cache"
_CHECKED = (
    "-g1",
    "-fsanitize=thread,alignment,bounds",
    "-fno-sanitize-recover=all",
    "--param",
    "tsan-instrument-func-entry-exit=0",
)


def compiled(kernels: str, out: Path, host: Sequence[str] = (), *, shared: bool = True) -> Path:
    """A library (or, not shared, a program) of `kernels`, a file of csrc/ under the machine, and of files of plain C++.

    Compiling one takes up to half a minute: it is kept in the environment, by the hash of everything that it is made
    of, and compiled once where several tests run at the same time.
    """
    if _CUDA is None or shutil.which("g++") is None:
        pytest.skip("CUDA's headers or g++ are not here")
    common = ["g++", "-std=c++17", "-O1", "-fPIC", f"-I{_CUDA}", f"-I{CSRC}"]
    common += ["-fno-gnu-unique"]  # each library has a machine of its own, where a process loads several
    machine = ["-D__launch_bounds__(...)=", "-include", str(CSRC / "tests/lockstep/lockstep.h"), "-x", "c++"]
    commands = [
        [*common, *_CHECKED, *machine, "-c", str(CSRC / kernels)],
        *([*common, "-c", str(CSRC / name)] for name in host),
    ]
    link = ["g++", *(["-shared"] if shared else [])]  # no -fsanitize: the machine is the sanitizers' runtime
    kept = _KEPT / _hash(repr((*commands, link)))
    kept.mkdir(parents=True, exist_ok=True)
    with open(kept / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (kept / "made").exists():
            objects = [str(kept / f"{i}.o") for i in range(len(commands))]
            for command, file in zip(commands, objects, strict=True):
                _run([*command, "-o", file])
            _run([*link, *objects, "-o", str(kept / "unfinished")])
            (kept / "unfinished").rename(kept / "made")
    return Path(shutil.copy(kept / "made", out / Path(kernels).stem))


def _hash(commands: str) -> str:
    """Of the commands, the compiler, CUDA's headers and all sources."""
    assert _CUDA is not None
    version = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout
    found = hashlib.sha256(f"{commands}\n{version}".encode() + (_CUDA / "cuda.h").read_bytes())
    for path in sorted(path for path in CSRC.rglob("*") if path.is_file()):
        found.update(f"{path.relative_to(CSRC)}\0".encode() + path.read_bytes())
    return found.hexdigest()


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
