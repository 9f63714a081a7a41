"""What slots of fewer bits or in host memory save and change: bytes, dB of the final clip and time side by side, on the
demo model.

    python -m bench.memory --out bench/results/memory-cpu.jsonl
    python -m bench.memory --device cuda --parts slots,bus --clips 16

Every plan samples the same clips from the same noise. `psnr` is that against the run without PAB, `psnr_own` against
the same plan with slots in the model's own dtype on its device. The parts:

    slots      each cache dtype, and on a CUDA device slots in host memory: peak bytes, dB and seconds
    outputs    the outputs that a plan keeps, by kind of sublayer: their signal to error ratio in dB under these
               roundings and others, and how far channels differ
    roundings  the final clip under each of the others, of slots that stay in the model's dtype
    bus        GB a second to host memory, back, and both ways at once; on CUDA devices only
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, get_args
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree
from tqdm import tqdm

import pab_kernels as pab
from pab_kernels import PABConfig
from pab_kernels.analysis.quality.psnr_ssim import psnr
from pab_kernels.broadcast import turn
from pab_kernels.broadcast.bus import CudaBus
from pab_kernels.broadcast.slots import is_quantised
from pab_kernels.models import demo
from pab_kernels.ops import dequantize, quantize
from pab_kernels.rules.config import CacheDtype

from .quality import CONFIGS, PROMPTS
from .record import write

PLANS = {
    "sublayers 2 linear (preset demo)": CONFIGS["sublayers 2 linear (preset demo)"],
    "attention 2/4/6 (preset pab246)": CONFIGS["attention 2/4/6 (preset pab246)"],
    "blocks 2": PABConfig(block=2),
}
PARTS = ("slots", "outputs", "roundings", "bus")
KEPT_OF_A_KIND = 24
"""Outputs of a kind whose errors are measured, spread over the run."""
OUTLIERS = 32
"""One in so many channels counts as an outlier."""


def _grouped(x: Tensor, group: int) -> Tensor:
    """`[..., groups, group]`; the last group repeats the last channel, which changes neither extreme."""
    behind = -x.shape[-1] % group
    x = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], behind)], -1) if behind else x
    return x.unflatten(-1, (-1, group))


def _whole(grouped: Tensor, x: Tensor) -> Tensor:
    return grouped.flatten(-2)[..., : x.shape[-1]]


def _ratio(x: Tensor, scale: Tensor) -> Tensor:
    return x / scale.masked_fill(scale == 0, 1)


def quantised(dtype: torch.dtype, group: int) -> Callable[[Tensor], Tensor]:
    """The rounding of the package's slots."""
    return lambda x: dequantize(quantize(x, dtype, group), torch.float32)


def symmetric(x: Tensor, factors: tuple[float, ...] = (1.0,)) -> Tensor:
    """-7 to 7 in groups of 32, with the scale among `factors * max |x| / 7` of the least squared error."""
    groups = _grouped(x, 32)
    best = torch.zeros_like(groups)
    least = groups.new_full((*groups.shape[:-1], 1), math.inf)
    for factor in factors:
        scale = (groups.abs().amax(-1, keepdim=True) * factor / 7).bfloat16().float()
        values = _ratio(groups, scale).round().clamp(-7, 7) * scale
        error = (values - groups).square().sum(-1, keepdim=True)
        best, least = torch.where(error < least, values, best), torch.minimum(error, least)
    return _whole(best, x)


def with_offset(group: int) -> Callable[[Tensor], Tensor]:
    """0 to 15 from the least value of a group to the largest, with scale and offset in bfloat16."""

    def rounded(x: Tensor) -> Tensor:
        groups = _grouped(x, group)
        low, high = groups.amin(-1, keepdim=True).bfloat16().float(), groups.amax(-1, keepdim=True)
        scale = ((high - low) / 15).bfloat16().float()
        return _whole(_ratio(groups - low, scale).round().clamp(0, 15) * scale + low, x)

    return rounded


def without_means(x: Tensor) -> Tensor:
    """int4 of what is left of each channel without its mean over the tokens, which is kept apart."""
    mean = x.flatten(0, -2).mean(0)
    return quantised(torch.int4, 32)(x - mean) + mean


def without_outliers(x: Tensor) -> Tensor:
    """int4 of all channels but one in `OUTLIERS`, those with the largest values, which are kept as they are."""
    channels = x.shape[-1]
    largest = x.flatten(0, -2).abs().amax(0).topk(-(-channels // OUTLIERS)).indices
    apart = F.one_hot(largest, channels).sum(0).bool()
    return torch.where(apart, x, quantised(torch.int4, 32)(x.masked_fill(apart, 0)))


Roundings = dict[str, tuple[float, Callable[[Tensor], Tensor]]]
"""By name, with channels of a group: bits a value, in 16-bit models, with scales; and the rounding."""
SLOTS: Roundings = {
    "int8, 128": (8.25, quantised(torch.int8, 128)),
    "e4m3, 128": (8.25, quantised(torch.float8_e4m3fn, 128)),
    "int4, 32": (4.5, quantised(torch.int4, 32)),
}
"""Those of the package's slots."""
OTHERS: Roundings = {
    "int4, 64": (4.25, quantised(torch.int4, 64)),
    "int4, 16": (5.0, quantised(torch.int4, 16)),
    "-7 to 7, 32": (4.5, symmetric),
    "-7 to 7 searched, 32": (4.5, lambda x: symmetric(x, (1.0, 0.94, 0.88, 0.82))),
    "offset, 64": (4.5, with_offset(64)),
    "offset, 32": (5.0, with_offset(32)),
    "channel means apart, 32": (4.5, without_means),
    "1 in 32 channels apart, 32": (5.0, without_outliers),
}


def decibels(signal: Tensor, error: Tensor) -> float:
    """The ratio of their squares."""
    return round(10 * math.log10(float(signal.double().square().sum() / error.double().square().sum())), 2)


def closeness(name: str, clips: Tensor, to: Tensor) -> dict[str, float]:
    """PSNR of the clips, in the mean and of the worst."""
    found = [psnr(float((a.double() - b.double()).square().mean())) for a, b in zip(clips, to, strict=True)]
    return {name: round(statistics.mean(found), 2), f"{name}_worst": round(min(found), 2)}


def of_outputs(kind: str, outputs: list[Tensor]) -> dict[str, Any]:
    """The row of a kind: errors under each rounding, and how far channels and groups differ."""
    spread = outputs[:: max(1, len(outputs) // KEPT_OF_A_KIND)]
    x = torch.cat([t.float().flatten(0, -2) for t in spread])
    largest, mean_square = x.abs().amax(0), x.square().mean(0)
    error = (quantised(torch.int4, 32)(x) - x).square().sum(0)  # by channel
    by_group = torch.stack([part.sum() for part in error.split(32)])
    values_by_group = torch.stack([part.sum() for part in mean_square.split(32)])
    worst = int(by_group.argmax())
    rounded = {name: decibels(x, rounding(x) - x) for name, (_, rounding) in (SLOTS | OTHERS).items()}
    return {
        "kind": kind,
        "channels": x.shape[1],
        "decibels": rounded,
        "largest_over_median": round(float(largest.max() / largest.median()), 2),
        "rms_largest_over_median": round(float((mean_square.max() / mean_square.median()).sqrt()), 2),
        "mean_share": round(float(x.mean(0).square().sum() / mean_square.sum()), 4),
        "worst_group_error_share": round(float(by_group[worst] / by_group.sum()), 3),
        "worst_group_value_share": round(float(values_by_group[worst] / values_by_group.sum()), 3),
        "groups": len(by_group),
    }


def bus(device: str, nbytes: int = 2**28, repeats: int = 20) -> dict[str, Any]:
    """The row of the bus: the rates at which slots move, without anything else to do; medians."""
    moves, there = CudaBus(torch.device(device)), torch.zeros(nbytes, dtype=torch.uint8, device=device)
    (here,), _ = moves.to_host([there])
    to_host, to_device = partial(moves.to_host, [there]), partial(moves.to_device, [here])
    row: dict[str, Any] = {"bench": "memory", "part": "bus", "copied_bytes": nbytes}
    for name, ways in (("to_host", [to_host]), ("to_device", [to_device]), ("both", [to_host, to_device])):
        seconds = []
        for _ in range(repeats):
            torch.cuda.synchronize(device)  # so that pinned memory is free to be used again
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            copies = [way() for way in ways]
            for _, done in copies:
                moves.wait(done)
            end.record()
            torch.cuda.synchronize(device)
            seconds.append(begin.elapsed_time(end) / 1e3)
        row[f"{name}_gb_s"] = round(nbytes / statistics.median(seconds) / 1e9, 1)  # each way
    return row


class Bench:
    """Samples the clips of the demo model under plans.

    Args:
        args: of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        scheduler, _, steps = args.scheduler.partition(":")
        self.model, self.steps = demo.load(scheduler, args.device), int(steps or 20)
        self.prompts = [PROMPTS["demo"][i % len(PROMPTS["demo"])] for i in range(args.clips)]
        self.device = args.device
        self.run = {"bench": "memory", "scheduler": scheduler, "steps": self.steps, "clips": args.clips}
        self.clock = time.process_time if args.device == "cpu" else time.perf_counter
        self.bar = tqdm(unit="run", disable=None)
        self.full = self.sample()[0]

    def sample(self) -> tuple[Tensor, float]:
        """The clips, and the seconds that they took: of the processor on a CPU, which others may share."""
        began = self.clock()
        clips = self.model.generate(self.prompts, list(range(1000, 1000 + len(self.prompts))), self.steps)
        self.bar.update()
        return clips, self.clock() - began  # the clips are on the host: the device is done

    def under(self, config: PABConfig, pack: Callable[..., Any] | None = None) -> tuple[Tensor, float, Any]:
        """The clips, the seconds and the summary under a plan, whose outputs are perhaps kept by another function."""
        with nullcontext() if pack is None else mock.patch.object(turn, "pack", pack):
            pab.enable(self.model.pipe, config)
            clips, seconds = self.sample()
            summary = pab.summary(self.model.pipe)
            pab.disable(self.model.pipe)
        return clips, seconds, summary

    def rows(self, plan: str, config: PABConfig, parts: list[str]) -> Iterator[dict[str, Any]]:
        """The rows of a plan."""
        run, kept = self.run | {"plan": plan}, dict[str, list[Tensor]]()
        names = {s.name: s.kind for s in pab.sublayers(self.model.pipe)}
        own, seconds, summary = self.under(config)
        if "slots" in parts:
            places = (None,) if self.device == "cpu" else (None, "cpu")
            for dtype, place in itertools.product((None, *get_args(CacheDtype)), places):
                clips = own
                if dtype or place:
                    clips, seconds, summary = self.under(replace(config, cache_dtype=dtype, cache_device=place))
                name = (dtype or "own") + (" in host memory" if place else "")
                row = {"part": "slots", "slots": name, "flops_share": round(summary.share, 4)}
                row |= {"peak_cache_bytes": summary.peak_cache_bytes, "peak_host_bytes": summary.peak_host_bytes}
                row |= {"seconds": round(seconds, 2)} | closeness("psnr", clips, self.full)
                yield run | row | (closeness("psnr_own", clips, own) if dtype or place else {})
        if "outputs" in parts:
            put = turn.Turn.put

            def recorded(of: turn.Turn, value: Any) -> None:
                tensors = [v for v in pytree.tree_leaves(value) if isinstance(v, Tensor) and is_quantised(v)]
                kept.setdefault(names[of.sublayer.name], []).extend(t.detach().cpu().clone() for t in tensors)
                put(of, value)

            with mock.patch.object(turn.Turn, "put", recorded):
                self.under(config)
            for kind, outputs in kept.items():
                yield run | {"part": "outputs"} | of_outputs(kind, outputs)
        if "roundings" in parts:
            for name, (bits, rounding) in OTHERS.items():

                def pack(value: Any, dtype: Any, rounding: Any = rounding) -> Any:
                    def rounded(v: Any) -> Any:
                        there = isinstance(v, Tensor) and is_quantised(v)
                        return rounding(v.float()).to(v.dtype).contiguous() if there else v

                    return pytree.tree_map(rounded, value)

                clips, _, _ = self.under(config, pack)
                row = {"part": "roundings", "rounding": name, "bits": bits}
                yield run | row | closeness("psnr", clips, self.full) | closeness("psnr_own", clips, own)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheduler", default="dpm++:20", help="name and steps")
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}, with commas")
    parser.add_argument("--out", help="a file for the rows, as JSON lines")
    args = parser.parse_args()
    parts = args.parts.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"got part {unknown[0]!r}; supported are {', '.join(PARTS)}")
    if "bus" in parts and args.device == "cpu":
        if args.parts != parser.get_default("parts"):
            parser.error(
                "got part 'bus' with --device cpu; it is for CUDA devices: leave it out, or give --device cuda"
            )
        parts.remove("bus")
    bench, rows = Bench(args), [bus(args.device)] if "bus" in parts else []
    for plan, config in PLANS.items():
        for row in bench.rows(plan, config, parts):
            rows.append(row)
            if args.out:
                write(args.out, rows, args.device)
    bench.bar.close()
    for row in rows:
        print({name: value for name, value in row.items() if name not in bench.run})


if __name__ == "__main__":
    main()
