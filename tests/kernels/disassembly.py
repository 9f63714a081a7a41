"""The machine code of compiled kernels as text, by the tools of the CUDA toolkit that are in the triton package.

Disassembling a kernel takes longer than finding it in Triton's cache, and the same bytes give the same text: it is kept
beside that cache, in the environment, by the hash of the kernel.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(sys.prefix) / "disassembly-cache"


def tool(name: str) -> str:
    """A tool of the CUDA toolkit, as the triton package has it."""
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def disassembly(cubin: bytes) -> tuple[str, str]:
    """What cuobjdump says of the resources that the kernels in `cubin` need, and nvdisasm of their code."""
    import triton

    kept = FOLDER / triton.__version__ / f"{hashlib.sha256(cubin).hexdigest()}.json.gz"
    if kept.exists():
        usage, code = json.loads(gzip.decompress(kept.read_bytes()))
        return usage, code
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True)
        usage = done.stdout + done.stderr
        code = subprocess.run([tool("nvdisasm"), "-c", file.name], capture_output=True, text=True, check=True).stdout
    kept.parent.mkdir(parents=True, exist_ok=True)
    unfinished = kept.with_name(f"{kept.name}.{os.getpid()}")
    unfinished.write_bytes(gzip.compress(json.dumps([usage, code]).encode()))
    unfinished.replace(kept)  # whole, whoever else writes the same
    return usage, code
