"""A report of the installation: `pab doctor`, or without typer `python -m pab_kernels.doctor`.

It needs only Python and never fails: an error becomes an entry of the report.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from .messages import joined
from .streams import standard_streams
from .strict_json import to_json

PACKAGES = (
    "pab-kernels",
    "torch",
    "triton",
    "numpy",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "typer",
    "rich",
    "matplotlib",
    "imageio",
    "imageio-ffmpeg",
    "scikit-image",
    "pillow",
    "tqdm",
    "PyYAML",
    "lpips",
    "torchmetrics",
    "flash-attn",
)
"""Distributions whose version is reported."""

VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "TRITON_INTERPRET",
    "TRITON_CACHE_DIR",
    "TRITON_HOME",
    "PYTORCH_ALLOC_CONF",
    "TORCHDYNAMO_DISABLE",
)
"""Environment variables that change what runs."""

NO_KERNEL = "it has no kernel for this operation"


@dataclass(frozen=True)
class Cache:
    """Triton's cache of compiled kernels.

    Args:
        path: its folder.
        files: number of files.
        bytes: their size.
        problem: why the cache cannot be read, or None.
    """

    path: str
    files: int = 0
    bytes: int = 0
    problem: str | None = None


@dataclass(frozen=True)
class Report:
    """The state of an installation.

    Args:
        python: version, implementation, system.
        packages: version by distribution, or None if not installed.
        torch: the build, or why it cannot be imported.
        devices: one line each.
        operations: by operation: "auto" is the chosen backend; every other backend has None if it can serve, else the
            reason why not.
        asked: the call for which the backends were checked.
        extension: the compiled CUDA kernels of this package, or why there are none; and further compiled modules.
        cache: of compiled Triton kernels.
        environment: the set variables that change what runs.
        problems: errors and warnings of the checks.
    """

    python: str
    packages: dict[str, str | None]
    torch: str
    devices: tuple[str, ...]
    operations: dict[str, dict[str, str | None]]
    asked: str
    extension: tuple[str, ...]
    cache: Cache
    environment: dict[str, str]
    problems: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def __str__(self) -> str:
        found = [f"{name} {version}" for name, version in self.packages.items() if version]
        missing = [name for name, version in self.packages.items() if not version]
        environment = [f"{name}={value}" for name, value in self.environment.items()]
        mib = f"{self.cache.files} files, {self.cache.bytes / 2**20:.1f} MiB"
        lines = [
            *_listed("python", [self.python]),
            *_listed("torch", [self.torch]),
            *_listed("packages", found),
            *_listed("missing", missing or ["nothing"]),
            *_listed("devices", list(self.devices), apart=True),
            *_listed("extension", list(self.extension), apart=True),
            *_listed("triton cache", [f"{self.cache.path}: {self.cache.problem or mib}"]),
            *_listed("environment", environment or ["nothing that changes what runs"]),
            "",
            *_operations_table(self.operations, self.asked),
        ]
        return "\n".join([*lines, *(f"problem: {problem}" for problem in self.problems)])


_MARGIN, _WIDTH = 14, 118


def _listed(heading: str, items: list[str], apart: bool = False) -> list[str]:
    """Items behind a heading, one a line if `apart`, else as many on a line as fit."""
    lines: list[str] = []
    for item in items:
        if lines and not apart and len(lines[-1]) + len(item) + 2 <= _WIDTH - _MARGIN:
            lines[-1] += f", {item}"
        else:
            lines.append(item)
    return [f"{heading if i == 0 else '':<{_MARGIN}}{line}" for i, line in enumerate(lines)]


def _operations_table(operations: dict[str, dict[str, str | None]], asked: str) -> list[str]:
    """A table of backends by operation, with numbered reasons below it."""
    if not operations:
        return []
    backends = list(next(iter(operations.values())))
    reasons: list[str] = []
    rows = [["operation", *backends]]
    for op, served in operations.items():
        row = [op, served["auto"] or ""]
        for backend in backends[1:]:
            reason = served[backend]
            if reason is not None and reason != NO_KERNEL and reason not in reasons:
                reasons.append(reason)
            row.append("yes" if reason is None else "-" if reason == NO_KERNEL else f"no [{reasons.index(reason) + 1}]")
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    notes = [f"[{i}] {reason}" for i, reason in enumerate(reasons, 1)]
    return [*table, f"asked for {asked}; -: no such kernel", *notes]


def doctor() -> Report:
    """Inspect the installation, without changing, compiling or fetching anything.

    Returns:
        The report; `print` shows it as text.

    >>> doctor().operations["attention"]["reference"] is None
    True
    """
    problems: list[str] = []

    def tried(what: str, look: Callable[[], Any], otherwise: Any) -> Any:
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                found = look()
            problems.extend(
                f"{what}: {joined(w.message)}" for w in caught if not issubclass(w.category, DeprecationWarning)
            )
            return found
        except Exception as error:  # a broken installation is the purpose of this command
            problems.append(f"{what}: {joined(error)}")
            return otherwise

    torch_build = tried("torch", _torch_build, "cannot be imported")
    devices = tried("devices", _devices, ())
    operations, asked = tried("operations", _operations, ({}, ""))
    return Report(
        python=f"{platform.python_version()} ({platform.python_implementation()}), {platform.platform()}",
        packages={name: tried(name, partial(_version, name), None) for name in PACKAGES},
        torch=torch_build,
        devices=devices,
        operations=operations,
        asked=asked,
        extension=tried("extension", _extension, ()),
        cache=tried("triton cache", _triton_cache, Cache("", problem="cannot be found")),
        environment={name: os.environ[name] for name in VARIABLES if name in os.environ},
        problems=tuple(problems),
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _torch_build() -> str:
    import torch

    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    hip = f", ROCm {torch.version.hip}" if torch.version.hip else ""
    return f"{torch.__version__}, built with {cuda}{hip}, {torch.get_num_threads()} threads"


def _devices() -> tuple[str, ...]:
    import torch

    found = [f"cpu: {platform.machine()}, {os.cpu_count()} cores"]
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        p = torch.cuda.get_device_properties(i)
        found.append(f"cuda:{i}: {p.name}, compute capability {p.major}.{p.minor}, {p.total_memory / 2**30:.0f} GiB")
    if torch.backends.mps.is_available():
        found.append("mps")
    return tuple(found)


def _operations() -> tuple[dict[str, dict[str, str | None]], str]:
    """`Report.operations` and `Report.asked`."""
    import torch

    from .ops import backend

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    operations: dict[str, dict[str, str | None]] = {}
    for op, call in _sample_calls(device, dtype).items():
        operations[op] = {"auto": _chosen(op, call), **{name: _refusal(op, name, call) for name in backend.BACKENDS}}
    return operations, f"{str(dtype).removeprefix('torch.')} on {device}, head size 64"


def _chosen(op: str, call: Any) -> str:
    from .ops import backend

    try:
        return backend.choose(op, "auto", call)
    except Exception as error:
        return joined(error)


def _refusal(op: str, name: str, call: Any) -> str | None:
    """Why a backend cannot serve a call, or None."""
    from .ops import backend

    if name not in backend.IMPLEMENTATIONS[op]:
        return NO_KERNEL
    try:
        return backend.refusal(op, name, call)
    except Exception as error:
        return f"it cannot be loaded: {joined(error)}"


def _sample_calls(device: str, dtype: Any) -> dict[str, Any]:
    """A typical call of each operation."""
    import torch

    from .ops import Norm, Quantized
    from .ops.attention import Attention
    from .ops.broadcast_residual import BroadcastResidual
    from .ops.dequantize import Dequantize
    from .ops.project_residual import ProjectResidual
    from .ops.quantize import Quantize
    from .ops.short_attention import ShortAttention

    x, weight, shift = (
        torch.zeros(shape, device=device, dtype=dtype) for shape in ((1, 16, 128), (128, 128), (1, 1, 128))
    )
    q, k, v = torch.zeros(1, 16, 3, 2, 64, device=device, dtype=dtype).unbind(2)  # [1, 16, 2, 64]
    return {
        "broadcast_residual": BroadcastResidual(x, (), Norm("layer"), shift, shift),
        "project_residual": ProjectResidual(x, weight, None, x, shift),
        "attention": Attention(q, k, v),
        "short_attention": ShortAttention(q, k, v),
        "quantize": Quantize(x, torch.int8, 128),
        "dequantize": Dequantize(Quantized(x.to(torch.int8), x[..., :1].float()), dtype),
    }


def _extension() -> tuple[str, ...]:
    """`Report.extension`."""
    from .ops import cuda_library

    info, reason = cuda_library.build_info(), cuda_library.load()
    if reason is None:
        kernels = (
            f"{cuda_library.LIBRARY.name}: loaded; compute capabilities {', '.join(info['archs'])}, torch from "
            f"{info['torch_target']} on; nvcc {info['nvcc']}, headers of torch {info['torch_headers']}; "
            f"commit {info['commit'] or 'unknown'}"
        )
    else:
        kernels = f"none: {reason}"
    return (kernels, *(f"{path.name}: the planners" for path in sorted(cuda_library.PACKAGE.glob("_host*.so"))))


def _triton_cache() -> Cache:
    """The folder of Triton's cache, found as Triton's settings define it, and its size."""
    home = Path(os.environ.get("TRITON_HOME") or Path.home())
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache")
    if not folder.is_dir():
        return Cache(str(folder), problem="there is none yet")
    sizes = []
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # another process may clean up
                sizes.append((Path(parent) / name).stat().st_size)
    return Cache(str(folder), len(sizes), sum(sizes))


def print_report(as_json: bool = False) -> None:
    """Print the report as text or JSON, in ASCII."""
    report = doctor()
    text = to_json(report.to_dict()) if as_json else str(report)
    print(text.encode("ascii", "backslashreplace").decode("ascii"))


def main() -> None:
    """`python -m pab_kernels.doctor`."""
    parser = argparse.ArgumentParser(
        prog="python -m pab_kernels.doctor", description="Show what is installed and whether it works."
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    with standard_streams():
        print_report(parser.parse_args().json)


if __name__ == "__main__":
    main()
