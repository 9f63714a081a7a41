"""How close sampling stays to the full run, by its share of the FLOPs: a model of the package, against fewer steps.

    python -m bench.quality --out bench/results/quality-demo.jsonl
    python -m bench.quality --schedulers ddim:50,unipc:20 --clips 4
    python -m bench.quality --model video

Every config samples the same clips from the same noise. PSNR and SSIM are those against the run without PAB on the same
schedule, over whole clips; `won` counts the clips that are closer to it than the run with fewer steps, which computes
at least as many FLOPs.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from pab_kernels.analysis.quality.psnr_ssim import psnr, ssim
from pab_kernels.models import demo, video
from pab_kernels.models.packaged import PackagedPipeline

from .record import write

MODELS = {"demo": demo, "video": video}
PROMPTS = {
    "demo": (
        "a red circle moves right at night",
        "a purple column moves up at day",
        "a white bar moves left at dawn",
        "a green circle moves down at day",
    ),
    "video": ("a driver, wide, slow", "a street, wide, fast", "a bunny, close, slow", "a street, close, slow"),
}
SAMPLINGS = {"demo": "ddim:50,dpm++:30,unipc:30,euler:30", "video": "flow:30,unipc:30,dpm++:30"}
"""By model, the schedulers with their steps that are measured without `--schedulers`."""


def forecast(reach: int, lo: float, hi: float) -> PABConfig:
    """The whole model every `reach`-th step between two fractions of the schedule, its output predicted between."""
    return PABConfig(model=Broadcast(reach, (lo, hi), reuse="forecast"))


CONFIGS = {
    "model 2 forecast in .5-.9": forecast(2, 0.5, 0.9),
    "model 2 forecast in .15-.85": forecast(2, 0.15, 0.85),
    "model 2 forecast in .1-.95": forecast(2, 0.1, 0.95),
    "model 3 forecast in .2-.9": forecast(3, 0.2, 0.9),
    "model 4 forecast in .2-.9": forecast(4, 0.2, 0.9),
    "model 2 hold in .15-.85": PABConfig(model=2),
    "model 2 linear in .15-.85": PABConfig(model=Broadcast(2, reuse="linear")),
    "sublayers 2 linear (preset demo)": PABConfig.preset("demo"),
    "blocks 2 linear": PABConfig(block=Broadcast(2, reuse="linear")),
    "attention 2/4/6 (preset pab246)": PABConfig.preset("pab246"),
}


def closeness(clips: torch.Tensor, full: torch.Tensor) -> dict[str, Any]:
    """PSNR in dB and SSIM of each clip, `[clips, frames, 3, height, width]`, against the full run."""
    pairs = list(zip(clips.double().numpy(), full.double().numpy(), strict=True))
    decibels = [psnr(float(((a - b) ** 2).mean())) for a, b in pairs]
    similar = [statistics.mean(ssim(f, g) for f, g in zip(a, b, strict=True)) for a, b in pairs]
    return {
        "psnr": round(statistics.mean(decibels), 2),
        "psnr_worst": round(min(decibels), 2),
        "ssim": round(statistics.mean(similar), 5),
        "psnr_by_clip": [round(v, 2) for v in decibels],
    }


def measured(model: PackagedPipeline, steps: int, prompts: Sequence[str], bar: Any) -> list[dict[str, Any]]:
    """A row for each config, and one for the fewer steps that it is compared with."""
    seeds = list(range(1000, 1000 + len(prompts)))

    def sample(count: int) -> torch.Tensor:
        clips = model.generate(prompts, seeds, count)
        bar.update()
        return clips

    full = sample(steps)
    rows: list[dict[str, Any]] = []
    fewer: dict[int, dict[str, Any]] = {}

    def fewer_steps(share: float) -> dict[str, Any]:
        count = min(math.ceil(share * steps), steps - 1)
        if count not in fewer:
            fewer[count] = {"config": f"{count} steps", "flops_share": round(count / steps, 4)}
            fewer[count] |= closeness(sample(count), full)
        return fewer[count]

    for config, rules in CONFIGS.items():
        pab.enable(model.pipe, rules)
        clips, found = sample(steps), pab.summary(model.pipe)
        pab.disable(model.pipe)
        row = {"config": config, "flops_share": round(found.share, 4), "peak_cache_bytes": found.peak_cache_bytes}
        row |= closeness(clips, full)
        against = fewer_steps(found.share)
        won = sum(a > b for a, b in zip(row["psnr_by_clip"], against["psnr_by_clip"], strict=True))
        rows.append(
            row | {"fewer_steps": against["config"], "gain": round(row["psnr"] - against["psnr"], 2), "won": won}
        )
    rows += sorted(fewer.values(), key=lambda row: row["flops_share"])
    return rows


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="demo")
    parser.add_argument("--schedulers", help=f"names with their steps; default {SAMPLINGS}")
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", help="a file for the rows, as JSON lines")
    args = parser.parse_args()
    room, known = MODELS[args.model], PROMPTS[args.model]
    samplings = (s.partition(":") for s in (args.schedulers or SAMPLINGS[args.model]).split(","))
    wanted = [(name, int(steps or 50)) for name, _, steps in samplings]
    if unknown := [name for name, _ in wanted if name not in room.SCHEDULERS]:
        parser.error(f"got scheduler {unknown[0]!r}; supported are {', '.join(room.SCHEDULERS)}")
    prompts = [known[i % len(known)] for i in range(args.clips)]
    rows = []
    with tqdm(total=len(wanted) * (2 * len(CONFIGS) - 2), unit="run", disable=None) as bar:
        for name, steps in wanted:
            run = {"bench": "quality", "model": args.model, "scheduler": name, "steps": steps, "clips": args.clips}
            rows += [run | row for row in measured(room.load(name, args.device), steps, prompts, bar)]
            if args.out:
                write(args.out, rows, args.device)
    print(f"{'scheduler':10} {'config':34} {'FLOPs':>6} {'PSNR':>6} {'worst':>6} {'SSIM':>7} {'gain':>6} won")
    for row in rows:
        gain = f"{row['gain']:+6.1f} {row['won']} of {row['clips']}" if "gain" in row else ""
        print(
            f"{row['scheduler']:10} {row['config']:34} {row['flops_share']:6.1%} {row['psnr']:6.2f} "
            f"{row['psnr_worst']:6.2f} {row['ssim']:7.5f} {gain}"
        )


if __name__ == "__main__":
    main()
