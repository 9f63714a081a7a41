"""How close sampling stays to the full run, by its share of the FLOPs: a model of the package, against fewer steps.

    python -m bench.quality --out quality.jsonl
    python -m bench.quality --schedulers ddim:50,unipc:20 --clips 4
    python -m bench.quality --model video
    python -m bench.quality --schedulers dpm++:30 --clips 4 --others --searched .35,.5,.65
    python -m bench.quality --schedulers ddim:50,dpm++:30 --clips 6 --fitted
    python -m bench.quality --schedulers unipc:30 --searched .8,.9 --plans-only

Every config samples the same clips from the same noise. PSNR and SSIM are those against the run without PAB on the same
schedule, over whole clips; `won` counts the clips that are closer to it than the run with fewer steps, which computes
at least as many FLOPs. `--others` adds other caches (`bench/peers.py`), other schedulers with fewer steps, and, as the
scale of what a dB means, noise of 1 % added after the first step. `--searched` adds plans of `pab.calibrate` for shares
of the FLOPs, and the same search where the last output is held (as LeMiCa and DPCache do), both made on other clips;
`--plans-only` leaves the fixed configs out.
`--fitted` adds every config with linear reuses once more with weights of `pab.fit`, fitted to two other clips, or to
as many as are given.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from pab_kernels.analysis.calibration.calibration import NoPlan
from pab_kernels.analysis.calibration.sampler import Clip, PipelineSampler
from pab_kernels.analysis.calibration.schedules import Schedules
from pab_kernels.analysis.quality.perceptual import Distance, load_lpips
from pab_kernels.analysis.quality.psnr_ssim import psnr, ssim
from pab_kernels.messages import first_line
from pab_kernels.models import demo, video
from pab_kernels.models.packaged import PackagedPipeline

from .peers import peers
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
    "preset close": PABConfig.preset("close"),
    "preset balanced": PABConfig.preset("balanced"),
    "preset fast": PABConfig.preset("fast"),
    "model 2 forecast in .15-.85": forecast(2, 0.15, 0.85),
    "model 4 forecast in .25-.9": forecast(4, 0.25, 0.9),
    "preset balanced-line": PABConfig.preset("balanced-line"),
    "model 2 hold in .2-.9": PABConfig(model=Broadcast(2, (0.2, 0.9))),
    "sublayers 2 linear (preset demo)": PABConfig.preset("demo"),
    "blocks 2 linear": PABConfig(block=Broadcast(2, reuse="linear")),
    "attention 2/4/6 (preset pab246)": PABConfig.preset("pab246"),
}


def closeness(clips: torch.Tensor, full: torch.Tensor) -> dict[str, Any]:
    """PSNR, SSIM and perhaps LPIPS of each clip, `[clips, frames, 3, height, width]`, against the full run."""
    pairs = list(zip(clips.double().numpy(), full.double().numpy(), strict=True))
    decibels = [psnr(float(((a - b) ** 2).mean())) for a, b in pairs]
    measures = {"ssim": ssim} if (lpips := perceptual()) is None else {"ssim": ssim, "lpips": lpips}
    means = {
        name: round(statistics.mean(measure(f, g) for a, b in pairs for f, g in zip(a, b, strict=True)), 5)
        for name, measure in measures.items()
    }
    return {
        "psnr": round(statistics.mean(decibels), 2),
        "psnr_worst": round(min(decibels), 2),
        **means,
        "psnr_by_clip": [round(v, 2) for v in decibels],
    }


@functools.cache
def perceptual() -> Distance | None:
    """LPIPS; None, said once, where it is not installed or its network cannot be loaded."""
    try:
        return load_lpips()
    except (ModuleNotFoundError, RuntimeError) as error:
        print(f"without LPIPS: {error}", file=sys.stderr)
        return None


def searched(
    model: PackagedPipeline, steps: int, prompts: Sequence[str], shares: Sequence[float], folder: str
) -> dict[str, tuple[PABConfig, int]]:
    """Plans of `pab.calibrate`, and those of its search where the last output is held, each with its steps.

    The calibrations keep their generations in the folder, and share those that are the same.
    """

    def call(pipe: Any, prompt: str, seed: int, num_steps: int = steps) -> torch.Tensor:
        return model.generate([prompt], [seed], num_steps)[0]

    found = {}
    sampler = PipelineSampler(model.pipe, steps, call)
    recordings = [sampler.record(Clip(prompt, i), lambda: None) for i, prompt in enumerate(prompts[:2])]
    held = Schedules(recordings, np.ones(len(recordings[0].outputs)), "hold", steps)
    given: dict[str, Any] = {"num_steps": steps, "call": call, "most_generations": 30, "folder": folder}
    for share in shares:
        try:
            plan = pab.calibrate(model.pipe, prompts, flops=share, **given)
        except NoPlan as error:
            print(f"{share:.0%}: {error}", file=sys.stderr)
            continue
        found[f"model calibrated, {share:.0%}: {plan.verified.title}"] = plan.config, plan.sampling_steps
        way = held.searched(math.floor(share * steps))
        assert way.config is not None, "of a plan"
        found[f"model searched, hold, {share:.0%}"] = way.config, steps
    return found


def fitted(model: PackagedPipeline, steps: int, prompts: Sequence[str]) -> dict[str, tuple[PABConfig, int]]:
    """The configs with linear reuses, with fitted weights, each with its steps."""

    def call(pipe: Any, prompt: str, seed: int) -> torch.Tensor:
        return model.generate([prompt], [seed], steps)

    linear = {n: c for n, c in CONFIGS.items() if any(rule.reuse == "linear" for _, rule in c.broadcasts())}
    fits = {n: pab.fit(model.pipe, prompts, c, num_steps=steps, call=call) for n, c in linear.items()}
    return {f"{name}, fitted": (config, steps) for name, config in fits.items()}


def other_ways(
    model: PackagedPipeline, load: Callable[[str], PackagedPipeline], steps: int, sample: Callable[..., torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor, float]]:
    """What users would take instead: a name, clips, and the share of the FLOPs.

    Args:
        model: the model.
        load: the same model with another scheduler, by its name.
        steps: of the full run.
        sample: the clips of a model, with a number of steps and a callback.
    """

    def noisy(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        x = tensors["latents"]
        return {
            "latents": x + 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) if index == 0 else x
        }

    yield "1 % noise after the first step", sample(model, steps, noisy), 1.0
    for name in ("unipc", "dpm++"):
        for count in (steps // 2, 2 * steps // 3):
            yield f"{name} with {count} steps", sample(load(name), count), count / steps
    with FlopCounterMode(display=False) as full:
        sample(model, steps)
    for title, enabled in peers(model.pipe, model.schedule(steps), lambda: sample(model, steps)).items():
        try:
            with enabled(), FlopCounterMode(display=False) as spent:
                clips = sample(model, steps)
        except Exception as error:  # of another package: the table says where it does not run
            print(f"{title} does not run on the model: {first_line(error)}", file=sys.stderr)
            continue
        yield title, clips, spent.get_total_flops() / full.get_total_flops()


def measured(
    model: PackagedPipeline,
    load: Callable[[str], PackagedPipeline],
    steps: int,
    prompts: Sequence[str],
    bar: Any,
    configs: dict[str, tuple[PABConfig, int]],
    others: bool,
) -> list[dict[str, Any]]:
    """A row for each config with its number of steps, and one for the fewer steps that it is compared with."""
    seeds = list(range(1000, 1000 + len(prompts)))

    def sample(of: PackagedPipeline, count: int, callback: Any = None) -> torch.Tensor:
        clips = of.generate(prompts, seeds, count, callback=callback)
        bar.update()
        return clips

    full = sample(model, steps)
    rows: list[dict[str, Any]] = []
    fewer: dict[int, dict[str, Any]] = {}

    def fewer_steps(share: float) -> dict[str, Any]:
        count = min(math.ceil(share * steps), steps - 1)
        if count not in fewer:
            fewer[count] = {"config": f"{count} steps", "flops_share": round(count / steps, 4)}
            fewer[count] |= closeness(sample(model, count), full)
        return fewer[count]

    def add(config: str, clips: torch.Tensor, share: float, **more: Any) -> None:
        row = {"config": config, "flops_share": round(share, 4)} | more | closeness(clips, full)
        against = fewer_steps(share)
        won = sum(a > b for a, b in zip(row["psnr_by_clip"], against["psnr_by_clip"], strict=True))
        gain = round(row["psnr"] - against["psnr"], 2)
        rows.append(row | {"fewer_steps": against["config"], "gain": gain, "won": won})

    for config, (rules, count) in configs.items():
        pab.enable(model.pipe, rules)
        clips, found = sample(model, count), pab.summary(model.pipe)
        pab.disable(model.pipe)
        add(config, clips, found.share * count / steps, peak_cache_bytes=found.peak_cache_bytes)
    for title, clips, share in other_ways(model, load, steps, sample) if others else ():
        add(title, clips, share)
    rows += sorted(fewer.values(), key=lambda row: row["flops_share"])
    return rows


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="demo")
    parser.add_argument("--schedulers", help=f"names with their steps; default {SAMPLINGS}")
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--others", action="store_true", help="other caches and schedulers too")
    parser.add_argument("--searched", metavar="SHARES", help="plans of pab.calibrate for shares of the FLOPs: .35,.5")
    parser.add_argument("--plans-only", action="store_true", help="without the configs that are measured otherwise")
    parser.add_argument(
        "--fitted",
        metavar="CLIPS",
        type=int,
        nargs="?",
        const=2,
        help="linear configs with weights fitted to CLIPS too",
    )
    parser.add_argument("--out", help="a file for the rows, as JSON lines")
    args = parser.parse_args()
    room, known = MODELS[args.model], PROMPTS[args.model]
    samplings = (s.partition(":") for s in (args.schedulers or SAMPLINGS[args.model]).split(","))
    wanted = [(name, int(steps or 50)) for name, _, steps in samplings]
    if unknown := [name for name, _ in wanted if name not in room.SCHEDULERS]:
        parser.error(f"got scheduler {unknown[0]!r}; supported are {', '.join(room.SCHEDULERS)}")
    prompts = [known[i % len(known)] for i in range(args.clips)]
    shares = [float(share) for share in args.searched.split(",")] if args.searched else []
    rows = []
    with tqdm(unit="run", disable=None) as bar:
        for name, steps in wanted:
            run = {"bench": "quality", "model": args.model, "scheduler": name, "steps": steps, "clips": args.clips}
            model, load = room.load(name, args.device), functools.partial(room.load, device=args.device)
            configs = {} if args.plans_only else {config: (rules, steps) for config, rules in CONFIGS.items()}
            if shares:
                with tempfile.TemporaryDirectory() as folder:
                    configs |= searched(model, steps, known, shares, folder)
            if args.fitted:
                configs |= fitted(model, steps, known[: args.fitted])
            found = measured(model, load, steps, prompts, bar, configs, args.others)
            rows += [run | row for row in found]
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
