"""The unmodified binding of a kernel to torch, compiled for CPU tensors around the kernel under the lockstep
machine."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import torch

from tests.csrc.machine import library

ROOT = Path(__file__).parents[2]
TORCH = Path(torch.__file__).parent


STAND_IN = """
#include <cstdint>
// Of CUDA: a CPU tensor is on the device that is the current one.
extern "C" {
int aoti_torch_get_current_cuda_stream(int32_t, void** stream) { *stream = nullptr; return 0; }
int cudaGetDevice(int* device) { *device = 0; return 0; }
const char* cudaGetErrorString(int) { return "the launch failed"; }
int32_t aoti_torch_device_type_cuda() { return 0; }
int aoti_torch_get_device_index(void*, int32_t* index) { *index = 0; return 0; }
}
"""


def bound(op: str, folder: Path) -> ctypes.CDLL:
    """The kernel of an operation under the machine; around it its binding, loaded into torch."""
    kernels = library(f"{op}.cu", folder, [f"{op}_plan.cpp"])
    source = (ROOT / "python" / f"{op}_torch.cpp").read_text()
    assert source.count("pab_kernels_cuda, CUDA, library") == 1
    (folder / "binding.cpp").write_text(
        source.replace("pab_kernels_cuda, CUDA, library", "pab_kernels_cuda, CPU, library")
    )
    (folder / "stand_in.cpp").write_text(STAND_IN)
    command = [
        "g++",
        "-std=c++17",
        "-O0",
        "-fPIC",
        "-shared",
        "-Wl,-Bsymbolic",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
    ]
    command += [
        f"-I{ROOT / 'python'}",
        "-isystem",
        str(TORCH / "include"),
        str(folder / "binding.cpp"),
        str(folder / "stand_in.cpp"),
    ]
    command += [
        str(folder / op),
        f"-Wl,-rpath,{folder}",
        f"-L{TORCH / 'lib'}",
        "-ltorch",
        "-ltorch_cpu",
        "-o",
        str(folder / "binding.so"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    torch.ops.load_library(folder / "binding.so")
    return kernels
