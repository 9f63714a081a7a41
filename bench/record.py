"""What a measurement is kept with: device, clocks, versions, commit and command."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent


CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks_event_reasons.active", "temperature.gpu", "power.draw")
"""What is asked of nvidia-smi, which sets nothing: MHz, the reasons for not being faster as a bit mask, degrees
Celsius, W."""


def environment(device: str | torch.device | None = None) -> dict[str, Any]:
    """Device, versions, commit, command and date of this run; without `device` it is the GPU where there is one."""
    cuda = torch.cuda.is_available() and (device is None or torch.device(device).type == "cuda")
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "diffusers", "flash-attn"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if cuda:
        versions["cuda"] = torch.version.cuda or ""
        versions["driver"] = _nvidia_smi("driver_version").get("driver_version", "")
    module = sys.modules["__main__"].__spec__
    command = f"python -m {module.name.removesuffix('.__main__')}" if module else f"python {Path(sys.argv[0]).name}"
    return {
        "device": torch.cuda.get_device_name() if cuda else f"{_processor()}, {torch.get_num_threads()} threads",
        "versions": versions,
        "commit": _commit(),
        "command": shlex.join([*command.split(), *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
    }


def write(path: str | os.PathLike[str], rows: list[dict[str, Any]], device: str | None = None) -> None:
    """Write rows as JSON lines, each with the environment."""
    shared = environment(device)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(row | shared) + "\n" for row in rows))


def append(path: str | os.PathLike[str], row: dict[str, Any], shared: dict[str, Any]) -> None:
    """Add one row with the environment: what has been written stays, whatever happens next."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with Path(path).open("a") as file:
        file.write(json.dumps(row | shared) + "\n")


def read(paths: Iterable[str | os.PathLike[str]]) -> list[dict[str, Any]]:
    """The rows of files of JSON lines."""
    return [json.loads(line) for path in paths for line in Path(path).read_text().splitlines()]


def clocks() -> dict[str, Any]:
    """The GPU's clocks, temperature and power now; empty where nvidia-smi does not answer."""
    return _nvidia_smi(*CLOCKS)


def _nvidia_smi(*fields: str) -> dict[str, Any]:
    device = str(torch.cuda.get_device_properties().uuid)
    id_ = device if device.startswith("GPU-") else f"GPU-{device}"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--id={id_}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (value.strip() for value in done.stdout.split(",")), strict=False))


def _commit() -> str:
    head = _git("rev-parse", "--short", "HEAD")
    if not head:  # a copy of the tree without its history
        return os.environ.get("BENCH_COMMIT", "")
    return head + ("+changes" if _git("status", "--porcelain", "--", "pab_kernels") else "")


def _git(*args: str) -> str:
    try:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
