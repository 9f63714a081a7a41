"""Runs the kernels of some backends over small odd shapes and all their options, several times, and compares the
results bit for bit.

    python -m bench.sanitize --repeats 20 --geometry odd,latte
    compute-sanitizer --tool racecheck --error-exitcode 99 python -m bench.sanitize

It is what compute-sanitizer watches: few kernels beside those of the backends, and nothing timed. Exit status: 1 if a
result changed between runs, an element was not written, a kernel failed, or a backend served no case of an operation
that it has a kernel for. CUDA kernels that were not compiled are left out, which is said.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch

from pab_kernels.ops import BACKENDS, BackendError, cuda_library
from pab_kernels.ops.backend import IMPLEMENTATIONS

from .__main__ import OPS, cases
from .case import Case, Draw, Outputs, poison_free_memory, tensors, unwritten
from .geometries import GEOMETRIES
from .measure import progress, reason
from .record import append, environment

SMALL = [name for name, geometry in GEOMETRIES.items() if geometry.small]


def repeated(case: Case, backend: str, repeats: int, device: torch.device, seed: int, poisoned: bool) -> dict[str, Any]:
    """Whether `repeats` runs of a case give the same bits, in every element."""
    (candidate,) = (c for c in case.candidates if c.name == f"pab {backend}")
    inputs = case.draw(Draw(case.dtype, device, seed))
    first: list[torch.Tensor] = []
    outputs: Outputs = ()
    try:
        run = candidate.make()
        for i in range(repeats):
            if poisoned:
                poison_free_memory(outputs)
            outputs = run(inputs)
            bits = [t.view(torch.uint8) for t in tensors(outputs)]
            if poisoned and unwritten(outputs):
                return {"status": "failed", "reason": f"run {i}: an element was not written, or is not finite"}
            first = first or bits
            if not all(map(torch.equal, first, bits)):
                return {"status": "failed", "reason": f"run {i} gave other bits than run 0"}
    except BackendError as error:
        return {"status": "unavailable", "reason": str(error)}
    except Exception as error:  # the row says which
        return {"status": "failed", "reason": reason(error)}
    return {"status": "ok", "reason": None}


def main() -> int:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(
        "python -m bench.sanitize", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", default=",".join(OPS), help="with commas between")
    parser.add_argument(
        "--geometry", default=",".join(SMALL), help=f"some of {', '.join(GEOMETRIES)}, with commas between"
    )
    parser.add_argument("--dtype", default="bfloat16", help="some of bfloat16, float16, float32, with commas between")
    parser.add_argument("--backend", default="triton,cuda", help=f"some of {', '.join(BACKENDS)}, with commas between")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-poison", action="store_true", help="leave free memory as it is: for initcheck")
    parser.add_argument("--json", help="file to which rows are appended, JSON lines")
    args = parser.parse_args()
    shared, failed = environment(args.device), 0
    backends = args.backend.split(",")
    if "cuda" in backends and (missing := cuda_library.load()) is not None:
        progress(f"backend 'cuda' is left out: {missing}")
        backends.remove("cuda")
    chosen = [(op, backend) for op in args.op.split(",") for backend in backends if backend in IMPLEMENTATIONS[op]]
    idle = set(chosen)
    with torch.no_grad():
        for dtype in args.dtype.split(","):
            every = cases(args.op.split(","), args.geometry.split(","), getattr(torch, dtype))
            for case, backend in ((case, backend) for case in every for op, backend in chosen if op == case.op):
                found = repeated(case, backend, args.repeats, torch.device(args.device), args.seed, not args.no_poison)
                row = {
                    "bench": "determinism",
                    "op": case.op,
                    "geometry": case.geometry,
                    "case": case.name,
                    "dtype": dtype,
                }
                row |= {"backend": backend, "repeats": args.repeats, "seed": args.seed, **found}
                progress(f"{row['status']:<12} {case} {backend} {dtype} {row['reason'] or ''}")
                if args.json:
                    append(args.json, row, shared)
                failed += found["status"] == "failed"
                idle -= {(case.op, backend)} if found["status"] == "ok" else set()
    for op, backend in sorted(idle):
        progress(f"backend {backend!r} served no case of {op}")
    return int(failed > 0 or not chosen or bool(idle))


if __name__ == "__main__":
    sys.exit(main())
