"""Takes the compiled CUDA kernels out of the library in the source tree and reads what the compiler made of them.

`python -m tests.csrc.compilation` prints a JSON line for every kernel and architecture. A module
`tests.csrc.kernels_<op>` says what the kernels of an operation must be. cuobjdump and nvdisasm are those inside the
triton package.
"""

from __future__ import annotations

import collections
import importlib
import json
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pab_kernels.ops.cuda_library import LIBRARY, build_info
from tests.kernels.compilation import OPCODE
from tests.kernels.disassembly import disassembly, tool

USAGE = re.compile(r"Function (\S+?):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
FUNCTION = re.compile(r"^\s*\.section\s+\.text\.(\w+)", re.MULTILINE)


@dataclass(frozen=True)
class Promise:
    """What a kernel must be in every architecture, beside free of spills.

    Args:
        has: prefixes of opcodes of which each is there, such as "LDG.E.128" or "HMMA".
        has_not: prefixes of opcodes of which none is there.
        waits: from sm_90 on, no access to global memory comes before the kernel waits for those before it.
        counts: prefixes of opcodes and how many of each there are, such as "HMMA.16816" and 17.
        loads_first: every load from global memory comes before the first store.
    """

    has: tuple[str, ...] = ()
    has_not: tuple[str, ...] = ()
    waits: bool = False
    counts: Mapping[str, int] = field(default_factory=dict)
    loads_first: bool = False


def promises() -> dict[str, Promise]:
    """By pattern of a kernel's name, as `fnmatch` has it: `quantize_kernel<*, *, true>`."""
    found: dict[str, Promise] = {}
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.name.startswith("kernels_"):
            found |= importlib.import_module(f"tests.csrc.{module.name}").KERNELS
    return found


def _run(*command: str, cwd: str | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def readable(mangled: list[str]) -> list[str]:
    """Names as the source has them, without namespaces, return types and arguments."""
    names = _run("c++filt", *mangled)
    for pattern, plain in (
        (r"\(bool\)1", "true"),
        (r"\(bool\)0", "false"),
        (r"\(anonymous namespace\)::|\w+::|^void |\((unsigned )?int\)", ""),
        (r"\(.*$", ""),
    ):
        names = re.sub(pattern, plain, names, flags=re.MULTILINE)
    return names.splitlines()


def _inspect(cubin: Path) -> list[dict[str, Any]]:
    arch = re.search(r"sm_(\w+)\.cubin$", cubin.name)
    resources, code = disassembly(cubin.read_bytes())
    usage = USAGE.findall(resources)
    assert arch and usage, cubin
    pieces = FUNCTION.split(code)
    sass = dict(zip(pieces[1::2], pieces[2::2], strict=True))
    records = []
    for kernel, (mangled, registers, stack, shared, local) in zip(readable([u[0] for u in usage]), usage, strict=True):
        opcodes = [match[1] for match in map(OPCODE.match, sass[mangled].splitlines()) if match]
        first_access = next((i for i, op in enumerate(opcodes) if op.startswith(("LDG", "STG"))), len(opcodes))
        first_store = next((i for i, op in enumerate(opcodes) if op.startswith("STG")), len(opcodes))
        records.append(
            {
                "launch": "csrc",
                "kernel": kernel,
                "arch": arch[1],
                "compiler": f"nvcc {'.'.join(build_info()['nvcc'].split('.')[:2])}",
                "registers": int(registers),
                "shared": int(shared),
                "stack": int(stack) + int(local),
                "opcodes": dict(sorted(collections.Counter(opcodes).items())),
                "waits": "ACQBULK" in opcodes[:first_access],
                "loads": sum(op.startswith("LDG.") for op in opcodes),
                "loads_before_stores": sum(op.startswith("LDG.") for op in opcodes[:first_store]),
            }
        )
    return records


def compiled() -> list[dict[str, Any]]:
    """A record for every kernel and architecture in the library."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        _run(tool("cuobjdump"), "-xelf", "all", str(LIBRARY), cwd=folder)
        return [record for records in pool.map(_inspect, sorted(Path(folder).glob("*.cubin"))) for record in records]


def main() -> None:
    """Print the records as JSON lines."""
    for record in compiled():
        print(json.dumps(record))


if __name__ == "__main__":
    main()
