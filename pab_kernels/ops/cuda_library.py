"""The compiled CUDA kernels: loaded once, when the first is asked for; where they are not there or cannot run, it is
said why.

The library registers with torch the CUDA implementations of `pab_kernels_cuda::<op>`, which write to the tensors that
they are given. Their schemas and fakes are defined here in Python, where the library need not be.
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


def kernel(op: str, arguments: str, *, tells: bool = False) -> Callable[..., Any]:
    """Define `pab_kernels_cuda::<op>` by the schema of its arguments; the function that calls it.

    It returns nothing or, if it `tells`, whether it ran: it does not where an argument is on the meta device, or fake.
    The library serves it from the moment that `refuse` has loaded it.
    """
    _schemas.define(f"{op}({arguments}) -> {'bool' if tells else '()'}", tags=torch.Tag.pt2_compliant_tag)
    torch.library.register_fake(f"pab_kernels_cuda::{op}", lambda *args: False if tells else None, lib=_schemas)
    return getattr(torch.ops.pab_kernels_cuda, op).default


def rows(t: Tensor) -> Tensor:
    """`[..., C]` with neighbouring channels and one stride between rows, as kernels take it: itself or a view where
    there is one."""
    if t.is_contiguous():
        return t
    flat = t.reshape(-1, t.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


@cache
def build_info() -> dict[str, Any]:
    """What the build says of itself: `archs` (compute capabilities), `nvcc`, `torch_target`, `torch_headers`, `commit`,
    and `missing`, why there are no kernels, or None. Nothing but `missing` where nothing was built."""
    if BUILD_INFO.exists():
        return json.loads(BUILD_INFO.read_text())
    return {"missing": "nothing was compiled in this source tree; `make extension` compiles them"}


@cache
def load() -> str | None:
    """Load the library; None, or why it cannot be."""
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
    """Whether code for `arch` ("80", "90a", "100f") runs on a device of this capability, as CUDA has it: code of a
    capability runs on later ones of the same generation, "a" on none but its own, "f" on its family, which is the
    generation too."""
    major, minor = divmod(int(arch.rstrip("af")), 10)
    return capability == (major, minor) if arch.endswith("a") else capability[0] == major and capability[1] >= minor
