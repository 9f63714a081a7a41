"""Times the operations against everything else that a user could call, checked against float64 in the same run.

    python -m bench --op all --json bench/results/operations.jsonl
    python -m bench --op attention,short_attention --geometry latte --candidate triton --candidate SDPA --json
    /tmp/latte.jsonl

A row is appended to the file as soon as it is measured, so an interrupted run keeps what it had. Exit status: 0 if
every candidate that can serve was right; 1 if one was wrong or failed; 130 if interrupted.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch

from . import timing
from .case import Candidate, Case
from .geometries import GEOMETRIES
from .measure import Row, measure, progress, reason
from .record import append, clocks, environment
from .table import show

OPS = ("broadcast_residual", "project_residual", "attention", "short_attention", "quantize", "dequantize")


def cases(ops: list[str], geometries: list[str], dtype: torch.dtype) -> Iterator[Case]:
    """The cases of these operations, all of one geometry before the next."""
    for name in geometries:
        for op in ops:
            yield from import_module(f"bench.{op}").cases(name, GEOMETRIES[name], dtype)


def run(args: argparse.Namespace, keep: list[Row]) -> None:
    """Measure, and put every row into `keep` and the file as it comes."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    began, shared = time.monotonic(), environment(device)
    read_clocks = clocks if device.type == "cuda" else None
    ceilings = timing.ceilings(device, dtype, args.repeats, read_clocks)
    progress(
        f"{shared['device']}: copy {ceilings.copy / 1e9:.0f} GB/s, {args.dtype} product {ceilings.matmul / 1e12:.1f} "
        "TFLOP/s"
    )

    def wanted(candidate: Candidate) -> bool:
        return not args.candidate or any(part in candidate.name for part in args.candidate)

    def chosen(case: Case) -> bool:
        return not args.case or any(part in case.name for part in args.case)

    def done(row: Row) -> None:
        keep.append(row | shared)
        if args.json:
            append(args.json, row, shared)
        progress(f"  {row['candidate']:<28} {_outcome(row)}")

    for case in filter(chosen, cases(args.op, args.geometry, dtype)):
        if args.seconds and time.monotonic() - began > args.seconds:
            for candidate in filter(wanted, case.candidates):
                done(_skipped(case, candidate, args.seconds))
            continue
        progress(f"{case}  {case.shape}")
        for row in measure(case, device, args.repeats, ceilings, args.seed, wanted, read_clocks):
            done(row)


def _skipped(case: Case, candidate: Candidate, seconds: float) -> Row:
    what: Row = {
        "bench": case.op,
        "geometry": case.geometry,
        "case": case.name,
        "dtype": str(case.dtype).removeprefix("torch."),
    }
    return {
        **what,
        "candidate": candidate.name,
        "ours": candidate.ours,
        "status": "skipped",
        "reason": f"the {seconds:g} s were up",
    }


def _outcome(row: Row) -> str:
    if row["status"] != "ok":
        return f"{row['status']}: {row['reason']}"
    low, high = row["spread"]
    return (
        f"{row['microseconds']:>10.1f} us   {low:.1f} to {high:.1f}   {100 * row['share_of_floor']:.0f} % of the floor"
    )


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        "python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models = [name for name, geometry in GEOMETRIES.items() if not geometry.small]
    cuda = torch.cuda.is_available()
    made.add_argument(
        "--op", type=_names(OPS, OPS), default=list(OPS), help=f"all, or some of {', '.join(OPS)}, with commas between"
    )
    made.add_argument(
        "--geometry",
        type=_names(GEOMETRIES, models),
        default=models,
        help=f"all models, or some of {', '.join(GEOMETRIES)}, with commas",
    )
    made.add_argument("--case", action="append", help="only cases whose name contains this; may be repeated")
    made.add_argument("--candidate", action="append", help="only candidates whose name contains this; may be repeated")
    made.add_argument("--device", default="cuda" if cuda else "cpu")
    made.add_argument("--dtype", default="bfloat16" if cuda else "float32", choices=["bfloat16", "float16", "float32"])
    made.add_argument(
        "--repeats", type=int, default=20, help="timed repeats of a candidate; slow ones get fewer, but five"
    )
    made.add_argument(
        "--seed", type=int, default=None, help="of the inputs; default: another one every time, which the rows tell"
    )
    made.add_argument(
        "--seconds", type=float, help="begin no further case after so many seconds; those left are rows too"
    )
    made.add_argument("--json", help="file to which rows are appended, JSON lines")
    return made


def _names(known: Any, all_: Any) -> Any:
    def names(text: str) -> list[str]:
        chosen = list(all_) if text == "all" else text.split(",")
        unknown = [name for name in chosen if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(
                f"{unknown[0]!r} is unknown; all, or some of {', '.join(known)}: pass these"
            )
        return chosen

    return names


def main() -> int:
    """Measure what the command line says, and show it."""
    args = parser().parse_args()
    if args.seed is None:
        args.seed = random.SystemRandom().randrange(2**31)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a time limit ends it as Ctrl-C does: with the table
    rows: list[Row] = []
    status = 0
    try:
        run(args, rows)
    except KeyboardInterrupt:
        status = 130
        progress("interrupted")
    except RuntimeError as error:  # the device's: after an illegal access nothing more can be measured in this process
        status = 1
        progress(reason(error))
    show(rows)
    bad = [row for row in rows if row["status"] in ("wrong", "failed")]
    for row in bad:
        progress(
            f"{row['status']}: {row['bench']} {row['geometry']} {row['case']}, {row['candidate']}: {row['reason']}"
        )
    return status or int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
