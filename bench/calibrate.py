"""Whether `pab.calibrate` keeps what it promises: its plans on clips whose captions and seeds it has never seen.

    python -m bench.calibrate --out bench/results/calibrate-demo.jsonl
    python -m bench.calibrate --targets floor=40,flops=.45 --schedulers ddim:50 --clips 16
    python -m bench.calibrate --model video --targets floor=35,floor=40,floor=45 --schedulers flow:30

For each target it calibrates with the default settings, and samples the unseen clips in full and under the plan. Of a
floor, `kept` counts the clips at or above it. Plans for a share of the FLOPs are also compared with as many steps
without PAB: `most_lost` is the most dB by which a clip is further from the full run. The unseen clips of the demo model
have captions of their own; the video model has twelve captions, and its unseen clips are other seeds of all of them.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import tempfile
from typing import Any

import torch
from tqdm import tqdm

import pab_kernels as pab
from pab_kernels.analysis.calibration.calibration import Calibration, NoPlan
from pab_kernels.models.demo.shapes import held_out
from pab_kernels.models.packaged import PackagedPipeline
from pab_kernels.models.video.captions import VOCABULARY, Caption

from .quality import MODELS, closeness
from .record import write

PROMPTS = 7
"""Captions that `calibrate` gets, with the seeds from 0 on."""
SEED = 1000
"""Of the first unseen clip, where no other is given."""
TARGETS = "floor=35,floor=40,floor=45,flops=.35,flops=.45,flops=.55,flops=.65,flops=.8"


def target(text: str) -> dict[str, float]:
    """An argument of `pab.calibrate`, such as floor=40."""
    name, _, value = text.partition("=")
    return {name: float(value)}


def captions(model: str, clips: int) -> tuple[list[str], list[str]]:
    """Captions that `calibrate` gets, and those of the unseen clips, of which the demo model has a limited number."""
    if model == "demo":
        known = [str(caption) for caption in held_out()]
        return known[:PROMPTS], known[PROMPTS:][:clips]
    words = itertools.product(*reversed(VOCABULARY.values()))
    known = [str(Caption(**dict(zip(reversed(VOCABULARY), word, strict=True)))) for word in words]
    return known[:PROMPTS], list(itertools.islice(itertools.cycle(known), clips))


def of_target(
    model: PackagedPipeline,
    steps: int,
    asked: dict[str, float],
    known: list[str],
    prompts: list[str],
    seed: int,
    full: torch.Tensor,
    folder: str,
    bar: Any,
) -> dict[str, Any]:
    """A row: the plan that is found for a target, on unseen clips; generations of other targets are in the folder."""

    def call(pipe: Any, prompt: str, seed: int, num_steps: int = steps) -> torch.Tensor:
        bar.update()
        return model.generate([prompt], [seed], num_steps)[0]

    def clips(num_steps: int) -> torch.Tensor:
        return torch.stack([call(model.pipe, prompt, seed + i, num_steps) for i, prompt in enumerate(prompts)])

    row: dict[str, Any] = {"target": asked}
    try:
        found: Calibration = pab.calibrate(model.pipe, known, num_steps=steps, call=call, folder=folder, **asked)
    except NoPlan as error:
        return row | {"config": None, "why": str(error), "best": error.best and error.best.to_dict()}
    pab.enable(model.pipe, found.config)
    ours = closeness(clips(found.sampling_steps), full)
    share = found.verified.share
    pab.disable(model.pipe)
    row |= {
        "config": found.verified.title,
        "sampling_steps": found.sampling_steps,
        "flops_share": round(share, 4),
    } | ours
    row |= {
        "psnr_expected": round(found.everywhere.expected, 2),
        "verified": [round(value, 2) for value in found.verified.psnr],
        "searched": [row.to_dict() for row in found.searched],
        "generations": round(found.generations, 2),
        "at": _computed(found),
    }
    if "floor" in asked:
        return row | {"kept": sum(value >= asked["floor"] for value in ours["psnr_by_clip"])}
    fewer = min(math.ceil(share * steps - 1e-6), steps - 1)
    plain = closeness(clips(fewer), full)
    lost = [b - a for a, b in zip(ours["psnr_by_clip"], plain["psnr_by_clip"], strict=True)]
    row |= {
        "fewer_steps": f"{fewer} steps",
        "gain": round(statistics.mean(ours["psnr_by_clip"]) - statistics.mean(plain["psnr_by_clip"]), 2),
        "won": sum(value < 0 for value in lost),
        "most_lost": round(max(lost), 2),
        "fewer_by_clip": plain["psnr_by_clip"],
    }
    return row


def _computed(found: Calibration) -> list[int]:
    rule = found.config.rule("model", 0)
    return [] if rule is None or rule.at is None else list(rule.at)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="demo")
    parser.add_argument("--targets", default=TARGETS, help="of pab.calibrate")
    parser.add_argument("--schedulers", default="dpm++:30", help="names with their steps")
    parser.add_argument("--clips", type=int, default=40)
    parser.add_argument("--seed", type=int, default=SEED, help=f"of the first unseen clip, default {SEED}")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", help="a file for the rows, as JSON lines")
    args = parser.parse_args()
    known, prompts = captions(args.model, args.clips)
    if len(prompts) < args.clips:
        parser.error(f"got {args.clips} clips; supported are up to {len(prompts)}, each with its own caption")
    rows: list[dict[str, Any]] = []
    with tqdm(unit="run", disable=None) as bar:
        for sampling in args.schedulers.split(","):
            name, _, steps = sampling.partition(":")
            model, count = MODELS[args.model].load(name, args.device), int(steps or 50)
            run = {
                "bench": "calibrate",
                "model": args.model,
                "scheduler": name,
                "steps": count,
                "clips": args.clips,
                "seed": args.seed,
            }
            full = torch.cat([model.generate([prompt], [args.seed + i], count) for i, prompt in enumerate(prompts)])
            with tempfile.TemporaryDirectory() as folder:
                for text in args.targets.split(","):
                    asked = target(text)
                    rows.append(run | of_target(model, count, asked, known, prompts, args.seed, full, folder, bar))
                    tqdm.write(_line(rows[-1]))
                    if args.out:
                        write(args.out, rows, args.device)


def _line(row: dict[str, Any]) -> str:
    ((name, value),) = row["target"].items()
    if row["config"] is None:
        return f"{row['scheduler']} {name}={value:g}: {row['why']}"
    if "kept" in row:
        more = f"{row['kept']} of {row['clips']} kept"
    else:
        more = f"against {row['fewer_steps']} {row['gain']:+.1f} dB, won {row['won']}, most lost {row['most_lost']:.1f}"
    return (
        f"{row['scheduler']} {name}={value:g}: {row['config']}, {row['flops_share']:.0%}, {row['psnr']:.1f} dB, worst "
        f"{row['psnr_worst']:.1f}, expected {row['psnr_expected']:.1f}; {more}; {row['generations']:.1f} generations"
    )


if __name__ == "__main__":
    main()
