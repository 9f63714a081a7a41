"""What a measurement is kept with: device, versions, commit and command."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent


def environment() -> dict[str, Any]:
    """Device, versions, commit, command and date of this run."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "diffusers", "flash-attn"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{_processor()}, {torch.get_num_threads()} threads"
    module = sys.modules["__main__"].__spec__
    command = f"python -m {module.name}" if module else f"python {Path(sys.argv[0]).name}"
    return {
        "device": device,
        "versions": versions,
        "commit": _git("rev-parse", "--short", "HEAD") + ("+changes" if _git("status", "--porcelain", "--", "pab_kernels") else ""),
        "command": shlex.join([*command.split(), *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
    }


def write(path: str | os.PathLike[str], rows: list[dict[str, Any]]) -> None:
    """Write rows as JSON lines, each with the environment."""
    shared = environment()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(row | shared) + "\n" for row in rows))


def _git(*args: str) -> str:
    done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
