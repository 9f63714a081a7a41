"""A denoising run of Open-Sora 1.2 on several ranks, random weights: seconds and bytes, beside one rank alone.

    torchrun --nproc-per-node 8 -m bench.ranks --out bench/results/ranks-gpu.jsonl
    torchrun --nproc-per-node 2 -m bench.ranks --size small --out ranks-cpu.jsonl

All rows sample from the same noise with the same weights, with guidance in one batch. Each plan runs on one rank alone
(every rank does the same then), on all ranks with the sequence split, and with guidance split as well. Repeats are
interleaved and the figures are medians of the slowest rank, by the wall clock:

    ratio   seconds of one rank without PAB by its own      GB sent   by a rank, and as a share of that without PAB
    PSNR    of the final latents against one rank with the same plan, with noise of standard deviation 1 as the scale

On a CPU several ranks share its cores: their seconds say nothing about GPUs, while bytes and PSNR are what they are.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import pab_kernels as pab
from pab_kernels import PABConfig
from pab_kernels.analysis.quality.psnr_ssim import psnr

from .end_to_end import Inputs, Setup, denoise, prepared, setup_of
from .record import write

Row = dict[str, Any]
RANGES = PABConfig.preset("open-sora-1.2")
PLANS = {
    "without PAB": None,
    "open-sora-1.2": RANGES,
    "open-sora-1.2, int8 slots": dataclasses.replace(RANGES, cache_dtype="int8"),
    "block 2": PABConfig(block=2),
}
"""Plans by their names in the rows."""


def layouts(ranks: int) -> dict[str, dict[str, int] | None]:
    """Arguments of `pab.parallelize` by name; None for one rank alone."""
    found: dict[str, dict[str, int] | None] = {"one rank": None, f"sequence {ranks}": {"sequence": ranks}}
    if ranks % 2 == 0:
        found[f"cfg 2 x sequence {ranks // 2}"] = {"cfg": 2}
    return found


def measure(setup: Setup, steps: int, repeats: int, device: torch.device, dtype: torch.dtype) -> Iterator[list[Row]]:
    """All rows, once more after every repeat; every rank runs it, in step with the others."""
    given, ranks = Inputs.drawn(setup, steps, device, dtype), dist.get_world_size()
    rows: dict[tuple[str, str], Row] = {}
    runs: dict[tuple[str, str], Callable[[], Tensor]] = {}
    alone: dict[str, Tensor] = {}
    for plan, config in PLANS.items():
        for layout, arguments in layouts(ranks).items():
            pipe = prepared("ours", given.weights, setup, steps)
            if config is not None:
                pab.enable(pipe, config)
            if arguments is not None:
                pab.parallelize(pipe, **arguments)
            runs[plan, layout] = lambda pipe=pipe: denoise(pipe, given)
            latents = runs[plan, layout]()
            alone.setdefault(plan, latents)
            error = float((latents.double() - alone[plan].double()).square().mean())
            row: Row = {"plan": plan, "layout": layout, "ranks": ranks, "psnr": psnr(error) if error else None}
            row |= {"traffic": None, "cache_bytes": 0}
            if config is not None:
                summary = pab.summary(pipe)
                row["cache_bytes"] = summary.peak_cache_bytes
                row["traffic"] = summary.traffic and summary.traffic.to_dict()
            rows[plan, layout] = row
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in rows}
    shared = {"bench": "ranks", "size": "x".join(map(str, setup.size)), **setup.config, "steps": steps}
    for _ in range(repeats):
        for key, run in runs.items():
            seconds[key].append(_slowest(run, device))
        medians = {key: statistics.median(found) for key, found in seconds.items()}
        for key, row in rows.items():
            row |= {"seconds": round(medians[key], 4), "repeats": len(seconds[key])}
            row["ratio"] = round(medians["without PAB", "one rank"] / medians[key], 3)
        yield [shared | row | {"dtype": str(dtype).removeprefix("torch.")} for row in rows.values()]


def _slowest(run: Callable[[], Tensor], device: torch.device) -> float:
    """Seconds of the slowest rank, all of which begin together."""
    dist.barrier()
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    taken = torch.tensor([time.perf_counter() - begin], device=device, dtype=torch.float64)
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return float(taken)


def table(rows: list[Row]) -> Iterator[str]:
    """The rows as lines."""
    yield f"{'plan':28}{'layout':24}{'seconds':>9}{'ratio':>8}{'GB sent':>10}{'of':>8}{'PSNR':>8}"
    for row in rows:
        sent = row["traffic"]
        gb = f"{sent['bytes'] / 1e9:.3f}" if sent else "-"
        of = f"{sent['bytes'] / sent['bytes_without']:.1%}" if sent and sent["bytes_without"] else "-"
        dB = "equal" if row["psnr"] is None else f"{row['psnr']:.1f}"
        yield f"{row['plan']:28}{row['layout']:24}{row['seconds']:9.3f}{row['ratio']:8.2f}{gb:>10}{of:>8}{dB:>8}"


def main() -> None:
    """The command line, on every rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", help="51x480x854 and the like for the published model, or small; default by device")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", metavar="FILE", help="file to write, JSON lines")
    args = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it with torchrun: torchrun --nproc-per-node 2 -m bench.ranks")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group()
    first = dist.get_rank() == 0
    setup = setup_of(args.size or ("51x480x854" if cuda else "small"))
    rows: list[Row] = []
    of = (setup, args.steps, args.repeats, device, torch.bfloat16 if cuda else torch.float32)
    for rows in tqdm(measure(*of), total=args.repeats, unit="repeat", disable=None if first else True):
        if first and args.out:
            write(args.out, rows, device.type)
    if first:
        print(*table(rows), sep="\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
