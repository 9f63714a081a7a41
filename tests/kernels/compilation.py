"""Compiles the Triton kernels without a device, exactly as their launchers launch them, and reads what the compiler
made of them.

A module `tests.kernels.launches_<op>` lists, by name, calls of a launcher on meta tensors (nothing is computed) and
what each kernel must look like. `python -m tests.kernels.compilation 80 90 100` compiles every one for these
architectures and prints a JSON line for each. It runs without TRITON_INTERPRET, with whichever Triton is first on the
path. The machine's GPU, if it has one, is not used.
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import json
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.kernels.disassembly import disassembly

PLAIN_DOT = re.compile(r"\btt\.dot\b.*parent = #blocked")
"""A product by multiply-adds in Triton's IR; one on tensor cores has the layout of an mma, or is another operation."""

OPCODE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")


@dataclass(frozen=True)
class Launch:
    """One call of a launcher, and what its kernels must be.

    Args:
        call: runs the launcher on meta tensors.
        dots: every product runs on tensor cores: HGMMA on sm_90, UTCHMMA or HMMA on sm_100, HMMA on sm_80; none by
            multiply-adds.
        pipelined: loads go to shared memory asynchronously (LDGSTS or UTMALDG).
        wide: narrowest global load or store in bytes a lane; None where narrower ones are in order.
        archs: compute capabilities that the launch is for.
    """

    call: Callable[[], Any]
    dots: bool = False
    pipelined: bool = False
    wide: int | None = None
    archs: tuple[int, ...] = (80, 90, 100)


def launches() -> dict[str, Launch]:
    """All launches, by `<op>/<name>`."""
    found: dict[str, Launch] = {}
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.name.startswith("launches_"):
            listed = importlib.import_module(f"tests.kernels.{module.name}").LAUNCHES
            found |= {f"{module.name.removeprefix('launches_')}/{name}": launch for name, launch in listed.items()}
    return found


@contextlib.contextmanager
def _captured(arch: int) -> Iterator[list[tuple[str, Any]]]:
    """Kernels launched inside are compiled for `arch` and kept instead of run."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import ASTSource, make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    kernels: list[tuple[str, Any]] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        bound, specialization, options = create_function_from_signature(self.signature, self.params, backend)(
            *args, **kwargs
        )
        options, signature, constexprs, attrs = self._pack_args(
            backend, kwargs | {"debug": False}, bound, specialization, options
        )
        source = ASTSource(self, signature, constexprs, attrs)
        kernels.append((self.__name__, triton.compile(source, target=target, options=options.__dict__)))

    original, JITFunction.run = JITFunction.run, run
    try:
        yield kernels
    finally:
        JITFunction.run = original


def inspect(kernel: Any) -> dict[str, Any]:
    """Registers, shared memory and the opcodes of a compiled kernel."""
    usage, code = disassembly(kernel.asm["cubin"])
    registers = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert registers, usage
    opcodes = [match[1] for match in map(OPCODE.match, code.splitlines()) if match]
    before_stores = opcodes[: next((i for i, op in enumerate(opcodes) if op.startswith("STG")), len(opcodes))]
    return {
        "registers": int(registers[1]),
        "stack": int(registers[2]),
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "plain_dots": len(PLAIN_DOT.findall(kernel.asm["ttgir"])),
        "opcodes": dict(sorted(collections.Counter(opcodes).items())),
        "loads": sum(op.startswith("LDG.") for op in opcodes),
        "loads_before_stores": sum(op.startswith("LDG.") for op in before_stores),
    }


def compile_launch(name: str, arch: int) -> list[dict[str, Any]]:
    """One record for each kernel of a launch."""
    import triton

    with _captured(arch) as kernels:
        launches()[name].call()
    assert kernels, f"{name} launched nothing"
    made = {"launch": name, "arch": arch, "compiler": triton.__version__}
    return [made | {"kernel": kernel_name} | inspect(kernel) for kernel_name, kernel in kernels]


def main(arguments: list[str]) -> None:
    """Compile for the architectures named.

    A further argument with a letter in it keeps the launches whose name contains it.
    """
    archs = [int(a) for a in arguments if a.isdigit()]
    only = [a for a in arguments if not a.isdigit()]
    chosen = [(name, arch) for name, launch in launches().items() for arch in archs if arch in launch.archs]
    chosen = [(name, arch) for name, arch in chosen if all(part in name for part in only)]
    with ProcessPoolExecutor(2) as pool:
        for records in pool.map(compile_launch, *zip(*chosen, strict=True)) if chosen else ():
            for record in records:
                print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
