"""The compiled CUDA kernels: loaded at the first request, with a reason where they are missing or cannot run.

The library registers the CUDA implementations of `pab_kernels_cuda::<op>` with torch, which write to given tensors.
Schemas and fakes are defined here in Python, and need no library.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PACKAGE = Path(__file__).parents[1]
LIBRARY = PACKAGE / "pab_kernels_cuda.so"
BUILD_INFO = PACKAGE / "_build_info.json"

_schemas = torch.library.Library("pab_kernels_cuda", "FRAGMENT")


def kernel(op: str, arguments: str) -> Callable[..., Any]:
    """Define `pab_kernels_cuda::<op>` by the schema of its arguments, and return the function that calls it.

    The function returns None, and works once `refuse` has loaded the library.
    """
    _schemas.define(f"{op}({arguments}) -> ()", tags=torch.Tag.pt2_compliant_tag)
    torch.library.register_fake(f"pab_kernels_cuda::{op}", lambda *args: None, lib=_schemas)
    return getattr(torch.ops.pab_kernels_cuda, op).default


def rows(t: Tensor) -> Tensor:
    """`[..., C]` with neighbouring channels and one stride between rows: t, a view of it, or else a copy."""
    if t.is_contiguous():
        return t
    flat = t.reshape(-1, t.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


@cache
def build_info() -> dict[str, Any]:
    """The build's record: `archs` (compute capabilities), `nvcc`, `torch_target`, `torch_headers`, `commit`, and
    `missing`, why there are no kernels, or None. Only `missing` where nothing was built."""
    if BUILD_INFO.exists():
        return json.loads(BUILD_INFO.read_text())
    return {"missing": "nothing was compiled in this source tree; `make extension` compiles them"}


@cache
def load() -> str | None:
    """Load the library, and return why that failed, or None."""
    missing = build_info()["missing"]
    if missing is not None:
        return f"this installation has no CUDA kernels: {missing}"
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return f"the CUDA kernels cannot be loaded: {' '.join(str(error.__cause__ or error).split())}"
    return None


def refuse(tensor: Tensor) -> str | None:
    """Why the CUDA kernels cannot run where `tensor` lies; None where they can."""
    reason = load()
    if reason is not None:
        return reason
    if not tensor.is_cuda:
        return f"CUDA kernels run on CUDA devices; the tensors are on {tensor.device}"
    return _refuse_device(tensor.get_device())


@cache
def _refuse_device(index: int) -> str | None:
    capability, archs = torch.cuda.get_device_capability(index), build_info()["archs"]
    if any(runs(arch, capability) for arch in archs):
        return None
    major, minor = capability
    return f"cuda:{index} has compute capability {major}.{minor}; the kernels were compiled for {', '.join(archs)}"


def runs(arch: str, capability: tuple[int, int]) -> bool:
    """Whether code for `arch` ("80", "90a", "100f") runs on a device of this compute capability.

    Code runs on later capabilities of the same generation; with "a" only on its own, with "f" on its family, the same
    generation.
    """
    major, minor = divmod(int(arch.rstrip("af")), 10)
    return capability == (major, minor) if arch.endswith("a") else capability[0] == major and capability[1] >= minor
